// What torch sees of the CPU kernels: shapes, layouts, threads, registration. LibTorch's stable ABI only, so that one library
// serves every torch since 2.10. Arguments were checked, and layouts made dense and alike, by alexnet_kernels/ops.

#if __has_include(<Python.h>)
#define ALEXNET_PYTHON 1
#include <Python.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "lrn_pool_cpu.h"

namespace {

using alexnet_cpu::Call;
using alexnet_cpu::Type;
using alexnet_cpu::Work;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

Type type_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float: return Type::f32;
        case ScalarType::Double: return Type::f64;
        case ScalarType::BFloat16: return Type::bf16;
        default: STD_TORCH_CHECK(false, "x must be float32, float64 or bfloat16");
    }
    return Type::f32;
}

// [N, C, ...] of any number of dimensions: all that follows C is one row.
void describe(Call& call, const Tensor& x) {
    STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 2, "x must be a CPU tensor [N, C, ...]");
    call.type = type_of(x);
    call.channels_last = !x.is_contiguous();
    call.threads = torch::stable::get_num_threads();
    call.n = x.size(0), call.c = x.size(1), call.h = 1, call.w = 1;
    for (int64_t d = 2; d < x.dim(); ++d) (d == 2 && x.dim() == 4 ? call.h : call.w) *= x.size(d);
}

void check_like(const Tensor& a, const Tensor& x, const char* name) {
    bool same = a.is_cpu() && a.dim() == x.dim() && a.scalar_type() == x.scalar_type();
    for (int64_t d = 0; same && d < x.dim(); ++d) same = a.size(d) == x.size(d);
    STD_TORCH_CHECK(same && a.is_contiguous() | (a.stride(1) == 1), name, " must have the shape, dtype and layout of x");
}

void describe_lrn(Call& call, int64_t size, double scale, double beta, double k, int64_t groups) {
    STD_TORCH_CHECK(size >= 1 && groups >= 1 && call.c % groups == 0, "size and groups must be at least 1, groups must divide C");
    call.normalise = true;
    call.size = size, call.scale = scale, call.beta = beta, call.k = k, call.groups = groups;
}

void describe_window(Call& call, const Sizes& w) {
    STD_TORCH_CHECK(w.size() == 8, "window must be [kh, kw, sh, sw, ph, pw, dh, dw]");
    call.pool = true;
    call.window = {w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]};
    for (int i : {0, 1, 2, 3, 6, 7}) STD_TORCH_CHECK(w[i] >= 1, "kernel, stride and dilation must be at least 1");
    STD_TORCH_CHECK(w[4] >= 0 && w[5] >= 0 && w[0] * w[1] <= 256, "padding must be at least 0, the kernel's area at most 256");
}

// torch's rule: in ceil mode a last window may hang over, but must begin inside the picture or its left padding.
int64_t windows(int64_t length, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil_mode) {
    int64_t room = length + 2 * padding - dilation * (kernel - 1) - 1 + (ceil_mode ? stride - 1 : 0);
    int64_t count = (room < 0 ? -((-room + stride - 1) / stride) : room / stride) + 1;
    if (ceil_mode && (count - 1) * stride >= length + padding) --count;
    STD_TORCH_CHECK(count >= 1, "the pooling window does not fit into the picture");
    return count;
}

Tensor make(const Sizes& sizes, ScalarType type, const Call& call) {
    std::optional<MemoryFormat> format;
    if (call.channels_last) format = sizes.size() == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
    return torch::stable::empty(sizes, type, std::nullopt, std::nullopt, std::nullopt, format);
}

Tensor empty_row(int64_t n, ScalarType type) { return torch::stable::empty({n}, type); }

Sizes shape(const Tensor& x) {
    auto sizes = x.sizes();
    return Sizes(sizes.begin(), sizes.end());
}

void run(const Call& call, Work work, void (*kernel)(const Call&, int64_t, int64_t)) {
    if (work.tasks == 0) return;
    if (work.tasks <= work.grain) return kernel(call, 0, work.tasks);
    torch::stable::parallel_for(
        0, work.tasks, work.grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

void run_forward(const Call& call) { run(call, forward_work(call), alexnet_cpu::forward); }
void run_backward(const Call& call) { run(call, backward_work(call), alexnet_cpu::backward); }

Tensor lrn(const Tensor& x, int64_t size, double scale, double beta, double k, int64_t groups) {
    Call call;
    describe(call, x);
    describe_lrn(call, size, scale, beta, k, groups);
    Tensor y = make(shape(x), x.scalar_type(), call);
    call.x = x.const_data_ptr(), call.out = y.mutable_data_ptr();
    if (x.numel()) run_forward(call);
    return y;
}

Tensor lrn_backward(
    const Tensor& grad, const Tensor& x, int64_t size, double scale, double beta, double k, int64_t groups) {
    Call call;
    describe(call, x);
    check_like(grad, x, "grad");
    describe_lrn(call, size, scale, beta, k, groups);
    Tensor dx = make(shape(x), x.scalar_type(), call);
    call.x = x.const_data_ptr(), call.grad = grad.const_data_ptr(), call.out = dx.mutable_data_ptr();
    if (x.numel()) run_backward(call);
    return dx;
}

std::tuple<Tensor, Tensor> pooled(Call& call, const Tensor& x, bool ceil_mode, bool with_place) {
    STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W]");
    const auto& w = call.window;
    call.oh = windows(call.h, w.kh, w.sh, w.ph, w.dh, ceil_mode);
    call.ow = windows(call.w, w.kw, w.sw, w.pw, w.dw, ceil_mode);
    Sizes sizes{call.n, call.c, call.oh, call.ow};
    Tensor y = make(sizes, x.scalar_type(), call);
    Tensor place = with_place ? make(sizes, ScalarType::Byte, call) : empty_row(0, ScalarType::Byte);
    call.x = x.const_data_ptr(), call.out = y.mutable_data_ptr();
    if (with_place) call.place_out = static_cast<uint8_t*>(place.mutable_data_ptr());
    if (x.numel()) run_forward(call);
    return {y, place};
}

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& x, Sizes window, bool ceil_mode, bool with_place) {
    Call call;
    describe(call, x);
    describe_window(call, window);
    return pooled(call, x, ceil_mode, with_place);
}

void check_places(Call& call, const Tensor& grad, const Tensor& place) {
    STD_TORCH_CHECK(grad.is_cpu() && grad.dim() == 4 && place.is_cpu() && place.dim() == 4, "grad and place must be 4-D on the CPU");
    STD_TORCH_CHECK(place.scalar_type() == ScalarType::Byte, "place must be uint8");
    for (int d = 0; d < 4; ++d) STD_TORCH_CHECK(grad.size(d) == place.size(d), "grad and place must have one shape");
    STD_TORCH_CHECK(type_of(grad) == call.type && grad.size(0) == call.n && grad.size(1) == call.c, "grad must match x");
    call.oh = grad.size(2), call.ow = grad.size(3);
    call.grad = grad.const_data_ptr();
    call.place = static_cast<const uint8_t*>(place.const_data_ptr());
}

Tensor max_pool2d_backward(
    const Tensor& grad, const Tensor& place, int64_t height, int64_t width, Sizes window) {
    Call call;
    describe(call, grad);
    call.h = height, call.w = width;
    describe_window(call, window);
    check_places(call, grad, place);
    Tensor dx = make({call.n, call.c, height, width}, grad.scalar_type(), call);
    call.out = dx.mutable_data_ptr();
    if (grad.numel()) run_backward(call);
    return dx;
}

void describe_activation(Call& call, const Tensor& x, const std::optional<Tensor>& bias, bool relu) {
    call.relu = relu;
    if (!bias) return;
    STD_TORCH_CHECK(
        bias->is_cpu() && bias->is_contiguous() && bias->numel() == call.c && bias->scalar_type() == x.scalar_type(),
        "bias must be contiguous, one value of x's dtype per channel");
    call.bias = bias->const_data_ptr();
}

std::tuple<Tensor, Tensor> lrn_pool(
    const Tensor& x, std::optional<Tensor> bias, bool relu, int64_t size, double scale, double beta, double k,
    int64_t groups, Sizes window, bool ceil_mode, bool pool_first, bool with_place) {
    Call call;
    describe(call, x);
    describe_activation(call, x, bias, relu);
    describe_lrn(call, size, scale, beta, k, groups);
    describe_window(call, window);
    call.pool_first = pool_first;
    return pooled(call, x, ceil_mode, with_place);
}

// Σ over the tasks, in their order
template <class T>
void sum_partials(const std::vector<double>& partial, int64_t channels, T* out) {
    std::vector<double> total(channels, 0.0);
    for (size_t i = 0; i < partial.size(); ++i) total[i % channels] += partial[i];
    for (int64_t c = 0; c < channels; ++c) out[c] = T(total[c]);
}

Tensor bias_gradient(const std::vector<double>& partial, const Call& call, ScalarType type) {
    Tensor out = empty_row(call.c, type);
    switch (call.type) {
        case Type::f32: sum_partials(partial, call.c, static_cast<float*>(out.mutable_data_ptr())); break;
        case Type::f64: sum_partials(partial, call.c, static_cast<double*>(out.mutable_data_ptr())); break;
        case Type::bf16:
            std::vector<float> wide(call.c);
            sum_partials(partial, call.c, wide.data());
            auto* to = static_cast<torch::headeronly::BFloat16*>(out.mutable_data_ptr());
            for (int64_t c = 0; c < call.c; ++c) to[c] = torch::headeronly::BFloat16(wide[c]);
    }
    return out;
}

std::tuple<Tensor, Tensor> lrn_pool_backward(
    const Tensor& grad, const Tensor& x, std::optional<Tensor> bias, const Tensor& place, bool relu, int64_t size,
    double scale, double beta, double k, int64_t groups, Sizes window, bool pool_first, bool with_bias_grad) {
    Call call;
    describe(call, x);
    STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W]");
    describe_activation(call, x, bias, relu);
    describe_lrn(call, size, scale, beta, k, groups);
    describe_window(call, window);
    call.pool_first = pool_first;
    check_places(call, grad, place);
    Tensor dx = make(shape(x), x.scalar_type(), call);
    call.x = x.const_data_ptr(), call.out = dx.mutable_data_ptr();
    std::vector<double> partial;
    if (with_bias_grad) {
        partial.resize(x.numel() ? backward_work(call).tasks * call.c : 0);
        call.bias_partial = partial.data();
    }
    if (x.numel()) run_backward(call);
    return {dx, with_bias_grad ? bias_gradient(partial, call, x.scalar_type()) : empty_row(0, x.scalar_type())};
}

int64_t simd_level() { return int64_t(alexnet_cpu::level()); }

}  // namespace

STABLE_TORCH_LIBRARY(alexnet_kernels_cpu, m) {
    m.def("lrn(Tensor x, int size, float scale, float beta, float k, int groups) -> Tensor");
    m.def("lrn_backward(Tensor grad, Tensor x, int size, float scale, float beta, float k, int groups) -> Tensor");
    m.def("max_pool2d(Tensor x, int[] window, bool ceil_mode, bool with_place) -> (Tensor y, Tensor place)");
    m.def("max_pool2d_backward(Tensor grad, Tensor place, int height, int width, int[] window) -> Tensor");
    m.def(
        "lrn_pool(Tensor x, Tensor? bias, bool relu, int size, float scale, float beta, float k, int groups, int[] window, "
        "bool ceil_mode, bool pool_first, bool with_place) -> (Tensor y, Tensor place)");
    m.def(
        "lrn_pool_backward(Tensor grad, Tensor x, Tensor? bias, Tensor place, bool relu, int size, float scale, float beta, "
        "float k, int groups, int[] window, bool pool_first, bool with_bias_grad) -> (Tensor dx, Tensor dbias)");
    m.def("simd_level() -> int");  // 0 baseline, 1 AVX2, 2 AVX-512
}

STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels_cpu, CompositeExplicitAutograd, m) {
    m.impl("simd_level", TORCH_BOX(&simd_level));
}

STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels_cpu, CPU, m) {
    m.impl("lrn", TORCH_BOX(&lrn));
    m.impl("lrn_backward", TORCH_BOX(&lrn_backward));
    m.impl("max_pool2d", TORCH_BOX(&max_pool2d));
    m.impl("max_pool2d_backward", TORCH_BOX(&max_pool2d_backward));
    m.impl("lrn_pool", TORCH_BOX(&lrn_pool));
    m.impl("lrn_pool_backward", TORCH_BOX(&lrn_pool_backward));
}

#ifdef ALEXNET_PYTHON  // not needed to load the library, but then it can also be imported
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cpu() {
    static PyModuleDef module = {
        PyModuleDef_HEAD_INIT, "_cpu", "The CPU kernels: importing it registers torch.ops.alexnet_kernels_cpu.", -1,
        nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
#endif
