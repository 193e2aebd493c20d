// How torch's tensors become the images of conv1.h.
#pragma once

#include <optional>
#include <vector>

#include "bindings.h"
#include "conv1.h"

namespace bindings {

inline Conv1Source conv1_source(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float: return Conv1Source::kFloat32;
        case ScalarType::Half: return Conv1Source::kFloat16;
        case ScalarType::BFloat16: return Conv1Source::kBFloat16;
        case ScalarType::Byte: return Conv1Source::kUint8;
        default: STD_TORCH_CHECK(false, "x must be float32, float16, bfloat16 or uint8: convert it");
    }
}

inline const float* per_plane(const std::optional<Tensor>& t, const Tensor& x, const char* name) {
    if (!t) {
        return nullptr;
    }
    STD_TORCH_CHECK(t->is_cuda() && t->get_device_index() == x.get_device_index() && t->scalar_type() == ScalarType::Float &&
                        t->dim() == 1 && t->size(0) == 3 && t->is_contiguous(),
                    name, " must be a contiguous float32 tensor of 3 numbers on x's device");
    return static_cast<const float*>(t->data_ptr());
}

// x, mean, scale and padding, checked. [top, bottom, left, right]
inline Conv1Images conv1_images(const Tensor& x, const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
                                const std::vector<int64_t>& padding) {
    STD_TORCH_CHECK(x.is_cuda(), "x must be on a CUDA device");
    STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == 3, "x must be [N, 3, H, W], got ", shape(x));
    STD_TORCH_CHECK(planes_outermost(x) || channels_last(x),
                    "x must be dense, contiguous or channels_last: call x.contiguous()");
    STD_TORCH_CHECK(mean.has_value() == scale.has_value(), "mean and scale belong together: give both or neither");
    Conv1Images in{};
    in.source = conv1_source(x);
    STD_TORCH_CHECK(in.source != Conv1Source::kUint8 || mean, "mean and scale are needed for an x of uint8: give both");
    STD_TORCH_CHECK(padding.size() == 4, "padding must be [top, bottom, left, right], got ", padding.size(), " numbers");
    for (int64_t one : padding) {
        STD_TORCH_CHECK(one >= 0 && one < 1 << 16, "padding must be from 0 to 65535, got ", one);
    }
    STD_TORCH_CHECK(x.size(2) < 1 << 30 && x.size(3) < 1 << 30, "x must be smaller than 2^30 on each side, got ", shape(x));
    in.x = x.data_ptr();
    in.mean = per_plane(mean, x, "mean"), in.scale = per_plane(scale, x, "scale");
    in.images = x.size(0), in.image_stride = x.size(1) * x.size(2) * x.size(3);
    in.height = static_cast<int>(x.size(2)), in.width = static_cast<int>(x.size(3));
    const bool last = !planes_outermost(x);
    in.column_stride = last ? 3 : 1, in.row_stride = in.width * in.column_stride;
    in.plane_stride = last ? 1 : static_cast<int>(x.size(2) * x.size(3));  // a larger image is refused
    in.pad_top = static_cast<int>(padding[0]), in.pad_left = static_cast<int>(padding[2]);
    return in;
}

// Rows or columns of the result; 0 where the kernel does not fit.
inline int conv1_out_size(int64_t size, int64_t before, int64_t after) {
    const int64_t room = size + before + after - 11;
    return room < 0 ? 0 : static_cast<int>(room / 4 + 1);
}

inline void check_conv1_weight(const Tensor& weight, const Tensor& x) {
    STD_TORCH_CHECK(weight.is_cuda() && weight.get_device_index() == x.get_device_index(), "weight must be on x's device");
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == 3 && weight.size(2) == 11 && weight.size(3) == 11,
                    "weight must be [O, 3, 11, 11], got ", shape(weight));
}

// The kernels read both layouts; a weight in neither is copied.
inline Tensor conv1_taps(const Tensor& weight, int (&strides)[4]) {
    const Tensor taps = planes_outermost(weight) || channels_last(weight) ? weight : torch::stable::contiguous(weight);
    for (int dim = 0; dim < 4; ++dim) {
        strides[dim] = static_cast<int>(taps.stride(dim));
    }
    return taps;
}

}  // namespace bindings
