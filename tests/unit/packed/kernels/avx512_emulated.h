// The few AVX-512 instructions that packed.cpp uses, in plain C++, so that its code for them can be tested anywhere.
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define LVLM_EMULATED
#define AVX2 __attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2")))
#define AVX512 AVX2

struct Shorts { uint16_t at[32]; };
struct Floats { float at[16]; };

static inline Shorts emulated_load(const void* from) { Shorts v; memcpy(&v, from, 64); return v; }
static inline Shorts emulated_aligned_load(const void* from) {
    if ((uintptr_t)from % 64) abort();
    return emulated_load(from);
}
static inline void emulated_store(void* to, Shorts v) { memcpy(to, &v, 64); }
static inline Shorts emulated_expand(uint32_t mask, Shorts v) {
    Shorts spread = {};
    for (int i = 0, next = 0; i < 32; i++)
        if (mask >> i & 1) spread.at[i] = v.at[next++];
    return spread;
}
static inline float emulated_widen(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float f;
    memcpy(&f, &wide, 4);
    return f;
}
static inline Floats emulated_dot(Floats sum, Shorts a, Shorts b) {
    for (int i = 0; i < 32; i++) sum.at[i / 2] += emulated_widen(a.at[i]) * emulated_widen(b.at[i]);
    return sum;
}
static inline float emulated_total(Floats v) {
    float total = 0;
    for (float f : v.at) total += f;
    return total;
}

#define __m512i Shorts
#define __m512bh Shorts
#define __m512 Floats
#define _mm512_loadu_si512 emulated_load
#define _mm512_load_si512 emulated_aligned_load
#define _mm512_storeu_si512 emulated_store
#define _mm512_maskz_expand_epi16 emulated_expand
#define _mm512_dpbf16_ps emulated_dot
static inline Floats emulated_zero() { return Floats{}; }
#define _mm512_setzero_ps emulated_zero
#define _mm512_reduce_add_ps emulated_total
