// The names of warpgroup.h for a compiler that is not nvcc. Products read shared memory as it was at the proxy fences, and are
// formed at the wait: until then their sums are NaN, and a byte that is not what it was at the last fence is read as NaN too.
// So a missing wait, a missing fence and shared memory overwritten under a product all show as NaN.
#pragma once

#include "tensor_core.h"

namespace host {

constexpr int kWarpgroup = 4 * kWarp;

inline uint32_t offset_in_shared(const void* address) {
    return static_cast<uint32_t>(static_cast<const uint8_t*>(address) - the_block->shared.data());
}

// 16 bytes of a matrix, `row` and `half` as a descriptor places them.
inline void read_half(uint32_t (&words)[4], uint64_t descriptor, int row, int half) {
    const auto field = [descriptor](int bit) { return static_cast<size_t>(descriptor >> bit & 0x3fff) << 4; };
    const size_t at = field(0) + half * field(16) + row / 8 * field(32) + row % 8 * 16;
    Block& b = *the_block;
    const auto holds = [at](const SharedArray& one) { return at >= one.offset && at + 16 <= one.offset + one.bytes; };
    if (std::none_of(b.arrays.begin(), b.arrays.end(), holds)) {
        fail("wgmma reads outside the shared arrays");
    }
    const bool known = std::memcmp(&b.shared[at], &b.fenced[at], 16) == 0;
    known ? std::memcpy(words, &b.shared[at], 16) : std::memset(words, kPoison, 16);
}

// This lane's sums. They are formed in double and rounded once: no order of the terms is promised.
template <float (*kToFloat)(uint32_t), int kTiles> void form_product(const AsyncProduct& product) {
    const unsigned thread = the_block->current->linear % kWarpgroup, g = thread % kWarp / 4, q = thread % 4;
    const auto read = [](double(&values)[16], uint64_t descriptor, int row) {
        for (int half = 0; half < 2; ++half) {
            uint32_t words[4];
            read_half(words, descriptor, row, half);
            for (int i = 0; i < 8; ++i) {
                values[half * 8 + i] = kToFloat(words[i / 2] >> 16 * (i % 2));
            }
        }
    };
    double left[2][16], right[16];
    for (int i = 0; i < 2; ++i) {
        read(left[i], product.a, thread / kWarp * 16 + g + 8 * i);
    }
    for (int column = 0; column < 2 * kTiles; ++column) {
        read(right, product.b, column / 2 * 8 + 2 * q + column % 2);
        for (int i = 0; i < 2; ++i) {
            float& one = product.d[column / 2 * 4 + 2 * i + column % 2];
            double sum = one;
            for (int k = 0; k < 16; ++k) {
                sum += left[i][k] * right[k];
            }
            one = static_cast<float>(sum);
        }
    }
}

inline void hide(Fiber& me, const AsyncProduct& product) {
    float *const begin = product.d, *const end = begin + product.count;
    if (std::none_of(me.hidden.begin(), me.hidden.end(), [begin](const Hidden& one) { return one.d == begin; })) {
        me.hidden.push_back({begin, std::vector<float>(begin, end)});
        std::fill(begin, end, std::nanf(""));
    }
}

template <float (*kToFloat)(uint32_t), int kTiles> void begin_product(float (&d)[kTiles][4], uint64_t a, uint64_t b) {
    static const char operation = 0;
    Fiber& me = *the_block->current;
    meet(the_block->warps[me.linear / kWarp], &operation, [] {});
    auto& asked = the_block->asked[me.linear / kWarpgroup];
    if (me.asked == asked.size()) {
        asked.emplace_back(a, b);
    }
    if (asked[me.asked++] != std::make_pair(a, b)) {
        fail("threads of a warpgroup have come for different products");
    }
    if (!me.sums_fenced) {
        fail("wgmma without wgmma.fence before it");
    }
    me.products.push_back({form_product<kToFloat, kTiles>, &d[0][0], 4 * kTiles, a, b, me.product_groups});
    hide(me, me.products.back());
}

inline void wait_for_products(unsigned pending) {
    Fiber& me = *the_block->current;
    for (const Hidden& one : me.hidden) {
        std::copy(one.values.begin(), one.values.end(), one.d);
    }
    me.hidden.clear();
    size_t done = 0;
    for (; done < me.products.size() && me.products[done].group + pending < me.product_groups; ++done) {
        me.products[done].form(me.products[done]);
    }
    me.products.erase(me.products.begin(), me.products.begin() + static_cast<std::ptrdiff_t>(done));
    for (const AsyncProduct& product : me.products) {
        hide(me, product);
    }
    me.sums_fenced = !me.products.empty();
}

}  // namespace host

inline bool has_warpgroups() { return host::shared_limit == host::kSharedMemory; }  // the device that is played is an sm_90

inline uint64_t matrix_descriptor(const void* start, int leading, int stride) {
    host::check_alignment(start, "a matrix of wgmma at an address that is not a multiple of 16");
    return static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(leading >> 4) << 16 |
           host::offset_in_shared(start) >> 4;
}

inline void proxy_fence() {
    host::Block& b = *host::the_block;
    for (const host::SharedArray& array : b.arrays) {
        std::memcpy(&b.fenced[array.offset], &b.shared[array.offset], array.bytes);
    }
}

template <int kRows, int kColumns> void warpgroup_fence(float (&)[kRows][kColumns][4]) {
    host::the_block->current->sums_fenced = true;
}
inline void warpgroup_commit() { ++host::the_block->current->product_groups; }
template <int kPending, int kRows, int kColumns> void warpgroup_wait(float (&)[kRows][kColumns][4]) {
    host::wait_for_products(kPending);
}
template <int kTiles> void warpgroup_mma_bf16(float (&d)[kTiles][4], uint64_t a, uint64_t b) {
    host::begin_product<host::low_bf16_to_float>(d, a, b);
}
template <int kTiles> void warpgroup_mma_half(float (&d)[kTiles][4], uint64_t a, uint64_t b) {
    host::begin_product<half_to_float>(d, a, b);
}
