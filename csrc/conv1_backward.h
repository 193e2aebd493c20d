// The backward of the first convolution (conv1.h): numbers and pointers, no torch, no CUDA.
#pragma once

#include "conv1.h"

// grad and a are dense channels_last and start at a multiple of 16 bytes. Strides count elements.
struct Conv1Backward {
    Conv1Images in;
    const void* grad;    // [images, out_height, out_width, channels]
    const void* a;       // as grad, or null; the gradient counts where `not a <= 0`
    const void* weight;  // [channels, 3, 11, 11]; read for dx alone
    void* dx;            // as in.x, by x and not by (x - mean) * scale; or null
    void* dw;            // as weight, or null
    void* db;            // [channels], or null
    void* workspace;     // conv1_backward_workspace() bytes, at a multiple of 16
    int weight_strides[4];
    int out_height, out_width, channels;
    int multiprocessors;  // of the device: their blocks share the rows of dw, and the order of its sums depends on their number
};

// How the launch of dw and db lies over the problem, for tests and tables.
struct Conv1BackwardLaunch {
    int blocks, threads, shared_bytes;
    int64_t issued, useful;  // multiply-adds
};

// Null if the kernels can do this on the current device, else one line that says why not.
const char* conv1_backward_refusal(const Conv1Backward& problem, ElementType type);

// Of dx, dw and db these look only at which are null.
int64_t conv1_backward_workspace(const Conv1Backward& problem, ElementType type);
Conv1BackwardLaunch conv1_backward_launch(const Conv1Backward& problem, ElementType type);

// Enqueues on `stream` (a cudaStream_t). images > 0. `type` is that of grad, a, weight, dw and db; kFloat32 is multiplied as
// tf32.
void conv1_backward(const Conv1Backward& problem, ElementType type, void* stream);
