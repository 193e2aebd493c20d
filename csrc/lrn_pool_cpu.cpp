// The CPU kernels, compiled once per instruction set, and the choice among them.

#include "lrn_pool_cpu.h"

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

namespace alexnet_cpu {

namespace {

constexpr int64_t WORTH_A_THREAD = 1 << 15;  // elements

int64_t at_least_one(int64_t v) { return v > 1 ? v : 1; }
int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pixels that one task of plain LRN takes. NCHW: long runs of a channel, as memory is read best, but two tasks a thread.
// channels_last: what keeps the temporaries in the first or second cache.
int64_t lrn_block(const Call& call) {
    int64_t pixels = call.h * call.w * (call.channels_last ? call.n : 1), wanted;
    if (call.channels_last) {
        wanted = 4096 / at_least_one(call.c);
        wanted = wanted < 8 ? 8 : wanted / 8 * 8;
    } else {
        int64_t most = up(pixels, up(2 * call.threads, at_least_one(call.n)));
        wanted = most < 64 ? 64 : most > 768 ? 768 : up(most, 16) * 16;
    }
    return wanted < pixels ? wanted : at_least_one(pixels);
}

int64_t strip_rows(const Call& call) {
    int64_t rows = 16384 / at_least_one(call.c * call.w);
    return rows < 1 ? 1 : rows > 8 ? 8 : rows;
}

Work work(int64_t tasks, int64_t elements) {
    return {tasks, tasks == 0 ? 1 : at_least_one(WORTH_A_THREAD / at_least_one(elements / tasks))};
}

int64_t lrn_tasks(const Call& call) {
    int64_t pixels = call.h * call.w, block = lrn_block(call);
    return call.channels_last ? up(call.n * pixels, block) : call.n * up(pixels, block);
}

}  // namespace

Work forward_work(const Call& call) {
    return work(call.pool ? call.n * call.oh : lrn_tasks(call), call.n * call.c * call.h * call.w);
}

Work backward_work(const Call& call) {
    return work(call.pool ? call.n * up(call.h, strip_rows(call)) : lrn_tasks(call), call.n * call.c * call.h * call.w);
}

void* scratch(Slot slot, size_t bytes) {
    struct Free {
        void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
    };
    struct Kept {
        std::unique_ptr<void, Free> memory;
        size_t bytes = 0;
    };
    static thread_local Kept kept[size_t(Slot::count)];
    Kept& k = kept[size_t(slot)];
#ifdef __SANITIZE_ADDRESS__  // a fresh one of the exact size, full of NaN: what is read too far or too early shows
    constexpr bool fresh = true;
#else
    constexpr bool fresh = false;
#endif
    if (fresh || k.bytes < bytes) {
        k.memory.reset();
        k.bytes = 0;
        k.memory.reset(::operator new(bytes, std::align_val_t(64)));
        k.bytes = bytes;
        if (fresh) memset(k.memory.get(), 0xff, bytes);
    }
    return k.memory.get();
}

// Each instruction set is a namespace with the same source in it. Only these functions may use its instructions: whatever
// they call from outside is a builtin or compiled for the baseline.
#define ALEXNET_LEVEL baseline
#include "level_cpu.h"
#undef ALEXNET_LEVEL

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ALEXNET_X86 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#define ALEXNET_LEVEL avx2
#include "level_cpu.h"
#undef ALEXNET_LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define ALEXNET_LEVEL avx512
#include "level_cpu.h"
#undef ALEXNET_LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace {

bool has(Level wanted) {
#ifdef ALEXNET_X86
    __builtin_cpu_init();
    if (wanted == Level::avx2) return __builtin_cpu_supports("avx2");
    if (wanted == Level::avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return wanted == Level::baseline;
}

Level best_level() {
    const char* asked = std::getenv("ALEXNET_KERNELS_SIMD");
    const char* names[] = {"baseline", "avx2", "avx512"};
    for (Level level : {Level::avx512, Level::avx2})
        if (has(level) && (!asked || !*asked || !strcmp(asked, names[int(level)]))) return level;
    return Level::baseline;
}

std::atomic<Level>& chosen() {
    static std::atomic<Level> level{best_level()};
    return level;
}

}  // namespace

Level level() { return chosen().load(std::memory_order_relaxed); }

bool use_level(Level wanted) {
    if (!has(wanted)) return false;
    chosen().store(wanted);
    return true;
}

void forward(const Call& call, int64_t begin, int64_t end) {
#ifdef ALEXNET_X86
    if (level() == Level::avx512) return avx512::forward(call, begin, end);
    if (level() == Level::avx2) return avx2::forward(call, begin, end);
#endif
    baseline::forward(call, begin, end);
}

void backward(const Call& call, int64_t begin, int64_t end) {
#ifdef ALEXNET_X86
    if (level() == Level::avx512) return avx512::backward(call, begin, end);
    if (level() == Level::avx2) return avx2::backward(call, begin, end);
#endif
    baseline::backward(call, begin, end);
}

}  // namespace alexnet_cpu
