// What torch sees of the first layer's backward. LibTorch's stable ABI only.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "bindings_conv1.h"
#include "conv1_backward.h"

namespace {

using namespace bindings;

void check_gradient(const Tensor& t, const char* name, const Tensor& x, const Tensor& weight, int height, int width) {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), name, " must be on x's device");
    STD_TORCH_CHECK(t.scalar_type() == weight.scalar_type(), name, " must have weight's dtype: convert it");
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == x.size(0) && t.size(1) == weight.size(0) && t.size(2) == height &&
                        t.size(3) == width,
                    name, " must be [", x.size(0), ", ", weight.size(0), ", ", height, ", ", width, "], got ", shape(t));
    STD_TORCH_CHECK(channels_last(t), name,
                    " must be dense channels_last: call .contiguous(memory_format=torch.channels_last)");
}

int multiprocessors(const Tensor& t) {
    int count = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.get_device_index());
    STD_TORCH_CHECK(error == cudaSuccess, "conv1_backward: ", cudaGetErrorString(error));
    return count;
}

std::tuple<Tensor, Tensor, Tensor> conv1_backward_cuda(const Tensor& grad, const std::optional<Tensor>& a, const Tensor& x,
                                                       const Tensor& weight, const std::optional<Tensor>& mean,
                                                       const std::optional<Tensor>& scale, std::vector<int64_t> padding,
                                                       std::vector<bool> mask) {
    Conv1Backward p{};
    p.in = conv1_images(x, mean, scale, padding);
    check_conv1_weight(weight, x);
    const ElementType type = element_type(weight, "weight");
    STD_TORCH_CHECK(mask.size() == 3, "mask must be three bools, of x, weight and bias, got ", mask.size());
    STD_TORCH_CHECK(!mask[0] || p.in.source != Conv1Source::kUint8, "x of uint8 has no gradient: mask[0] must be false");
    p.out_height = conv1_out_size(x.size(2), padding[0], padding[1]);
    p.out_width = conv1_out_size(x.size(3), padding[2], padding[3]);
    p.channels = static_cast<int>(weight.size(0));
    check_gradient(grad, "grad", x, weight, p.out_height, p.out_width);
    if (a) {
        check_gradient(*a, "a", x, weight, p.out_height, p.out_width);
    }
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    p.multiprocessors = multiprocessors(x);
    const char* refusal = conv1_backward_refusal(p, type);
    STD_TORCH_CHECK(refusal == nullptr, "conv1_backward: ", refusal);

    Tensor dx = torch::stable::new_empty(x, {0});  // three tensors, wanted or not: results of an op share no memory
    Tensor dw = torch::stable::new_empty(weight, {0}), db = torch::stable::new_empty(weight, {0});
    if (mask[0]) {
        dx = planes_outermost(x) ? torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)})
                                 : empty_channels_last(x, x.size(0), x.size(1), x.size(2), x.size(3), x.scalar_type());
    }
    const Tensor taps = conv1_taps(weight, p.weight_strides);  // one set of strides serves weight and dw
    if (mask[1]) {
        dw = torch::stable::empty_like(taps);
    }
    if (mask[2]) {
        db = torch::stable::new_empty(weight, {weight.size(0)});
    }
    if (x.size(0) == 0) {
        return {dx, torch::stable::zero_(dw), torch::stable::zero_(db)};
    }
    p.grad = address(grad, "grad"), p.a = a ? address(*a, "a") : nullptr, p.weight = taps.data_ptr();
    p.dx = mask[0] ? dx.data_ptr() : nullptr;
    p.dw = mask[1] ? dw.data_ptr() : nullptr;
    p.db = mask[2] ? db.data_ptr() : nullptr;
    const Tensor workspace = torch::stable::new_empty(weight, {conv1_backward_workspace(p, type)}, ScalarType::Byte);
    p.workspace = workspace.data_ptr();
    conv1_backward(p, type, current_stream(x));
    check_launch("conv1_backward");
    return {dx, dw, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(alexnet_kernels_cuda, library) {
    library.def(
        "conv1_backward(Tensor grad, Tensor? a, Tensor x, Tensor weight, Tensor? mean, Tensor? scale, int[] padding, "
        "bool[] mask) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels_cuda, CUDA, library) {
    library.impl("conv1_backward", TORCH_BOX(&conv1_backward_cuda));
}
