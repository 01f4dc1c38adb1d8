// The same with AVX-512 (VBMI2).
#pragma once

#include "common.h"

#ifdef AVX512

// The memory form of vpexpandw is slow on AMD: the load must stay an instruction of its own.
AVX512 static inline __m512i whole(const void* p) {
    __m512i v = _mm512_loadu_si512(p);
#ifndef LVLM_EMULATED
    asm("" : "+v"(v));
#endif
    return v;
}

// A mask that goes from memory to its register at once: by way of another register it takes the port that expanding needs.
AVX512 static inline __mmask32 mask_at(const uint32_t* p) {
#ifdef LVLM_EMULATED
    return *p;
#else
    __mmask32 m;
    asm("kmovd %1, %0" : "=k"(m) : "m"(*p));
    return m;
#endif
}
AVX512 static inline __mmask16 mask_at(const uint16_t* p) {
#ifdef LVLM_EMULATED
    return *p;
#else
    __mmask16 m;
    asm("kmovw %1, %0" : "=k"(m) : "m"(*p));
    return m;
#endif
}

AVX512 static inline __m512i half_of(const void* p, const uint32_t* mask) { return _mm512_maskz_expand_epi16(mask_at(mask), whole(p)); }

// 32 columns as floats: of bfloat16 those of even and those of odd columns, of others the first and the second sixteen.
struct Columns { __m512 first, second; };
AVX512 static inline Columns columns_of(const Bfloat*, __m512i v) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xffff0000)))};
}
AVX512 static inline Columns columns_of(const Half*, __m512i v) {
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(v)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1))};
}
template <class V> AVX512 static inline Columns expanded(const V* p, const uint32_t* mask) { return columns_of(p, half_of(p, mask)); }
AVX512 static inline Columns expanded(const float* p, const uint32_t* mask) {
    const uint16_t* m = (const uint16_t*)mask;
    return {
        _mm512_maskz_expand_ps(mask_at(m), _mm512_castsi512_ps(whole(p))),
        _mm512_maskz_expand_ps(mask_at(m + 1), _mm512_castsi512_ps(whole(p + ones(*m)))),
    };
}

// Products in float, of which a processor does two at once; `vdpbf16ps` took twice as long where it was measured. For
// bfloat16 the input has its columns in the order of `place`.
template <class V, int B> AVX512 static void group_avx512(const uint64_t* mask, i64 words, const void* values, const float* input, i64 stride, float* out) {
    const V* p = (const V*)values;
    const float* x = input;
    __m512 sum[8][B];
    for (int r = 0; r < 8; r++)
        for (int b = 0; b < B; b++) sum[r][b] = _mm512_setzero_ps();
    for (i64 w = 0; w < words; w++, x += 64) {
        _mm_prefetch((const char*)(mask + 8 * w) + AHEAD / 4, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
            const uint32_t* m = (const uint32_t*)(mask + 8 * w + r);
            Columns low = expanded(p, m), high = expanded(p + ones(*m), m + 1);
            _mm_prefetch((const char*)p + AHEAD, _MM_HINT_T0);
            if (sizeof(V) == 4) _mm_prefetch((const char*)p + AHEAD + 64, _MM_HINT_T0);
            p += ones(mask[8 * w + r]);
            for (int b = 0; b < B; b++) {
                const float* at = x + b * stride;
                sum[r][b] = _mm512_fmadd_ps(low.first, _mm512_load_ps(at), sum[r][b]);
                sum[r][b] = _mm512_fmadd_ps(low.second, _mm512_load_ps(at + 16), sum[r][b]);
                sum[r][b] = _mm512_fmadd_ps(high.first, _mm512_load_ps(at + 32), sum[r][b]);
                sum[r][b] = _mm512_fmadd_ps(high.second, _mm512_load_ps(at + 48), sum[r][b]);
            }
        }
    }
    for (int r = 0; r < 8; r++)
        for (int b = 0; b < B; b++) out[r * B + b] = _mm512_reduce_add_ps(sum[r][b]);
}

// The total of each of eight vectors, added to `out`.
AVX512 static inline void add_totals(const __m512* v, float* out) {
#ifdef LVLM_EMULATED
    for (int r = 0; r < 8; r++) out[r] += _mm512_reduce_add_ps(v[r]);
#else
    __m256 half[8];
    for (int r = 0; r < 8; r++) half[r] = _mm256_add_ps(_mm512_castps512_ps256(v[r]), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v[r]), 1)));
    __m256 four[2];  // quarters of four totals in each lane
    for (int i = 0; i < 2; i++) four[i] = _mm256_hadd_ps(_mm256_hadd_ps(half[4 * i], half[4 * i + 1]), _mm256_hadd_ps(half[4 * i + 2], half[4 * i + 3]));
    __m256 low = _mm256_permute2f128_ps(four[0], four[1], 0x20), high = _mm256_permute2f128_ps(four[0], four[1], 0x31);
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), _mm256_add_ps(low, high)));
#endif
}

// Eight rows of a panel times B tokens, added to `out` (B, 8).
template <int B> AVX512 static inline void add_products(const float* panel, const float* x, i64 stride, i64 columns, float* out) {
    __m512 sum[B][8];
    for (int b = 0; b < B; b++)
        for (int r = 0; r < 8; r++) sum[b][r] = _mm512_setzero_ps();
    for (i64 c = 0; c < columns; c += 16) {
        __m512 in[B];
        for (int b = 0; b < B; b++) in[b] = _mm512_load_ps(x + b * stride + c);
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
            __m512 w = _mm512_load_ps(panel + r * PANEL_STRIDE + c);
            for (int b = 0; b < B; b++) sum[b][r] = _mm512_fmadd_ps(w, in[b], sum[b][r]);
        }
    }
    for (int b = 0; b < B; b++) add_totals(sum[b], out + 8 * b);
}

// A group times many tokens: its values are expanded once for all of them, to one panel after the other.
// `panel` (8, PANEL_STRIDE) at whole lines; `out` (tokens, 8).
template <class V> AVX512 static void panels_avx512(const uint64_t* mask, i64 words, const void* values, const float* input, i64 stride, i64 tokens, float* panel, float* out) {
    const V* p = (const V*)values;
    memset(out, 0, 4 * 8 * tokens);
    for (i64 from = 0; from < words; from += PANEL_COLUMNS / 64) {
        i64 n = words - from < PANEL_COLUMNS / 64 ? words - from : PANEL_COLUMNS / 64;
        for (i64 w = 0; w < n; w++) {
            const uint64_t* row = mask + 8 * (from + w);
            _mm_prefetch((const char*)row + AHEAD / 4, _MM_HINT_T0);
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) {
                const uint32_t* m = (const uint32_t*)(row + r);
                Columns low = expanded(p, m), high = expanded(p + ones(*m), m + 1);
                _mm_prefetch((const char*)p + AHEAD, _MM_HINT_T0);
                p += ones(row[r]);
                float* at = panel + r * PANEL_STRIDE + 64 * w;
                _mm512_store_ps(at, low.first), _mm512_store_ps(at + 16, low.second);
                _mm512_store_ps(at + 32, high.first), _mm512_store_ps(at + 48, high.second);
            }
        }
        const float* x = input + 64 * from;
        for (i64 t = 0; t < tokens; t += 3) {
            if (tokens - t > 2) add_products<3>(panel, x + t * stride, stride, 64 * n, out + 8 * t);
            else if (tokens - t > 1) add_products<2>(panel, x + t * stride, stride, 64 * n, out + 8 * t);
            else add_products<1>(panel, x + t * stride, stride, 64 * n, out + 8 * t);
        }
    }
}

AVX512 static const Bfloat* expand_avx512(const uint64_t* mask, int n, const Bfloat* p, Bfloat* out, i64 step) {
    for (int i = 0; i < n; i++, out += step) {
        const uint32_t* m = (const uint32_t*)(mask + i);
        _mm512_storeu_si512(out, half_of(p, m));
        _mm512_storeu_si512(out + 32, half_of(p + ones(*m), m + 1));
        p += ones(mask[i]);
    }
    return p;
}

template <class V> AVX512 static void dense_avx512(const void* rows, const float* input, i64 columns, float* out) {
    const V* w = (const V*)rows;
    const float* x = input;
    __m512 sum[4];
    for (auto& s : sum) s = _mm512_setzero_ps();
    for (i64 c = 0; c < columns; c += 32)
        for (int r = 0; r < 4; r++) {
            Columns part = columns_of(w, whole(w + r * columns + c));
            sum[r] = _mm512_fmadd_ps(part.first, _mm512_load_ps(x + c), sum[r]);
            sum[r] = _mm512_fmadd_ps(part.second, _mm512_load_ps(x + c + 16), sum[r]);
        }
    for (int r = 0; r < 4; r++) out[r] = _mm512_reduce_add_ps(sum[r]);
}
#endif
