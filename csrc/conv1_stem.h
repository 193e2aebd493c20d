// Response normalisation over 5 channels and max pooling 3 x 3 of pixels that lie in shared memory, T::kPixel bytes apart.
#pragma once

#include "conv1.h"
#include "vectors.h"

constexpr int kWindow = 3;  // of the pool
constexpr int kSides = 2;   // channels of the normalisation on each side

// ---------------------------------------------------------------------------------------------------- normalisation

// y of the eight channels in the middle. Sums of five by pairs: quad + one more.
DEVICE void normalise(float (&y)[kVector], const float (&v)[kVector + 2 * kSides], const Conv1Forward& p) {
    float pair[kVector / 2 + kSides];
#pragma unroll
    for (int i = 0; i < kVector / 2 + kSides; ++i) {
        pair[i] = v[2 * i] * v[2 * i] + v[2 * i + 1] * v[2 * i + 1];
    }
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
        const int i = (c + 1) / 2;
        const float one = c % 2 ? v[c] : v[c + 4], s = (one * one + (pair[i] + pair[i + 1])) * p.lrn_scale + p.k;
        if (p.beta == 0.75f) {
            const float r = fast_rsqrt(s);
            y[c] = v[c + kSides] * (r * fast_sqrt(r));
        } else {
            y[c] = v[c + kSides] * fast_exp2(-p.beta * fast_log2(s));
        }
    }
}

template <class T> DEVICE void load_vector(float (&values)[kVector], const uint8_t* from) {
    uint32_t words[T::kWords];
    load<T>(words, from, true);
    unpack<T>(values, 0, words);
}

// A pixel's channels in their place, from the first to the last: the two before are remembered as they were.
template <class T> DEVICE void normalise_pixel(uint8_t* pixel, const Conv1Forward& p) {
    constexpr int kAll = T::kChannels / kVector;
    const int group = kAll / p.groups;
    float v[kVector + 2 * kSides], next[kVector], y[kVector];
    load_vector<T>(next, pixel);
    bool last = true;
#pragma unroll 1
    for (int vector = 0; vector < kAll; ++vector) {
        v[0] = last ? 0 : v[kVector], v[1] = last ? 0 : v[kVector + 1];
#pragma unroll
        for (int c = 0; c < kVector; ++c) {
            v[c + kSides] = next[c];
        }
        if (vector + 1 < kAll) {
            load_vector<T>(next, pixel + (vector + 1) * kVector * T::kBytes);
        }
        last = (vector + 1) % group == 0;
        v[kVector + kSides] = last ? 0 : next[0], v[kVector + kSides + 1] = last ? 0 : next[1];
        normalise(y, v, p);
        store<T>(pixel + vector * kVector * T::kBytes, y);
    }
}

// ---------------------------------------------------------------------------------------------------- pooling

// The taps of one window that lie inside the picture; row[i]: its leftmost pixel in shared memory.
struct PoolWindow {
    const uint8_t* row[kWindow];
    int rows, columns;
};

// Maxima of kCount words at one place of the window's pixels.
template <class T, int kCount> DEVICE void pool_words(uint32_t (&best)[kCount], const PoolWindow& window, int at) {
#pragma unroll
    for (int tap = 0; tap < kWindow * kWindow; ++tap) {
        if (tap == 0 || (tap / kWindow < window.rows && tap % kWindow < window.columns)) {
            const uint8_t* from = window.row[tap / kWindow] + tap % kWindow * T::kPixel + at;
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const uint32_t word = reinterpret_cast<const uint32_t*>(from)[i];
                best[i] = tap == 0 ? word : T::E::maximum(best[i], word);
            }
        }
    }
}

// Maxima of eight channels and their places one tap after another: the first of equal ones, NaN wins, the last of several.
template <class T>
DEVICE void pool_scan(float (&best)[kVector], uint32_t (&place)[2], const PoolWindow& window, int at) {
    place[0] = place[1] = 0;
#pragma unroll 1
    for (int tap = 0; tap < kWindow * kWindow; ++tap) {
        if (tap / kWindow < window.rows && tap % kWindow < window.columns) {
            const uint8_t* row = tap < kWindow ? window.row[0] : tap < 2 * kWindow ? window.row[1] : window.row[2];
            float values[kVector];
            load_vector<T>(values, row + tap % kWindow * T::kPixel + at);
#pragma unroll
            for (int c = 0; c < kVector; ++c) {
                const bool wins = tap == 0 || values[c] > best[c] || values[c] != values[c];
                const uint32_t byte = 0xffu << c % 4 * 8;
                best[c] = wins ? values[c] : best[c];
                place[c / 4] = wins ? (place[c / 4] & ~byte) | (tap * 0x01010101u & byte) : place[c / 4];
            }
        }
    }
}

// The same by the maxima first, two channels at once, and then, from the last tap to the first, who equals them: half the
// instructions. Nothing equals NaN; then the scan decides.
template <class T>
DEVICE void pool_places(float (&best)[kVector], uint32_t (&place)[2], const PoolWindow& window, int at) {
    constexpr int kNobody = 0x80;
    uint32_t words[T::kWords];
    pool_words<T>(words, window, at);
    unpack<T>(best, 0, words);
    int taps[kVector];
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
        taps[c] = kNobody;
    }
#pragma unroll
    for (int tap = kWindow * kWindow - 1; tap >= 0; --tap) {
        if (tap == 0 || (tap / kWindow < window.rows && tap % kWindow < window.columns)) {
            float values[kVector];
            load_vector<T>(values, window.row[tap / kWindow] + tap % kWindow * T::kPixel + at);
#pragma unroll
            for (int c = 0; c < kVector; ++c) {
                taps[c] = values[c] == best[c] ? tap : taps[c];
            }
        }
    }
    place[0] = taps[0] | taps[1] << 8 | taps[2] << 16 | taps[3] << 24;
    place[1] = taps[4] | taps[5] << 8 | taps[6] << 16 | taps[7] << 24;
    if ((place[0] | place[1]) & kNobody * 0x01010101u) {
        pool_scan<T>(best, place, window, at);
    }
}

// Maxima of eight channels become the normalised ones: of the two neighbours on each side only maxima are wanted.
template <class T>
DEVICE void normalise_pooled(float (&best)[kVector], const PoolWindow& window, int vector, const Conv1Forward& p) {
    constexpr int kSideWords = kSides / T::E::kPerWord;
    const int group = T::kChannels / kVector / p.groups, at = vector * kVector * T::kBytes;
    float v[kVector + 2 * kSides] = {}, y[kVector];
    uint32_t side[kSideWords];
    if (vector % group != 0) {
        pool_words<T>(side, window, at - kSides * T::kBytes);
        unpack<T>(v, 0, side);
    }
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
        v[c + kSides] = best[c];
    }
    if ((vector + 1) % group != 0) {
        pool_words<T>(side, window, at + kVector * T::kBytes);
        unpack<T>(v, kSides + kVector, side);
    }
    normalise(y, v, p);
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
        best[c] = y[c];
    }
}

