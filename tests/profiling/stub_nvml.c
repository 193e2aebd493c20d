/* A small libnvidia-ml.so.1: two GPUs whose counters are known. STUB_NVML, words with commas between them, changes it:
 * mig (GPU 1 is in MIG mode, with two instances), lost (GPU 1 is lost after STUB_LOST_AFTER reads), unsupported (GPU 1 has
 * memory and nothing else), old (no cumulative PCIe counters, no instant power), refuse (the driver does not answer). */
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, UNSUPPORTED = 3, NOT_FOUND = 6, NO_DRIVER = 9, LOST = 15 };

typedef struct {
    int number, mig; /* mig: 0 a whole GPU, 1 and 2 an instance of it */
    const char *uuid;
} Device;

typedef struct {
    unsigned fieldId, scopeId;
    long long timestamp, latency;
    unsigned valueType, nvmlReturn;
    union {
        double d;
        unsigned ui;
        unsigned long long ull;
    } value;
} Field;

static Device devices[2] = {
    {0, 0, "GPU-aaaaaaaa-1111-2222-3333-444444444444"},
    {1, 0, "GPU-bbbbbbbb-1111-2222-3333-444444444444"},
};
static Device instances[2] = {
    {1, 1, "MIG-cccccccc-1111-2222-3333-444444444444"},
    {1, 2, "MIG-dddddddd-1111-2222-3333-444444444444"},
};
static int opened, reads;

static int says(const char *word) {
    const char *mode = getenv("STUB_NVML");
    return mode && strstr(mode, word);
}

static int state(const Device *d) {
    if (!opened) return UNINITIALIZED;
    const char *after = getenv("STUB_LOST_AFTER");
    return d->number == 1 && says("lost") && reads > (after ? atoi(after) : 10) ? LOST : OK;
}

static int counted(const Device *d) { /* everything but memory */
    if (state(d)) return state(d);
    return d->mig || (d->number == 1 && (says("unsupported") || says("mig"))) ? UNSUPPORTED : OK;
}

static int copy(char *to, unsigned size, const char *text) {
    strncpy(to, text, size);
    return OK;
}

int nvmlInitWithFlags(unsigned flags) { return says("refuse") ? NO_DRIVER : (opened++, (int)flags * 0); }
int nvmlShutdown(void) { return opened-- > 0 ? OK : UNINITIALIZED; }
const char *nvmlErrorString(int code) { return code == NO_DRIVER ? "Driver Not Loaded" : "an error of the stub"; }
int nvmlDeviceGetCount_v2(unsigned *count) { return *count = 2, OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, Device **d) { return i < 2 ? (*d = &devices[i], OK) : INVALID; }
int nvmlDeviceGetUUID(Device *d, char *to, unsigned size) { return copy(to, size, d->uuid); }
int nvmlDeviceGetName(Device *d, char *to, unsigned size) { return copy(to, size, d->number ? "Stub B" : "Stub A"); }

int nvmlDeviceGetMigMode(Device *d, unsigned *now, unsigned *next) {
    if (!says("mig")) return UNSUPPORTED;
    *now = *next = d->number == 1;
    return OK;
}
int nvmlDeviceGetMaxMigDeviceCount(Device *d, unsigned *count) { return (void)d, *count = 7, OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(Device *d, unsigned i, Device **found) {
    if (d->number != 1 || (i != 0 && i != 3)) return NOT_FOUND; /* numbers have gaps */
    *found = &instances[i == 3];
    return OK;
}

int nvmlDeviceGetMemoryInfo(Device *d, unsigned long long *info) { /* total, free, used */
    if (state(d)) return state(d);
    info[0] = 80ull << 30;
    info[2] = (d->mig ? 5ull : d->number ? 20ull : 10ull) << 30;
    info[1] = info[0] - info[2];
    return OK;
}
int nvmlDeviceGetUtilizationRates(Device *d, unsigned *rates) {
    reads += d->number == 1;
    rates[0] = d->number ? 30 : 90;
    rates[1] = 10;
    return counted(d);
}
int nvmlDeviceGetPowerUsage(Device *d, unsigned *milliwatts) { return *milliwatts = 111000, counted(d); }
int nvmlDeviceGetClockInfo(Device *d, unsigned kind, unsigned *mhz) {
    *mhz = kind == 2 ? 2619 : d->number ? 1200 : 1980;
    return counted(d);
}
int nvmlDeviceGetTemperature(Device *d, unsigned sensor, unsigned *celsius) {
    return (void)sensor, *celsius = d->number ? 40 : 55, counted(d);
}
int nvmlDeviceGetCurrentClocksThrottleReasons(Device *d, unsigned long long *bits) { /* power cap and hardware; idle */
    return *bits = d->number ? 0x1 : 0x44, counted(d);
}
int nvmlDeviceGetPcieThroughput(Device *d, unsigned way, unsigned *kilobytes) {
    usleep(20000); /* as the driver does */
    return *kilobytes = way ? 4096 : 2048, counted(d);
}

int nvmlDeviceGetFieldValues(Device *d, int count, Field *fields) {
    static unsigned steps[2][2];
    struct timespec now;
    if (state(d)) return state(d);
    clock_gettime(CLOCK_REALTIME, &now);
    for (int i = 0; i < count; i++) {
        Field *f = &fields[i];
        f->nvmlReturn = counted(d);
        f->valueType = 3;
        f->timestamp = now.tv_sec * 1000000ll + now.tv_nsec / 1000;
        if (f->fieldId == 186 && !says("old")) {
            f->valueType = 1;
            f->value.ui = d->number ? 250000 : 650000;
        } else if ((f->fieldId == 138 || f->fieldId == 139) && f->scopeId == 0xffffffffu && d->number == 0) {
            f->value.ull = 1024ull * 1024 * ++steps[0][f->fieldId - 138]; /* a GiB more at each reading */
        } else if ((f->fieldId == 197 || f->fieldId == 198) && !says("old")) {
            f->valueType = 1; /* short, and about to wrap */
            f->value.ui = 0xfff00000u + (1u << 20) * ++steps[1][f->fieldId - 197];
        } else
            f->nvmlReturn = UNSUPPORTED;
    }
    return OK;
}
