// What the kernels of every instruction set share: numbers, threads, tables.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#ifndef LVLM_EMULATED  // tests replace the intrinsics of instruction sets that their machine lacks
#define AVX2 __attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx2,fma,popcnt,bmi,bmi2")))
#endif
#endif

typedef int64_t i64;
enum Level { PLAIN, WITH_AVX2, WITH_AVX512 };
enum Kind { FLOAT, BFLOAT, HALF };
static const i64 SLACK = 64;   // elements: the widest load
static const int MOST = 4;     // tokens in one pass over a group
// A panel: the rows of a group as floats, which stay in the first cache; their distance is no power of two.
static const i64 PANEL_COLUMNS = 768, PANEL_STRIDE = PANEL_COLUMNS + 16;
static const int VERSION = 1;  // of this interface
static const int AHEAD = 8192;       // bytes that are asked for before they are needed, by measurement
static const int DENSE_AHEAD = 2048;

// ---------------------------------------------------------------------------------------------------- numbers

struct Bfloat { uint16_t bits; };
struct Half { uint16_t bits; };

static inline float as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32_t as_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }
static inline float widen(float f) { return f; }
static inline float widen(Bfloat b) { return as_float((uint32_t)b.bits << 16); }
static inline float widen(Half h) {
    uint32_t sign = (uint32_t)(h.bits & 0x8000) << 16, rest = h.bits & 0x7fff;
    if (rest < 0x400) return as_float(as_bits((float)rest * 0x1p-24f) | sign);
    return as_float(sign | (rest < 0x7c00 ? (rest << 13) + (112u << 23) : rest << 13 | 0x7f800000));
}
static inline void narrow(float f, float* to) { *to = f; }
static inline void narrow(float f, Bfloat* to) {
    uint32_t u = as_bits(f);
    to->bits = (u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 64 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
static inline void narrow(float f, Half* to) {
    uint32_t u = as_bits(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff, h;
    if (a > 0x7f800000) h = 0x7e00;
    else if (a >= 0x477ff000) h = 0x7c00;                                                // rounds to infinity
    else if (a < 0x38800000) h = (uint32_t)std::nearbyint(as_float(a) * 0x1p24f);        // a subnormal
    else h = (a + 0xfff + (a >> 13 & 1) - (112u << 23)) >> 13;
    to->bits = sign | h;
}

// ---------------------------------------------------------------------------------------------------- threads

static void (*run_team)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel
static int (*member)(), (*members)();                                  // omp_get_thread_num, omp_get_num_threads

extern "C" void lvlm_use_pool(void* team, void* number, void* size) {
    run_team = (decltype(run_team))team, member = (decltype(member))number, members = (decltype(members))size;
}

// Call body(first, last) on every thread for its share of 0 .. n.
template <class Body> static void share(i64 n, int threads, const Body& body) {
    if (!run_team || threads < 2 || n < 2) return body((i64)0, n);
    struct Work { const Body* body; i64 n; } work = {&body, n};
    run_team([](void* given) {
        auto w = (Work*)given;
        i64 i = member(), k = members();
        (*w->body)(w->n * i / k, w->n * (i + 1) / k);
    }, &work, threads, 0);
}

// ---------------------------------------------------------------------------------------------------- tables

// For each byte of a mask, the byte shuffles that spread values to where its bits are set, and that bring them together.
static struct Tables {
    alignas(64) uint8_t to_floats[256][32];  // 16-bit values to the upper halves of eight 32-bit words
    alignas(64) uint8_t spread[256][16];     // 16-bit values to eight 16-bit words
    alignas(64) uint8_t gather[256][16];     // eight 16-bit words to the front
    alignas(64) uint8_t words[256][8];       // which of eight 32-bit values comes to each word; 128: none
    Tables() {
        memset(this, 0x80, sizeof *this);
        for (int m = 0; m < 256; m++)
            for (int j = 0, k = 0; j < 8; j++) {
                if (!(m >> j & 1)) continue;
                for (int half = 0; half < 2; half++) {
                    to_floats[m][4 * j + 2 + half] = spread[m][2 * j + half] = 2 * k + half;
                    gather[m][2 * k + half] = 2 * j + half;
                }
                words[m][j] = k++;
            }
    }
} tables;

static inline int ones(uint64_t m) { return __builtin_popcountll(m); }

// 64 columns of one row of a mask in rows; `bytes` may be fewer than 8 at the end of a row.
static inline uint64_t word_of(const uint8_t* row, i64 bytes) {
    uint64_t m = 0;
    memcpy(&m, row, bytes < 8 ? bytes : 8);  // little-endian machines only, as everywhere in this file
    return m;
}
