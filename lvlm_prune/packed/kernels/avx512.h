// The same with AVX-512 (VBMI2, and BF16 for bfloat16).
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
AVX512 static inline __m512bh half_of(const Bfloat* p, uint32_t m) { return (__m512bh)_mm512_maskz_expand_epi16(m, whole(p)); }

// bfloat16 values and activations: products of pairs are summed in float by the processor.
template <int B> AVX512 static void group_avx512(const uint64_t* mask, i64 words, const void* values, const void* input, i64 stride, float* out) {
    const Bfloat *p = (const Bfloat*)values, *x = (const Bfloat*)input;
    __m512 sum[8][B];
    for (int r = 0; r < 8; r++)
        for (int b = 0; b < B; b++) sum[r][b] = _mm512_setzero_ps();
    for (i64 w = 0; w < words; w++, x += 64) {
        _mm_prefetch((const char*)(mask + 8 * w) + AHEAD / 4, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
            uint64_t m = mask[8 * w + r];
            __m512bh low = half_of(p, (uint32_t)m), high = half_of(p + ones((uint32_t)m), (uint32_t)(m >> 32));
            _mm_prefetch((const char*)p + AHEAD, _MM_HINT_T0);
            p += ones(m);
            for (int b = 0; b < B; b++) {
                sum[r][b] = _mm512_dpbf16_ps(sum[r][b], low, (__m512bh)_mm512_load_si512(x + b * stride));
                sum[r][b] = _mm512_dpbf16_ps(sum[r][b], high, (__m512bh)_mm512_load_si512(x + b * stride + 32));
            }
        }
    }
    for (int r = 0; r < 8; r++)
        for (int b = 0; b < B; b++) out[r * B + b] = _mm512_reduce_add_ps(sum[r][b]);
}

AVX512 static const Bfloat* expand_avx512(const uint64_t* mask, int n, const Bfloat* p, Bfloat* out, i64 step) {
    for (int i = 0; i < n; i++, out += step) {
        uint64_t m = mask[i];
        _mm512_storeu_si512(out, (__m512i)half_of(p, (uint32_t)m));
        _mm512_storeu_si512(out + 32, (__m512i)half_of(p + ones((uint32_t)m), (uint32_t)(m >> 32)));
        p += ones(m);
    }
    return p;
}

AVX512 static void dense_avx512(const void* rows, const void* input, i64 columns, float* out) {
    const Bfloat *w = (const Bfloat*)rows, *x = (const Bfloat*)input;
    __m512 sum[4];
    for (auto& s : sum) s = _mm512_setzero_ps();
    for (i64 c = 0; c < columns; c += 32)
        for (int r = 0; r < 4; r++)
            sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)_mm512_loadu_si512(w + r * columns + c), (__m512bh)_mm512_load_si512(x + c));
    for (int r = 0; r < 4; r++) out[r] = _mm512_reduce_add_ps(sum[r]);
}
#endif
