// Groups of rows in plain C++: for every processor.
#pragma once

#include "common.h"

// The values of n words of a mask, spread over 64 columns each; word i goes to out + i * step. Returns what follows them.
template <class V, class Out> static const V* expand_plain(const uint64_t* mask, int n, const V* p, Out* out, i64 step) {
    for (int i = 0; i < n; i++, out += step)
        for (int j = 0; j < 64; j++) {
            bool kept = mask[i] >> j & 1;
            if constexpr (std::is_same<V, Out>::value) out[j] = kept ? *p : V{};
            else out[j] = kept ? widen(*p) : 0.0f;
            p += kept;
        }
    return p;
}

// Mask of 64 weights and, where `to` is given, their kept values.
template <class U> static uint64_t gather_plain(const U* w, U* to, const U*) {
    uint64_t mask = 0;
    for (int j = 0; j < 64; j++) mask |= (uint64_t)(w[j] != 0) << j;
    for (uint64_t m = to ? mask : 0; m; m &= m - 1) *to++ = w[__builtin_ctzll(m)];
    return mask;
}

template <class V, int B> static void group_plain(const uint64_t* mask, i64 words, const void* values, const float* input, i64 stride, float* out) {
    const V* p = (const V*)values;
    for (int i = 0; i < 8 * B; i++) out[i] = 0;
    for (i64 w = 0; w < words; w++)
        for (int r = 0; r < 8; r++) {
            const float* x = input + 64 * w;
            for (uint64_t m = mask[8 * w + r]; m; m &= m - 1, p++) {
                int j = __builtin_ctzll(m);
                for (int b = 0; b < B; b++) out[r * B + b] += widen(*p) * x[b * stride + j];
            }
        }
}
