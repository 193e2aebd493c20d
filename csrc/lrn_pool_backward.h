// The fused backward of bias, ReLU, response normalisation and 3x3 / 2 max pooling: numbers and pointers, no torch, no CUDA.
#pragma once

#include <cstdint>

#include "element_type.h"

// Everything is dense channels_last and starts at a multiple of 16 bytes.
struct LrnPoolBackward {
    const void* grad;           // [images, out_height, out_width, channels]
    const uint8_t* place;       // as grad: the tap 3 * i + j of the maximum
    const void* x;              // [images, height, width, channels]
    const void* bias;           // [channels], or null: nothing is added
    void* dx;                   // as x
    float* partial;             // [lrn_pool_backward_partials(), channels], or null: no bias gradient
    void* dbias;                // [channels]
    int64_t images;
    int height, width, out_height, out_width, channels, groups;
    int pad_height, pad_width;  // 0 or 1
    float scale, beta, k;       // of the normalisation over 5 channels
    bool relu;
};

// Null if the kernel can do this, else one line that says why not.
const char* lrn_pool_backward_refusal(const LrnPoolBackward& problem);

// Rows of `partial`. A function of the sizes alone, so that results do not depend on the device.
int64_t lrn_pool_backward_partials(const LrnPoolBackward& problem);

// Enqueues on `stream` (a cudaStream_t). images > 0.
void lrn_pool_backward(const LrnPoolBackward& problem, ElementType type, void* stream);
