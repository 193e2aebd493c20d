// What the two kernels of the first convolution's backward share: the map it is seen on, operands of the tensor cores, the
// masked gradient.
//
// Four by four image pixels of three colours are one cell of a space-to-depth map, on which the convolution has stride 1 and
// a 3 x 3 window: image row 4 i + ry - pad_top, column 4 j + rx - pad_left lies in cell (i, j), and kernel row ky = 4 dy + ry
// meets it from output row i - dy. A cell's 48 numbers are ordered (ry, colour, rx): twelve runs of four. Two runs are a chunk.
#pragma once

#include "conv1_backward.h"
#include "tensor_core.h"
#include "vectors.h"

namespace conv1_grad {

constexpr int kStride = 4, kKernel = 11, kColors = 3;
constexpr int kWindow = 3;                             // cells that a kernel reaches, in each direction
constexpr int kRuns = kStride * kColors;               // of four pixels in a cell
constexpr int kCell = kRuns * kStride, kChunk = 8;     // numbers
constexpr int kThreads = 256, kWarpLanes = 32, kWarps = kThreads / kWarpLanes;
static_assert(kWindow * kStride >= kKernel, "the window covers the kernel");

// Numbers as the tensor cores take them: bf16 and fp16, or fp32 rounded to tf32.
template <ElementType kType> struct Operand {
    using E = Element<kType>;
    static constexpr int kBytes = E::kBytes, kVectorSize = 16 / kBytes;  // numbers in 16 bytes
    static constexpr int kDepth = 32 / kBytes;                           // of a product: 16, or 8 of tf32
    static constexpr uint32_t kOnes = kType == ElementType::kFloat16 ? 0x3c003c00 : 0x3f803f80;

    DEVICE static void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        if constexpr (kType == ElementType::kFloat32) {
            mma_tf32(d, a, b0, b1);
        } else if constexpr (kType == ElementType::kFloat16) {
            mma_half(d, a, b0, b1);
        } else {
            mma_bf16(d, a, b0, b1);
        }
    }
    // The first eight of sixteen alone.
    DEVICE static void multiply_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0) {
        static_assert(kBytes == 2, "a product of tf32 is eight deep");
        if constexpr (kType == ElementType::kFloat16) {
            mma_half_k8(d, a[0], a[1], b0);
        } else {
            mma_bf16_k8(d, a[0], a[1], b0);
        }
    }
    // fp32 as an operand, in the low bits of a word.
    DEVICE static uint32_t round(float value) {
        if constexpr (kType == ElementType::kFloat32) {
            return float_to_tf32(value);
        } else {
            return E::pack(value, 0);
        }
    }
    DEVICE static void put(uint8_t* to, uint32_t operand) {
        if constexpr (kBytes == 4) {
            *reinterpret_cast<uint32_t*>(to) = operand;
        } else {
            *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(operand);
        }
    }
    // The bits of `grad` where `not a <= 0`: a is positive or NaN. Of 16 bits, two at once: bit 15 of `nonzero` says that the
    // magnitude is not zero, of `nan` that it is above infinity.
    DEVICE static uint32_t mask(uint32_t grad, uint32_t a) {
        if constexpr (kBytes == 4) {
            return as_float(a) <= 0 ? 0 : grad;
        } else {
            constexpr uint32_t kAboveInfinity = kType == ElementType::kFloat16 ? 0x03ff03ff : 0x007f007f;
            const uint32_t magnitude = a & 0x7fff7fff, nonzero = magnitude + 0x7fff7fff, nan = magnitude + kAboveInfinity;
            return grad & spread_signs_16x2((nonzero & ~a) | nan);
        }
    }
};

DEVICE uint32_t word(const uint8_t* from) { return *reinterpret_cast<const uint32_t*>(from); }

// 16 bytes of the gradient that lie in shared memory become operands; `words` is what they were after the mask and before
// rounding.
template <ElementType kType> DEVICE void prepare(uint32_t (&words)[4], uint8_t* grad, const uint8_t* a, bool masked) {
    const uint4 g = *reinterpret_cast<const uint4*>(grad);
    words[0] = g.x, words[1] = g.y, words[2] = g.z, words[3] = g.w;
    if (masked) {
        const uint4 y = *reinterpret_cast<const uint4*>(a);
        const uint32_t below[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            words[i] = Operand<kType>::mask(words[i], below[i]);
        }
    }
    if (kType == ElementType::kFloat32) {
        *reinterpret_cast<uint4*>(grad) = make_uint4(float_to_tf32(as_float(words[0])), float_to_tf32(as_float(words[1])),
                                                     float_to_tf32(as_float(words[2])), float_to_tf32(as_float(words[3])));
    } else if (masked) {
        *reinterpret_cast<uint4*>(grad) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

template <ElementType kType> DEVICE void store_one(void* to, int64_t at, float value) {
    if constexpr (kType == ElementType::kFloat32) {
        static_cast<float*>(to)[at] = value;
    } else {
        static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(Element<kType>::pack(value, 0));
    }
}

}  // namespace conv1_grad

// dx, in conv1_dgrad.cu.
int64_t conv1_data_gradient_workspace(const Conv1Backward& problem, ElementType type);
void conv1_data_gradient(const Conv1Backward& problem, ElementType type, void* stream);
