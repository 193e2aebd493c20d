// The names of device.h and of CUDA's language for a compiler that is not nvcc: threads are the fibers of fibers.h, and
// arithmetic is IEEE where the GPU's is approximate.
#pragma once

#include <cmath>

#include "fibers.h"

#define __global__
#define __restrict__
#define __launch_bounds__(...)
#define DEVICE inline
#define DYNAMIC_SHARED(T, name, offset, count) \
    T* name = static_cast<T*>(host::dynamic_shared(offset, (count) * sizeof(T)))
#define STATIC_SHARED(T, name, count) T* name = static_cast<T*>(host::shared_array(-__LINE__, (count) * sizeof(T)))

#define threadIdx (host::the_block->current->index)
#define blockIdx (host::the_block->index)
#define blockDim (host::the_block->block)
#define gridDim (host::the_block->grid)

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
constexpr uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
constexpr uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

template <class... Formal, class... Actual>
void launch(void (*kernel)(Formal...), dim3 grid, dim3 block, size_t shared, void*, Actual... arguments) {
    if (shared > static_cast<size_t>(host::shared_limit)) {
        throw std::runtime_error("a launch asks for more shared memory than the device has for a block");
    }
    host::launch(grid, block, shared, [=] { kernel(arguments...); });
}

inline int shared_memory_limit() { return host::shared_limit; }

inline void __syncthreads() { host::barrier(); }
inline bool barrier_vote(bool yes) { return host::barrier_vote(yes); }

// As __shfl_up_sync and __shfl_down_sync by one lane: the lane at the end keeps its own value.
inline uint32_t shuffle_up(uint32_t value) {
    const unsigned lane = host::the_block->current->linear % host::kWarp;
    return host::exchange(value, [lane](const uint32_t* values) { return values[lane == 0 ? 0 : lane - 1]; });
}
inline uint32_t shuffle_down(uint32_t value) {
    const unsigned lane = host::the_block->current->linear % host::kWarp;
    return host::exchange(value, [lane](const uint32_t* values) { return values[lane == 31 ? 31 : lane + 1]; });
}

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}
inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

// Where nothing is read nothing is brought: an address outside an array is caught.
inline void prefetch(const void* address) {
    [[maybe_unused]] const volatile uint8_t byte = *static_cast<const uint8_t*>(address);
}

inline float fast_rsqrt(float v) { return 1 / std::sqrt(v); }
inline float fast_sqrt(float v) { return std::sqrt(v); }
inline float fast_reciprocal(float v) { return 1 / v; }
inline float fast_log2(float v) { return std::log2(v); }
inline float fast_exp2(float v) { return std::exp2(v); }
inline float max_nan(float a, float b) { return a != a || a > b ? a : b; }

inline uint32_t float_to_bf16(float value) {
    const uint32_t bits = as_bits(value);
    return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float half_to_float(uint32_t low16) {
    const uint32_t sign = (low16 & 0x8000u) << 16, exponent = low16 >> 10 & 31, fraction = low16 & 1023;
    if (exponent == 0) {
        const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    return as_float(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

inline uint32_t float_to_half(float value) {
    const uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) {
        return 0x7fff;
    }
    if (magnitude < 0x38800000) {  // below 2^-14, steps of 2^-24: the FPU rounds to the nearest even integer
        return sign | static_cast<uint32_t>(std::nearbyint(as_float(magnitude) * 0x1p24f));
    }
    const uint32_t rounded = (magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13;
    return sign | std::min(rounded - (112u << 10), 0x7c00u);
}

inline uint32_t spread_signs_16x2(uint32_t word) { return (word >> 15 & 0x00010001) * 0xffff; }
inline float low_bf16(uint32_t pair) { return as_float(pair << 16); }
inline float high_bf16(uint32_t pair) { return as_float(pair & 0xffff0000); }
inline uint32_t pack_bf16x2(float low, float high) { return float_to_bf16(low) | float_to_bf16(high) << 16; }
inline uint32_t pack_half2(float low, float high) { return float_to_half(low) | float_to_half(high) << 16; }
inline uint32_t add_bf16x2(uint32_t a, uint32_t b) {
    return pack_bf16x2(low_bf16(a) + low_bf16(b), high_bf16(a) + high_bf16(b));
}
inline uint32_t add_half2(uint32_t a, uint32_t b) {
    return pack_half2(half_to_float(a) + half_to_float(b), half_to_float(a >> 16) + half_to_float(b >> 16));
}
inline uint32_t add_zero_times_bf16x2(uint32_t sum, uint32_t word) {
    return pack_bf16x2(low_bf16(sum) + 0 * low_bf16(word), high_bf16(sum) + 0 * high_bf16(word));
}
inline uint32_t add_zero_times_half2(uint32_t sum, uint32_t word) {
    return pack_half2(half_to_float(sum) + 0 * half_to_float(word),
                      half_to_float(sum >> 16) + 0 * half_to_float(word >> 16));
}
inline uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
    return pack_bf16x2(max_nan(low_bf16(a), low_bf16(b)), max_nan(high_bf16(a), high_bf16(b)));
}
inline uint32_t max_nan_half2(uint32_t a, uint32_t b) {
    return pack_half2(max_nan(half_to_float(a), half_to_float(b)), max_nan(half_to_float(a >> 16), half_to_float(b >> 16)));
}
