// CUDA as the kernels of this project use it. Under nvcc these are the instructions; under any other compiler host/cuda.h
// gives the same names bodies that run on a CPU. Kernels include this file and no CUDA header, use no `<<<>>>` and no
// `extern __shared__`.
#pragma once

#include <cstdint>

#ifndef __CUDACC__
#include "host/cuda.h"
#else

#define DEVICE __device__ __forceinline__
// `count` elements of T in dynamic shared memory, `offset` bytes from its start; what one launch asks for holds them all.
#define DYNAMIC_SHARED(T, name, offset, count)                  \
    extern __shared__ __align__(128) uint8_t dynamic_shared[]; \
    T* name = reinterpret_cast<T*>(dynamic_shared + (offset))
#define STATIC_SHARED(T, name, count) __shared__ T name[count]

template <class... Formal, class... Actual>
void launch(void (*kernel)(Formal...), dim3 grid, dim3 block, size_t shared, void* stream, Actual... arguments) {
    if (shared > 48 << 10) {
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    }
    kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
}

// Bytes of shared memory that a block may ask for on the current device.
inline int shared_memory_limit() {
    int device = 0, bytes = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return bytes;
}

// A barrier that tells all threads of the block whether any of them said yes.
DEVICE bool barrier_vote(bool yes) { return __syncthreads_or(yes); }

DEVICE uint32_t shuffle_up(uint32_t value) { return __shfl_up_sync(0xffffffffu, value, 1); }
DEVICE uint32_t shuffle_down(uint32_t value) { return __shfl_down_sync(0xffffffffu, value, 1); }
DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }

// MUFU: about 22 bits.
DEVICE float fast_rsqrt(float v) {
    float r;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
DEVICE float fast_sqrt(float v) {
    float r;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
DEVICE float fast_reciprocal(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
DEVICE float fast_log2(float v) {
    float r;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
DEVICE float fast_exp2(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

// Brings the cache line of an address in global memory to L2.
DEVICE void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// max, NaN if either is.
DEVICE float max_nan(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
DEVICE uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
DEVICE uint32_t max_nan_half2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

// Sums rounded once to the nearest even: what fp32 arithmetic rounded to the type gives too (24 >= 2 * 11 + 2 bits).
DEVICE uint32_t add_bf16x2(uint32_t a, uint32_t b) {  // sm_80 has no addition of bf16, but a * 1 + b
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x3f803f80u), "r"(b));
    return r;
}
DEVICE uint32_t add_half2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

// sum + 0 * word: each half of `sum` is NaN from the first infinite or NaN one on.
DEVICE uint32_t add_zero_times_bf16x2(uint32_t sum, uint32_t word) {
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(word), "r"(0), "r"(sum));
    return r;
}
DEVICE uint32_t add_zero_times_half2(uint32_t sum, uint32_t word) {
    uint32_t r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(word), "r"(0), "r"(sum));
    return r;
}

// All bits of each half whose uppermost is set.
DEVICE uint32_t spread_signs_16x2(uint32_t word) {
    uint32_t r;
    asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(r) : "r"(word));
    return r;
}

// A word holds two numbers, the one of the lower address in its low half.
DEVICE uint32_t pack_bf16x2(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
DEVICE uint32_t pack_half2(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
DEVICE float half_to_float(uint32_t low16) {
    float r;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(r) : "r"(low16));
    return r;
}

#endif

DEVICE float shuffle_up(float value) { return as_float(shuffle_up(as_bits(value))); }
DEVICE float shuffle_down(float value) { return as_float(shuffle_down(as_bits(value))); }
