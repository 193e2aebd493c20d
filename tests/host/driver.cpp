// The fused backward on the host: a function for ctypes, and a program of its own for the sanitizers, whose buffers end
// exactly where the tensors end.
#include <cstdio>
#include <cstring>
#include <exception>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "lrn_pool_backward.h"

// Runs one problem with `partial` allocated here where dbias is wanted; the message of what went wrong, or null.
extern "C" const char* run_lrn_pool_backward(LrnPoolBackward problem, int type, int order) {
    static std::string message;
    if (const char* refusal = lrn_pool_backward_refusal(problem)) {
        return refusal;
    }
    std::vector<float> partial(problem.dbias ? lrn_pool_backward_partials(problem) * problem.channels : 0, NAN);
    problem.partial = problem.dbias ? partial.data() : nullptr;
    host::order = order;
    try {
        lrn_pool_backward(problem, static_cast<ElementType>(type), nullptr);
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
    return nullptr;
}

// The bits of `count` numbers through the host's conversions: to bf16 or half and back.
extern "C" void round_trip(const float* from, uint16_t* to, float* back, int64_t count, int type) {
    for (int64_t i = 0; i < count; ++i) {
        const bool half = type == static_cast<int>(ElementType::kFloat16);
        to[i] = static_cast<uint16_t>(half ? float_to_half(from[i]) : float_to_bf16(from[i]));
        back[i] = half ? half_to_float(to[i]) : low_bf16(to[i]);
    }
}

namespace {

// A heap buffer per tensor: 16-byte aligned by malloc, and ASan sees the first byte behind it.
std::vector<uint8_t> tensor(size_t count, ElementType type, std::mt19937& random) {
    std::vector<uint8_t> bytes(count * (type == ElementType::kFloat32 ? 4 : 2));
    for (size_t i = 0; i < count; ++i) {
        const float value = static_cast<float>(random() % 2001) / 500 - 2;
        const uint32_t bits = type == ElementType::kFloat16    ? float_to_half(value)
                              : type == ElementType::kBFloat16 ? float_to_bf16(value)
                                                               : as_bits(value);
        std::memcpy(&bytes[i * bytes.size() / count], &bits, bytes.size() / count);
    }
    return bytes;
}

int check(ElementType type, int images, int height, int width, int channels, int groups, int padding, float beta) {
    std::mt19937 random(1);
    const int out_height = (height + 2 * padding - 3) / 2 + 1, out_width = (width + 2 * padding - 3) / 2 + 1;
    const size_t in = static_cast<size_t>(images) * height * width * channels;
    const size_t out = static_cast<size_t>(images) * out_height * out_width * channels;
    const auto x = tensor(in, type, random), grad = tensor(out, type, random), bias = tensor(channels, type, random);
    std::vector<uint8_t> place(out), dx(x.size()), dbias(bias.size()), first_dx, first_dbias;
    for (uint8_t& tap : place) {
        tap = static_cast<uint8_t>(random() % 9);
    }
    for (int order : {0, 1, 7}) {
        std::fill(dx.begin(), dx.end(), host::kPoison);
        LrnPoolBackward p{grad.data(), place.data(), x.data(), bias.data(), dx.data(), nullptr, dbias.data(), images,
                          height, width, out_height, out_width, channels, groups, padding, padding, 1e-2f, beta, 2, true};
        if (const char* message = run_lrn_pool_backward(p, static_cast<int>(type), order)) {
            std::fprintf(stderr, "%s\n", message);
            return 1;
        }
        if (order == 0) {
            first_dx = dx, first_dbias = dbias;
        } else if (dx != first_dx || dbias != first_dbias) {
            std::fprintf(stderr, "order %d gives another result\n", order);
            return 1;
        }
    }
    return 0;
}

}  // namespace

int main() {
    int failures = 0;
    for (ElementType type : {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16}) {
        failures += check(type, 2, 5, 7, 16, 2, 0, 0.75f);
        failures += check(type, 1, 6, 8, 104, 1, 1, 0.6f);
    }
    return failures;
}
