// Products of a warpgroup, four warps together, of sm_90a: both factors in shared memory, the sums in registers, asynchronous.
// host/warpgroup.h gives the same names bodies that run on a CPU.
//
//   d[64 x N] += a[64 x 16] b[16 x N],   16-bit numbers; N = 48, 64, 96
//
// Of a row of a, and of a column of b, the 16 numbers are two halves of 16 bytes. Eight rows' halves that follow each other
// are 128 bytes, a core matrix. A descriptor says where the first one begins, how many bytes behind it the second half lies
// (`leading`), and how many the next eight rows (`stride`); all are multiples of 16 and no swizzle is applied.
//
// Lane (g, q) of warp w, as in tensor_core.h:  d[t][i] is row 16 w + g + 8 * (i / 2), column 8 t + 2 q + i % 2.
//
//   write shared memory; proxy_fence(); __syncthreads(); warpgroup_fence(d); warpgroup_mma(d, ...); ...; warpgroup_commit();
//   warpgroup_wait<0>(d); read d; __syncthreads(); overwrite shared memory
#pragma once

#include "tensor_core.h"

#ifndef __CUDACC__
#include "host/warpgroup.h"
#else

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WARPGROUP_ASM(...) asm volatile(__VA_ARGS__)
#else
#define WARPGROUP_ASM(...) __trap()  // the other targets have no such instruction, and has_warpgroups() says so
#endif

// Whether the current device has what the functions below are.
inline bool has_warpgroups() {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return major == 9 && minor == 0;
}

DEVICE uint64_t matrix_descriptor(const void* start, int leading, int stride) {
    const uint64_t offsets = static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(leading >> 4) << 16;
    return offsets | shared_address(start) >> 4;
}

// What this thread wrote to shared memory is there for products that begin behind the next barrier.
DEVICE void proxy_fence() { WARPGROUP_ASM("fence.proxy.async.shared::cta;" ::: "memory"); }

// No instruction of the compiler's crosses this with a sum.
template <int kCount> DEVICE void hold(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        asm volatile("" : "+f"(d[i])::"memory");
    }
}
template <int kRows, int kColumns, int kCount> DEVICE void hold(float (&d)[kRows][kColumns][kCount]) {
#pragma unroll
    for (int i = 0; i < kRows * kColumns; ++i) {
        hold(d[i / kColumns][i % kColumns]);
    }
}

// Before the first product of sums that anything else has written.
template <int kRows, int kColumns> DEVICE void warpgroup_fence(float (&d)[kRows][kColumns][4]) {
    hold(d);
    WARPGROUP_ASM("wgmma.fence.sync.aligned;" ::: "memory");
}
// Closes a group: the products since the last one.
DEVICE void warpgroup_commit() { WARPGROUP_ASM("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until no more than kPending groups, the youngest, are under way. Until then nobody touches their sums.
template <int kPending, int kRows, int kColumns> DEVICE void warpgroup_wait(float (&d)[kRows][kColumns][4]) {
    WARPGROUP_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
    hold(d);
}

#define SUMS(t) "+f"(d[t][0]), "+f"(d[t][1]), "+f"(d[t][2]), "+f"(d[t][3])
#define SUMS_6(t) SUMS(t), SUMS(t + 1), SUMS(t + 2), SUMS(t + 3), SUMS(t + 4), SUMS(t + 5)
#define NAMES_24 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, " \
                 "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23"
#define NAMES_32 NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_48 NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, " \
                          "%40, %41, %42, %43, %44, %45, %46, %47"
#define PRODUCT(n, type, names, a_name, b_name, ...)                                                                     \
    WARPGROUP_ASM("{ .reg .pred add; setp.ne.b32 add, 1, 0; wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type \
                  " {" names "}, " a_name ", " b_name ", add, 1, 1, 0, 0; }"                                              \
                  : __VA_ARGS__                                                                                           \
                  : "l"(a), "l"(b))
#define PRODUCT_OF(type)                                                                     \
    if constexpr (kTiles == 6) {                                                             \
        PRODUCT("48", type, NAMES_24, "%24", "%25", SUMS_6(0));                              \
    } else if constexpr (kTiles == 8) {                                                      \
        PRODUCT("64", type, NAMES_32, "%32", "%33", SUMS_6(0), SUMS(6), SUMS(7));            \
    } else {                                                                                 \
        static_assert(kTiles == 12);                                                         \
        PRODUCT("96", type, NAMES_48, "%48", "%49", SUMS_6(0), SUMS_6(6));                   \
    }

// N = 8 * kTiles.
template <int kTiles> DEVICE void warpgroup_mma_bf16(float (&d)[kTiles][4], uint64_t a, uint64_t b) { PRODUCT_OF("bf16") }
template <int kTiles> DEVICE void warpgroup_mma_half(float (&d)[kTiles][4], uint64_t a, uint64_t b) { PRODUCT_OF("f16") }

#undef PRODUCT_OF
#undef PRODUCT
#undef NAMES_48
#undef NAMES_32
#undef NAMES_24
#undef SUMS_6
#undef SUMS
#undef WARPGROUP_ASM

#endif
