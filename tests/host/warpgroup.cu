// A product of two small matrices by two warpgroups, and the same with one bug planted.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

#include "warpgroup.h"

namespace {

enum Plant {
    kNone,
    kMissingWait,
    kWaitForOneOfTwo,
    kOpenGroup,
    kMissingFence,
    kMissingProxyFence,
    kProxyFenceBeforeTheWrites,
    kMissingBarrier,
    kOverwritten,
    kMissingWarp,
    kDifferentMatrices,
    kOddAddress,
    kBehindTheArray,
    kSwappedOffsets
};

constexpr int kM = 64, kK = 32, kThreads = 256, kRows = kM + 3;  // rows of a lie three further than they are asked for first
constexpr int kLeft = 4 * kRows * 16;                            // bytes of a: [half of a step of K][row][8 numbers]

// d [warpgroup, 64, N] = a [warpgroup, 64, 32] b [32, N], given as b' [N, 32]. Warpgroup w multiplies what the other has
// written. Two steps of K are two groups.
template <bool kHalf, int kN, Plant kPlant> __global__ void multiply(const uint16_t* a, const uint16_t* b, float* d) {
    DYNAMIC_SHARED(uint8_t, left, 0, 2 * kLeft);
    DYNAMIC_SHARED(uint8_t, right, 2 * kLeft, 4 * kN * 16);
    const int group = threadIdx.x / 128, other = 1 - group, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    if (kPlant == kProxyFenceBeforeTheWrites) {
        proxy_fence();
    }
    for (int i = threadIdx.x % 128; i < kM * kK; i += 128) {
        const int row = i / kK, k = i % kK, at = (k / 8 * kRows + row + 3) * 16 + k % 8 * 2;
        *reinterpret_cast<uint16_t*>(left + group * kLeft + at) = a[group * kM * kK + i];
    }
    for (int i = threadIdx.x; i < kN * kK; i += kThreads) {
        *reinterpret_cast<uint16_t*>(right + (i % kK / 8 * kN + i / kK) * 16 + i % 8 * 2) = b[i];
    }
    if (kPlant != kMissingProxyFence && kPlant != kProxyFenceBeforeTheWrites) {
        proxy_fence();
    }
    if (kPlant != kMissingBarrier) {
        __syncthreads();
    }
    float sums[1][kN / 8][4] = {};
    if (kPlant != kMissingFence) {
        warpgroup_fence(sums);
    }
    const int start = kPlant == kOddAddress ? 8 : kPlant == kBehindTheArray ? kLeft + 64 : 0;
    const int leading = kRows * 16, stride = 128;
    uint64_t a_matrix = matrix_descriptor(left + other * kLeft + start, kPlant == kSwappedOffsets ? stride : leading,
                                          kPlant == kSwappedOffsets ? leading : stride);
    const uint64_t b_matrix = matrix_descriptor(right, kN * 16, 128);
    a_matrix += 3 + (kPlant == kDifferentMatrices && warp == 2);  // rows of 16 bytes
    for (int step = 0; step < 2; ++step) {
        if (!(kPlant == kMissingWarp && warp == 3 && step == 1)) {
            const uint64_t a_step = a_matrix + step * 2 * leading / 16, b_step = b_matrix + step * 2 * kN;
            kHalf ? warpgroup_mma_half(sums[0], a_step, b_step) : warpgroup_mma_bf16(sums[0], a_step, b_step);
        }
        if (!(kPlant == kOpenGroup && step == 1)) {
            warpgroup_commit();
        }
    }
    if (kPlant == kOverwritten && threadIdx.x == 0) {
        left[3 * 16] ^= 1;
    }
    if (kPlant == kWaitForOneOfTwo) {
        warpgroup_wait<1>(sums);
    } else if (kPlant != kMissingWait) {
        warpgroup_wait<1>(sums);
        warpgroup_wait<0>(sums);
    }
    for (int i = 0; i < kN / 2; ++i) {
        const int row = 16 * warp + lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        d[(other * kM + row) * kN + column] = sums[0][i / 4][i % 4];
    }
}

// Small integers: every sum is exact, so the results are equal or wrong.
template <bool kHalf, int kN, Plant kPlant> int run() {
    std::vector<int> a(2 * kM * kK), b(kN * kK);
    std::vector<uint16_t> a_bits, b_bits;
    const auto encode = [](int value) {
        return static_cast<uint16_t>(kHalf ? float_to_half(static_cast<float>(value)) : float_to_bf16(static_cast<float>(value)));
    };
    for (size_t i = 0; i < a.size(); ++i) {
        a[i] = static_cast<int>(i * 7919 % 31) - 15;
        a_bits.push_back(encode(a[i]));
    }
    for (size_t i = 0; i < b.size(); ++i) {
        b[i] = static_cast<int>(i * 104729 % 29) - 14;
        b_bits.push_back(encode(b[i]));
    }
    for (int order : {0, 1, 7}) {
        std::vector<float> d(2 * kM * kN, NAN);
        host::order = order;
        try {
            launch(multiply<kHalf, kN, kPlant>, dim3(1), dim3(kThreads), 2 * kLeft + 4 * kN * 16, nullptr,
                   static_cast<const uint16_t*>(a_bits.data()), static_cast<const uint16_t*>(b_bits.data()), d.data());
        } catch (const std::exception& error) {
            std::fprintf(stderr, "%s\n", error.what());
            return 1;
        }
        for (int i = 0; i < 2 * kM * kN; ++i) {
            int want = 0;
            for (int k = 0; k < kK; ++k) {
                want += a[i / kN * kK + k] * b[i % kN * kK + k];
            }
            if (!(d[i] == static_cast<float>(want))) {
                std::fprintf(stderr, "wrong result in order %d\n", order);
                return 1;
            }
        }
    }
    return 0;
}

int run_right() {
    return run<false, 48, kNone>() + run<false, 64, kNone>() + run<false, 96, kNone>() + run<true, 48, kNone>() +
           run<true, 64, kNone>() + run<true, 96, kNone>();
}

}  // namespace

int main(int, char** arguments) {
    int (*const runs[])() = {run_right,
                             run<false, 96, kMissingWait>,
                             run<false, 96, kWaitForOneOfTwo>,
                             run<false, 96, kOpenGroup>,
                             run<false, 96, kMissingFence>,
                             run<false, 96, kMissingProxyFence>,
                             run<false, 96, kProxyFenceBeforeTheWrites>,
                             run<false, 96, kMissingBarrier>,
                             run<false, 96, kOverwritten>,
                             run<false, 96, kMissingWarp>,
                             run<false, 96, kDifferentMatrices>,
                             run<false, 96, kOddAddress>,
                             run<false, 96, kBehindTheArray>,
                             run<false, 96, kSwappedOffsets>};
    return runs[std::atoi(arguments[1])]();
}
