// The weight and the bias gradient of a convolution 11 x 11, stride 4, of three colours:
//
//   dW[o, c, ky, kx] = Σ g[n, oh, ow, o] v(n, c, 4 oh + ky - pad_top, 4 ow + kx - pad_left)        db[o] = Σ g[n, oh, ow, o]
//
// g = grad, zero where a <= 0; v = (x - mean[c]) scale[c] rounded to the arithmetic type, zero outside the image.
//
// As a product on the tensor cores: M = channels o, N = taps, K = pixels (n, oh, ow). A block keeps the whole of dW in its
// registers, takes its share of all output rows one after another, and writes its sums once; a second kernel adds the
// blocks' sums in their order. Which rows are whose depends on the sizes and on the number of multiprocessors alone.
//
// A row of output pixels needs three rows of cells (conv1_backward_device.h). They lie in a ring of four, chunk by chunk, 16
// bytes a cell (32 of tf32): while three are multiplied the fourth is filled. For a tile (conv1_sums.h) the cells of eight
// neighbouring pixels are 128 bytes in a row, wherever they start: a transposed ldmatrix loads them without a bank conflict
// and without a copy for each tap. Pixels of the gradient lie an odd number of 16 bytes apart, for the same reason.
//
// The gradient's row comes by asynchronous copies and is masked in place by the thread that copied it, the image's row comes
// through registers (conv1_rows.h). Both are asked for at the start of a row's products and put down among them.
#include "conv1_rows.h"
#include "conv1_sums.h"

#include <algorithm>
#include <type_traits>

namespace {

using namespace conv1_grad;

constexpr int kStripColumns = 56;               // output pixels of a row that a block takes: 3 · 16 + 8
constexpr int kCells = kStripColumns + kWindow - 1;  // under them
constexpr int kEarlyColumns = 32;               // multiplied while what a step has asked for is on its way
constexpr int kRing = 4;
constexpr int kFewestRows = 2;                  // of a block: its first costs two more rows of cells
static_assert(kCells * kStride <= kThreads, "a thread for each image column");

// ---------------------------------------------------------------------------------------------------- traits

template <ElementType type, int channels> struct Traits {
    static constexpr ElementType kType = type;
    static constexpr int kChannels = channels;
    using Op = Operand<kType>;
    static constexpr int kBytes = Op::kBytes, kColumns = kStripColumns;
    static constexpr int kWarpsM = kChannels == 96 ? 2 : 1, kWarpsN = kWarps / kWarpsM;
    static constexpr int kM = kChannels / 16 / kWarpsM, kN = (kTiles + kWarpsN - 1) / kWarpsN;  // tiles of a warp
    static constexpr int kLoads = kBytes == 4 ? kN : (kN + 1) / 2;  // an ldmatrix brings two tiles
    static constexpr int kVectors = kChannels / Op::kVectorSize, kPixels = kThreads / kVectors;  // threads along a row of g
    static constexpr int kItems = (kColumns + kPixels - 1) / kPixels;
    static constexpr int kSums = kM * kN * 4 * kThreads;  // of a block
    static constexpr bool kBiasTile = kBytes == 2;  // tf32 would round what is summed
    static constexpr int kPartial = kSums + (kBiasTile ? 0 : kChannels);  // floats of a block
    static_assert(kTiles < kN * kWarpsN, "the last warp has a tile to spare");
    // Shared memory: the ring, 64 cells a row, and 16 zeros; two rows of g; a row of `a`.
    static constexpr int kCellBytes = kChunk * kBytes, kRowBytes = 64 * kCellBytes, kChunkBytes = kRing * kRowBytes;
    static constexpr int kRowBits = (kRing - 1) * kRowBytes;  // of an offset: the row in the ring
    static constexpr int kZeros = kChunks * kChunkBytes, kImageBytes = kZeros + 128;
    static constexpr int kPitch = (kChannels + 8) * kBytes, kGradBytes = kColumns * kPitch;
    static constexpr int kMaskBytes = kColumns * kChannels * kBytes;
    static constexpr int kSharedBytes = kImageBytes + 2 * kGradBytes + kMaskBytes;
    static_assert(kCells <= 64 && (kRing & (kRing - 1)) == 0, "the row is two bits of an offset");
    static_assert(kM * 16 * kWarpsM == kChannels, "whole tiles of channels");
    static_assert(kPitch / 16 % 2 == 1 || kBytes == 4, "eight pixels' 16 bytes lie in eight groups of banks");
    static_assert(kPitch / 4 % 16 == 8 || kBytes == 2, "four pixels' eight words lie in 32 banks");
    static_assert(kPixels * kChannels * 4 <= kImageBytes, "the bias sums fit over the ring");
    static_assert(kSharedBytes <= 163 << 10, "an sm_80 has it");
};

// ---------------------------------------------------------------------------------------------------- the product

template <class T> using Sums = float[T::kM][T::kN][4];

// Adds the products of 16 pixels (8 of tf32) from pixel `at` on, or with kEnd of 8 that may reach behind `width`. There the
// gradient is zero, but cells may hold NaN: zeros are multiplied instead. `tiles` are offsets in the ring.
template <class T, bool kEnd>
DEVICE void multiply(Sums<T>& sums, const uint8_t* grad, const uint8_t* image, const int (&tiles)[T::kLoads], int at,
                     int width) {
    const int lane = threadIdx.x % kWarpLanes;
    const int warp_n = threadIdx.x / kWarpLanes % T::kWarpsN;
    const bool ones = T::kBiasTile && warp_n == T::kWarpsN - 1, all = ones || tiles_of(warp_n, T::kWarpsN, T::kN) == T::kN;
    uint32_t a[T::kM][4];
    if constexpr (T::kBytes == 4) {
        const int g = lane / 4, q = lane % 4;
        const bool inside[2] = {!kEnd || at + q < width, !kEnd || at + q + 4 < width};
        const uint8_t* first = grad + (at + q) * T::kPitch + g * 4;
#pragma unroll
        for (int i = 0; i < T::kM * 4; ++i) {
            a[i / 4][i % 4] = word(first + i % 4 / 2 * 4 * T::kPitch + (i / 4 * 16 + i % 2 * 8) * 4);
        }
#pragma unroll
        for (int n = 0; n < T::kN; ++n) {
            const uint8_t* cell = image + tiles[n] + at * T::kCellBytes;
            const uint32_t b0 = inside[0] ? word(cell) : 0, b1 = inside[1] ? word(cell + 4 * T::kCellBytes) : 0;
            if (n == T::kN - 1 && !all) {
                break;
            }
#pragma unroll
            for (int m = 0; m < T::kM; ++m) {
                T::Op::multiply(sums[m][n], a[m], b0, b1);
            }
        }
    } else {
        const bool inside = !kEnd || at + lane % 16 < width;
        const uint8_t* first = grad + (at + lane % 8 + (kEnd ? 0 : lane / 16 * 8)) * T::kPitch + lane / 8 % 2 * 16;
#pragma unroll
        for (int m = 0; m < T::kM; ++m) {
            load_matrix_x4_transposed(a[m], first + m * 32);
        }
#pragma unroll
        for (int i = 0; i < T::kLoads; ++i) {
            uint32_t b[4];
            load_matrix_x4_transposed(b, inside ? image + tiles[i] + at * T::kCellBytes : image + T::kZeros);
#pragma unroll
            for (int n = 2 * i; n < 2 * i + 2 && n < T::kN; ++n) {
                if (n == T::kN - 1 && !all) {
                    break;
                }
                const uint32_t b0 = n == T::kN - 1 && ones ? T::Op::kOnes : b[n % 2 * 2];
                const uint32_t b1 = n == T::kN - 1 && ones ? T::Op::kOnes : b[n % 2 * 2 + 1];
#pragma unroll
                for (int m = 0; m < T::kM; ++m) {
                    if constexpr (kEnd) {
                        T::Op::multiply_half(sums[m][n], a[m], b0);
                    } else {
                        T::Op::multiply(sums[m][n], a[m], b0, b1);
                    }
                }
            }
        }
    }
}

// Offsets of the lane's numbers of the warp's tiles in the ring, before the first row is multiplied.
template <class T> DEVICE void locate(int (&tiles)[T::kLoads]) {
    const int lane = threadIdx.x % kWarpLanes, warp_n = threadIdx.x / kWarpLanes % T::kWarpsN;
    const int inner = T::kBytes == 4 ? lane % 4 * T::kCellBytes + lane / 4 * 4 : lane % 16 * T::kCellBytes;
#pragma unroll
    for (int i = 0; i < T::kLoads; ++i) {
        const Tile tile = tile_of(first_tile(warp_n, T::kWarpsN, T::kN) + (T::kBytes == 4 ? i : 2 * i + lane / 16));
        const int row = (tile.dy + kRing - kWindow) % kRing;  // the first step turns it; row dy = 2 is filled then
        tiles[i] = tile.chunk * T::kChunkBytes + row * T::kRowBytes + tile.dx * T::kCellBytes + inner;
    }
}

// One row further round the ring.
template <class T> DEVICE void turn(int (&tiles)[T::kLoads]) {
#pragma unroll
    for (int i = 0; i < T::kLoads; ++i) {
        tiles[i] = ((tiles[i] + T::kRowBytes) & T::kRowBits) | (tiles[i] & ~T::kRowBits);
    }
}

// The block's sums, each register of all threads side by side, then the bias over the threads of a channel in their order.
template <class T>
DEVICE void write_partial(const Conv1Backward& p, float* sums_of_pixels, const Sums<T>& sums,
                          const float (&bias)[4]) {
    float* partial = static_cast<float*>(p.workspace) + static_cast<int64_t>(blockIdx.x) * T::kPartial;
    const int t = threadIdx.x;
#pragma unroll
    for (int i = 0; i < T::kM * T::kN * 4; ++i) {
        partial[i * kThreads + t] = sums[i / 4 / T::kN][i / 4 % T::kN][i % 4];
    }
    if (T::kBiasTile) {
        return;
    }
    if (t < T::kPixels * T::kVectors) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sums_of_pixels[t * 4 + i] = bias[i];
        }
    }
    __syncthreads();
    if (t < T::kChannels) {
        float total = 0;
        for (int pixel = 0; pixel < T::kPixels; ++pixel) {
            total += sums_of_pixels[pixel * T::kChannels + t];
        }
        partial[T::kSums + t] = total;
    }
}

// ---------------------------------------------------------------------------------------------------- kernels

template <class T> __global__ void __launch_bounds__(kThreads, 1) weight_gradient(Conv1Backward p, Rows rows) {
    DYNAMIC_SHARED(uint8_t, image, 0, T::kImageBytes);
    DYNAMIC_SHARED(uint8_t, grads, T::kImageBytes, 2 * T::kGradBytes);
    DYNAMIC_SHARED(uint8_t, a, T::kImageBytes + 2 * T::kGradBytes, T::kMaskBytes);
    const int warp = threadIdx.x / kWarpLanes, warp_m = warp / T::kWarpsN;
    // Warps w and w + 4 share a tensor core: one fills while the other multiplies.
    const int last_to_fill = warp / (kWarps / 2);

    Cursor cursor = first_row(rows, p.out_height);
    Sums<T> sums = {};
    float bias[4] = {};
    int tiles[T::kLoads];
    locate<T>(tiles);
    if (threadIdx.x < 4) {
        reinterpret_cast<uint32_t*>(image + T::kZeros)[threadIdx.x] = 0;
    }
    uint32_t raw[kRuns];
    {
        const Column column = column_of(p.in, cursor, rows, p.out_width);
        load_image(raw, p.in, column, cursor.image);
        store_image<T>(image, raw, p.in, column);
    }
    bool more = true;
    for (int step = 0; more; ++step) {
        __syncthreads();
        const int width = cursor.multiplies() ? cursor.width(rows, p.out_width) : 0;
        more = advance(cursor, rows, p.out_height);
        const Column column = column_of(p.in, cursor, rows, p.out_width);
        const uint8_t* grad = grads + step % 2 * T::kGradBytes + warp_m * T::kM * 16 * T::kBytes;
        uint8_t* next = grads + (step + 1) % 2 * T::kGradBytes;
        if (more) {
            load_image(raw, p.in, column, cursor.image);
            if (cursor.multiplies()) {
                copy_gradient<T>(next, a, p, cursor, rows);
            }
        }
        turn<T>(tiles);
        int done = 0;
        if (width >= kEarlyColumns) {
#pragma unroll (T::kBytes == 4 ? 1 : 2)
            for (; done < kEarlyColumns; done += T::Op::kDepth) {
                multiply<T, false>(sums, grad, image, tiles, done, width);
            }
        }
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            if (half == last_to_fill) {
                if (more) {
                    store_image<T>(image + (step + 1) % kRing * T::kRowBytes, raw, p.in, column);
                    if (cursor.multiplies()) {
                        prepare_gradient<T>(next, a, p.a != nullptr, bias);
                    }
                }
                continue;
            }
#pragma unroll 1
            for (; done + T::Op::kDepth <= width; done += T::Op::kDepth) {
                multiply<T, false>(sums, grad, image, tiles, done, width);
            }
#pragma unroll 1
            for (; done < width; done += 8) {
                multiply<T, true>(sums, grad, image, tiles, done, width);
            }
        }
    }
    __syncthreads();
    write_partial<T>(p, reinterpret_cast<float*>(image), sums, bias);
}

// ---------------------------------------------------------------------------------------------------- launchers

Rows lay_out(const Conv1Backward& p) {
    Rows rows;
    rows.strips = (p.out_width + kStripColumns - 1) / kStripColumns;
    rows.columns = kStripColumns;
    rows.total = p.in.images * rows.strips * p.out_height;
    return rows;
}

int blocks_of(const Conv1Backward& p) {
    const int64_t wanted = lay_out(p).total / kFewestRows;
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, p.multiprocessors)));
}

template <class T> void launch_both(const Conv1Backward& p, void* stream) {
    const int blocks = blocks_of(p);
    launch(weight_gradient<T>, dim3(blocks), dim3(kThreads), T::kSharedBytes, stream, p, lay_out(p));
    const Layout layout{blocks, T::kPartial, T::kWarpsN, T::kM, T::kN};
    launch(reduce_partials<T::kType>, dim3((T::kPartial + kReduceColumns - 1) / kReduceColumns),
           dim3(kReduceColumns, kReduceRows), 0, stream, p, layout);
}

// Calls f with the kernel's traits.
template <class F> auto with_traits(ElementType type, int channels, F f) {
    const auto with_channels = [&](auto t) {
        constexpr ElementType kType = decltype(t)::value;
        return channels == 48 ? f(Traits<kType, 48>()) : channels == 64 ? f(Traits<kType, 64>()) : f(Traits<kType, 96>());
    };
    switch (type) {
        case ElementType::kFloat32: return with_channels(std::integral_constant<ElementType, ElementType::kFloat32>());
        case ElementType::kFloat16: return with_channels(std::integral_constant<ElementType, ElementType::kFloat16>());
        default: return with_channels(std::integral_constant<ElementType, ElementType::kBFloat16>());
    }
}

}  // namespace

const char* conv1_backward_refusal(const Conv1Backward& p, ElementType type) {
    if (p.channels != 48 && p.channels != 64 && p.channels != 96) {
        return "the channels are not 48, 64 or 96";
    }
    if (p.in.height < 1 || p.in.width < 1 || p.out_height < 1 || p.out_width < 1) {
        return "an empty image or an empty map";
    }
    if (p.in.pad_top < 0 || p.in.pad_left < 0) {
        return "negative padding";
    }
    // In an image, offsets, and those of the rows and columns around it that are asked about, are 32 bits wide.
    const int64_t height = int64_t{p.in.height} + p.in.pad_top + kStride * (p.out_height + kStride);
    const int64_t width = int64_t{p.in.width} + p.in.pad_left + kStride * (p.out_width + kThreads);
    if (height * width * kColors >= int64_t{1} << 31) {
        return "an image of 2^31 numbers or more, its padding counted";
    }
    const int bytes = with_traits(type, p.channels, [](auto t) { return decltype(t)::kSharedBytes; });
    return bytes > shared_memory_limit() ? "the device has too little shared memory for a block" : nullptr;
}

int64_t conv1_backward_workspace(const Conv1Backward& p, ElementType type) {
    const bool sums = p.dw != nullptr || p.db != nullptr;
    const int64_t floats = with_traits(type, p.channels, [](auto t) { return int64_t{decltype(t)::kPartial}; });
    const int64_t weights = p.dx != nullptr ? conv1_data_gradient_workspace(p, type) : 0;
    return std::max<int64_t>(sums ? blocks_of(p) * floats * 4 : 0, weights);
}

Conv1BackwardLaunch conv1_backward_launch(const Conv1Backward& p, ElementType type) {
    return with_traits(type, p.channels, [&](auto t) {
        using T = decltype(t);
        const Rows rows = lay_out(p);
        int64_t depth = 0;  // pixels multiplied for one output row
        for (int left = p.out_width; left > 0; left -= rows.columns) {
            depth += (std::min(left, rows.columns) + 7) / 8 * 8;
        }
        const int64_t issued = p.in.images * p.out_height * depth * p.channels * kTiles * kChunk;
        const int64_t useful = p.in.images * p.out_height * p.out_width * p.channels * kColors * kKernel * kKernel;
        return Conv1BackwardLaunch{blocks_of(p), kThreads, T::kSharedBytes, issued, useful};
    });
}

void conv1_backward(const Conv1Backward& p, ElementType type, void* stream) {
    if (p.dx != nullptr) {
        conv1_data_gradient(p, type, stream);
    }
    if (p.dw != nullptr || p.db != nullptr) {
        with_traits(type, p.channels, [&](auto t) { launch_both<decltype(t)>(p, stream); });
    }
}
