// How blocks lie over a problem of the first layer's forward, and what each of them does.
#pragma once

#include <algorithm>

#include "conv1_warpgroup.h"

constexpr int64_t kEnoughBlocks = 256;        // two on each of an H200's 132 multiprocessors, nearly
constexpr int kFewestSteps = 4;               // of a walk: loading the weights costs about half a step

// How blocks lie over the problem.
struct Tiling {
    int steps;               // down a whole image
    int walks, walk_steps;   // of a column of tiles; steps of a walk
    int tiles, tile_units;   // across; a unit is a column of windows with pooling, else a column of `a`
};

// What one block does. Rows and columns of `a`.
struct Walk {
    int64_t image;
    int first_step, last_step, first_unit, units, first_column, columns;
};

DEVICE Walk find_walk(const Tiling& tiling, const Conv1Forward& p, bool stem) {
    Walk walk;
    const int block = blockIdx.x, tile = block / tiling.walks % tiling.tiles;
    walk.image = block / tiling.walks / tiling.tiles;
    walk.first_step = block % tiling.walks * tiling.walk_steps;
    const int last_step = walk.first_step + tiling.walk_steps;
    walk.last_step = last_step < tiling.steps ? last_step : tiling.steps;
    walk.first_unit = tile * tiling.tile_units;
    walk.first_column = walk.first_unit * (stem ? 2 : 1);
    const int all = stem ? p.out_width / 2 : p.out_width;
    walk.units = walk.first_unit + tiling.tile_units < all ? tiling.tile_units : all - walk.first_unit;
    const int wanted = stem ? 2 * walk.units + 1 : walk.units;
    walk.columns = wanted < p.out_width - walk.first_column ? wanted : p.out_width - walk.first_column;
    return walk;
}

template <class T> Tiling lay_out(const Conv1Forward& p) {
    Tiling tiling;
    const int units = T::kStem ? p.out_width / 2 : p.out_width, most = T::kStem ? T::kColumns / 2 : T::kColumns;
    tiling.steps = T::kStem ? p.out_height / 2 : (p.out_height + 1) / 2;
    tiling.tiles = (units + most - 1) / most;
    tiling.tile_units = (units + tiling.tiles - 1) / tiling.tiles;
    const int64_t columns = std::max<int64_t>(1, p.in.images * tiling.tiles);
    const int64_t wanted = (kEnoughBlocks + columns - 1) / columns;
    const int possible = tiling.steps < kFewestSteps ? 1 : tiling.steps / kFewestSteps;
    tiling.walks = static_cast<int>(wanted < possible ? wanted : possible);
    tiling.walk_steps = (tiling.steps + tiling.walks - 1) / tiling.walks;
    tiling.walks = (tiling.steps + tiling.walk_steps - 1) / tiling.walk_steps;
    return tiling;
}

// Products of 16 pixels, each with all channels, that the walks of one image issue.
template <class T> int64_t products(const Conv1Forward& p, const Tiling& tiling) {
    if constexpr (T::Order::kWarpgroup) {  // rows of 64 pixels
        const int64_t rows = 2 * tiling.steps + (T::kStem ? tiling.walks : -(p.out_height % 2));
        return tiling.tiles * rows * (T::Order::kRowPixels / 16);
    } else {
        int64_t count = 0;
        for (int tile = 0; tile < tiling.tiles; ++tile) {
            const int column = tile * tiling.tile_units * (T::kStem ? 2 : 1);
            const int columns = std::min(tiling.tile_units * (T::kStem ? 2 : 1) + T::kStem, p.out_width - column);
            for (int step = 0; step < tiling.steps; ++step) {
                const bool both = 2 * step + T::kStem + 1 < p.out_height;
                count += ((both ? 2 : 1) * columns + 15) / 16;
            }
            count += T::kStem ? tiling.walks * ((columns + 15) / 16) : 0;  // the row that a walk begins with
        }
        return count;
    }
}
