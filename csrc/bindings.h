// What the bindings of the CUDA kernels have in common: checks of tensors, device guard and stream, the report of a launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <string>

#include "element_type.h"

namespace bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAlignment = 16;  // of the kernels' loads

inline ElementType element_type(const Tensor& t, const char* name) {
    switch (t.scalar_type()) {
        case ScalarType::Float: return ElementType::kFloat32;
        case ScalarType::Half: return ElementType::kFloat16;
        case ScalarType::BFloat16: return ElementType::kBFloat16;
        default: STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16: convert it");
    }
}

// Dense, dims in this order from the innermost out; the stride of a dim of size 1 says nothing.
inline bool dense(const Tensor& t, std::initializer_list<int64_t> dims) {
    int64_t expected = 1;
    for (int64_t dim : dims) {
        if (t.size(dim) != 1 && t.stride(dim) != expected) {
            return false;
        }
        expected *= t.size(dim);
    }
    return true;
}
inline bool planes_outermost(const Tensor& t) { return dense(t, {3, 2, 1, 0}); }
inline bool channels_last(const Tensor& t) { return dense(t, {1, 3, 2, 0}); }

inline const void* address(const Tensor& t, const char* name) {
    const void* data = t.data_ptr();
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % kAlignment == 0, name,
                    " must start at a multiple of 16 bytes: clone it");
    return data;
}

inline std::string shape(const Tensor& t) {
    std::string text = "[";
    for (int64_t dim = 0; dim < t.dim(); ++dim) {
        text += (dim ? ", " : "") + std::to_string(t.size(dim));
    }
    return text + "]";
}

// A new dense channels_last tensor of the dtype and on the device of `like`.
inline Tensor empty_channels_last(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, ScalarType type) {
    const Tensor rows = torch::stable::new_empty(like, {n, h, w, c}, type);
    return torch::stable::transpose(torch::stable::transpose(rows, 1, 3), 2, 3);
}

inline void* current_stream(const Tensor& t) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    return stream;
}

// What a launch answers where the library holds neither code for the device nor PTX that its driver can translate.
inline bool says_no_code(cudaError_t error) {
    return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
           error == cudaErrorUnsupportedPtxVersion || error == cudaErrorInvalidPtx ||
           error == cudaErrorJitCompilerNotFound || error == cudaErrorJitCompilationDisabled;
}

// After a launch on the current device. ops/_stem_ways.py knows these words.
inline void check_launch(const char* operation) {
    const cudaError_t error = cudaGetLastError();
    if (says_no_code(error)) {
        int device = 0, major = 0, minor = 0;
        cudaGetDevice(&device);
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
        STD_TORCH_CHECK(false, operation, ": this library holds no code for sm_", major, minor, ", the architecture of cuda:",
                        device, " (", cudaGetErrorString(error), "); rebuild it with a toolkit that knows it: "
                        "pip install --no-build-isolation -e \".[bench]\" -c constraints.txt");
    }
    STD_TORCH_CHECK(error == cudaSuccess, operation, ": ", cudaGetErrorString(error));
}

}  // namespace bindings
