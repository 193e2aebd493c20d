// The first convolution's backward on the host: a function for ctypes, and a program of its own for the sanitizers, whose
// buffers end exactly where the tensors end.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <random>
#include <string>
#include <vector>

#include "conv1_backward.h"
#include "device.h"

// Runs one problem on a device with so many bytes of shared memory a block, its workspace allocated here and filled with NaN;
// the message of what went wrong, or null.
extern "C" const char* run_conv1_backward(Conv1Backward problem, int type, int order, int shared_limit) {
    static std::string message;
    host::shared_limit = shared_limit;
    if (const char* refusal = conv1_backward_refusal(problem, static_cast<ElementType>(type))) {
        return refusal;
    }
    std::vector<float> workspace((conv1_backward_workspace(problem, static_cast<ElementType>(type)) + 3) / 4, NAN);
    problem.workspace = workspace.data();
    host::order = order;
    try {
        conv1_backward(problem, static_cast<ElementType>(type), nullptr);
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
    return nullptr;
}

extern "C" Conv1BackwardLaunch describe_conv1_backward(Conv1Backward problem, int type) {
    return conv1_backward_launch(problem, static_cast<ElementType>(type));
}

namespace {

struct Shape {
    int images, height, width, top, left, bottom, right;
};

// A heap buffer per tensor: 16-byte aligned by malloc, and ASan sees the first byte behind it.
std::vector<uint8_t> tensor(size_t count, Conv1Source type, std::mt19937& random) {
    const size_t size = type == Conv1Source::kFloat32 ? 4 : type == Conv1Source::kUint8 ? 1 : 2;
    std::vector<uint8_t> bytes(count * size);
    for (size_t i = 0; i < count; ++i) {
        const float value = static_cast<float>(random() % 2001) / 500 - 2;
        const uint32_t bits = type == Conv1Source::kFloat16    ? float_to_half(value)
                              : type == Conv1Source::kBFloat16 ? float_to_bf16(value)
                              : type == Conv1Source::kUint8    ? random() % 256
                                                          : as_bits(value);
        std::memcpy(&bytes[i * size], &bits, size);
    }
    return bytes;
}

int check(ElementType type, Conv1Source source, const Shape& s, int channels, bool masked, bool channels_last) {
    std::mt19937 random(1);
    const Conv1Source same = static_cast<Conv1Source>(type);
    const int out_height = (s.height + s.top + s.bottom - 11) / 4 + 1, out_width = (s.width + s.left + s.right - 11) / 4 + 1;
    const size_t in = static_cast<size_t>(s.images) * 3 * s.height * s.width, weights = channels * 363;
    const size_t out = static_cast<size_t>(s.images) * out_height * out_width * channels;
    const auto x = tensor(in, source, random), weight = tensor(weights, same, random), grad = tensor(out, same, random),
               a = tensor(out, same, random);
    const float mean[3] = {1, 2, 3}, scale[3] = {0.5f, 0.25f, 2};
    std::vector<uint8_t> dx(source == Conv1Source::kUint8 ? 0 : x.size()), dw(weight.size());
    std::vector<uint8_t> db(channels * weight.size() / weights);
    Conv1Backward p{};
    p.in = {x.data(), source, mean, scale, s.images, 3 * s.height * s.width, s.height, s.width, s.width, 1,
            s.height * s.width, s.top, s.left};
    if (channels_last) {
        p.in.row_stride = 3 * s.width, p.in.column_stride = 3, p.in.plane_stride = 1;
    }
    p.grad = grad.data(), p.a = masked ? a.data() : nullptr, p.weight = weight.data();
    p.dx = dx.empty() ? nullptr : dx.data(), p.dw = dw.data(), p.db = db.data();
    const int taps[4] = {363, 121, 11, 1};
    std::copy(taps, taps + 4, p.weight_strides);
    p.out_height = out_height, p.out_width = out_width, p.channels = channels, p.multiprocessors = 3;
    std::vector<std::vector<uint8_t>> first;
    for (int order : {0, 1, 7}) {
        for (std::vector<uint8_t>* gradient : {&dx, &dw, &db}) {
            std::fill(gradient->begin(), gradient->end(), host::kPoison);
        }
        if (const char* message = run_conv1_backward(p, static_cast<int>(type), order, 163 << 10)) {
            std::fprintf(stderr, "%s\n", message);
            return 1;
        }
        if (order == 0) {
            first = {dx, dw, db};
        } else if (first != std::vector<std::vector<uint8_t>>{dx, dw, db}) {
            std::fprintf(stderr, "order %d gives another result\n", order);
            return 1;
        }
    }
    return 0;
}

}  // namespace

int main() {
    int failures = 0;
    failures += check(ElementType::kFloat32, Conv1Source::kFloat32, {2, 15, 19, 2, 2, 2, 2}, 48, true, false);
    failures += check(ElementType::kFloat16, Conv1Source::kUint8, {1, 12, 18, 0, 1, 3, 2}, 64, false, true);
    failures += check(ElementType::kBFloat16, Conv1Source::kFloat16, {2, 15, 11, 0, 0, 0, 0}, 96, true, true);
    failures += check(ElementType::kBFloat16, Conv1Source::kBFloat16, {1, 11, 239, 0, 0, 0, 0}, 48, false, false);
    return failures;
}
