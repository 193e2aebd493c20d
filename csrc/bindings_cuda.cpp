// What torch sees of the fused backward on CUDA; the library that other files add to. LibTorch's stable ABI only, so one build serves every torch >= 2.10.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "lrn_pool_backward.h"

namespace {

using namespace bindings;

void check_activation(const Tensor& t, const Tensor& x, const char* name) {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), name, " must be on x's device");
    STD_TORCH_CHECK(t.dim() == 4 && channels_last(t), name, " must be a dense channels_last [N, C, H, W] tensor");
    STD_TORCH_CHECK(t.size(0) == x.size(0) && t.size(1) == x.size(1), name, " must have x's N and C");
}

std::tuple<Tensor, Tensor> lrn_pool_backward_cuda(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias,
                                                  const Tensor& place, bool relu, int64_t size, double scale, double beta,
                                                  double k, int64_t groups, std::vector<int64_t> window, bool pool_first,
                                                  bool with_bias_grad) {
    STD_TORCH_CHECK(x.is_cuda(), "x must be on a CUDA device");
    const ElementType type = element_type(x, "x");
    for (const auto& [tensor, name] : {std::pair(&x, "x"), std::pair(&grad, "grad"), std::pair(&place, "place")}) {
        check_activation(*tensor, x, name);
    }
    STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && place.scalar_type() == ScalarType::Byte,
                    "grad must have x's dtype, place uint8");
    STD_TORCH_CHECK(place.size(2) == grad.size(2) && place.size(3) == grad.size(3), "place must have grad's shape");
    STD_TORCH_CHECK(!bias || (bias->is_cuda() && bias->get_device_index() == x.get_device_index() && bias->dim() == 1 &&
                              bias->size(0) == x.size(1) && bias->is_contiguous() && bias->scalar_type() == x.scalar_type()),
                    "bias must be a contiguous [C] tensor of x's dtype and device");
    STD_TORCH_CHECK(size == 5 && !pool_first, "the CUDA kernel is for size 5, normalisation before pooling");
    STD_TORCH_CHECK(window.size() == 8 && window[0] == 3 && window[1] == 3 && window[2] == 2 && window[3] == 2 &&
                        window[6] == 1 && window[7] == 1,
                    "the CUDA kernel is for windows of 3 x 3, stride 2, dilation 1");

    Tensor dx = torch::stable::empty_like(x);
    Tensor dbias = torch::stable::new_empty(x, {with_bias_grad ? x.size(1) : 0});
    LrnPoolBackward problem{};
    problem.images = x.size(0);
    problem.channels = static_cast<int>(x.size(1));
    problem.height = static_cast<int>(x.size(2));
    problem.width = static_cast<int>(x.size(3));
    problem.out_height = static_cast<int>(grad.size(2));
    problem.out_width = static_cast<int>(grad.size(3));
    problem.groups = static_cast<int>(groups);
    problem.pad_height = static_cast<int>(window[4]);
    problem.pad_width = static_cast<int>(window[5]);
    problem.scale = static_cast<float>(scale);
    problem.beta = static_cast<float>(beta);
    problem.k = static_cast<float>(k);
    problem.relu = relu;
    const char* refusal = lrn_pool_backward_refusal(problem);
    STD_TORCH_CHECK(refusal == nullptr, refusal);
    if (x.numel() == 0) {
        return {dx, torch::stable::zero_(dbias)};
    }
    problem.x = address(x, "x");
    problem.grad = address(grad, "grad");
    problem.place = static_cast<const uint8_t*>(address(place, "place"));
    problem.bias = bias ? address(*bias, "bias") : nullptr;
    problem.dx = dx.data_ptr();
    std::optional<Tensor> partial;
    if (with_bias_grad) {
        partial = torch::stable::new_empty(x, {lrn_pool_backward_partials(problem), x.size(1)}, ScalarType::Float);
        problem.partial = static_cast<float*>(partial->data_ptr());
        problem.dbias = dbias.data_ptr();
    }

    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    lrn_pool_backward(problem, type, current_stream(x));
    check_launch("lrn_pool_backward");
    return {dx, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY(alexnet_kernels_cuda, library) {
    library.def(
        "lrn_pool_backward(Tensor grad, Tensor x, Tensor? bias, Tensor place, bool relu, int size, float scale, float beta, "
        "float k, int groups, int[] window, bool pool_first, bool with_bias_grad) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels_cuda, CUDA, library) {
    library.impl("lrn_pool_backward", TORCH_BOX(&lrn_pool_backward_cuda));
}
