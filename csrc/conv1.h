// The first layer of AlexNet: 11 x 11 convolution with stride 4 over three planes, alone or with all that stands between it
// and the second layer. Numbers and pointers, no torch, no CUDA.
#pragma once

#include <cstdint>

#include "element_type.h"

enum class Conv1Source { kFloat32, kFloat16, kBFloat16, kUint8 };

// A batch of images in any dense layout; strides count elements.
struct Conv1Images {
    const void* x;
    Conv1Source source;
    const float *mean, *scale;  // [3]: (x - mean) * scale is convolved; or null
    int64_t images, image_stride;
    int height, width, row_stride, column_stride, plane_stride;
    int pad_top, pad_left;      // zeros, after mean and scale
};

// a = [relu](conv(x, weight) + bias), rounded; with `y` also  y = maxpool(lrn(a))  or  lrn(maxpool(a)).
// Results are dense channels_last and start at a multiple of 16 bytes.
struct Conv1Forward {
    Conv1Images in;
    const void* weight;  // [channels, 3, 11, 11]
    void* packed;        // conv1_packed_bytes() of them, at a multiple of 16: where the weights are put in order
    const void* bias;    // [channels], or null
    void* a;             // [images, out_height, out_width, channels]; with y it may be null
    void* y;             // [images, pooled_height, pooled_width, channels], or null: the convolution alone
    uint8_t* place;      // as y: the tap 3 * i + j of each maximum; or null
    int out_height, out_width, pooled_height, pooled_width;
    int weight_strides[4];
    int channels, groups;        // groups: of the normalisation over 5 channels
    float lrn_scale, beta, k;
    bool relu, pool_first;
    bool warpgroups;             // fp16 and bf16 by wgmma; fp32 goes the one way there is
};

// How the launch lies over the problem, for tests and tables.
struct Conv1Launch {
    int64_t blocks;
    int threads, shared_bytes;
    int depth, used_depth;       // of the product, and how much of it are taps: 400 or 416, and 363
    int64_t products;            // of 16 pixels and all channels that are issued
};

// Null if the kernel can do this on the current device, else one line that says why not.
const char* conv1_forward_refusal(const Conv1Forward& problem, ElementType type);

int64_t conv1_packed_bytes(const Conv1Forward& problem, ElementType type);
Conv1Launch conv1_forward_launch(const Conv1Forward& problem, ElementType type);

// Enqueues on `stream` (a cudaStream_t). images > 0. `type` is that of weight, bias, a and y; kFloat32 is multiplied as tf32.
void conv1_forward(const Conv1Forward& problem, ElementType type, void* stream);
