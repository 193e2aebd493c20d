// Runs every CPU kernel on odd shapes, from buffers of the exact size, under AddressSanitizer and UBSan; no torch.
// Every instruction set that the machine has must give the same bits as the baseline, and so must other divisions of the
// tasks. Prints "ok LEVELS", or what differs.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "lrn_pool_cpu.h"

using namespace alexnet_cpu;

namespace {

std::mt19937 generator(1);
int64_t pick(int64_t low, int64_t high) { return low + int64_t(generator() % uint64_t(high - low + 1)); }

using Bytes = std::vector<uint8_t>;  // its heap block ends where the tensor does

Bytes values(Type type, int64_t n, bool odd) {
    size_t width = type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2;
    Bytes bytes(size_t(n) * width);
    for (int64_t i = 0; i < n; ++i) {
        double v = double(pick(-6, 6)) / 2;  // ties
        if (odd && pick(0, 9) == 0) v = pick(0, 1) ? -INFINITY : NAN;
        float f = float(v);
        uint32_t bits;
        memcpy(&bits, &f, 4);
        uint16_t half = uint16_t(bits >> 16);  // exact for these
        if (type == Type::f64) memcpy(&bytes[i * 8], &v, 8);
        if (type == Type::f32) memcpy(&bytes[i * 4], &f, 4);
        if (type == Type::bf16) memcpy(&bytes[i * 2], &half, 2);
    }
    return bytes;
}

int64_t windows(int64_t length, int64_t k, int64_t s, int64_t p, int64_t d, bool ceil) {
    int64_t room = length + 2 * p - d * (k - 1) - 1;
    if (room < 0) return 0;
    int64_t count = (room + (ceil ? s - 1 : 0)) / s + 1;
    return ceil && (count - 1) * s >= length + p ? count - 1 : count;
}

struct Result {
    Bytes y, place, dx;
    std::vector<double> bias;
    bool operator==(const Result& o) const {
        return y == o.y && place == o.place && dx == o.dx &&
               (bias.empty() || !memcmp(bias.data(), o.bias.data(), bias.size() * 8));
    }
};

void in_pieces(const Call& call, Work work, void (*kernel)(const Call&, int64_t, int64_t), int64_t pieces) {
    for (int64_t i = pieces - 1; i >= 0; --i) {
        int64_t begin = work.tasks * i / pieces, end = work.tasks * (i + 1) / pieces;
        if (begin < end) kernel(call, begin, end);
    }
}

// A NaN has a sign and a payload that instructions may choose: all become one.
template <class T>
void plain_nan(void* data, size_t bytes) {
    for (T *v = static_cast<T*>(data), *end = v + bytes / sizeof(T); v < end; ++v)
        if (std::isnan(*v)) *v = std::numeric_limits<T>::quiet_NaN();
}

void plain_nans(Type type, Bytes& bytes) {
    if (type == Type::f32) plain_nan<float>(bytes.data(), bytes.size());
    if (type == Type::f64) plain_nan<double>(bytes.data(), bytes.size());
}

Result compute(Call call, const Bytes& grad, size_t width, int64_t pieces) {
    Result r;
    int64_t all = call.n * call.c * call.h * call.w, out = call.pool ? call.n * call.c * call.oh * call.ow : all;
    r.y.resize(size_t(out) * width), r.dx.resize(size_t(all) * width);
    call.out = r.y.data(), call.threads = pieces;
    if (call.pool) r.place.resize(size_t(out)), call.place_out = r.place.data();
    in_pieces(call, forward_work(call), forward, pieces);
    call.grad = grad.data(), call.out = r.dx.data(), call.place = r.place.data();
    if (call.pool && call.normalise) {
        r.bias.resize(size_t(backward_work(call).tasks * call.c));
        call.bias_partial = r.bias.data();
    }
    in_pieces(call, backward_work(call), backward, pieces);
    plain_nans(call.type, r.y);
    plain_nans(call.type, r.dx);
    plain_nan<double>(r.bias.data(), r.bias.size() * 8);
    return r;
}

bool one(int number, std::vector<Level>& levels) {
    Call call;
    call.type = Type(number % 3), call.channels_last = pick(0, 1);
    call.groups = pick(1, 3), call.n = pick(1, 2), call.c = call.groups * pick(1, 11), call.h = pick(1, 13), call.w = pick(1, 19);
    call.pool = pick(0, 3) > 0, call.normalise = !call.pool || pick(0, 3) > 0, call.pool_first = pick(0, 1);
    int64_t sizes[] = {1, 2, 3, 4, 5, 5, 5, 8, 50};
    double betas[] = {0.75, 0.75, 0.5, 1, 0.6};
    call.size = sizes[pick(0, 8)], call.scale = 0.1, call.beta = betas[pick(0, 4)], call.k = double(pick(0, 2));
    if (call.pool) {
        int64_t kh = pick(1, 4), kw = pick(1, 4);
        call.window = {kh, kw, pick(1, 4), pick(1, 4), pick(0, kh / 2), pick(0, kw / 2), pick(1, 2), pick(1, 2)};
        if (pick(0, 1)) call.window = {3, 3, 2, 2, 0, 0, 1, 1};
        bool ceil = pick(0, 1);
        const Window& w = call.window;
        call.oh = windows(call.h, w.kh, w.sh, w.ph, w.dh, ceil), call.ow = windows(call.w, w.kw, w.sw, w.pw, w.dw, ceil);
        if (call.oh < 1 || call.ow < 1) return true;
    }
    bool fused = call.pool && call.normalise;
    call.relu = fused && pick(0, 1);
    size_t width = call.type == Type::f64 ? 8 : call.type == Type::f32 ? 4 : 2;
    int64_t all = call.n * call.c * call.h * call.w, out = call.pool ? call.n * call.c * call.oh * call.ow : all;
    Bytes x = values(call.type, all, pick(0, 1)), bias = values(call.type, call.c, false), grad = values(call.type, out, false);
    call.x = x.data();
    if (fused && pick(0, 1)) call.bias = bias.data();
    use_level(Level::baseline);
    Result expected = compute(call, grad, width, 1);
    for (Level level : levels)
        for (int64_t pieces : {1, 2, 5}) {
            use_level(level);
            if (compute(call, grad, width, pieces) == expected) continue;
            printf("case %d: level %d in %d pieces differs\n", number, int(level), int(pieces));
            return false;
        }
    return true;
}

}  // namespace

int main(int count, char** arguments) {
    std::vector<Level> levels;
    for (Level level : {Level::baseline, Level::avx2, Level::avx512})
        if (use_level(level)) levels.push_back(level);
    bool fine = true;
    for (int i = 0, n = count > 1 ? atoi(arguments[1]) : 300; i < n; ++i) fine &= one(i, levels);
    printf(fine ? "ok" : "wrong");
    for (Level level : levels) printf(" %d", int(level));
    printf("\n");
    return fine ? 0 : 1;
}
