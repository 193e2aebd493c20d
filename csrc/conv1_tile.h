// What one block of conv1_forward.cu multiplies: two rows of up to 56 output pixels, as an implicit GEMM.
//
//   sums[pixel, channel] = Σ_k A[pixel, k] W[k, channel],    k = (tap row r, tap column t), r = 3 * row + plane < 33, t < 12
//
// The strip is the image under the two rows, 15 rows of three planes, each line 232 numbers, the lines of a pixel row side by
// side: line 3 * row + plane. The 33 lines of a pixel's window then follow each other, whatever the plane, so A is never
// formed: the word of tap (r, t) lies r lines and t numbers behind the pixel's corner, and the corners of neighbouring pixels
// are four numbers apart. The twelfth column belongs to no window. Its weight is zero, and so is what multiplies it: an
// infinite pixel there would make NaN of zero.
//
// Lane (g, q) holds rows g and g + 8 of A (see tensor_core.h). Which taps its words are repeats after three steps of K, in
// which the taps come to the end of a row: a turn. W lies in the order in which lanes want it (`pack`), so a load of 16 bytes
// is the B of two products of 8 channels.
#pragma once

#include "conv1.h"
#include "warpgroup.h"
#include "vectors.h"

constexpr int kKernel = 11, kStride = 4, kPlanes = 3;
constexpr int kTapRows = kKernel * kPlanes, kTapColumns = kKernel + 1;
constexpr int kTileRows = 2, kTileColumns = 56;  // output pixels
constexpr int kStripRows = (kTileRows - 1) * kStride + kKernel, kLines = kStripRows * kPlanes;
constexpr int kLineLength = (kTileColumns - 1) * kStride + kTapColumns;
constexpr int kWarpSize = 32, kWarpPixels = 32, kPixelRows = 4;  // of A that a lane holds: g, g + 8, g + 16, g + 24

// ---------------------------------------------------------------------------------------------------- the order of the taps

// What a word of the packed weights holds: this channel's taps from `column` on; zero outside 33 rows of 11.
struct TapWord {
    int channel, row, column;
};

// Lines of numbers in the strip, rows of words in K, kPerWord numbers a word.
template <int kPerWord> struct TapRows {
    static constexpr bool kWarpgroup = false;
    static constexpr int kDepth = 400, kSteps = kDepth / (8 * kPerWord);
    static constexpr int kWords = kTapColumns / kPerWord;  // of a tap row
    static constexpr int kStripBytes = kLines * kLineLength / kPerWord * 4;
    DEVICE static constexpr int word(int line, int word) { return (line * (kLineLength / kPerWord) + word) * 4; }
    DEVICE static constexpr int slot(int step, bool high) { return 8 * step + 4 * high; }  // of q = 0
    DEVICE static constexpr int offset(int step, bool high, int line) {
        return slot(step, high) / kWords * line + slot(step, high) % kWords * 4;
    }

    // The weights as lanes want them: [pair of tiles of 8 channels][step][lane][tile of the pair, half of the step].
    DEVICE static TapWord tap_word(int i, int) {
        const int lane = i / 4 % kWarpSize, step = i / 128 % kSteps, tile = i / 128 / kSteps * 2 + i % 4 / 2;
        const int of_tap = slot(step, i % 2) + lane % 4;
        return {tile * 8 + lane / 4, of_tap / kWords, of_tap % kWords * kPerWord};
    }
    static_assert(kTapRows * kTapColumns <= kDepth, "all taps");
    static_assert(kKernel * kKernel * kPlanes * 100 >= kDepth * 84, "K waste within 16%");
};

// How tensor cores take a type: for the words of a step, `high` being the second half of its columns, where they lie behind
// lane q's first word, from which of two bases, and which of two masks makes the twelfth column zero.
template <ElementType kType> struct Taps : TapRows<2> {  // bf16 and half: a word is the taps 2t, 2t + 1; a step is 8 words wide
    static constexpr int kTurnRows = 4, kTurns = 8, kTail = 1;
    DEVICE static constexpr int base(int step, bool high) { return slot(step, high) % kWords == 4; }  // ends in the next row
    DEVICE static constexpr int mask(int step, bool high) {
        return slot(step, high) % kWords == 4 ? 0 : slot(step, high) % kWords == 2 ? 1 : -1;
    }
    DEVICE static int second_base(int q, int line, bool tail) { return q < 2 ? 0 : tail ? -16 : line - 24; }
    DEVICE static uint32_t mask_word(int which, int q, bool tail) {
        return which == 0 ? q == 1 ? 0xffff : tail && q > 1 ? 0 : 0xffffffff : q == 3 ? 0xffff : 0xffffffff;
    }
};

template <> struct Taps<ElementType::kFloat32> : TapRows<1> {  // tf32: a word is one tap; a step is 2 x 4 taps, 3 x 4 are a row
    static constexpr int kTurnRows = 2, kTurns = 16, kTail = 2;
    DEVICE static constexpr int base(int step, bool high) { return step == 1 && high; }  // in the tail behind the last row
    DEVICE static constexpr int mask(int step, bool high) {
        return slot(step, high) % kWords == 8 ? 0 : step == 1 && high ? 1 : -1;
    }
    DEVICE static int second_base(int, int line, bool tail) { return tail ? -line : 0; }
    DEVICE static uint32_t mask_word(int which, int q, bool tail) {
        return which == 0 ? q == 3 ? 0 : 0xffffffff : tail ? 0 : 0xffffffff;
    }
};

template <class T>
constexpr bool kWholeTurns = T::kSteps == 3 * T::kTurns + T::kTail && T::kTurnRows * T::kWords == 24 &&
                             T::kTurns * T::kTurnRows == kTapRows - 1;
static_assert(kWholeTurns<Taps<ElementType::kBFloat16>> && kWholeTurns<Taps<ElementType::kFloat32>>, "a loop of turns");

// ---------------------------------------------------------------------------------------------------- traits

// TapOrder says how numbers lie in the strip and weights in their order: Taps, or WarpgroupTaps of conv1_warpgroup.h.
template <ElementType kElement, int kAllChannels, bool kWithPool, int kWeightParts, class TapOrder = Taps<kElement>>
struct Conv1Traits {
    using E = Element<kElement>;
    using Order = TapOrder;
    static constexpr ElementType kType = kElement;
    static constexpr bool kStem = kWithPool;
    static constexpr int kChannels = kAllChannels, kParts = kWeightParts;  // channels / kParts have weights there at once
    static constexpr int kBytes = E::kBytes, kWords = kVector / E::kPerWord;
    static constexpr int kVectors = kChannels * kBytes / 16;  // of 16 bytes, of a pixel

    // tf32 leaves room for one block on a multiprocessor, so that one has eight warps.
    static constexpr bool kTf32 = kElement == ElementType::kFloat32;
    static constexpr int kWarpsDown = 4, kWarpsAcross = kTf32 && kParts == 1 && kChannels > 48 ? 2 : 1;
    static constexpr int kThreads = kWarpsDown * kWarpsAcross * kWarpSize;
    static constexpr int kTiles = kChannels / 8 / kWarpsAcross, kPartTiles = kTiles / kParts;  // of 8 channels, of a warp
    static_assert(kWarpsDown * kWarpPixels >= kTileRows * kTileColumns, "each pixel has its warp");
    static_assert(kPartTiles % 2 == 0, "B comes for two tiles at once");
    static_assert(kPartTiles * kParts * kWarpsAcross * 8 == kChannels, "each channel has its warp");
    static_assert(kParts == 1 || kWarpsAcross == 1, "a part is the same channels for all warps");

    // With pooling a tile is 27 windows wide: 55 pixels, the first of which the tile before has too.
    static constexpr int kColumns = kStem ? kTileColumns - 1 : kTileColumns;

    // Shared memory: weights, bias, and then the strip and the rows of `a` by turns, beside the one row that stays.
    static constexpr int kLine = kLineLength * kBytes, kLineWords = kLine / 4;
    static constexpr int kPixel = kChannels * kBytes + 16;  // odd in units of 16: eight neighbours, eight groups of banks
    static constexpr int kFragment = kWarpSize * 16;          // B of two tiles in one step
    static constexpr int kWeightBytes = Order::kDepth * kChannels / kParts * kBytes;
    static constexpr int kBiasAt = kWeightBytes, kStripAt = kBiasAt + kChannels * 4;
    static constexpr int kRowsBytes = kTileRows * kColumns * kPixel;
    static constexpr int kSharingBytes = Order::kStripBytes > kRowsBytes ? Order::kStripBytes : kRowsBytes;
    static constexpr int kCarryAt = kStripAt + kSharingBytes, kCarryBytes = kStem ? kColumns * kPixel : 0;
    static constexpr int kSharedBytes = kCarryAt + kCarryBytes;
    static constexpr int kFitting = (228 << 10) / (kSharedBytes + 1024);  // blocks on a multiprocessor of sm_90
    static constexpr int kBlocks = kFitting < 1 ? 1 : kFitting > 3 ? 3 : kFitting;

    static_assert(Order::kDepth == Order::kSteps * 8 * E::kPerWord, "whole steps");
    static_assert(!Order::kWarpgroup || (!kTf32 && kThreads == 128 && kParts == 1), "four warps, 16-bit numbers");
    static_assert(kTf32 || kLineWords % 32 == 20, "taps 8 ... 11 and 0 ... 3 in different banks");
    static_assert(kPixel / 16 % 2 == 1 && kCarryAt % 16 == 0 && kStripAt % 16 == 0, "vectors are aligned");
    static_assert(kParts > 1 || kSharedBytes <= 227 << 10, "a block fits on sm_90");

    DEVICE static void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        kType == ElementType::kBFloat16  ? mma_bf16(d, a, b0, b1)
        : kType == ElementType::kFloat16 ? mma_half(d, a, b0, b1)
                                         : mma_tf32(d, a, b0, b1);
    }
    template <class Sums> DEVICE static void multiply_rows(Sums& d, uint64_t a, uint64_t b) {
        kType == ElementType::kBFloat16 ? warpgroup_mma_bf16(d, a, b) : warpgroup_mma_half(d, a, b);
    }
    // NaN from the first word on that holds an infinite or NaN number.
    DEVICE static uint32_t watch(uint32_t so_far, uint32_t word) {
        return kType == ElementType::kBFloat16 ? add_zero_times_bf16x2(so_far, word) : add_zero_times_half2(so_far, word);
    }
    DEVICE static uint32_t encode(float first, float second) {
        return kType == ElementType::kFloat32 ? float_to_tf32(first) : E::pack(first, second);
    }
};

// ---------------------------------------------------------------------------------------------------- the strip

template <Conv1Source kSource> DEVICE float element(const void* x, int at) {
    switch (kSource) {
        case Conv1Source::kFloat32: return static_cast<const float*>(x)[at];
        case Conv1Source::kFloat16: return half_to_float(static_cast<const uint16_t*>(x)[at]);
        case Conv1Source::kBFloat16: return Element<ElementType::kBFloat16>::first(static_cast<const uint16_t*>(x)[at]);
        case Conv1Source::kUint8: return static_cast<const uint8_t*>(x)[at];
    }
    return 0;
}

// The strip whose corner is pixel (top, left) of the image, as far as `length` numbers of a line; outside there are zeros. A
// warp takes every n-th row of pixels, lanes take words: neighbours in memory. All loads of a row are under way together, each
// from an address inside the image; `keep` makes zeros of what lies outside. For a warpgroup, whether this thread has seen a
// number that is not finite.
template <class T, Conv1Source kSource>
DEVICE bool load_strip_of(uint8_t* strip, const Conv1Images& in, const void* image, int top, int left, int length) {
    constexpr int kPerWord = T::E::kPerWord, kTurns = (T::kLineWords + kWarpSize - 1) / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    int column[kTurns * kPerWord];
    uint32_t keep[kTurns];
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
        const int word = lane + i * kWarpSize;
        keep[i] = 0;
#pragma unroll
        for (int j = 0; j < kPerWord; ++j) {
            const int x = left + word * kPerWord + j;
            const bool exists = x >= 0 && x < in.width && word * kPerWord < length;
            column[i * kPerWord + j] = exists ? x * in.column_stride : 0;
            keep[i] |= exists ? (kPerWord == 1 ? 0xffffffff : 0xffffu << 16 * j) : 0;
        }
    }
    float mean[kPlanes], scale[kPlanes];
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
        mean[plane] = in.mean != nullptr ? in.mean[plane] : 0, scale[plane] = in.mean != nullptr ? in.scale[plane] : 1;
    }
    uint32_t watched = 0;
#pragma unroll 1
    for (int row = threadIdx.x / kWarpSize; row < kStripRows; row += T::kThreads / kWarpSize) {
        const bool inside = top + row >= 0 && top + row < in.height;
        const int from = inside ? (top + row) * in.row_stride : 0;
        const uint32_t keep_row = inside ? 0xffffffff : 0;
        float values[kPlanes][kTurns * kPerWord];
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
            for (int i = 0; i < kTurns * kPerWord; ++i) {
                values[plane][i] = element<kSource>(image, from + plane * in.plane_stride + column[i]);
            }
        }
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
            for (int i = 0; i < kTurns; ++i) {
                const float first = (values[plane][i * kPerWord] - mean[plane]) * scale[plane];
                const float second = (values[plane][(i + 1) * kPerWord - 1] - mean[plane]) * scale[plane];
                const int at = T::Order::word(row * kPlanes + plane, lane + i * kWarpSize);
                const uint32_t word = T::encode(first, second) & keep[i] & keep_row;
                watched = T::Order::kWarpgroup ? T::watch(watched, word) : 0;
                if (lane + i * kWarpSize < T::kLineWords) {
                    *reinterpret_cast<uint32_t*>(strip + at) = word;
                }
            }
        }
    }
    return watched != 0;
}

DEVICE int source_bytes(Conv1Source source) {
    return source == Conv1Source::kFloat32 ? 4 : source == Conv1Source::kUint8 ? 1 : 2;
}

template <class T>
DEVICE bool load_strip(uint8_t* strip, const Conv1Images& in, int64_t image, int top, int left, int length) {
    constexpr Conv1Source kFloat32 = Conv1Source::kFloat32, kFloat16 = Conv1Source::kFloat16;
    constexpr Conv1Source kBFloat16 = Conv1Source::kBFloat16, kUint8 = Conv1Source::kUint8;
    const void* x = static_cast<const uint8_t*>(in.x) + image * in.image_stride * source_bytes(in.source);
    switch (in.source) {
        case kFloat32: return load_strip_of<T, kFloat32>(strip, in, x, top, left, length);
        case kFloat16: return load_strip_of<T, kFloat16>(strip, in, x, top, left, length);
        case kBFloat16: return load_strip_of<T, kBFloat16>(strip, in, x, top, left, length);
        case kUint8: return load_strip_of<T, kUint8>(strip, in, x, top, left, length);
    }
    return false;
}

// Brings the rows to L2 that the strip below this one has and this one has not.
template <class T> DEVICE void prefetch_strip(const Conv1Images& in, int64_t image, int top, int left, int length) {
    constexpr int kCacheLine = 128, kRows = kTileRows * kStride;
    const int bytes = source_bytes(in.source), first = left > 0 ? left : 0, planes = in.plane_stride == 1 ? 1 : kPlanes;
    const int last = left + length < in.width ? left + length : in.width;
    const int span = (last - first) * in.column_stride * bytes, chunks = (span + kCacheLine - 1) / kCacheLine;
    const uint8_t* x = static_cast<const uint8_t*>(in.x) + image * in.image_stride * bytes;
    for (int i = threadIdx.x; i < kRows * planes * chunks; i += T::kThreads) {
        const int y = top + kStripRows + i / chunks / planes;
        if (y >= 0 && y < in.height) {
            const int at = y * in.row_stride + first * in.column_stride + i / chunks % planes * in.plane_stride;
            prefetch(x + int64_t{at} * bytes + i % chunks * kCacheLine);
        }
    }
}

// ---------------------------------------------------------------------------------------------------- the product

// A step of K for kHalves times 16 pixels and a part's channels of this warp, from tile kFirst on.
template <class T, int kStep, int kHalves, int kFirst>
DEVICE void multiply_step(float (&sums)[2][T::kTiles][4], const uint8_t* strip, const int (&at)[2][kPixelRows],
                          const uint32_t (&mask)[2], const uint8_t* weights) {
    using Order = typename T::Order;
    uint32_t a[kHalves][4];
#pragma unroll
    for (int i = 0; i < 4 * kHalves; ++i) {
        const int half = i / 4, row = half * 2 + i % 2, which = Order::mask(kStep, i % 4 / 2);
        const int from = at[Order::base(kStep, i % 4 / 2)][row] + Order::offset(kStep, i % 4 / 2, T::kLine);
        const uint32_t word = *reinterpret_cast<const uint32_t*>(strip + from);
        a[half][i % 4] = which < 0 ? word : word & mask[which < 0 ? 0 : which];
    }
#pragma unroll
    for (int t = 0; t < T::kPartTiles; t += 2) {
        const uint4 b = *reinterpret_cast<const uint4*>(weights + (t / 2 * T::Order::kSteps + kStep) * T::kFragment);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            T::multiply(sums[half][kFirst + t], a[half], b.x, b.y);
            T::multiply(sums[half][kFirst + t + 1], a[half], b.z, b.w);
        }
    }
}

// All of K. corner[i]: of the window of the lane's i-th pixel, bytes from the strip's start; weights: this lane's.
template <class T, int kHalves, int kFirst>
DEVICE void multiply_tile(float (&sums)[2][T::kTiles][4], const uint8_t* strip, const int (&corner)[kPixelRows],
                          const uint8_t* weights) {
    using Order = typename T::Order;
    const int q = threadIdx.x % 4;
    uint32_t mask[2] = {Order::mask_word(0, q, false), Order::mask_word(1, q, false)};
    int at[2][kPixelRows];
#pragma unroll
    for (int i = 0; i < kPixelRows; ++i) {
        at[0][i] = corner[i] + q * 4;
        at[1][i] = at[0][i] + Order::second_base(q, T::kLine, false);
    }
#pragma unroll 1
    for (int turn = 0; turn < Order::kTurns; ++turn) {
        multiply_step<T, 0, kHalves, kFirst>(sums, strip, at, mask, weights);
        multiply_step<T, 1, kHalves, kFirst>(sums, strip, at, mask, weights);
        multiply_step<T, 2, kHalves, kFirst>(sums, strip, at, mask, weights);
#pragma unroll
        for (int i = 0; i < kPixelRows; ++i) {
            at[0][i] += Order::kTurnRows * T::kLine;
            at[1][i] += Order::kTurnRows * T::kLine;
        }
        weights += 3 * T::kFragment;
    }
#pragma unroll
    for (int i = 0; i < kPixelRows; ++i) {  // what lies behind the last tap row is neither read nor counted
        at[1][i] = at[0][i] + Order::second_base(q, T::kLine, true);
    }
    mask[0] = Order::mask_word(0, q, true), mask[1] = Order::mask_word(1, q, true);
    multiply_step<T, 0, kHalves, kFirst>(sums, strip, at, mask, weights);
    if (Order::kTail == 2) {
        multiply_step<T, 1, kHalves, kFirst>(sums, strip, at, mask, weights);
    }
}

// ---------------------------------------------------------------------------------------------------- the weights

// The weights in the order in which the product wants them.
template <ElementType kType, class Order>
__global__ void __launch_bounds__(256) pack(Conv1Forward p) {
    using E = Element<kType>;
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= p.channels * Order::kDepth / E::kPerWord) {
        return;
    }
    const TapWord tap = Order::tap_word(i, p.channels);
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < E::kPerWord; ++j) {
        if (tap.row < kTapRows && tap.column + j < kKernel) {
            const int* strides = p.weight_strides;
            const int at = tap.channel * strides[0] + tap.row % kPlanes * strides[1] + tap.row / kPlanes * strides[2] +
                           (tap.column + j) * strides[3];
            word |= E::kPerWord == 1 ? float_to_tf32(static_cast<const float*>(p.weight)[at])
                                     : static_cast<uint32_t>(static_cast<const uint16_t*>(p.weight)[at]) << 16 * j;
        }
    }
    static_cast<uint32_t*>(p.packed)[i] = word;
}
