// The same with AVX2, and a dense kernel to compare with.
#pragma once

#include "common.h"

#ifdef AVX2

// Eight columns as floats: `at` is 32 times the byte of the mask.
AVX2 static inline __m256 eight(const Bfloat* p, uint64_t at) {
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, _mm256_load_si256((const __m256i*)((const char*)tables.to_floats + at))));
}
AVX2 static inline __m128i eight_short(const void* p, uint64_t at) {
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)p), _mm_load_si128((const __m128i*)((const char*)tables.spread + at / 2)));
}
AVX2 static inline __m256 eight(const Half* p, uint64_t at) { return _mm256_cvtph_ps(eight_short(p, at)); }
AVX2 static inline __m256 eight(const float* p, uint64_t at) {
    __m256i from = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)((const char*)tables.words + at / 4)));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(p), from), _mm256_setzero_ps(), _mm256_castsi256_ps(from));
}
AVX2 static inline float total(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

template <class V, int B> AVX2 static void group_avx2(const uint64_t* mask, i64 words, const void* values, const float* input, i64 stride, float* out) {
    const V* p = (const V*)values;
    __m256 sum[8][B];
    for (int r = 0; r < 8; r++)
        for (int b = 0; b < B; b++) sum[r][b] = _mm256_setzero_ps();
    for (i64 w = 0; w < words; w++) {
        const float* x = input + 64 * w;
        _mm_prefetch((const char*)(mask + 8 * w) + AHEAD / 4, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
            uint64_t m = mask[8 * w + r];
            _mm_prefetch((const char*)p + AHEAD, _MM_HINT_T0);
            __m256 part[B][2];
            for (int b = 0; b < B; b++) part[b][0] = part[b][1] = _mm256_setzero_ps();
#pragma GCC unroll 8
            for (int k = 0; k < 8; k++) {
                uint64_t at = (m >> ((8 * k + 59) & 63) | m << ((5 - 8 * k) & 63)) & 0x1fe0;  // a rotation, which needs no copy
                __m256 v = eight(p, at);
                p += ones(at);
                for (int b = 0; b < B; b++) part[b][k & 1] = _mm256_fmadd_ps(v, _mm256_load_ps(x + b * stride + 8 * k), part[b][k & 1]);
            }
            for (int b = 0; b < B; b++) sum[r][b] = _mm256_add_ps(sum[r][b], _mm256_add_ps(part[b][0], part[b][1]));
        }
    }
    for (int r = 0; r < 8; r++)
        for (int b = 0; b < B; b++) out[r * B + b] = total(sum[r][b]);
}

template <class V, class Out> AVX2 static const V* expand_avx2(const uint64_t* mask, int n, const V* p, Out* out, i64 step) {
    for (int i = 0; i < n; i++, out += step)
        for (int k = 0; k < 8; k++) {
            uint64_t at = (k ? mask[i] >> (8 * k - 5) : mask[i] << 5) & 0x1fe0;
            if constexpr (sizeof(Out) == 2) _mm_storeu_si128((__m128i*)(out + 8 * k), eight_short(p, at));
            else _mm256_storeu_ps((float*)out + 8 * k, eight(p, at));
            p += ones(at);
        }
    return p;
}

// What lies before `end` may be written over: it comes later in the same row or in a later row of the same thread.
AVX2 static uint64_t gather_avx2(const uint16_t* w, uint16_t* to, const uint16_t* end) {
    uint64_t mask = 0;
    for (int k = 0; k < 8; k++) {
        __m128i v = _mm_loadu_si128((const __m128i*)(w + 8 * k)), zero = _mm_setzero_si128();
        uint64_t q = ~_mm_movemask_epi8(_mm_packs_epi16(_mm_cmpeq_epi16(v, zero), zero)) & 255;
        mask |= q << 8 * k;
        if (!to) continue;
        if (end - to >= 8)
            _mm_storeu_si128((__m128i*)to, _mm_shuffle_epi8(v, _mm_load_si128((const __m128i*)tables.gather[q])));
        else
            for (int j = 0, n = 0; j < 8; j++)
                if (q >> j & 1) to[n++] = w[8 * k + j];
        to += ones(q);
    }
    return mask;
}

// Four rows of a dense matrix with one token: what a packed product has to be compared with.
template <class V> AVX2 static inline __m256 eight(const V* p) {
    if constexpr (std::is_same<V, float>::value) return _mm256_loadu_ps(p);
    else {
        __m128i v = _mm_loadu_si128((const __m128i*)p);
        if constexpr (std::is_same<V, Half>::value) return _mm256_cvtph_ps(v);
        else return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
    }
}
template <class V> AVX2 static void dense_avx2(const void* rows, const float* input, i64 columns, float* out) {
    const float* x = input;
    __m256 sum[4][2];
    for (auto& s : sum) s[0] = s[1] = _mm256_setzero_ps();
    for (i64 c = 0; c < columns; c += 64)
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const V* w = (const V*)rows + r * columns + c;
            _mm_prefetch((const char*)w + DENSE_AHEAD, _MM_HINT_T0);
#pragma GCC unroll 8
            for (int k = 0; k < 8; k++) sum[r][k & 1] = _mm256_fmadd_ps(eight(w + 8 * k), _mm256_load_ps(x + c + 8 * k), sum[r][k & 1]);
        }
    for (int r = 0; r < 4; r++) out[r] = total(_mm256_add_ps(sum[r][0], sum[r][1]));
}
#endif
