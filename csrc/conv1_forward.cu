// a = [relu](conv(x, weight) + bias), 11 x 11 with stride 4, and on request what follows it in one launch:
//
//   y = maxpool(lrn(a))  or  y = lrn(maxpool(a)),   lrn(a)_c = a_c (k + scale · Σ a_j²)^-beta,  j: c-2 ... c+2 inside the group,
//   windows of 3 x 3 with stride 2, place = the first tap that holds the maximum
//
// A block owns up to 56 columns of one image and walks down them two rows of `a` at a time, its weights resident in shared
// memory. In a step it loads the strip of the image under the two rows, each pixel converted once on its way; multiplies
// (conv1_tile.h, or conv1_warpgroup.h where that is asked for); and, when all warps are done with the strip, puts the rows of
// `a`, rounded, in its place: from there they go to memory as whole vectors, or are normalised, each number once, and pooled.
//
// With pooling, a step is one row of windows: the row of `a` above its two stays from the step before. So only the first step
// of a walk computes a row twice, and a tile's first column is the last of the tile before. Who computes a number that another
// block computes too does not write it. `a` and `place` are written only where asked for: without them nothing of the size of
// `a` reaches memory.
#include "conv1.h"

#include "conv1_stem.h"
#include "conv1_walk.h"
#include "conv1_warpgroup.h"

namespace {

// ---------------------------------------------------------------------------------------------------- sums to `a`

// The corner of the window of pixel m of the tile, in bytes of the strip.
template <class T> DEVICE int corner(int m, int columns) {
    const int row = m >= columns, column = m - row * columns;
    return row * kStride * kPlanes * T::kLine + column * kStride * T::kBytes;
}

// The pixel of the tile whose sums are this lane's i-th row of A; `end` if it is none's. `first`: of this warp's, or, for a
// warpgroup, whose rows are those of the tile, of all.
template <class T> DEVICE int pixel_of(int i, int first, int columns, int end) {
    const int g = threadIdx.x % kWarpSize / 4;
    if (!T::Order::kWarpgroup) {
        return first + g + 8 * i;
    }
    const int column = threadIdx.x / kWarpSize * 16 + g + i % 2 * 8, m = i / 2 * columns + column;
    return column < columns && m >= first ? m : end;
}

// bias, ReLU, rounding: this warp's sums into the rows of `a`, up to pixel end.
template <class T>
DEVICE void write_rows(uint8_t* rows, const float (&sums)[2][T::kTiles][4], const float* bias, bool relu, int first,
                       int columns, int end) {
    const int q = threadIdx.x % 4;
    const int channels = threadIdx.x / kWarpSize / T::kWarpsDown * T::kTiles * 8 + 2 * q;
#pragma unroll
    for (int t = 0; t < T::kTiles; ++t) {
        const int channel = channels + 8 * t;
        const float low_bias = bias[channel], high_bias = bias[channel + 1];
#pragma unroll
        for (int i = 0; i < kPixelRows; ++i) {
            const int m = pixel_of<T>(i, first, columns, end);
            float low = sums[i / 2][t][i % 2 * 2] + low_bias, high = sums[i / 2][t][i % 2 * 2 + 1] + high_bias;
            low = relu ? max_nan(low, 0) : low, high = relu ? max_nan(high, 0) : high;
            uint8_t* to = rows + m * T::kPixel + channel * T::kBytes;
            if (m < end && T::E::kPerWord == 2) {
                *reinterpret_cast<uint32_t*>(to) = T::E::pack(low, high);
            } else if (m < end) {
                *reinterpret_cast<uint2*>(to) = make_uint2(as_bits(low), as_bits(high));
            }
        }
    }
}

// The pixels of `a` that this block owns, from its first own column on, to memory.
template <class T>
DEVICE void store_rows(const uint8_t* rows, const Conv1Forward& p, const Walk& walk, int row, int begin, int end) {
    uint8_t* a = static_cast<uint8_t*>(p.a) + walk.image * p.out_height * p.out_width * T::kChannels * T::kBytes;
    for (int i = begin * T::kVectors + threadIdx.x; i < end * T::kVectors; i += T::kThreads) {
        const int m = i / T::kVectors, vector = i % T::kVectors;
        const int down = m >= walk.columns, column = m - down * walk.columns;
        if (!T::kStem || column > 0 || walk.first_column == 0) {
            const int at = ((row + down) * p.out_width + walk.first_column + column) * T::kVectors + vector;
            reinterpret_cast<uint4*>(a)[at] = *reinterpret_cast<const uint4*>(rows + m * T::kPixel + vector * 16);
        }
    }
}

// ---------------------------------------------------------------------------------------------------- normalised and pooled

// One row of windows, its first row of pixels `carry`.
template <class T>
DEVICE void pool_row(const uint8_t* carry, const uint8_t* rows, const Conv1Forward& p, const Walk& walk, int step) {
    constexpr int kAll = T::kChannels / kVector;
    const int64_t image = walk.image * p.pooled_height * p.pooled_width * T::kChannels;
    uint8_t* y = static_cast<uint8_t*>(p.y) + image * T::kBytes;
    for (int i = threadIdx.x; i < walk.units * kAll; i += T::kThreads) {
        const int unit = i / kAll, vector = i % kAll, column = walk.first_unit + unit;
        if (column >= p.pooled_width) {
            return;
        }
        PoolWindow window;
        window.row[0] = carry + 2 * unit * T::kPixel;
        window.row[1] = rows + 2 * unit * T::kPixel;
        window.row[2] = window.row[1] + walk.columns * T::kPixel;
        window.rows = p.out_height - 2 * step, window.columns = p.out_width - 2 * column;
        const int at = vector * kVector * T::kBytes;
        const int to = ((step * p.pooled_width + column) * kAll + vector) * kVector;
        float best[kVector];
        if (p.place != nullptr) {
            uint32_t place[2];
            pool_places<T>(best, place, window, at);
            *reinterpret_cast<uint2*>(p.place + image + to) = make_uint2(place[0], place[1]);
        } else {
            uint32_t words[T::kWords];
            pool_words<T>(words, window, at);
            unpack<T>(best, 0, words);
        }
        if (p.pool_first) {
            normalise_pooled<T>(best, window, vector, p);
        }
        store<T>(y + to * T::kBytes, best);
    }
}

// ---------------------------------------------------------------------------------------------------- the kernel

// The weights of a part of the channels, on their way.
template <class T> DEVICE void fetch_weights(uint8_t* weights, const void* packed, int part) {
    const uint8_t* from = static_cast<const uint8_t*>(packed) + part * T::kWeightBytes;
    for (int i = threadIdx.x * 16; i < T::kWeightBytes; i += T::kThreads * 16) {
        copy_async_16(weights + i, from + i);
    }
    copy_async_commit();
}

// The sums of this warp's 32 pixels, of which `count` are wanted, and its channels.
template <class T, int kPart>
DEVICE void multiply_part(float (&sums)[2][T::kTiles][4], const uint8_t* strip, const int (&corners)[kPixelRows],
                          const uint8_t* weights, int count) {
    constexpr int kFirst = kPart * T::kPartTiles;
    const int across = threadIdx.x / kWarpSize / T::kWarpsDown;
    weights += across * T::kTiles / 2 * T::Order::kSteps * T::kFragment + threadIdx.x % kWarpSize * 16;
    if (count > kWarpPixels / 2) {
        multiply_tile<T, 2, kFirst>(sums, strip, corners, weights);
    } else if (count > 0) {
        multiply_tile<T, 1, kFirst>(sums, strip, corners, weights);
    }
}

// Waits for the strip and the weights; whether a number of the strip is not finite, as far as a warpgroup has to know.
template <class T> DEVICE bool wait_for_strip(bool special) {
    copy_async_wait<0>();
    if (!T::Order::kWarpgroup) {
        __syncthreads();
        return false;
    }
    proxy_fence();
    return barrier_vote(special);
}

// The sums of this warp's 32 pixels, `first` and those behind it, and all channels.
template <class T>
DEVICE void multiply_warp(float (&sums)[2][T::kTiles][4], const uint8_t* strip, uint8_t* weights, const void* packed,
                          int first, int columns, int end) {
    int corners[kPixelRows];
#pragma unroll
    for (int i = 0; i < kPixelRows; ++i) {
        const int m = pixel_of<T>(i, first, columns, end);
        corners[i] = corner<T>(m < end ? m : end - 1, columns);
    }
    multiply_part<T, 0>(sums, strip, corners, weights, end - first);
    if (T::kParts > 1) {
        __syncthreads();
        fetch_weights<T>(weights, packed, 1);
        copy_async_wait<0>();
        __syncthreads();
        multiply_part<T, T::kParts - 1>(sums, strip, corners, weights, end - first);
    }
}

// What becomes of the two rows of `a` (pixels begin ... end) that begin at row `row`.
template <class T>
DEVICE void finish_rows(uint8_t* carry, uint8_t* rows, const Conv1Forward& p, const Walk& walk, int step, int begin, int end) {
    const int row = 2 * step + T::kStem;
    if (p.a != nullptr && (begin == 0 || step < 0)) {
        store_rows<T>(rows, p, walk, row, begin, end);
    }
    if (!T::kStem) {
        return;
    }
    if (!p.pool_first) {
        __syncthreads();
        for (int m = begin + threadIdx.x; m < end; m += T::kThreads) {
            normalise_pixel<T>(rows + m * T::kPixel, p);
        }
        __syncthreads();
    }
    if (begin == 0 && step < p.pooled_height) {
        pool_row<T>(carry, rows, p, walk, step);
    }
    __syncthreads();
    if (end == 2 * walk.columns) {
        for (int i = threadIdx.x; i < walk.columns * T::kPixel / 16; i += T::kThreads) {
            reinterpret_cast<uint4*>(carry)[i] = reinterpret_cast<const uint4*>(rows + walk.columns * T::kPixel)[i];
        }
    }
}

template <class T> __global__ void __launch_bounds__(T::kThreads, T::kBlocks) forward(Conv1Forward p, Tiling tiling) {
    DYNAMIC_SHARED(uint8_t, weights, 0, T::kWeightBytes);
    DYNAMIC_SHARED(float, bias, T::kBiasAt, T::kChannels);
    DYNAMIC_SHARED(uint8_t, strip, T::kStripAt, T::kSharingBytes);  // by turns: the rows of `a`
    DYNAMIC_SHARED(uint8_t, carry, T::kCarryAt, T::kCarryBytes);
    const Walk walk = find_walk(tiling, p, T::kStem);
    const int warp = threadIdx.x / kWarpSize % T::kWarpsDown;

    if (T::kParts == 1) {
        fetch_weights<T>(weights, p.packed, 0);
    }
    for (int c = threadIdx.x; c < T::kChannels; c += T::kThreads) {
        const void* b = p.bias;
        bias[c] = b == nullptr           ? 0
                  : T::E::kPerWord == 1  ? static_cast<const float*>(b)[c]
                                         : T::E::first(static_cast<const uint16_t*>(b)[c]);
    }
    for (int step = walk.first_step - T::kStem; step < walk.last_step; ++step) {
        const int row = 2 * step + T::kStem, begin = step < walk.first_step ? walk.columns : 0;
        const int end = row + 1 < p.out_height ? 2 * walk.columns : walk.columns;
        const int top = row * kStride - p.in.pad_top, left = walk.first_column * kStride - p.in.pad_left;
        const int length = (walk.columns - 1) * kStride + kTapColumns;
        bool special = load_strip<T>(strip, p.in, walk.image, top, left, length);

        // The half empty share goes round, so that no scheduler is always the idle one.
        const int share = T::Order::kWarpgroup ? 0 : (warp + step + 1) % T::kWarpsDown, first = begin + share * kWarpPixels;
        float sums[2][T::kTiles][4] = {};
        if (T::kParts > 1) {
            fetch_weights<T>(weights, p.packed, 0);
        }
        if (T::Order::kWarpgroup) {
            clear_last_line(strip, threadIdx.x);
        }
        special = wait_for_strip<T>(special);
        if (step + 1 < walk.last_step) {
            prefetch_strip<T>(p.in, walk.image, top, left, length);
        }
        if constexpr (T::Order::kWarpgroup) {
            multiply_warpgroup<T>(sums, strip, weights, special, T::kStem ? begin > 0 : end == walk.columns);
        } else {
            multiply_warp<T>(sums, strip, weights, p.packed, first, walk.columns, end);
        }
        __syncthreads();
        write_rows<T>(strip, sums, bias, p.relu, first, walk.columns, end);
        __syncthreads();
        finish_rows<T>(carry, strip, p, walk, step, begin, end);
        __syncthreads();
    }
}

// ---------------------------------------------------------------------------------------------------- launchers

// Calls `f` with the traits of the problem: all weights at once, or half of them where a block has less shared memory.
template <ElementType kType, int kChannels, bool kStem, class F> auto with_parts(const Conv1Forward& p, F f) {
    if constexpr (kType != ElementType::kFloat32) {
        if (p.warpgroups) {
            return f(Conv1Traits<kType, kChannels, kStem, 1, WarpgroupTaps>());
        }
    }
    using Whole = Conv1Traits<kType, kChannels, kStem, 1>;
    if constexpr (kChannels == 96) {
        if (shared_memory_limit() < Whole::kSharedBytes) {
            return f(Conv1Traits<kType, kChannels, kStem, 2>());
        }
    }
    return f(Whole());
}

template <ElementType kType, bool kStem, class F> auto with_channels(const Conv1Forward& p, F f) {
    return p.channels == 48   ? with_parts<kType, 48, kStem>(p, f)
           : p.channels == 64 ? with_parts<kType, 64, kStem>(p, f)
                              : with_parts<kType, 96, kStem>(p, f);
}

template <ElementType kType, class F> auto with_pool(const Conv1Forward& p, F f) {
    return p.y != nullptr ? with_channels<kType, true>(p, f) : with_channels<kType, false>(p, f);
}

template <class F> auto with_traits(const Conv1Forward& p, ElementType type, F f) {
    return type == ElementType::kFloat32   ? with_pool<ElementType::kFloat32>(p, f)
           : type == ElementType::kFloat16 ? with_pool<ElementType::kFloat16>(p, f)
                                           : with_pool<ElementType::kBFloat16>(p, f);
}

}  // namespace

Conv1Launch conv1_forward_launch(const Conv1Forward& p, ElementType type) {
    return with_traits(p, type, [&p](auto traits) {
        using T = decltype(traits);
        const Tiling tiling = lay_out<T>(p);
        return Conv1Launch{p.in.images * tiling.tiles * tiling.walks, T::kThreads, T::kSharedBytes,
                           T::Order::kDepth, kKernel * kKernel * kPlanes, products<T>(p, tiling) * p.in.images};
    });
}

int64_t conv1_packed_bytes(const Conv1Forward& p, ElementType type) {
    return with_traits(p, type, [](auto traits) {
        using T = decltype(traits);
        return int64_t{T::kWeightBytes} * T::kParts;
    });
}

const char* conv1_forward_refusal(const Conv1Forward& p, ElementType type) {
    constexpr int64_t kMost = int64_t{1} << 31;
    if (p.channels != 48 && p.channels != 64 && p.channels != 96) {
        return "the weights are for 48, 64 or 96 channels, no other number";
    }
    if (p.in.height < 1 || p.in.width < 1) {
        return "an empty image";
    }
    if (p.out_height < 1 || p.out_width < 1) {
        return "the padded image is smaller than the kernel of 11 x 11";
    }
    if (int64_t{kPlanes} * p.in.height * p.in.width >= kMost ||
        int64_t{p.out_height} * p.out_width * p.channels * 4 >= kMost) {
        return "an image of 2^31 numbers or a result of 2^31 bytes";
    }
    if (p.y != nullptr && (p.pooled_height < 1 || p.pooled_width < 1)) {
        return "no window of the pool fits into the picture";
    }
    if (p.y != nullptr && (p.pooled_height > p.out_height / 2 || p.pooled_width > p.out_width / 2)) {
        return "the pool has padding";
    }
    if (p.y != nullptr && (p.groups < 1 || p.channels % (p.groups * kVector) != 0)) {
        return "a group is not a multiple of 8 channels";
    }
    if (p.warpgroups && type != ElementType::kFloat32 && !has_warpgroups()) {
        return "wgmma is for devices of compute capability 9.0, and this one is another";
    }
    const Conv1Launch launch = conv1_forward_launch(p, type);
    if (launch.blocks >= kMost) {
        return "2^31 blocks or more";
    }
    return launch.shared_bytes > shared_memory_limit() ? "the device has too little shared memory for a block" : nullptr;
}

void conv1_forward(const Conv1Forward& p, ElementType type, void* stream) {
    with_traits(p, type, [&p, stream](auto traits) {
        using T = decltype(traits);
        const Tiling tiling = lay_out<T>(p);
        const unsigned words = T::Order::kDepth * T::kChannels / T::E::kPerWord;
        launch(pack<T::kType, typename T::Order>, dim3((words + 255) / 256), dim3(256), 0, stream, p);
        const int64_t blocks = p.in.images * tiling.tiles * tiling.walks;
        launch(forward<T>, dim3(static_cast<unsigned>(blocks)), dim3(T::kThreads), T::kSharedBytes, stream, p, tiling);
    });
}
