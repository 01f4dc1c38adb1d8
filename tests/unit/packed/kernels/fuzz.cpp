// Hands random packed matrices, honest and hostile, to the checks and, where those accept them, to every kernel.
// Built with the address sanitizer: each tensor is an allocation of exactly its size. With an argument the checks are skipped.
#include "packed.cpp"

#include <cstdio>
#include <random>
#include <vector>

static std::mt19937_64 random_bits(1);
static i64 below(i64 n) { return random_bits() % n; }

#define MUST(what) if (!(what)) { printf("line %d: not %s\n", __LINE__, #what); exit(3); }

struct Matrix {
    i64 rows, columns;
    std::vector<uint8_t> mask;
    std::vector<char> values;  // a vector of elements of `size` bytes, exactly as long as claimed
    std::vector<i64> offset;
};

template <class T> static T* exact(std::vector<T>& v) { v.shrink_to_fit(); return v.data(); }

static void every_kernel(Matrix& m, int kind, int level) {
    i64 size = kind == FLOAT ? 4 : 2, n = m.offset[m.rows], groups = (m.rows + 7) / 8, words = (m.columns + 63) / 64;
    std::vector<uint64_t> tile_mask(8 * groups * words);
    std::vector<char> tile_values((n + SLACK) * size), dense(m.rows * m.columns * size), other(dense.size());
    std::vector<i64> start(groups + 1);
    lvlm_tile(exact(m.values), exact(m.mask), exact(m.offset), exact(tile_mask), exact(tile_values), exact(start), m.rows, m.columns, size, 1);
    lvlm_unpack_rows(m.values.data(), m.mask.data(), m.offset.data(), exact(dense), m.rows, m.columns, size, level, 1);
    lvlm_unpack(tile_mask.data(), tile_values.data(), start.data(), m.rows, m.columns, kind, 0, groups, exact(other), 0, level, 1);
    MUST(dense == other);
    std::vector<uint8_t> mask(m.mask.size());
    std::vector<char> values(n * size);
    lvlm_untile(tile_mask.data(), tile_values.data(), start.data(), exact(mask), nullptr, nullptr, m.rows, m.columns, size, 1);
    lvlm_untile(tile_mask.data(), tile_values.data(), start.data(), nullptr, m.offset.data(), exact(values), m.rows, m.columns, size, 1);
    MUST(mask == m.mask && values == m.values);
    std::vector<float> wide(m.rows * m.columns);
    lvlm_unpack(tile_mask.data(), tile_values.data(), start.data(), m.rows, m.columns, kind, groups / 2, groups, exact(wide), 1, level, 1);
    for (int x_kind : {FLOAT, BFLOAT, HALF}) {
        i64 tokens = 1 + below(9), x_size = x_kind == FLOAT ? 4 : 2;
        std::vector<char> x(tokens * m.columns * x_size), y(tokens * m.rows * x_size), bias(m.rows * x_size);
        lvlm_linear(tile_mask.data(), tile_values.data(), start.data(), m.rows, m.columns, kind, exact(x), x_kind, tokens, below(2) ? exact(bias) : nullptr, x_kind, exact(y), level, 1);
    }
    std::vector<i64> again(m.rows + 1);
    lvlm_pack(dense.data(), mask.data(), nullptr, nullptr, m.rows, m.columns, size, level, 1);
    MUST(lvlm_offsets(mask.data(), m.rows, m.columns, again.data(), 1));
    std::vector<char> packed(again[m.rows] * size);
    lvlm_pack(dense.data(), nullptr, again.data(), exact(packed), m.rows, m.columns, size, level, 1);
}

int main(int given, char**) {
    bool checked = given == 1;
    int accepted = 0, refused = 0;
    for (int round = 0; round < 10000; round++) {
        Matrix m;
        m.rows = 1 + below(25), m.columns = 1 + below(below(4) ? 70 : 400);
        i64 bytes = (m.columns + 7) / 8;
        m.mask.resize(m.rows * bytes);
        int density = below(4);
        for (auto& b : m.mask) b = density == 0 ? 0 : density == 1 ? 255 : random_bits();
        if (m.columns % 8 && below(4)) for (i64 r = 0; r < m.rows; r++) m.mask[(r + 1) * bytes - 1] &= (1 << m.columns % 8) - 1;
        m.offset.resize(m.rows + 1);
        bool fits = lvlm_offsets(exact(m.mask), m.rows, m.columns, exact(m.offset), 1);
        int kind = below(3);
        i64 claimed = m.offset[m.rows];
        if (!below(3)) claimed = below(claimed + 2);
        m.values.resize(claimed * (kind == FLOAT ? 4 : 2));
        for (auto& v : m.values) v = 1 + below(100);
        if (checked && (!fits || claimed != m.offset[m.rows])) { refused++; continue; }
        accepted++;
        every_kernel(m, kind, round % (lvlm_best_level() + 1));
    }
    printf("%d accepted, %d refused\n", accepted, refused);
    return accepted > 500 && refused > 500 ? 0 : 4;
}
