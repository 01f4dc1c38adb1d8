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
static inline void emulated_store_floats(void* to, Floats v) {
    if ((uintptr_t)to % 64) abort();
    memcpy(to, &v, 64);
}
static inline void emulated_store(void* to, Shorts v) { memcpy(to, &v, 64); }
static inline Shorts emulated_expand(uint32_t mask, Shorts v) {
    Shorts spread = {};
    for (int i = 0, next = 0; i < 32; i++)
        if (mask >> i & 1) spread.at[i] = v.at[next++];
    return spread;
}
static inline Floats emulated_add_product(Floats a, Floats b, Floats sum) {
    for (int i = 0; i < 16; i++) sum.at[i] += a.at[i] * b.at[i];
    return sum;
}
static inline Floats emulated_floats(Shorts v) { Floats f; memcpy(&f, &v, 64); return f; }
static inline Floats emulated_load_floats(const void* from) { return emulated_floats(emulated_aligned_load(from)); }
template <class Change> static inline Shorts emulated_words(Shorts v, Change change) {
    uint32_t words[16];
    memcpy(words, &v, 64);
    for (uint32_t& word : words) word = change(word);
    memcpy(&v, words, 64);
    return v;
}
static inline Shorts emulated_shift(Shorts v, int bits) { return emulated_words(v, [=](uint32_t word) { return word << bits; }); }
static inline Shorts emulated_and(Shorts v, uint32_t bits) { return emulated_words(v, [=](uint32_t word) { return word & bits; }); }
struct Sixteen { uint16_t at[16]; };
static inline Sixteen emulated_sixteen(Shorts v, int which) { Sixteen s; memcpy(&s, v.at + 16 * which, 32); return s; }
static inline Sixteen emulated_first(Shorts v) { return emulated_sixteen(v, 0); }
AVX2 static inline Floats emulated_from_half(Sixteen v) {
    Floats f;
    for (int i = 0; i < 16; i++) f.at[i] = _cvtsh_ss(v.at[i]);
    return f;
}
static inline Floats emulated_expand_floats(uint16_t mask, Floats v) {
    Floats spread = {};
    for (int i = 0, next = 0; i < 16; i++)
        if (mask >> i & 1) spread.at[i] = v.at[next++];
    return spread;
}
static inline float emulated_total(Floats v) {
    float total = 0;
    for (float f : v.at) total += f;
    return total;
}

#define __m512i Shorts
#define __m512 Floats
#define __mmask32 uint32_t
#define __mmask16 uint16_t
#define _mm512_castsi512_si256 emulated_first
#define _mm512_extracti64x4_epi64 emulated_sixteen
#define _mm512_cvtph_ps emulated_from_half
#define _mm512_maskz_expand_ps emulated_expand_floats
#define _mm512_loadu_si512 emulated_load
#define _mm512_load_ps emulated_load_floats
#define _mm512_storeu_si512 emulated_store
#define _mm512_store_ps emulated_store_floats
#define _mm512_maskz_expand_epi16 emulated_expand
#define _mm512_castsi512_ps emulated_floats
#define _mm512_slli_epi32 emulated_shift
#define _mm512_and_si512 emulated_and
#define _mm512_set1_epi32(bits) bits
#define _mm512_fmadd_ps emulated_add_product
static inline Floats emulated_zero() { return Floats{}; }
#define _mm512_setzero_ps emulated_zero
#define _mm512_reduce_add_ps emulated_total
