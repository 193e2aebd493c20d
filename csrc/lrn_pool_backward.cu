// dx of  a = max(0, x + bias),  y = maxpool(a_c s_c^-beta),  in one pass;
// s_c = k + scale · Σ a_j², j: c-2 ... c+2 inside c's group:
//
//   g_c  = sum of grad over the windows whose maximum, says `place`, was this pixel
//   t_c  = g_c a_c s_c^-(beta+1)
//   dx_c = [not a_c <= 0] · (g_c s_c^-beta - 2 · beta · scale · a_c · Σ t_j)          dbias_c = Σ dx_c, before it is rounded
//
// x, grad and place are read once, dx is written once; s is formed again, nothing but x was kept for it.
//
// A thread owns eight channels of two rows of pixels and walks along them two columns at a time: one step is a 2 x 2 block
// of pixels, which four windows of 3 x 3 / 2 reach. Two of these were in the step before; what they send on is carried in
// registers, so each window is loaded once a row. The two neighbouring channels on each side come from the neighbouring
// lanes. Lanes lie along (image, row pair, part of the row, channels); where the channels of a group do not fill a warp
// evenly, lanes 0 and 31 work for their neighbours only and store nothing.
//
// The bias gradient is summed along a walk in a register, over the block in shared memory, over the blocks by a second
// kernel, each in a fixed order.
#include "lrn_pool_backward.h"

#include "vectors.h"

namespace {

constexpr int kSides = 2;   // channels of the window on each side: size 5
constexpr int kWarpLanes = 32;
constexpr int kThreads = 256;
constexpr int kReduceColumns = 32, kReduceRows = 8;
constexpr int64_t kEnoughWalks = 1 << 18;  // two waves of an H200 at 50% occupancy; more parts would only repeat the start
constexpr int kFewestSteps = 4;
constexpr uint32_t kNoTap = 0xffffffff;    // the place of a window that is not there

static_assert(2 * kSides < kVector, "a window reaches the neighbouring lanes and no further");

// ---------------------------------------------------------------------------------------------------- traits

template <ElementType kType, bool kThreeQuarters> struct Traits {
    using E = Element<kType>;
    static constexpr bool kBetaIsThreeQuarters = kThreeQuarters;
    static constexpr int kWords = kVector / E::kPerWord, kSideWords = kSides / E::kPerWord;
    static constexpr int kSharedBytes = kThreads * kVector * 4;
    static_assert(kWords % 4 == 0, "whole 16-byte loads");
    static_assert(kSideWords * E::kPerWord == kSides, "a side is whole words");
    static_assert(kSharedBytes <= 48 << 10, "within what a launch has without asking");
};

// How threads lie over the problem.
struct Walks {
    int64_t count;     // of threads that store: images * row_pairs * parts * vectors
    int row_pairs, parts, steps;
    int vectors, group_vectors;  // of a pixel, of a group
    int stride;        // threads that store, of a warp
    int halo;          // 1: lanes 0 and 31 do not
};

// ---------------------------------------------------------------------------------------------------- device helpers

// One window's gradient and the places it may go to.
struct Window {
    float grad[kVector];
    uint32_t place[2];
};

template <class T> DEVICE void load_window(Window& window, const uint8_t* grad, const uint8_t* place, bool exists) {
    uint32_t words[T::kWords];
    load<T>(words, grad, exists);
    unpack<T>(window.grad, 0, words);
    const uint2 p = exists ? *reinterpret_cast<const uint2*>(place) : make_uint2(kNoTap, kNoTap);
    window.place[0] = p.x, window.place[1] = p.y;
}

// Adds to `sum` what the window sends to the pixel under its tap.
DEVICE void collect(float (&sum)[kVector], const Window& window, uint32_t tap) {
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
        const bool here = ((window.place[c / 4] ^ tap * 0x01010101u) & 0xffu << c % 4 * 8) == 0;
        sum[c] = here ? sum[c] + window.grad[c] : sum[c];
    }
}

DEVICE void clear(float (&sum)[kVector]) {
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
        sum[c] = 0;
    }
}

// Neighbouring lanes' channels around ours: values[0, 1] from the lane before, values[10, 11] from the lane after.
template <class T>
DEVICE void activations(float (&a)[kVector + 2 * kSides], const uint32_t (&words)[T::kWords], bool first, bool last) {
    uint32_t before[T::kSideWords], after[T::kSideWords];
#pragma unroll
    for (int i = 0; i < T::kSideWords; ++i) {
        const uint32_t up = shuffle_up(words[T::kWords - T::kSideWords + i]), down = shuffle_down(words[i]);
        before[i] = first ? 0 : up;
        after[i] = last ? 0 : down;
    }
    unpack<T>(a, 0, before);
    unpack<T>(a, kSides, words);
    unpack<T>(a, kSides + kVector, after);
}

// Sums of five by pairs and pairs of pairs: sum[c] = quad + one more, 19 additions for eight sums.
template <bool kSquares> DEVICE void window_sums(float (&sum)[kVector], const float (&v)[kVector + 2 * kSides]) {
    float pair[kVector / 2 + kSides];
#pragma unroll
    for (int i = 0; i < kVector / 2 + kSides; ++i) {
        pair[i] = kSquares ? v[2 * i] * v[2 * i] + v[2 * i + 1] * v[2 * i + 1] : v[2 * i] + v[2 * i + 1];
    }
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
        const int i = (c + 1) / 2;
        const float one = c % 2 ? v[c] : v[c + 4], quad = pair[i] + pair[i + 1];
        sum[c] = kSquares ? one * one + quad : one + quad;
    }
}

// dx of one pixel's eight channels; all lanes of a warp together.
template <class T>
DEVICE void pixel(float (&dx)[kVector], const uint32_t (&words)[T::kWords], const float (&g)[kVector],
                  const LrnPoolBackward& p, float mask_below, bool first, bool last) {
    float a[kVector + 2 * kSides], t[kVector + 2 * kSides], s[kVector], shared[kVector];
    activations<T>(a, words, first, last);
    window_sums<true>(s, a);
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
        const float v = s[c] * p.scale + p.k;
        if (T::kBetaIsThreeQuarters) {
            const float r = fast_rsqrt(v);
            dx[c] = g[c] * (r * fast_sqrt(r));
            t[c + kSides] = dx[c] * a[c + kSides] * (r * r);
        } else {
            dx[c] = g[c] * fast_exp2(-p.beta * fast_log2(v));
            t[c + kSides] = dx[c] * a[c + kSides] * fast_reciprocal(v);
        }
    }
#pragma unroll
    for (int i = 0; i < kSides; ++i) {
        const float up = shuffle_up(t[kVector + i]), down = shuffle_down(t[kSides + i]);
        t[i] = first ? 0 : up;
        t[kSides + kVector + i] = last ? 0 : down;
    }
    window_sums<false>(shared, t);
    const float factor = -2 * p.beta * p.scale;
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
        const float value = factor * a[c + kSides] * shared[c] + dx[c];
        dx[c] = a[c + kSides] <= mask_below ? 0 : value;
    }
}

// The block's part of the bias gradient: thread c adds, in their order, the walks of the block that own channel c.
template <class T> DEVICE void reduce_block(const LrnPoolBackward& p, const Walks& walks, const float (&sum)[kVector]) {
    DYNAMIC_SHARED(float, sums, 0, kThreads * kVector);
    const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
    const int stored = walks.stride * (kThreads / kWarpLanes), slot = warp * walks.stride + lane - walks.halo;
    if (lane >= walks.halo && lane < walks.halo + walks.stride) {
#pragma unroll
        for (int c = 0; c < kVector; ++c) {
            sums[slot * kVector + c] = sum[c];
        }
    }
    __syncthreads();
    const int offset = static_cast<int>(static_cast<int64_t>(blockIdx.x) * stored % walks.vectors);
    for (int c = threadIdx.x; c < p.channels; c += kThreads) {
        const int vector = c / kVector - offset;
        float total = 0;
        for (int i = vector < 0 ? vector + walks.vectors : vector; i < stored; i += walks.vectors) {
            total += sums[i * kVector + c % kVector];
        }
        p.partial[static_cast<int64_t>(blockIdx.x) * p.channels + c] = total;
    }
}

// ---------------------------------------------------------------------------------------------------- kernels

template <class T> __global__ void __launch_bounds__(kThreads, 2) backward(LrnPoolBackward p, Walks walks) {
    constexpr int kBytes = T::E::kBytes;
    const int lane = threadIdx.x % kWarpLanes;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarpLanes) + threadIdx.x / kWarpLanes;
    const int64_t walk = warp * walks.stride + lane - walks.halo;
    const bool exists = walk >= 0 && walk < walks.count;
    const bool stores = exists && lane >= walks.halo && lane < walks.halo + walks.stride;

    const uint32_t flat = exists ? static_cast<uint32_t>(walk) : 0;  // count < 2^31
    const uint32_t row = flat / walks.vectors;
    const int vector = flat % walks.vectors, part = row % walks.parts, row_pair = row / walks.parts % walks.row_pairs;
    const int64_t image = row / walks.parts / walks.row_pairs;
    const bool first = vector % walks.group_vectors == 0, last = (vector + 1) % walks.group_vectors == 0;

    const int h = 2 * row_pair - p.pad_height, pixel_bytes = p.channels * kBytes;
    const bool rows[2] = {exists && h >= 0 && h < p.height, exists && h + 1 < p.height};
    const bool window_rows[2] = {exists && row_pair >= 1 && row_pair <= p.out_height, exists && row_pair < p.out_height};
    const int64_t at = (image * p.height + h) * p.width * p.channels + vector * kVector;
    const int64_t out_at = (image * p.out_height + row_pair) * p.out_width * p.channels + vector * kVector;
    const uint8_t *x = static_cast<const uint8_t*>(p.x) + at * kBytes, *place = p.place + out_at;
    const uint8_t* grad = static_cast<const uint8_t*>(p.grad) + out_at * kBytes;
    uint8_t* dx = static_cast<uint8_t*>(p.dx) + at * kBytes;
    const int64_t row_bytes = static_cast<int64_t>(p.width) * pixel_bytes;
    const int64_t out_row = static_cast<int64_t>(p.out_width) * p.channels;

    const uint32_t floor = p.relu ? 0 : T::E::kMinusInfinity;
    const float mask_below = p.relu ? 0.0f : as_float(0x7fffffff);  // nothing is below NaN
    uint32_t bias[T::kWords];
#pragma unroll
    for (int i = 0; i < T::kWords; ++i) {
        bias[i] = T::E::kMinusZero;  // the neutral element: x + -0 is x, signed zeros too
    }
    if (p.bias != nullptr) {
        load<T>(bias, static_cast<const uint8_t*>(p.bias) + vector * kVector * kBytes, true);
    }

    float sum[kVector], carry[2][kVector];  // carry: what the windows of the column before send to this step's left pixels
    Window above, here;
    clear(sum);
    const int begin = part * walks.steps;
    for (int step = begin - 1; step < begin + walks.steps; ++step) {
        const bool column = step >= 0 && step < p.out_width;
        const int64_t window_at = static_cast<int64_t>(step) * p.channels;
        load_window<T>(above, grad + (window_at - out_row) * kBytes, place + window_at - out_row, column && window_rows[0]);
        load_window<T>(here, grad + window_at * kBytes, place + window_at, column && window_rows[1]);
        if (step >= begin) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int w = 2 * step - p.pad_width + i % 2;
                const bool inside = rows[i / 2] && w >= 0 && w < p.width;
                const int64_t offset = i / 2 * row_bytes + static_cast<int64_t>(w) * pixel_bytes;
                uint32_t words[T::kWords];
                load<T>(words, x + offset, inside);
#pragma unroll
                for (int j = 0; j < T::kWords; ++j) {
                    words[j] = T::E::activate(words[j], bias[j], floor);
                }
                float g[kVector], result[kVector];
                clear(g);
                if (i % 2 == 0) {
#pragma unroll
                    for (int c = 0; c < kVector; ++c) {
                        g[c] = carry[i / 2][c];
                    }
                }
                collect(g, here, i / 2 * 3 + i % 2);
                if (i / 2 == 0) {
                    collect(g, above, 6 + i % 2);
                }
                pixel<T>(result, words, g, p, mask_below, first, last);
                if (inside && stores) {
                    store<T>(dx + offset, result);
#pragma unroll
                    for (int c = 0; c < kVector; ++c) {
                        sum[c] += result[c];
                    }
                }
            }
        }
        clear(carry[0]);
        clear(carry[1]);
        collect(carry[0], here, 2);
        collect(carry[0], above, 8);
        collect(carry[1], here, 5);
    }
    if (p.partial != nullptr) {
        reduce_block<T>(p, walks, sum);
    }
}

// dbias[c]: row r of the block adds partials r, r + 8, ..., then the rows are added in their order.
template <ElementType kType> __global__ void __launch_bounds__(kReduceColumns * kReduceRows)
reduce_partials(const float* partial, void* dbias, int64_t rows, int channels) {
    using E = Element<kType>;
    STATIC_SHARED(float, sums, kReduceRows * kReduceColumns);
    const int column = threadIdx.x, row = threadIdx.y, c = blockIdx.x * kReduceColumns + column;
    float total = 0;
    for (int64_t r = row; c < channels && r < rows; r += kReduceRows) {
        total += partial[r * channels + c];
    }
    sums[row * kReduceColumns + column] = total;
    __syncthreads();
    if (row == 0 && c < channels) {
        for (int r = 1; r < kReduceRows; ++r) {
            total += sums[r * kReduceColumns + column];
        }
        if (E::kPerWord == 1) {
            static_cast<float*>(dbias)[c] = total;
        } else {
            static_cast<uint16_t*>(dbias)[c] = static_cast<uint16_t>(E::pack(total, total));
        }
    }
}

// ---------------------------------------------------------------------------------------------------- launchers

Walks lay_out(const LrnPoolBackward& p) {
    Walks walks;
    walks.vectors = p.channels / kVector;
    walks.group_vectors = walks.vectors / p.groups;
    const int whole_groups = kWarpLanes / walks.group_vectors * walks.group_vectors;
    walks.halo = whole_groups < kWarpLanes - 2;  // fewer lanes would work than with two given away
    walks.stride = walks.halo ? kWarpLanes - 2 : whole_groups;
    walks.row_pairs = (p.height + p.pad_height + 1) / 2;
    walks.parts = 1;
    walks.steps = (p.width + p.pad_width + 1) / 2;
    const int64_t rows = p.images * walks.row_pairs * walks.vectors;
    while (rows * walks.parts < kEnoughWalks && walks.steps >= 2 * kFewestSteps) {
        walks.parts *= 2;
        walks.steps = (walks.steps + 1) / 2;
    }
    walks.count = rows * walks.parts;
    return walks;
}

template <class T, ElementType kType> void launch_both(const LrnPoolBackward& p, void* stream) {
    const Walks walks = lay_out(p);
    const unsigned blocks = static_cast<unsigned>(lrn_pool_backward_partials(p));
    launch(backward<T>, dim3(blocks), dim3(kThreads), T::kSharedBytes, stream, p, walks);
    if (p.partial != nullptr) {
        const unsigned columns = (p.channels + kReduceColumns - 1) / kReduceColumns;
        launch(reduce_partials<kType>, dim3(columns), dim3(kReduceColumns, kReduceRows), 0, stream,
               static_cast<const float*>(p.partial), p.dbias, static_cast<int64_t>(blocks), p.channels);
    }
}

template <ElementType kType> void launch_beta(const LrnPoolBackward& p, void* stream) {
    p.beta == 0.75f ? launch_both<Traits<kType, true>, kType>(p, stream)
                    : launch_both<Traits<kType, false>, kType>(p, stream);
}

}  // namespace

const char* lrn_pool_backward_refusal(const LrnPoolBackward& p) {
    if (p.groups < 1 || p.channels % (p.groups * kVector) != 0) {
        return "a group is not a multiple of 8 channels";
    }
    if (p.pad_height < 0 || p.pad_height > 1 || p.pad_width < 0 || p.pad_width > 1) {
        return "padding beyond 1";
    }
    return lay_out(p).count >= int64_t{1} << 31 ? "2^31 threads or more" : nullptr;
}

int64_t lrn_pool_backward_partials(const LrnPoolBackward& p) {
    const Walks walks = lay_out(p);
    const int stored = walks.stride * (kThreads / kWarpLanes);
    return (walks.count + stored - 1) / stored;
}

void lrn_pool_backward(const LrnPoolBackward& p, ElementType type, void* stream) {
    switch (type) {
        case ElementType::kFloat32: return launch_beta<ElementType::kFloat32>(p, stream);
        case ElementType::kFloat16: return launch_beta<ElementType::kFloat16>(p, stream);
        case ElementType::kBFloat16: return launch_beta<ElementType::kBFloat16>(p, stream);
    }
}
