// The data gradient of a convolution 11 x 11, stride 4, of three colours. On the space-to-depth map (conv1_backward_device.h)
// it is a dense convolution of stride 1 that gathers, n = (ry, c, rx):
//
//   dcell[i, j, n] = Σ_{dy, dx, o} g[i - dy, j - dx, o] W[o, c, 4 dy + ry, 4 dx + rx]          dx = dcell scale[c]
//
// g = grad, zero where a <= 0 and outside the map; W is zero where 4 dy + ry or 4 dx + rx is 11. Each pixel belongs to one
// cell, so it is written once, nothing is added in memory, and pixels that no window reaches get their zeros by the same sum.
//
// As a product on the tensor cores: M = cells, N = 48 numbers of a cell, K = 9 taps x channels. A block computes 4 x 64
// cells, a warp 32 of a row, through slices of 32 bytes of channels, one product deep. For a slice 6 x 66 pixels of g and 9 x
// 48 rows of the weights lie in shared memory, 48 bytes apart (an odd number of 16: no bank conflict), twice, so that the
// next slice comes by asynchronous copies while one is multiplied. A small kernel lays the weights out in slices before.
#include "conv1_backward_device.h"

namespace {

using namespace conv1_grad;

constexpr int kRows = 4, kColumns = 64;  // cells of a block
constexpr int kGradRows = kRows + kWindow - 1, kGradColumns = kColumns + kWindow - 1;
constexpr int kTaps = kWindow * kWindow;
constexpr int kSlice = 32, kPitch = 48;  // bytes of a pixel's or a weight's channels, and from one to the next
constexpr int kM = 2, kN = kCell / 8;    // tiles of a warp
constexpr int kTallN = kN - 1;           // under dy = 2: ry = 3 is no tap, and the last tile has no other
static_assert(kWarps * kM * 16 == kRows * kColumns, "the warps cover the block's cells");

constexpr int kGradBytes = kGradRows * kGradColumns * kPitch, kWeightBytes = kTaps * kCell * kPitch;
constexpr int kMaskBytes = kGradRows * kGradColumns * kSlice;
constexpr int kSharedBytes = 2 * (kGradBytes + kWeightBytes) + kMaskBytes;
static_assert(2 * (kSharedBytes + 1024) <= 227 << 10, "two blocks on an sm_90");
static_assert(kSharedBytes <= 99 << 10, "a block on every GPU from sm_80 on: no refusal asks");

// The blocks of an image.
struct Blocks {
    int rows, columns;
};

// ---------------------------------------------------------------------------------------------------- device helpers

// Calls f(vector, pixel, row, column) for the 16-byte halves of the slice's pixels that this thread brings.
template <class Each> DEVICE void for_each_vector(Each f) {
    constexpr int kVectors = 2 * kGradRows * kGradColumns;
#pragma unroll
    for (int item = 0; item < (kVectors + kThreads - 1) / kThreads; ++item) {
        const int at = threadIdx.x + item * kThreads, pixel = at / 2;
        if (at < kVectors) {
            f(at % 2, pixel, pixel / kGradColumns, pixel % kGradColumns);
        }
    }
}

// Slice `slice` of the gradient around the cells from (i, j) on, and of the weights, on their way.
DEVICE void copy_slice(uint8_t* grad, uint8_t* a, uint8_t* weights, const Conv1Backward& p, int bytes, int64_t image, int i,
                       int j, int slice) {
    const int64_t base = image * p.out_height * p.out_width * bytes + slice * kSlice;
    for_each_vector([&](int vector, int pixel, int row, int column) {
        const int oh = i + row - (kWindow - 1), ow = j + column - (kWindow - 1);
        const bool wanted = oh >= 0 && oh < p.out_height && ow >= 0 && ow < p.out_width;
        const int64_t from = wanted ? base + (static_cast<int64_t>(oh) * p.out_width + ow) * bytes + vector * 16 : 0;
        copy_async_16(grad + pixel * kPitch + vector * 16, static_cast<const uint8_t*>(p.grad) + from, wanted);
        if (p.a != nullptr) {
            copy_async_16(a + pixel * kSlice + vector * 16, static_cast<const uint8_t*>(p.a) + from, wanted);
        }
    });
    const uint8_t* packed = static_cast<const uint8_t*>(p.workspace) + slice * kTaps * kCell * kSlice;
    for (int at = threadIdx.x; at < 2 * kTaps * kCell; at += kThreads) {
        copy_async_16(weights + at / 2 * kPitch + at % 2 * 16, packed + at * 16);
    }
    copy_async_commit();
}

using Sums = float[kM][kN][4];

// Adds the products of a tap; `pixel` is the warp's first in the gradient, shifted by the tap, `weights` the tap's.
template <ElementType kType, int kTiles> DEVICE void multiply(Sums& sums, const uint8_t* pixel, const uint8_t* weights) {
    using Op = Operand<kType>;
    const int lane = threadIdx.x % kWarpLanes;
    uint32_t a[kM][4];
    if constexpr (Op::kBytes == 4) {
        const int g = lane / 4, q = lane % 4;
#pragma unroll
        for (int i = 0; i < kM * 4; ++i) {
            a[i / 4][i % 4] = word(pixel + (i / 4 * 16 + i % 2 * 8 + g) * kPitch + (q + i % 4 / 2 * 4) * 4);
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            const uint8_t* row = weights + (n * 8 + g) * kPitch + q * 4;
            const uint32_t b0 = word(row), b1 = word(row + 16);
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                Op::multiply(sums[m][n], a[m], b0, b1);
            }
        }
    } else {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
            load_matrix_x4(a[m], pixel + (m * 16 + lane % 16) * kPitch + lane / 16 * 16);
        }
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
            uint32_t b[4];
            load_matrix_x4(b, weights + (n * 8 + lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 16);
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                Op::multiply(sums[m][n], a[m], b[0], b[1]);
                if (n + 1 < kTiles) {
                    Op::multiply(sums[m][n + 1], a[m], b[2], b[3]);
                }
            }
        }
    }
}

// The warp's cells, from (i, j) on, as pixels.
template <ElementType kPixel> DEVICE void write(const Conv1Backward& p, const Sums& sums, int64_t image, int i, int j) {
    const int lane = threadIdx.x % kWarpLanes;
    const int64_t base = image * p.in.image_stride;
#pragma unroll
    for (int at = 0; at < kM * kN * 4; ++at) {
        const int m = at / 4 / kN, n = at / 4 % kN * 8 + lane % 4 * 2 + at % 2, cell = j + m * 16 + lane / 4 + at % 4 / 2 * 8;
        const int run = n / kStride, c = run % kColors;
        const int h = i * kStride + run / kColors - p.in.pad_top, w = cell * kStride + n % kStride - p.in.pad_left;
        if (h >= 0 && h < p.in.height && w >= 0 && w < p.in.width) {
            const float value = sums[m][at / 4 % kN][at % 4];
            store_one<kPixel>(p.dx, base + c * p.in.plane_stride + h * p.in.row_stride + w * p.in.column_stride,
                              p.in.scale == nullptr ? value : value * p.in.scale[c]);
        }
    }
}

// ---------------------------------------------------------------------------------------------------- kernels

// W as operands: [slice][dy, dx][n][channel of the slice], zeros where there is no tap.
template <ElementType kType> __global__ void __launch_bounds__(kThreads) pack_weights(Conv1Backward p) {
    using Op = Operand<kType>;
    const int at = blockIdx.x * kThreads + threadIdx.x;
    if (at >= kTaps * kCell * p.channels) {
        return;
    }
    const int row = at / Op::kDepth, n = row % kCell, tap = row / kCell % kTaps;
    const int o = row / (kCell * kTaps) * Op::kDepth + at % Op::kDepth;
    const int run = n / kStride, ky = tap / kWindow * kStride + run / kColors, kx = tap % kWindow * kStride + n % kStride;
    uint8_t* to = static_cast<uint8_t*>(p.workspace) + at * Op::kBytes;
    if (ky >= kKernel || kx >= kKernel) {
        Op::put(to, 0);
        return;
    }
    const int* strides = p.weight_strides;
    const int from = o * strides[0] + run % kColors * strides[1] + ky * strides[2] + kx * strides[3];
    Op::put(to, kType == ElementType::kFloat32 ? float_to_tf32(static_cast<const float*>(p.weight)[from])
                                               : static_cast<const uint16_t*>(p.weight)[from]);
}

template <ElementType kType> __global__ void __launch_bounds__(kThreads, 2) data_gradient(Conv1Backward p, Blocks blocks) {
    DYNAMIC_SHARED(uint8_t, grads, 0, 2 * kGradBytes);
    DYNAMIC_SHARED(uint8_t, weights, 2 * kGradBytes, 2 * kWeightBytes);
    DYNAMIC_SHARED(uint8_t, a, 2 * (kGradBytes + kWeightBytes), kMaskBytes);
    const int warp = threadIdx.x / kWarpLanes, bytes = p.channels * Operand<kType>::kBytes, slices = bytes / kSlice;
    const int64_t image = blockIdx.x / (blocks.rows * blocks.columns);
    const int block = blockIdx.x % (blocks.rows * blocks.columns);
    const int i = block / blocks.columns * kRows, j = block % blocks.columns * kColumns;
    const int row = warp / 2, column = warp % 2 * 32;  // of the warp's first cell in the block

    Sums sums = {};
    copy_slice(grads, a, weights, p, bytes, image, i, j, 0);
    for (int slice = 0; slice < slices; ++slice) {
        uint8_t* grad = grads + slice % 2 * kGradBytes;
        copy_async_wait<0>();
        for_each_vector([&](int vector, int pixel, int, int) {
            uint32_t words[4];
            prepare<kType>(words, grad + pixel * kPitch + vector * 16, a + pixel * kSlice + vector * 16, p.a != nullptr);
        });
        __syncthreads();
        const int other = (slice + 1) % 2;
        if (slice + 1 < slices) {
            copy_slice(grads + other * kGradBytes, a, weights + other * kWeightBytes, p, bytes, image, i, j, slice + 1);
        }
        const uint8_t* weight = weights + slice % 2 * kWeightBytes;
#pragma unroll
        for (int dy = 0; dy < kWindow; ++dy) {
            const uint8_t* pixel = grad + ((row + kWindow - 1 - dy) * kGradColumns + column + kWindow - 1) * kPitch;
#pragma unroll 1
            for (int dx = 0; dx < kWindow; ++dx) {
                const uint8_t* tap = weight + (dy * kWindow + dx) * kCell * kPitch;
                if (dy < kWindow - 1) {
                    multiply<kType, kN>(sums, pixel - dx * kPitch, tap);
                } else {
                    multiply<kType, kTallN>(sums, pixel - dx * kPitch, tap);
                }
            }
        }
    }
    switch (p.in.source) {
        case Conv1Source::kFloat32: return write<ElementType::kFloat32>(p, sums, image, i + row, j + column);
        case Conv1Source::kFloat16: return write<ElementType::kFloat16>(p, sums, image, i + row, j + column);
        case Conv1Source::kBFloat16: return write<ElementType::kBFloat16>(p, sums, image, i + row, j + column);
        case Conv1Source::kUint8: return;
    }
}

// ---------------------------------------------------------------------------------------------------- launchers

template <ElementType kType> void launch_both(const Conv1Backward& p, void* stream) {
    const unsigned weights = (kTaps * kCell * p.channels + kThreads - 1) / kThreads;
    launch(pack_weights<kType>, dim3(weights), dim3(kThreads), 0, stream, p);
    const int rows = (p.in.height + p.in.pad_top + kStride - 1) / kStride;  // of cells
    const int columns = (p.in.width + p.in.pad_left + kStride - 1) / kStride;
    const Blocks blocks{(rows + kRows - 1) / kRows, (columns + kColumns - 1) / kColumns};
    launch(data_gradient<kType>, dim3(static_cast<unsigned>(p.in.images * blocks.rows * blocks.columns)), dim3(kThreads),
           kSharedBytes, stream, p, blocks);
}

}  // namespace

int64_t conv1_data_gradient_workspace(const Conv1Backward& p, ElementType type) {
    return static_cast<int64_t>(kTaps * kCell) * p.channels * (type == ElementType::kFloat32 ? 4 : 2);
}

void conv1_data_gradient(const Conv1Backward& p, ElementType type, void* stream) {
    switch (type) {
        case ElementType::kFloat32: return launch_both<ElementType::kFloat32>(p, stream);
        case ElementType::kFloat16: return launch_both<ElementType::kFloat16>(p, stream);
        case ElementType::kBFloat16: return launch_both<ElementType::kBFloat16>(p, stream);
    }
}
