// What torch sees of the first layer's forward: the convolution, and the convolution with all that follows it. Results are
// always channels_last. LibTorch's stable ABI only.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings_conv1.h"

namespace {

using namespace bindings;

// ALEXNET_KERNELS_CONV1, read at each call: "mma", which is what an empty one means, or "wgmma".
bool warpgroups() {
    const char* set = std::getenv("ALEXNET_KERNELS_CONV1");
    const std::string way = set == nullptr || *set == 0 ? "mma" : set;
    STD_TORCH_CHECK(way == "mma" || way == "wgmma", "ALEXNET_KERNELS_CONV1=", way,
                    " is no way to multiply; use 'mma' or 'wgmma'");
    return way == "wgmma";
}

// A problem with everything but its results, and what its pointers need to stay alive.
struct Prepared {
    Conv1Forward problem{};
    ElementType type;
    Tensor weight, packed;
};

Prepared prepare(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& mean,
                 const std::optional<Tensor>& scale, const std::vector<int64_t>& padding, bool relu) {
    Conv1Forward p{};
    p.in = conv1_images(x, mean, scale, padding);
    check_conv1_weight(weight, x);
    const ElementType type = element_type(weight, "weight");
    STD_TORCH_CHECK(!bias || (bias->is_cuda() && bias->get_device_index() == x.get_device_index() && bias->dim() == 1 &&
                              bias->size(0) == weight.size(0) && bias->is_contiguous() &&
                              bias->scalar_type() == weight.scalar_type()),
                    "bias must be a contiguous [O] tensor of weight's dtype and device");
    p.out_height = conv1_out_size(x.size(2), padding[0], padding[1]);
    p.out_width = conv1_out_size(x.size(3), padding[2], padding[3]);
    p.channels = static_cast<int>(weight.size(0));
    p.relu = relu;
    p.warpgroups = warpgroups();
    const Tensor taps = conv1_taps(weight, p.weight_strides);
    const Tensor packed = torch::stable::new_empty(weight, {conv1_packed_bytes(p, type)}, ScalarType::Byte);
    p.weight = taps.data_ptr(), p.packed = packed.data_ptr();
    p.bias = bias ? bias->data_ptr() : nullptr;
    return {p, type, taps, packed};
}

void run(const Prepared& prepared, const Tensor& x, const char* operation) {
    conv1_forward(prepared.problem, prepared.type, current_stream(x));
    check_launch(operation);
}

void check(const Prepared& prepared, const char* operation) {
    const char* refusal = conv1_forward_refusal(prepared.problem, prepared.type);
    STD_TORCH_CHECK(refusal == nullptr, operation, ": ", refusal);
}

Tensor conv1_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& mean,
                  const std::optional<Tensor>& scale, std::vector<int64_t> padding, bool relu) {
    STD_TORCH_CHECK(x.is_cuda(), "x must be on a CUDA device");
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    Prepared prepared = prepare(x, weight, bias, mean, scale, padding, relu);
    Conv1Forward& p = prepared.problem;
    check(prepared, "conv1");
    const Tensor a = empty_channels_last(weight, x.size(0), p.channels, p.out_height, p.out_width, weight.scalar_type());
    if (x.size(0) > 0) {
        p.a = a.data_ptr();
        run(prepared, x, "conv1");
    }
    return a;
}

// Windows of 3 with stride 2 along an axis: torch's rule, without padding.
int pooled_size(int size, bool ceil_mode) { return size < (ceil_mode ? 2 : 3) ? 0 : (size - 3 + ceil_mode) / 2 + 1; }

std::tuple<Tensor, Tensor, Tensor> stem_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                             const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
                                             std::vector<int64_t> padding, bool relu, int64_t size, double lrn_scale,
                                             double beta, double k, int64_t groups, std::vector<int64_t> window,
                                             bool ceil_mode, bool pool_first, bool keep) {
    STD_TORCH_CHECK(x.is_cuda(), "x must be on a CUDA device");
    STD_TORCH_CHECK(size == 5, "size must be 5, of the normalisation that the CUDA kernel has, got ", size);
    STD_TORCH_CHECK((window == std::vector<int64_t>{3, 3, 2, 2, 0, 0, 1, 1}),
                    "window must be that of a pool of 3 x 3 with stride 2, no padding and dilation 1: "
                    "[3, 3, 2, 2, 0, 0, 1, 1]");
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    Prepared prepared = prepare(x, weight, bias, mean, scale, padding, relu);
    Conv1Forward& p = prepared.problem;
    p.pooled_height = pooled_size(p.out_height, ceil_mode), p.pooled_width = pooled_size(p.out_width, ceil_mode);
    STD_TORCH_CHECK(p.pooled_height > 0 && p.pooled_width > 0, "x is too small for the pool: its convolution has ",
                    p.out_height, " x ", p.out_width, " pixels");
    p.groups = static_cast<int>(groups);
    p.lrn_scale = static_cast<float>(lrn_scale), p.beta = static_cast<float>(beta), p.k = static_cast<float>(k);
    p.pool_first = pool_first;

    const ScalarType type = weight.scalar_type();
    const Tensor y = empty_channels_last(weight, x.size(0), p.channels, p.pooled_height, p.pooled_width, type);
    p.y = y.data_ptr();
    check(prepared, "stem");
    const Tensor a = keep ? empty_channels_last(weight, x.size(0), p.channels, p.out_height, p.out_width, type)
                          : torch::stable::new_empty(weight, {0});
    const ScalarType byte = ScalarType::Byte;
    const Tensor place = keep ? empty_channels_last(y, x.size(0), p.channels, p.pooled_height, p.pooled_width, byte)
                              : torch::stable::new_empty(weight, {0}, byte);
    if (x.size(0) > 0) {
        p.a = keep ? a.data_ptr() : nullptr;
        p.place = keep ? static_cast<uint8_t*>(place.data_ptr()) : nullptr;
        run(prepared, x, "stem");
    }
    return {y, a, place};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(alexnet_kernels_cuda, library) {
    library.def(
        "conv1(Tensor x, Tensor weight, Tensor? bias, Tensor? mean, Tensor? scale, int[] padding, bool relu) -> Tensor");
    library.def(
        "stem(Tensor x, Tensor weight, Tensor? bias, Tensor? mean, Tensor? scale, int[] padding, bool relu, int size, "
        "float lrn_scale, float beta, float k, int groups, int[] window, bool ceil_mode, bool pool_first, bool keep) "
        "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels_cuda, CUDA, library) {
    library.impl("conv1", TORCH_BOX(&conv1_cuda));
    library.impl("stem", TORCH_BOX(&stem_cuda));
}
