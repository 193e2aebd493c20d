// The first layer's forward on the host: functions for ctypes, and a program of its own for the sanitizers, whose buffers end
// exactly where the tensors end.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "conv1.h"
#include "device.h"

// Runs one problem on a device with so many bytes of shared memory a block; the message of what went wrong, or null.
extern "C" const char* run_conv1_forward(Conv1Forward problem, int type, int order, int shared_limit) {
    static std::string message;
    host::order = order;
    host::shared_limit = shared_limit;
    const ElementType element = static_cast<ElementType>(type);
    if (const char* refusal = conv1_forward_refusal(problem, element)) {
        return refusal;
    }
    struct alignas(16) Vector { uint8_t bytes[16]; };
    std::vector<Vector> packed(conv1_packed_bytes(problem, element) / sizeof(Vector));
    problem.packed = packed.data();
    try {
        conv1_forward(problem, element, nullptr);
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
    return nullptr;
}

extern "C" Conv1Launch describe_conv1_forward(Conv1Forward problem, int type, int shared_limit) {
    host::shared_limit = shared_limit;
    return conv1_forward_launch(problem, static_cast<ElementType>(type));
}

namespace {

struct Case {
    ElementType type;
    Conv1Source source;
    int channels, height, width, shared_limit;
    bool stem, pool_first, keep, warpgroups;
};

std::vector<uint8_t> numbers(size_t count, int bytes, bool half, std::mt19937& random) {
    std::vector<uint8_t> result(count * bytes);
    for (size_t i = 0; i < count; ++i) {
        const float value = static_cast<float>(random() % 2001) / 1000 - 1;
        const uint32_t bits = bytes == 4   ? as_bits(value)
                              : bytes == 1 ? random()
                              : half       ? float_to_half(value)
                                           : float_to_bf16(value);
        std::memcpy(&result[i * bytes], &bits, bytes);
    }
    return result;
}

bool has_nan(const std::vector<uint8_t>& results, ElementType type) {
    const size_t bytes = type == ElementType::kFloat32 ? 4 : 2;
    for (size_t i = 0; i < results.size(); i += bytes) {
        uint32_t bits = 0;
        std::memcpy(&bits, &results[i], bytes);
        const float value = type == ElementType::kFloat16    ? half_to_float(bits)
                            : type == ElementType::kBFloat16 ? low_bf16(bits)
                                                             : as_float(bits);
        if (value != value) {
            return true;
        }
    }
    return false;
}

// Two images, planes outermost; padding 2, 1, 0, 3. The results of three orders are compared.
int check(const Case& c) {
    std::mt19937 random(1);
    const int bytes = c.type == ElementType::kFloat32 ? 4 : 2;
    const int source_bytes = c.source == Conv1Source::kFloat32 ? 4 : c.source == Conv1Source::kUint8 ? 1 : 2;
    const int out_height = (c.height + 3 - 11) / 4 + 1, out_width = (c.width + 3 - 11) / 4 + 1;
    const int pooled_height = (out_height - 3) / 2 + 1, pooled_width = (out_width - 3) / 2 + 1;
    const bool half = c.type == ElementType::kFloat16;
    const auto x = numbers(size_t{2} * 3 * c.height * c.width, source_bytes, c.source == Conv1Source::kFloat16, random);
    const auto weight = numbers(size_t{363} * c.channels, bytes, half, random);
    const auto bias = numbers(c.channels, bytes, half, random);
    std::vector<float> mean(3, 0.5f), scale(3, 0.25f);
    std::vector<uint8_t> a(size_t{2} * out_height * out_width * c.channels * bytes);
    std::vector<uint8_t> y(c.stem ? size_t{2} * pooled_height * pooled_width * c.channels * bytes : 0);
    std::vector<uint8_t> place(y.size() / bytes), first_a, first_y, first_place;
    Conv1Forward p{};
    const bool normalised = c.source == Conv1Source::kUint8;
    p.in = {x.data(), c.source, normalised ? mean.data() : nullptr, normalised ? scale.data() : nullptr, 2,
            3 * c.height * c.width, c.height, c.width, c.width, 1, c.height * c.width, 2, 0};
    const int taps[4] = {363, 121, 11, 1};
    std::copy(taps, taps + 4, p.weight_strides);
    p.weight = weight.data(), p.bias = bias.data(), p.a = c.keep ? a.data() : nullptr;
    p.y = c.stem ? y.data() : nullptr, p.place = c.stem && c.keep ? place.data() : nullptr;
    p.out_height = out_height, p.out_width = out_width, p.pooled_height = pooled_height, p.pooled_width = pooled_width;
    p.channels = c.channels, p.groups = 2, p.lrn_scale = 2e-2f, p.beta = 0.75f, p.k = 2, p.relu = true;
    p.pool_first = c.pool_first, p.warpgroups = c.warpgroups;
    // A device with more shared memory multiplies in the same order.
    const std::pair<int, int> runs[] = {{0, c.shared_limit}, {1, c.shared_limit}, {7, c.shared_limit}, {0, 227 << 10}};
    for (const auto& [order, shared_limit] : runs) {
        for (std::vector<uint8_t>* result : {&a, &y, &place}) {
            std::fill(result->begin(), result->end(), host::kPoison);
        }
        if (const char* message = run_conv1_forward(p, static_cast<int>(c.type), order, shared_limit)) {
            std::fprintf(stderr, "%s\n", message);
            return 1;
        }
        if (&order == &runs[0].first) {
            first_a = a, first_y = y, first_place = place;
            if ((c.keep && has_nan(a, c.type)) || has_nan(y, c.type)) {
                std::fprintf(stderr, "NaN in the result\n");
                return 1;
            }
        } else if (a != first_a || y != first_y || place != first_place) {
            std::fprintf(stderr, "order %d gives another result\n", order);
            return 1;
        }
    }
    return 0;
}

}  // namespace

int main() {
    constexpr ElementType kFloat32 = ElementType::kFloat32, kFloat16 = ElementType::kFloat16;
    constexpr ElementType kBFloat16 = ElementType::kBFloat16;
    const Case cases[] = {
        {kBFloat16, Conv1Source::kFloat32, 48, 24, 91, 227 << 10, true, false, true, false},  // two warps of four have pixels
        {kFloat16, Conv1Source::kUint8, 48, 21, 30, 227 << 10, true, true, false, false},
        {kFloat32, Conv1Source::kBFloat16, 96, 20, 21, 163 << 10, true, false, true, false},
        {kFloat32, Conv1Source::kUint8, 64, 19, 23, 227 << 10, false, false, true, false},
        {kFloat16, Conv1Source::kFloat32, 48, 24, 91, 227 << 10, true, false, true, true},
        {kBFloat16, Conv1Source::kUint8, 96, 19, 23, 227 << 10, false, false, true, true},
    };
    int failures = 0;
    for (const Case& c : cases) {
        failures += check(c);
    }
    return failures;
}
