// Products with a sparse matrix of which only the values that are not zero are kept, and one bit for every weight.
//
// Rows     the device-neutral form: mask uint8 (rows, ceil(columns / 8)), lowest bit first; values row after row;
//          offset int64 (rows + 1), where the values of a row begin.
// Tiles    the form that is multiplied with: 8 rows x 64 columns. A group is 8 rows; its tiles stand one after the other,
//          and so do the 8 rows of a tile, so that a product reads two streams from end to end:
//          mask uint64 (groups, words, 8), bits outside the matrix are zero; values in the same order, and SLACK elements
//          more, which are read and never used; start int64 (groups + 1), where the values of a group begin.
//
// Nothing here checks its arguments except `lvlm_offsets`: the caller compares its counts with what it has.
// Work is shared among the threads of the OpenMP pool that `lvlm_use_pool` was given, which is torch's own.
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
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,popcnt,bmi,bmi2")))
#endif
#endif

typedef int64_t i64;
enum Level { PLAIN, WITH_AVX2, WITH_AVX512 };
enum Kind { FLOAT, BFLOAT, HALF };
static const i64 SLACK = 64;   // elements: the widest load
static const int MOST = 4;     // tokens in one pass over a group
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

// ---------------------------------------------------------------------------------------------------- plain C++

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

template <class V, int B> static void group_plain(const uint64_t* mask, i64 words, const void* values, const void* input, i64 stride, float* out) {
    const V* p = (const V*)values;
    for (int i = 0; i < 8 * B; i++) out[i] = 0;
    for (i64 w = 0; w < words; w++)
        for (int r = 0; r < 8; r++) {
            const float* x = (const float*)input + 64 * w;
            for (uint64_t m = mask[8 * w + r]; m; m &= m - 1, p++) {
                int j = __builtin_ctzll(m);
                for (int b = 0; b < B; b++) out[r * B + b] += widen(*p) * x[b * stride + j];
            }
        }
}

// ---------------------------------------------------------------------------------------------------- AVX2
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

template <class V, int B> AVX2 static void group_avx2(const uint64_t* mask, i64 words, const void* values, const void* input, i64 stride, float* out) {
    const V* p = (const V*)values;
    __m256 sum[8][B];
    for (int r = 0; r < 8; r++)
        for (int b = 0; b < B; b++) sum[r][b] = _mm256_setzero_ps();
    for (i64 w = 0; w < words; w++) {
        const float* x = (const float*)input + 64 * w;
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
template <class V> AVX2 static void dense_avx2(const void* rows, const void* input, i64 columns, float* out) {
    const float* x = (const float*)input;
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

// ---------------------------------------------------------------------------------------------------- AVX-512
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

// ---------------------------------------------------------------------------------------------------- choice

typedef void (*Group)(const uint64_t* mask, i64 words, const void* values, const void* input, i64 stride, float* out);
typedef void (*Rows)(const void* rows, const void* input, i64 columns, float* out);

template <class V, int B> static Group group_of(int level) {
#ifdef AVX512
    if constexpr (std::is_same<V, Bfloat>::value)
        if (level == WITH_AVX512) return group_avx512<B>;
#endif
#ifdef AVX2
    if (level >= WITH_AVX2) return group_avx2<V, B>;
#endif
    return group_plain<V, B>;
}
template <class V> static Group group_of(int level, int tokens) {
    switch (tokens) {
        case 1: return group_of<V, 1>(level);
        case 2: return group_of<V, 2>(level);
        case 3: return group_of<V, 3>(level);
        default: return group_of<V, MOST>(level);
    }
}

// Whether activations stay bfloat16: the processor multiplies them with bfloat16 values itself.
static bool pairs(int level, int values, int x) { return level == WITH_AVX512 && values == BFLOAT && x == BFLOAT; }

static float read(const void* p, i64 i, int kind) {
    return kind == FLOAT ? ((const float*)p)[i] : kind == BFLOAT ? widen(((const Bfloat*)p)[i]) : widen(((const Half*)p)[i]);
}
static void write(float f, void* p, i64 i, int kind) {
    if (kind == FLOAT) narrow(f, (float*)p + i);
    else if (kind == BFLOAT) narrow(f, (Bfloat*)p + i);
    else narrow(f, (Half*)p + i);
}

struct Freed { void operator()(void* p) const { free(p); } };

// The activations as a product reads them: float or bfloat16, each token padded with zeros to whole words, at whole lines.
static std::unique_ptr<void, Freed> prepared(const void* x, int kind, i64 tokens, i64 columns, i64 stride, bool as_bfloat) {
    std::unique_ptr<void, Freed> to(aligned_alloc(64, tokens * stride * 4));
    for (i64 t = 0; t < tokens; t++) {
        if (as_bfloat) {
            Bfloat* row = (Bfloat*)to.get() + t * stride;
            memcpy(row, (const Bfloat*)x + t * columns, 2 * columns);
            memset(row + columns, 0, 2 * (stride - columns));
        } else {
            float* row = (float*)to.get() + t * stride;
            for (i64 c = 0; c < columns; c++) row[c] = read(x, t * columns + c, kind);
            memset(row + columns, 0, 4 * (stride - columns));
        }
    }
    return to;
}

template <class V, class Out> using Expand = const V* (*)(const uint64_t*, int, const V*, Out*, i64);
template <class V, class Out> static Expand<V, Out> expand_of(int level) {
#ifdef AVX512
    if constexpr (std::is_same<V, Bfloat>::value && std::is_same<Out, Bfloat>::value)
        if (level == WITH_AVX512) return expand_avx512;
#endif
#ifdef AVX2
    if (level >= WITH_AVX2) return expand_avx2<V, Out>;
#endif
    return expand_plain<V, Out>;
}

template <class U> static auto gather_of(int level) {
#ifdef AVX2
    if constexpr (sizeof(U) == 2)
        if (level >= WITH_AVX2) return gather_avx2;
#endif
    return gather_plain<U>;
}

// ---------------------------------------------------------------------------------------------------- rows

// Write the mask of a dense matrix (`offset` null), or its kept values to where `offset` says.
template <class U> static void pack(const U* dense, uint8_t* mask, const i64* offset, U* values, i64 rows, i64 columns, int level, int threads) {
    auto gather = gather_of<U>(level);
    share(rows, threads, [=](i64 first, i64 last) {
        for (i64 r = first; r < last; r++) {
            U *to = offset ? values + offset[r] : nullptr, padded[64] = {};
            const U* end = offset ? values + offset[last] : nullptr;
            for (i64 c = 0; c < columns; c += 64) {
                const U* w = dense + r * columns + c;
                i64 n = columns - c < 64 ? columns - c : 64;
                if (n < 64) w = (const U*)memcpy(padded, w, n * sizeof(U));
                uint64_t m = gather(w, to, end);
                if (offset) to += ones(m);
                else memcpy(mask + r * ((columns + 7) / 8) + c / 8, &m, (n + 7) / 8);
            }
        }
    });
}

// Bytes of a row's mask from this column on, at most the 8 of a word.
static i64 bytes_from(i64 column, i64 columns) { i64 n = (columns - column + 7) / 8; return n < 8 ? n : 8; }

template <class V> static void unpack_rows(const V* values, const uint8_t* mask, const i64* offset, V* dense, i64 rows, i64 columns, int level, int threads) {
    auto fast = expand_of<V, V>(level), safe = expand_plain<V, V>;
    share(rows, threads, [=](i64 first, i64 last) {
        const V* end = values + offset[rows];
        for (i64 r = first; r < last; r++) {
            const V* p = values + offset[r];
            for (i64 c = 0; c < columns; c += 64) {
                uint64_t m = word_of(mask + r * ((columns + 7) / 8) + c / 8, bytes_from(c, columns));
                V *out = dense + r * columns + c, padded[64];
                bool whole_word = columns - c >= 64;
                p = (end - p >= 64 + SLACK ? fast : safe)(&m, 1, p, whole_word ? out : padded, 0);
                if (!whole_word) memcpy(out, padded, (columns - c) * sizeof(V));
            }
        }
    });
}

// Copy the values of each row of a group between the two forms, one word at a time.
template <bool to_tiles> static void copy_group(const uint64_t* mask, i64 words, char* tiles, char* const* row, i64 size) {
    char* at[8];
    memcpy(at, row, sizeof at);
    for (i64 i = 0; i < 8 * words; i++) {
        i64 n = ones(mask[i]) * size;
        if (!n) continue;
        char*& p = at[i & 7];
        if (to_tiles) memcpy(tiles, p, n);
        else memcpy(p, tiles, n);
        tiles += n, p += n;
    }
}

// ---------------------------------------------------------------------------------------------------- interface

extern "C" {

int lvlm_version() { return VERSION; }
i64 lvlm_slack() { return SLACK; }

// The best instruction set that this processor has and this build knows.
int lvlm_best_level() {
#ifdef LVLM_EMULATED
    return WITH_AVX512;
#elif defined(AVX2)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16");
    return avx512 ? WITH_AVX512 : avx2 ? WITH_AVX2 : PLAIN;
#else
    return PLAIN;
#endif
}

// Where the values of each row begin, rows + 1 counts; false where a bit is set past the last column.
int lvlm_offsets(const uint8_t* mask, i64 rows, i64 columns, i64* offset, int threads) {
    i64 bytes = (columns + 7) / 8;
    bool past = false;
    share(rows, threads, [&](i64 first, i64 last) {
        for (i64 r = first; r < last; r++) {
            i64 n = 0;
            for (i64 b = 0; b < bytes; b += 8) n += ones(word_of(mask + r * bytes + b, bytes - b));
            if (columns % 8 && mask[r * bytes + bytes - 1] >> columns % 8) __atomic_store_n(&past, true, __ATOMIC_RELAXED);
            offset[r + 1] = n;
        }
    });
    offset[0] = 0;
    for (i64 r = 0; r < rows; r++) offset[r + 1] += offset[r];
    return !past;
}

void lvlm_pack(const void* dense, uint8_t* mask, const i64* offset, void* values, i64 rows, i64 columns, int size, int level, int threads) {
    if (size == 2) pack((const uint16_t*)dense, mask, offset, (uint16_t*)values, rows, columns, level, threads);
    else pack((const uint32_t*)dense, mask, offset, (uint32_t*)values, rows, columns, level, threads);
}

void lvlm_unpack_rows(const void* values, const uint8_t* mask, const i64* offset, void* dense, i64 rows, i64 columns, int size, int level, int threads) {
    if (size == 2) unpack_rows((const Bfloat*)values, mask, offset, (Bfloat*)dense, rows, columns, level, threads);
    else unpack_rows((const float*)values, mask, offset, (float*)dense, rows, columns, level, threads);
}

// Rows to tiles.
void lvlm_tile(const void* values, const uint8_t* mask, const i64* offset, uint64_t* tile_mask, void* tile_values, i64* start, i64 rows, i64 columns, int size, int threads) {
    i64 words = (columns + 63) / 64, groups = (rows + 7) / 8, bytes = (columns + 7) / 8;
    share(groups, threads, [=](i64 first, i64 last) {
        for (i64 g = first; g < last; g++) {
            uint64_t* m = tile_mask + 8 * words * g;
            char* row[8];
            for (i64 i = 0; i < 8; i++) {
                i64 r = 8 * g + i;
                row[i] = (char*)values + (r < rows ? offset[r] : 0) * size;
                for (i64 w = 0; w < words; w++) m[8 * w + i] = r < rows ? word_of(mask + r * bytes + 8 * w, bytes - 8 * w) : 0;
            }
            start[g] = offset[8 * g];
            copy_group<true>(m, words, (char*)tile_values + start[g] * size, row, size);
        }
    });
    start[groups] = offset[rows];
}

// Tiles to rows: first the mask (`offset` null), then, with the offsets that belong to it, the values.
void lvlm_untile(const uint64_t* tile_mask, const void* tile_values, const i64* start, uint8_t* mask, const i64* offset, void* values, i64 rows, i64 columns, int size, int threads) {
    i64 words = (columns + 63) / 64, groups = (rows + 7) / 8, bytes = (columns + 7) / 8;
    share(groups, threads, [=](i64 first, i64 last) {
        for (i64 g = first; g < last; g++) {
            const uint64_t* m = tile_mask + 8 * words * g;
            char* row[8] = {};
            for (i64 i = 0; i < 8 && 8 * g + i < rows; i++) {
                i64 r = 8 * g + i;
                if (offset) row[i] = (char*)values + offset[r] * size;
                else for (i64 w = 0; w < words; w++) memcpy(mask + r * bytes + 8 * w, m + 8 * w + i, bytes - 8 * w < 8 ? bytes - 8 * w : 8);
            }
            if (offset) copy_group<false>(m, words, (char*)tile_values + start[g] * size, row, size);
        }
    });
}
}

template <class V, class Out> static void unpack_tiles(const uint64_t* mask, const V* values, const i64* start, i64 rows, i64 columns, i64 from, i64 to, Out* out, int level, int threads) {
    i64 words = (columns + 63) / 64, whole_words = columns / 64;
    auto expand = expand_of<V, Out>(level);
    share(to - from, threads, [=](i64 first, i64 last) {
        for (i64 g = from + first; g < from + last; g++) {
            const V* p = values + start[g];
            i64 n = rows - 8 * g < 8 ? rows - 8 * g : 8;
            for (i64 w = 0; w < words; w++) {
                const uint64_t* m = mask + 8 * (g * words + w);
                Out *to_row = out + 8 * (g - from) * columns + 64 * w, padded[8 * 64];
                bool fits = w < whole_words;
                p = expand(m, (int)n, p, fits ? to_row : padded, fits ? columns : 64);
                for (i64 r = 0; !fits && r < n; r++) memcpy(to_row + r * columns, padded + 64 * r, (columns - 64 * w) * sizeof(Out));
            }
        }
    });
}

extern "C" {

// The rows of groups from .. to of a matrix in tiles, dense: as they were (`as_float` false), or as float.
void lvlm_unpack(const uint64_t* mask, const void* values, const i64* start, i64 rows, i64 columns, int kind, i64 from, i64 to, void* out, int as_float, int level, int threads) {
    auto run = [&](auto* v, auto* o) { unpack_tiles(mask, v, start, rows, columns, from, to, o, level, threads); };
    if (kind == FLOAT) run((const float*)values, (float*)out);
    else if (!as_float) run((const Bfloat*)values, (Bfloat*)out);  // 16 bits are 16 bits
    else if (kind == BFLOAT) run((const Bfloat*)values, (float*)out);
    else run((const Half*)values, (float*)out);
}

// y (tokens, rows) = x (tokens, columns) times a matrix in tiles, plus bias (rows, or null); y is of the kind of x.
void lvlm_linear(const uint64_t* mask, const void* values, const i64* start, i64 rows, i64 columns, int kind, const void* x, int x_kind, i64 tokens, const void* bias, int bias_kind, void* y, int level, int threads) {
    i64 words = (columns + 63) / 64, stride = 64 * words;
    bool paired = pairs(level, kind, x_kind);
    if (level == WITH_AVX512 && !paired) level = WITH_AVX2;
    i64 size = kind == FLOAT ? 4 : 2, x_size = paired ? 2 : 4;
    auto group_of_kind = kind == FLOAT ? group_of<float> : kind == BFLOAT ? group_of<Bfloat> : group_of<Half>;
    auto input = prepared(x, x_kind, tokens, columns, stride, paired);
    const char* in = (const char*)input.get();
    share((rows + 7) / 8, threads, [=](i64 first, i64 last) {
        float out[8 * MOST];
        for (i64 g = first; g < last; g++)
            for (i64 t = 0; t < tokens; t += MOST) {
                i64 n = tokens - t < MOST ? tokens - t : MOST;
                group_of_kind(level, (int)n)(mask + 8 * words * g, words, (const char*)values + start[g] * size, in + t * stride * x_size, stride, out);
                for (i64 i = 0; i < 8 && 8 * g + i < rows; i++)
                    for (i64 b = 0; b < n; b++) {
                        i64 r = 8 * g + i;
                        write(out[i * n + b] + (bias ? read(bias, r, bias_kind) : 0), y, (t + b) * rows + r, x_kind);
                    }
            }
    });
}

// y (rows) = x (columns) times a dense matrix whose rows are a multiple of 4 and columns of 64: a measure for the above.
// False where there is none for this instruction set.
int lvlm_dense(const void* w, i64 rows, i64 columns, int kind, const void* x, int x_kind, void* y, int level, int threads) {
    Rows four = nullptr;
    bool paired = pairs(level, kind, x_kind);
#ifdef AVX2
    if (level >= WITH_AVX2) four = kind == FLOAT ? dense_avx2<float> : kind == BFLOAT ? dense_avx2<Bfloat> : dense_avx2<Half>;
#endif
#ifdef AVX512
    if (paired) four = dense_avx512;
#endif
    if (!four || rows % 4 || columns % 64) return false;
    auto input = prepared(x, x_kind, 1, columns, columns, paired);
    const void* in = input.get();
    i64 size = kind == FLOAT ? 4 : 2;
    share(rows / 4, threads, [=](i64 first, i64 last) {
        for (i64 r = 4 * first; r < 4 * last; r += 4) {
            float out[4];
            four((const char*)w + r * columns * size, in, columns, out);
            for (int i = 0; i < 4; i++) write(out[i], y, r + i, x_kind);
        }
    });
    return true;
}
}
