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
#include "avx2.h"
#include "avx512.h"
#include "common.h"
#include "plain.h"

// ---------------------------------------------------------------------------------------------------- choice

typedef void (*Group)(const uint64_t* mask, i64 words, const void* values, const float* input, i64 stride, float* out);
typedef void (*Panels)(const uint64_t* mask, i64 words, const void* values, const float* input, i64 stride, i64 tokens, float* panel, float* out);
typedef void (*Rows)(const void* rows, const float* input, i64 columns, float* out);

template <class V, int B> static Group group_of(int level) {
#ifdef AVX512
    if (level == WITH_AVX512) return group_avx512<V, B>;
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

// For many tokens at once; null where there is none for an instruction set.
static Panels panels_of(int level, int values) {
#ifdef AVX512
    if (level == WITH_AVX512) return values == FLOAT ? panels_avx512<float> : values == BFLOAT ? panels_avx512<Bfloat> : panels_avx512<Half>;
#endif
    return nullptr;
}

// Whether a product wants even and odd columns apart: bfloat16 stand in pairs, and are made floats two by two.
static bool apart(int level, int values) { return level == WITH_AVX512 && values == BFLOAT; }
static i64 place(i64 column) { return (column & ~31) | (column & 1) << 4 | (column & 31) >> 1; }

static float read(const void* p, i64 i, int kind) {
    return kind == FLOAT ? ((const float*)p)[i] : kind == BFLOAT ? widen(((const Bfloat*)p)[i]) : widen(((const Half*)p)[i]);
}
static void write(float f, void* p, i64 i, int kind) {
    if (kind == FLOAT) narrow(f, (float*)p + i);
    else if (kind == BFLOAT) narrow(f, (Bfloat*)p + i);
    else narrow(f, (Half*)p + i);
}

struct Freed { void operator()(void* p) const { free(p); } };

// The activations as a product reads them: float, each token padded with zeros to whole words, at whole lines.
template <class X> static void prepare(const X* x, i64 columns, bool pairs, float* row) {
    if (pairs) for (i64 c = 0; c < columns; c++) row[place(c)] = widen(x[c]);
    else for (i64 c = 0; c < columns; c++) row[c] = widen(x[c]);
}
static std::unique_ptr<float, Freed> prepared(const void* x, int kind, i64 tokens, i64 columns, i64 stride, bool pairs) {
    std::unique_ptr<float, Freed> to((float*)aligned_alloc(64, tokens * stride * 4));
    for (i64 t = 0; t < tokens; t++) {
        float* row = to.get() + t * stride;
        memset(row + columns / 64 * 64, 0, 4 * (stride - columns / 64 * 64));
        if (kind == FLOAT) prepare((const float*)x + t * columns, columns, pairs, row);
        else if (kind == BFLOAT) prepare((const Bfloat*)x + t * columns, columns, pairs, row);
        else prepare((const Half*)x + t * columns, columns, pairs, row);
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
    bool avx512 = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2");
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
    i64 size = kind == FLOAT ? 4 : 2;
    auto group_of_kind = kind == FLOAT ? group_of<float> : kind == BFLOAT ? group_of<Bfloat> : group_of<Half>;
    auto input = prepared(x, x_kind, tokens, columns, stride, apart(level, kind));
    const float* in = input.get();
    auto finish = [=](float sum, i64 r, i64 t) { write(sum + (bias ? read(bias, r, bias_kind) : 0), y, t * rows + r, x_kind); };
    Panels panels = tokens > MOST ? panels_of(level, kind) : nullptr;
    i64 groups = (rows + 7) / 8;
    if (panels) return share(groups, threads, [=](i64 first, i64 last) {
        std::unique_ptr<float, Freed> panel((float*)aligned_alloc(64, 4 * 8 * PANEL_STRIDE)), out((float*)malloc(4 * 8 * tokens));
        for (i64 g = first; g < last; g++) {
            panels(mask + 8 * words * g, words, (const char*)values + start[g] * size, in, stride, tokens, panel.get(), out.get());
            for (i64 i = 0; i < 8 && 8 * g + i < rows; i++)
                for (i64 t = 0; t < tokens; t++) finish(out.get()[8 * t + i], 8 * g + i, t);
        }
    });
    share(groups, threads, [=](i64 first, i64 last) {
        float out[8 * MOST];
        for (i64 g = first; g < last; g++)
            for (i64 t = 0; t < tokens; t += MOST) {
                i64 n = tokens - t < MOST ? tokens - t : MOST;
                group_of_kind(level, (int)n)(mask + 8 * words * g, words, (const char*)values + start[g] * size, in + t * stride, stride, out);
                for (i64 i = 0; i < 8 && 8 * g + i < rows; i++)
                    for (i64 b = 0; b < n; b++) finish(out[i * n + b], 8 * g + i, t + b);
            }
    });
}

// y (rows) = x (columns) times a dense matrix whose rows are a multiple of 4 and columns of 64: for what stays dense, and a measure for the above.
// False where there is none for this instruction set.
int lvlm_dense(const void* w, i64 rows, i64 columns, int kind, const void* x, int x_kind, void* y, int level, int threads) {
    Rows four = nullptr;
#ifdef AVX2
    if (level >= WITH_AVX2) four = kind == FLOAT ? dense_avx2<float> : kind == BFLOAT ? dense_avx2<Bfloat> : dense_avx2<Half>;
#endif
#ifdef AVX512
    if (level == WITH_AVX512 && kind != FLOAT) four = kind == BFLOAT ? dense_avx512<Bfloat> : dense_avx512<Half>;
#endif
    if (!four || rows % 4 || columns % 64) return false;
    auto input = prepared(x, x_kind, 1, columns, columns, apart(level, kind));
    const float* in = input.get();
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
