// Eight channels of a pixel in one thread: how they are loaded, become fp32, and are stored. T is a kernel's traits: its E is an
// Element, kWords the words that eight of them are.
#pragma once

#include "device.h"
#include "element_type.h"

constexpr int kVector = 8;  // channels of a thread

// Eight elements of T as words: how they become fp32 and back, the larger of two, a = max(floor, x + bias) rounded to T.
template <ElementType> struct Element;

template <> struct Element<ElementType::kFloat32> {
    static constexpr int kBytes = 4, kPerWord = 1;
    static constexpr uint32_t kMinusZero = 0x80000000, kMinusInfinity = 0xff800000;
    DEVICE static float first(uint32_t word) { return as_float(word); }
    DEVICE static float second(uint32_t word) { return as_float(word); }
    DEVICE static uint32_t pack(float first, float) { return as_bits(first); }
    DEVICE static uint32_t maximum(uint32_t a, uint32_t b) { return as_bits(max_nan(as_float(a), as_float(b))); }
    DEVICE static uint32_t activate(uint32_t x, uint32_t bias, uint32_t floor) {
        return as_bits(max_nan(as_float(x) + as_float(bias), as_float(floor)));
    }
};

template <> struct Element<ElementType::kFloat16> {
    static constexpr int kBytes = 2, kPerWord = 2;
    static constexpr uint32_t kMinusZero = 0x80008000, kMinusInfinity = 0xfc00fc00;
    DEVICE static float first(uint32_t word) { return half_to_float(word); }
    DEVICE static float second(uint32_t word) { return half_to_float(word >> 16); }
    DEVICE static uint32_t pack(float first, float second) { return pack_half2(first, second); }
    DEVICE static uint32_t maximum(uint32_t a, uint32_t b) { return max_nan_half2(a, b); }
    DEVICE static uint32_t activate(uint32_t x, uint32_t bias, uint32_t floor) {
        return max_nan_half2(add_half2(x, bias), floor);
    }
};

template <> struct Element<ElementType::kBFloat16> {
    static constexpr int kBytes = 2, kPerWord = 2;
    static constexpr uint32_t kMinusZero = 0x80008000, kMinusInfinity = 0xff80ff80;
    DEVICE static float first(uint32_t word) { return as_float(word << 16); }
    DEVICE static float second(uint32_t word) { return as_float(word & 0xffff0000); }
    DEVICE static uint32_t pack(float first, float second) { return pack_bf16x2(first, second); }
    DEVICE static uint32_t maximum(uint32_t a, uint32_t b) { return max_nan_bf16x2(a, b); }
    DEVICE static uint32_t activate(uint32_t x, uint32_t bias, uint32_t floor) {
        return max_nan_bf16x2(add_bf16x2(x, bias), floor);
    }
};

template <class T> DEVICE void load(uint32_t (&words)[T::kWords], const uint8_t* from, bool wanted) {
#pragma unroll
    for (int i = 0; i < T::kWords; i += 4) {
        const uint4 v = wanted ? reinterpret_cast<const uint4*>(from)[i / 4] : make_uint4(0, 0, 0, 0);
        words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
    }
}

template <class T> DEVICE void store(uint8_t* to, const float (&values)[kVector]) {
    uint32_t words[T::kWords];
#pragma unroll
    for (int i = 0; i < T::kWords; ++i) {
        words[i] = T::E::pack(values[i * T::E::kPerWord], values[i * T::E::kPerWord + T::E::kPerWord - 1]);
    }
#pragma unroll
    for (int i = 0; i < T::kWords; i += 4) {
        reinterpret_cast<uint4*>(to)[i / 4] = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
}

// Words to fp32, from values[at] on.
template <class T, int kCount, int kSize>
DEVICE void unpack(float (&values)[kSize], int at, const uint32_t (&words)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        values[at + i * T::E::kPerWord] = T::E::first(words[i]);
        if (T::E::kPerWord == 2) {
            values[at + i * 2 + 1] = T::E::second(words[i]);
        }
    }
}
