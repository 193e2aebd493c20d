// The names of tensor_core.h for a compiler that is not nvcc. A copy is made at the wait and not before, so what reads its
// target without having waited reads NaN; the lane that comes last does a warp's work for all, at one moment, as the GPU does.
#pragma once

#include "cuda.h"

namespace host {

inline void check_alignment(const void* address, const char* message) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
        fail(message);
    }
}

// Brings `mine` and takes it back when `work` has seen what all the lanes brought, each in its slot.
template <class T> void together(const void* operation, T& mine, void (*work)(T (&)[kWarp])) {
    Warp& warp = the_block->warps[the_block->current->linear / kWarp];
    T(&slots)[kWarp] = warp.slots<T>();
    const unsigned lane = the_block->current->linear % kWarp;
    slots[lane] = mine;
    meet(warp, operation, [&slots, work] { work(slots); });
    mine = slots[lane];
}

struct MatrixLoad {
    const void* row;
    uint32_t words[4];
};

struct Product {
    float d[4];
    uint32_t a[4], b[2];
};

template <bool kTransposed> void load_matrices(uint32_t (&r)[4], const void* row) {
    static const char operation = 0;
    check_alignment(row, "ldmatrix of an address that is not a multiple of 16");
    MatrixLoad mine{row, {}};
    together<MatrixLoad>(&operation, mine, [](MatrixLoad(&lanes)[kWarp]) {
        for (int i = 0; i < 4; ++i) {
            for (int lane = 0; lane < kWarp; ++lane) {
                uint16_t pair[2];
                for (int j = 0; j < 2; ++j) {
                    const int row = kTransposed ? lane % 4 * 2 + j : lane / 4;
                    const int column = kTransposed ? lane / 4 : lane % 4 * 2 + j;
                    pair[j] = static_cast<const uint16_t*>(lanes[i * 8 + row].row)[column];
                }
                lanes[lane].words[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
            }
        }
    });
    std::copy(mine.words, mine.words + 4, r);
}

// d += a b, kPerWord numbers a word. The sum is formed in double and rounded once: no order of the terms is promised.
template <int kPerWord, float (*kToFloat)(uint32_t)>
void product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    static const char operation = 0;
    Product mine{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    together<Product>(&operation, mine, [](Product(&lanes)[kWarp]) {
        constexpr int kDepth = 8 * kPerWord;
        double left[16][kDepth], right[8][kDepth];
        for (int lane = 0; lane < kWarp; ++lane) {
            for (int i = 0; i < 4 * kPerWord; ++i) {
                const int word = i / kPerWord, half = i % kPerWord, k = lane % 4 * kPerWord + half;
                left[lane / 4 + word % 2 * 8][k + word / 2 * 4 * kPerWord] = kToFloat(lanes[lane].a[word] >> 16 * half);
                if (word < 2) {
                    right[lane / 4][k + word * 4 * kPerWord] = kToFloat(lanes[lane].b[word] >> 16 * half);
                }
            }
        }
        for (int lane = 0; lane < kWarp; ++lane) {
            for (int i = 0; i < 4; ++i) {
                double sum = lanes[lane].d[i];
                for (int k = 0; k < kDepth; ++k) {
                    sum += left[lane / 4 + i / 2 * 8][k] * right[lane % 4 * 2 + i % 2][k];
                }
                lanes[lane].d[i] = static_cast<float>(sum);
            }
        }
    });
    std::copy(mine.d, mine.d + 4, d);
}

inline float low_bf16_to_float(uint32_t word) { return as_float(word << 16); }
inline float tf32_to_float(uint32_t word) { return as_float(word & 0xffffe000); }

}  // namespace host

inline void copy_async_16(void* to, const void* from, bool wanted = true) {
    host::check_alignment(to, "cp.async to an address that is not a multiple of 16");
    host::check_alignment(wanted ? from : nullptr, "cp.async from an address that is not a multiple of 16");
    host::Fiber& me = *host::the_block->current;
    me.copies.push_back({to, wanted ? from : nullptr, me.copy_groups});
}

inline void copy_async_commit() { ++host::the_block->current->copy_groups; }

template <int kPending> void copy_async_wait() {
    host::Fiber& me = *host::the_block->current;
    size_t done = 0;
    for (; done < me.copies.size() && me.copies[done].group + kPending < me.copy_groups; ++done) {
        const host::Copy& copy = me.copies[done];
        copy.from ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
    }
    me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

inline void load_matrix_x4(uint32_t (&r)[4], const void* row) { host::load_matrices<false>(r, row); }
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) { host::load_matrices<true>(r, row); }

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    host::product<2, host::low_bf16_to_float>(d, a, b0, b1);
}
inline void mma_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    host::product<2, half_to_float>(d, a, b0, b1);
}
inline void mma_bf16_k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) { mma_bf16(d, {a0, a1, 0, 0}, b0, 0); }
inline void mma_half_k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) { mma_half(d, {a0, a1, 0, 0}, b0, 0); }
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    host::product<1, host::tf32_to_float>(d, a, b0, b1);
}

inline uint32_t float_to_tf32(float value) {
    const uint32_t bits = as_bits(value);
    return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & 0xffffe000;
}
