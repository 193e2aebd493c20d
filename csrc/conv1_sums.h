// dW as the tiles of a product: which taps a tile has, which tiles a warp, where a block's sums lie in memory, and the kernel
// that adds the blocks' sums.
//
// A tile is eight taps, a chunk of a cell (conv1_backward_device.h) under one shift (dy, dx). A cell has six chunks; of those
// under dy = 2 the last is left out, for it is ry = 3 alone, no tap: 51 tiles, 408 taps for 363.
#pragma once

#include "conv1_backward_device.h"

namespace conv1_grad {

constexpr int kChunks = kCell / kChunk, kLastChunks = 5;  // under dy = 0 or 1; under dy = 2
constexpr int kTiles = kWindow * (2 * kChunks + kLastChunks);
constexpr int kReduceColumns = 32, kReduceRows = 8;
static_assert(kKernel * kKernel * kColors * 100 >= kTiles * kChunk * 88, "88% of the taps are real");

// The first warps have n tiles each, the others one fewer, so that warps w and w + 4, which share a tensor core, have 13 of 51
// together, or 12. In 16 bits the last warp has one more, tile 51, all ones: the bias gradient.
DEVICE int tiles_of(int warp, int warps, int n) { return warp < kTiles - warps * (n - 1) ? n : n - 1; }
DEVICE int first_tile(int warp, int warps, int n) {
    const int longer = kTiles - warps * (n - 1);
    return warp * n - (warp < longer ? 0 : warp - longer);
}

// A tile's place in the map: cells it is shifted by, and its chunk.
struct Tile {
    int dy, dx, chunk;
};

DEVICE Tile tile_of(int index) {
    index = index < kTiles ? index : kTiles - 1;  // an odd last one is loaded with the one behind it
    Tile tile;
    tile.dy = index / (kWindow * kChunks);
    const int rest = index - tile.dy * kWindow * kChunks, chunks = tile.dy == kWindow - 1 ? kLastChunks : kChunks;
    tile.dx = rest / chunks;
    tile.chunk = rest % chunks;
    return tile;
}

// How the sums of a block lie in its partial.
struct Layout {
    int blocks, length, warps_n, m, n;
};

// dW and db: a column of the block is one sum; its row r adds blocks r, r + 8, ..., then the rows are added in their order.
template <ElementType kType>
__global__ void __launch_bounds__(kReduceColumns * kReduceRows) reduce_partials(Conv1Backward p, Layout layout) {
    STATIC_SHARED(float, totals, kReduceRows * kReduceColumns);
    const int sums = layout.m * layout.n * 4 * kThreads, length = layout.length;
    const int column = threadIdx.x, row = threadIdx.y, at = blockIdx.x * kReduceColumns + column;
    const float* partial = static_cast<const float*>(p.workspace) + at;
    float total = 0;
    for (int block = row; at < length && block < layout.blocks; block += kReduceRows) {
        total += partial[static_cast<int64_t>(block) * length];
    }
    totals[row * kReduceColumns + column] = total;
    __syncthreads();
    if (row > 0 || at >= length) {
        return;
    }
    for (int r = 1; r < kReduceRows; ++r) {
        total += totals[r * kReduceColumns + column];
    }
    if (at >= sums) {
        if (p.db != nullptr) {
            store_one<kType>(p.db, at - sums, total);
        }
        return;
    }
    const int thread = at % kThreads, i = at / kThreads, lane = thread % kWarpLanes, warp = thread / kWarpLanes;
    const int warp_n = warp % layout.warps_n, n = i / 4 % layout.n;
    const int o = (warp / layout.warps_n * layout.m + i / 4 / layout.n) * 16 + lane / 4 + i % 4 / 2 * 8;
    const int index = first_tile(warp_n, layout.warps_n, layout.n) + n;
    const Tile tile = tile_of(index);
    const int tap = lane % 4 * 2 + i % 2, run = tile.chunk * 2 + tap / kStride;
    const int ky = tile.dy * kStride + run / kColors, kx = tile.dx * kStride + tap % kStride;
    if (p.db != nullptr && length == sums && index == kTiles && tap == 0) {
        store_one<kType>(p.db, o, total);
    }
    if (p.dw != nullptr && n < tiles_of(warp_n, layout.warps_n, layout.n) && ky < kKernel && kx < kKernel) {
        const int* strides = p.weight_strides;
        store_one<kType>(p.dw, o * strides[0] + run % kColors * strides[1] + ky * strides[2] + kx * strides[3], total);
    }
}

}  // namespace conv1_grad
