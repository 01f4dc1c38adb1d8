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
