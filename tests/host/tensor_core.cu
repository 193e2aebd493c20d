// A product of two small matrices by way of asynchronous copies, ldmatrix and mma, and the same with one bug planted.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

#include "tensor_core.h"

namespace {

enum Plant { kNone, kMissingWait, kOpenGroup, kMissingBarrier, kMisaligned, kDifferentOperations };
enum class Type { kBFloat16, kHalf, kTf32 };

constexpr int kM = 16, kN = 8, kThreads = 64;
constexpr int kRow = 80;  // bytes of a row in shared memory: 64 of numbers, 16 so that 8 rows lie in 8 different banks

// d [warp, 16, 8] = a [warp, 16, K] b, with b [K, 8] where transposed and [8, K] otherwise; K = 32 16-bit or 16 tf32 numbers.
// Warp w reads what the other warp has copied. The copies come in two groups; the second is half of K.
template <Type kType, bool kTransposed, Plant kPlant>
__global__ void multiply(const uint8_t* a, const uint8_t* b, float* d) {
    DYNAMIC_SHARED(uint8_t, left, 0, 2 * kM * kRow);
    DYNAMIC_SHARED(uint8_t, right, 2 * kM * kRow, 32 * kRow);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, other = 1 - warp;
    constexpr int kRightRows = kTransposed ? 32 : kN, kRightChunks = kTransposed ? 1 : 4;
    for (int half = 0; half < 2; ++half) {
        const int row = lane / 2, chunk = lane % 2 + half * 2;
        copy_async_16(left + (warp * kM + row) * kRow + chunk * 16 + (kPlant == kMisaligned ? 8 : 0),
                      a + (warp * kM + row) * 64 + chunk * 16);
        for (int i = threadIdx.x + half * kThreads; i < kRightRows * kRightChunks; i += 2 * kThreads) {
            copy_async_16(right + i / kRightChunks * kRow + i % kRightChunks * 16, b + i * 16);
        }
        if (!(kPlant == kOpenGroup && half == 1)) {
            copy_async_commit();
        }
    }
    copy_async_wait<kPlant == kMissingWait ? 1 : 0>();
    if (kPlant != kMissingBarrier) {
        __syncthreads();
    }
    float sums[4] = {};
    for (int k = 0; k < 2; ++k) {  // 32 bytes of K at a time
        uint32_t words[4], columns[4];
        load_matrix_x4(words, left + (other * kM + lane % 16) * kRow + k * 32 + lane / 16 * 16);
        const uint8_t* row = kTransposed ? right + (k * 16 + lane % 16) * kRow
                                         : right + lane % 8 * kRow + k * 32 + lane / 8 % 2 * 16;
        if (kTransposed || (kPlant == kDifferentOperations && lane == 7)) {
            load_matrix_x4_transposed(columns, row);
        } else {
            load_matrix_x4(columns, row);
        }
        kType == Type::kBFloat16 ? mma_bf16(sums, words, columns[0], columns[1])
        : kType == Type::kHalf   ? mma_half(sums, words, columns[0], columns[1])
                                 : mma_tf32(sums, words, columns[0], columns[1]);
    }
    for (int i = 0; i < 4; ++i) {
        d[(other * kM + lane / 4 + i / 2 * 8) * kN + lane % 4 * 2 + i % 2] = sums[i];
    }
}

uint32_t encode(Type type, float value) {
    return type == Type::kBFloat16 ? float_to_bf16(value) : type == Type::kHalf ? float_to_half(value) : float_to_tf32(value);
}

// Small integers: every sum is exact, so the results are equal or wrong.
template <Type kType, bool kTransposed, Plant kPlant> int run() {
    constexpr int kBytes = kType == Type::kTf32 ? 4 : 2, kK = 64 / kBytes;
    std::vector<int> a(2 * kM * kK), b(kK * kN);
    std::vector<uint8_t> a_bytes(a.size() * kBytes), b_bytes(b.size() * kBytes);
    for (size_t i = 0; i < a.size(); ++i) {
        a[i] = static_cast<int>(i * 7919 % 31) - 15;
        const uint32_t bits = encode(kType, static_cast<float>(a[i]));
        std::memcpy(&a_bytes[i * kBytes], &bits, kBytes);
    }
    for (size_t i = 0; i < b.size(); ++i) {
        b[i] = static_cast<int>(i * 104729 % 29) - 14;
        const uint32_t bits = encode(kType, static_cast<float>(b[i]));
        std::memcpy(&b_bytes[i * kBytes], &bits, kBytes);
    }
    for (int order : {0, 1, 7}) {
        std::vector<float> d(2 * kM * kN, NAN);
        host::order = order;
        try {
            launch(multiply<kType, kTransposed, kPlant>, dim3(1), dim3(kThreads), (2 * kM + 32) * kRow, nullptr,
                   static_cast<const uint8_t*>(a_bytes.data()), static_cast<const uint8_t*>(b_bytes.data()), d.data());
        } catch (const std::exception& error) {
            std::fprintf(stderr, "%s\n", error.what());
            return 1;
        }
        for (int i = 0; i < 2 * kM * kN; ++i) {
            int want = 0;
            for (int k = 0; k < kK; ++k) {
                want += a[i / kN * kK + k] * b[kTransposed ? k * kN + i % kN : i % kN * kK + k];
            }
            if (!(d[i] == static_cast<float>(want))) {
                std::fprintf(stderr, "wrong result in order %d\n", order);
                return 1;
            }
        }
    }
    return 0;
}

// 11 bits stay, ties go away from zero; infinity and NaN stay what they are.
int check_rounding() {
    const float cases[][2] = {{1 + 0x1p-11f, 1 + 0x1p-10f}, {-1 - 0x1p-11f, -1 - 0x1p-10f}, {1 + 0x1p-12f, 1},
                              {INFINITY, INFINITY},         {0x1.fffp0f, 2}};
    for (const auto& [value, want] : cases) {
        if (as_float(float_to_tf32(value)) != want) {
            std::fprintf(stderr, "%a becomes %a\n", value, as_float(float_to_tf32(value)));
            return 1;
        }
    }
    return !std::isnan(as_float(float_to_tf32(NAN)));
}

int run_right() {
    return check_rounding() + run<Type::kBFloat16, false, kNone>() + run<Type::kHalf, false, kNone>() +
           run<Type::kTf32, false, kNone>() + run<Type::kBFloat16, true, kNone>() + run<Type::kHalf, true, kNone>();
}

}  // namespace

int main(int, char** arguments) {
    constexpr Type kType = Type::kBFloat16;
    int (*const runs[])() = {run_right,
                             run<kType, false, kMissingWait>,
                             run<kType, false, kOpenGroup>,
                             run<kType, false, kMissingBarrier>,
                             run<kType, false, kMisaligned>,
                             run<kType, false, kDifferentOperations>};
    return runs[std::atoi(arguments[1])]();
}
