// The product of conv1_tile.h by a warpgroup's instructions, for 16-bit types: the tensor cores read shared memory themselves,
// in pieces of 16 bytes (warpgroup.h). So the strip's lines lie by pairs, 2 p and 2 p + 1: four numbers of the one and the same
// four of the other are a piece. A piece is a tap of every pixel near it:
//
//   piece (p, c) of the strip is tap (p - 6 row, c - column) of pixel (row, column),   p - 6 row < 17, c - column < 3
//
// Eight neighbouring pixels' pieces are 128 bytes in a row, a core matrix; a tap further right begins 16 bytes later, a tap
// further down a pair of lines later. So A is again never formed: each step of K is a descriptor that begins elsewhere. K is
// 17 * 3 pieces of 8 and one that does not count, 26 steps of 16; M is a row of 64 pixels, 56 at most of which are wanted.
//
// Beside the taps, a window's pieces hold its twelfth column and a 34th line. Their weights are zero, but zero times infinity
// is NaN. So whoever loads the strip looks for what is not finite, and a step that has such a number takes the same pieces by
// mma.sync and masks what is no tap.
#pragma once

#include "conv1_tile.h"

struct WarpgroupTaps {
    static constexpr bool kWarpgroup = true;
    static constexpr int kDepth = 416, kSteps = kDepth / 16;
    static constexpr int kPairs = (kLines + 1) / 2, kTapPairs = (kTapRows + 1) / 2, kTaps = kTapColumns / 4;
    static constexpr int kPiece = 16, kCore = 8 * kPiece, kRowPixels = 64, kPair = kLineLength / 4 * kPiece;
    static constexpr int kRow = kStride * kPlanes / 2 * kPair;  // of pixels, to the next
    static constexpr int kWholeSteps = (kTapPairs - 1) / 2 * kTaps;

    // Behind the last pair the last pixels of 64 read what is there.
    static constexpr int kStripBytes = kPairs * kPair + (kRowPixels + kTaps - 1) * kPiece - kPair;
    DEVICE static constexpr int word(int line, int word) {
        return line / 2 * kPair + word / 2 * kPiece + line % 2 * 8 + word % 2 * 4;
    }

    // Which piece the halves of a step are. They lie below each other; at last, where one pair is left, beside each other,
    // and the last but one again, without weight.
    DEVICE static constexpr int pair(int step, int half) {
        return step < kWholeSteps ? step / kTaps * 2 + half : kTapPairs - 1;
    }
    DEVICE static constexpr int tap(int step, int half) {
        return step < kWholeSteps ? step % kTaps : step - kWholeSteps + half;
    }
    DEVICE static constexpr bool counts(int step, int half) { return step < kSteps - 1 || half == 1; }
    DEVICE static constexpr int at(int step, int half) { return pair(step, half) * kPair + tap(step, half) * kPiece; }
    DEVICE static uint32_t mask(int step, int half, int q) {  // of word q of a piece
        const bool is_line = 2 * pair(step, half) + q / 2 < kTapRows && counts(step, half);
        return !is_line ? 0 : tap(step, half) == kTaps - 1 && q % 2 == 1 ? 0xffff : 0xffffffff;
    }

    // Weights: [step][half][channel][word], so eight channels are a core matrix.
    DEVICE static constexpr int weights(int step, int half, int channels) {
        return (step * 2 + half) * channels * kPiece;
    }
    DEVICE static TapWord tap_word(int i, int channels) {
        const int q = i % 4, half = i / 4 / channels % 2, step = i / 8 / channels;
        const int line = counts(step, half) ? 2 * pair(step, half) + q / 2 : kTapRows;
        return {i / 4 % channels, line, tap(step, half) * 4 + q % 2 * 2};
    }

    static_assert(kSteps == kWholeSteps + 2 && kTapPairs % 2 == 1 && kTaps == 3, "three pieces are left for two steps");
    static_assert(kStride * kPlanes % 2 == 0 && kTileColumns <= kRowPixels, "a window begins with a pair");
};

// The line that the last pair has and the image has not. Nothing that is not finite may lie in it.
DEVICE void clear_last_line(uint8_t* strip, int thread) {
    using Order = WarpgroupTaps;
    if (kLines % 2 == 1 && thread < kLineLength / 4) {
        *reinterpret_cast<uint2*>(strip + Order::word(kLines, 0) + thread * Order::kPiece) = make_uint2(0, 0);
    }
}

// Rows kFrom ... kTo of the two: sums[row][t][i] is pixel 16 w + g + 8 * (i / 2), channel 8 t + 2 q + i % 2.
template <class T, int kFrom, int kTo>
DEVICE void multiply_rows(float (&sums)[2][T::kTiles][4], const uint8_t* strip, const uint8_t* weights) {
    using Order = typename T::Order;
    const uint64_t below = matrix_descriptor(strip, Order::kPair, Order::kCore);
    const uint64_t beside = matrix_descriptor(strip, Order::kPiece, Order::kCore);
    const uint64_t b = matrix_descriptor(weights, Order::weights(0, 1, T::kChannels), Order::kCore);
    warpgroup_fence(sums);
#pragma unroll
    for (int step = 0; step < Order::kSteps; ++step) {
#pragma unroll
        for (int row = kFrom; row < kTo; ++row) {
            const int at = Order::at(step, 0) + row * Order::kRow;
            const uint64_t a = (step < Order::kWholeSteps ? below : beside) + at / 16;
            T::multiply_rows(sums[row], a, b + Order::weights(step, 0, T::kChannels) / 16);
        }
    }
    warpgroup_commit();
    warpgroup_wait<0>(sums);
}

// Both rows, with what is no tap masked.
template <class T>
DEVICE void multiply_rows_masked(float (&sums)[2][T::kTiles][4], const uint8_t* strip, const uint8_t* weights) {
    using Order = typename T::Order;
    const int lane = threadIdx.x % kWarpSize, q = lane % 4;
    strip += (threadIdx.x / kWarpSize * 16 + lane / 4) * Order::kPiece + q * 4;
    weights += lane * 4;
#pragma unroll 1
    for (int step = 0; step < Order::kSteps; ++step) {
        uint32_t a[kTileRows][4];
#pragma unroll
        for (int i = 0; i < 4 * kTileRows; ++i) {
            const int row = i / 4, half = i % 4 / 2;
            const uint8_t* from = strip + Order::at(step, half) + row * Order::kRow + i % 2 * Order::kCore;
            a[row][i % 4] = *reinterpret_cast<const uint32_t*>(from) & Order::mask(step, half, q);
        }
#pragma unroll
        for (int t = 0; t < T::kTiles; ++t) {
            uint32_t b[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint8_t* from = weights + Order::weights(step, half, T::kChannels) + t * Order::kCore;
                b[half] = *reinterpret_cast<const uint32_t*>(from);
            }
            T::multiply(sums[0][t], a[0], b[0], b[1]);
            T::multiply(sums[1][t], a[1], b[0], b[1]);
        }
    }
}

// Those of the two rows that are wanted, as far as it matters: one, where a walk begins with pooling or ends without.
template <class T>
DEVICE void multiply_warpgroup(float (&sums)[2][T::kTiles][4], const uint8_t* strip, const uint8_t* weights, bool special,
                               bool one_row) {
    constexpr int kOne = T::kStem ? 1 : 0;
    if (special) {
        multiply_rows_masked<T>(sums, strip, weights);
    } else if (one_row) {
        multiply_rows<T, kOne, kOne + 1>(sums, strip, weights);
    } else {
        multiply_rows<T, 0, kTileRows>(sums, strip, weights);
    }
}
