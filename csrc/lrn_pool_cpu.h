// LRN, max-pooling, and both in one pass, on a CPU: what a caller fills in, and what it may call. No torch here.
//
// A call is divided into independent tasks. How it is divided, which thread runs which of them, and how many in a row, changes
// no bit of the result: every element is computed by the same operations in the same order. Neither does the instruction set:
// there is no fused multiply-add and no approximate root in it, so AVX-512, AVX2 and the baseline agree bit for bit.

#pragma once

#include <cstddef>
#include <cstdint>

namespace alexnet_cpu {

enum class Type { f32, f64, bf16 };  // sums are formed in fp32, in fp64 for f64

struct Window {
    int64_t kh, kw, sh, sw, ph, pw, dh, dw;
};

// Tensors are dense: [n, c, h, w] for x (and its gradient), [n, c, oh, ow] for what is pooled; or the same channels_last.
struct Call {
    Type type = Type::f32;
    bool channels_last = false;
    int64_t n = 0, c = 0, h = 0, w = 0, oh = 0, ow = 0;
    int64_t threads = 1;  // that there are; LRN alone makes tasks for all of them

    bool normalise = false;  // LRN over channels: y = x · (k + scale · Σ x²)^-beta
    int64_t size = 1, groups = 1;
    double scale = 0, beta = 0, k = 1;

    bool pool = false, pool_first = false;  // pool_first: LRN of the maxima; otherwise the maxima of LRN
    Window window{};

    bool relu = false;
    const void* bias = nullptr;  // [c], x's type

    const void* x = nullptr;     // backward of pooling alone needs none
    const void* grad = nullptr;  // backward only
    void* out = nullptr;         // forward: y; backward: the gradient by x
    uint8_t* place_out = nullptr;        // forward: tap kh_i * kw + kw_i of each maximum, where wanted
    const uint8_t* place = nullptr;      // backward
    double* bias_partial = nullptr;      // backward: [tasks, c], where wanted; their sum in order is the bias gradient
};

struct Work {
    int64_t tasks = 0;
    int64_t grain = 1;  // fewer tasks than this are not worth a thread
};

Work forward_work(const Call& call);
Work backward_work(const Call& call);
void forward(const Call& call, int64_t begin, int64_t end);   // tasks begin <= t < end
void backward(const Call& call, int64_t begin, int64_t end);

// The instruction set in use: the best this machine has, or less (ALEXNET_KERNELS_SIMD=baseline|avx2|avx512, for tests).
enum class Level { baseline, avx2, avx512 };
Level level();
bool use_level(Level wanted);  // false: this machine or this build does not have it

// One of a thread's buffers, grown when needed and kept: small calls then allocate nothing.
enum class Slot { raw, ring, best, place, result, grad, taken, direct, shared, bias, zeros, rows, taps, ids, count };
void* scratch(Slot slot, size_t bytes);

}  // namespace alexnet_cpu
