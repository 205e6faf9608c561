#include "matrix.h"

#include <vector>

#include "codes.h"
#include "pool.h"

namespace ingle {

const char* instructions() { return kInstructions; }

int64_t num_groups(const Matrix& m) { return (m.columns + m.group_size - 1) / m.group_size; }

static int64_t scale_bytes(const Matrix& m) {  // scales alone, or minima alone
    return m.bits == 16 ? 0 : kBlockRows * (m.wide_scales ? 4 : 2);
}

static int64_t codes_offset(const Matrix& m) { return scale_bytes(m) * (m.has_minima ? 2 : 1); }

int64_t group_bytes(const Matrix& m) { return codes_offset(m) + kBlockRows * m.group_size * m.bits / 8; }

static int64_t num_blocks(const Matrix& m) { return (m.rows + kBlockRows - 1) / kBlockRows; }

int64_t matrix_bytes(const Matrix& m) { return num_blocks(m) * num_groups(m) * group_bytes(m); }

static uint8_t* group_at(const Matrix& m, int64_t block, int64_t group) {
    return m.data + (block * num_groups(m) + group) * group_bytes(m);
}

// ---- packing, and the way back

static void put_scale(uint8_t* at, int64_t row, float value, bool wide) {
    if (wide) {
        memcpy(at + row * 4, &value, 4);
    } else {
        Half half[16];
        store(half, splat(value));
        memcpy(at + row * 2, half, 2);
    }
}

static float get_scale(const uint8_t* at, int64_t row, bool wide) {
    if (!wide) return to_float(((const Half*)at)[row]);
    float value;
    memcpy(&value, at + row * 4, 4);
    return value;
}

// Calls body(group, unit, column) for each unit of a row's columns.
template <typename Body>
static void for_each_unit(const Matrix& m, int64_t row, const Body& body) {
    const int64_t groups = num_groups(m), unit_bytes = kBlockRows * kUnit * m.bits / 8;
    for (int64_t g = 0; g < groups; g++) {
        uint8_t* group = group_at(m, row / kBlockRows, g);
        for (int64_t c = 0; c < m.group_size && g * m.group_size + c < m.columns; c += kUnit)
            body(group, group + codes_offset(m) + c / kUnit * unit_bytes, g * m.group_size + c);
    }
}

template <int Bits>
static void pack_codes(const Matrix& m, const uint8_t* codes, int64_t row) {
    constexpr int64_t size = Bits == 16 ? 2 : 1;
    for_each_unit(m, row, [&](uint8_t*, uint8_t* unit, int64_t column) {
        int64_t left = m.columns - column;
        uint8_t part[kUnit * size] = {};
        if (left < kUnit) memcpy(part, codes + column * size, left * size);
        Codes<Bits>::put(unit, row % kBlockRows, left < kUnit ? part : codes + column * size);
    });
}

void pack_rows(const Matrix& m, const void* codes, const float* scales, const float* minima, int64_t first,
               int64_t count) {
    const int64_t groups = num_groups(m), row_bytes = m.columns * (m.bits == 16 ? 2 : 1);
    for (int64_t i = 0; i < count; i++) {
        int64_t row = first + i;
        for (int64_t g = 0; m.bits != 16 && g < groups; g++) {
            uint8_t* group = group_at(m, row / kBlockRows, g);
            put_scale(group, row % kBlockRows, scales[i * groups + g], m.wide_scales);
            if (m.has_minima)
                put_scale(group + scale_bytes(m), row % kBlockRows, minima[i * groups + g], m.wide_scales);
        }
        const uint8_t* from = (const uint8_t*)codes + i * row_bytes;
        m.bits == 4 ? pack_codes<4>(m, from, row) : m.bits == 8 ? pack_codes<8>(m, from, row) : pack_codes<16>(m, from, row);
    }
}

template <int Bits>
static void unpack_row(const Matrix& m, int64_t row, float* out) {
    const int64_t r = row % kBlockRows;
    for_each_unit(m, row, [&](uint8_t* group, uint8_t* unit, int64_t column) {
        float values[kUnit];
        Codes<Bits>::get(unit, r, m, values);
        if (Bits != 16) {
            float scale = get_scale(group, r, m.wide_scales);
            float minimum = m.has_minima ? get_scale(group + scale_bytes(m), r, m.wide_scales) : 0.0f;
            for (float& value : values) value = value * scale + minimum;
        }
        int64_t left = m.columns - column;
        memcpy(out + column, values, (left < kUnit ? left : kUnit) * sizeof(float));
    });
}

void gather_rows(const Matrix& m, const int64_t* indices, int64_t count, float* out) {
    parallel_ranges(count, 8, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            float* to = out + i * m.columns;
            m.bits == 4   ? unpack_row<4>(m, indices[i], to)
            : m.bits == 8 ? unpack_row<8>(m, indices[i], to)
                          : unpack_row<16>(m, indices[i], to);
        }
    });
}

// ---- the product

namespace {

// x in tiles of tokens: operands [tile][columns][token], sums of each group's x [tile][group][token].
struct Tiled {
    std::vector<Operand> operands;
    std::vector<float> group_sums;
    int64_t columns;  // padded
    int64_t groups;
    int64_t num_tokens;

    int64_t num_tiles() const { return (num_tokens + kMaxTile - 1) / kMaxTile; }
    int64_t tokens_of(int64_t tile) const {
        int64_t left = num_tokens - tile * kMaxTile;
        return left < kMaxTile ? left : kMaxTile;
    }
};

// The sizes for which a product is compiled; a tile is computed in the least that holds it.
constexpr int64_t kTileSizes[] = {1, 2, 3, 4, 6, 8, 12};

int64_t compiled_size(int64_t tokens) {
    for (int64_t size : kTileSizes)
        if (size >= tokens) return size;
    return kMaxTile;
}

void tile_x(const Matrix& m, const float* x, int64_t num_tokens, Tiled& out) {
    out.columns = num_groups(m) * m.group_size;
    out.groups = num_groups(m);
    out.num_tokens = num_tokens;
    int64_t per_token = out.columns / kColumnsPerOperand;
    out.operands.resize(out.num_tiles() * kMaxTile * per_token);
    out.group_sums.resize(out.num_tiles() * kMaxTile * out.groups);
    parallel_for(out.num_tiles(), [&](int64_t tile) {
        int64_t tokens = out.tokens_of(tile), size = compiled_size(tokens);
        Operand* operands = out.operands.data() + tile * kMaxTile * per_token;
        float* sums = out.group_sums.data() + tile * kMaxTile * out.groups;
        memset(sums, 0, size * out.groups * sizeof(float));
        if (size != tokens) memset((void*)operands, 0, size * per_token * sizeof(Operand));
        for (int64_t t = 0; t < tokens; t++) {
            const float* row = x + (tile * kMaxTile + t) * m.columns;
            for (int64_t c = 0; c < out.columns; c += kUnit) {
                int64_t count = m.columns - c < kUnit ? (m.columns > c ? m.columns - c : 0) : kUnit;
                sums[c / m.group_size * size + t] +=
                    make_operands(row + c, count, operands + c / kColumnsPerOperand * size + t, size);
            }
        }
    });
}

Floats load_scales(const uint8_t* at, int64_t half, bool wide) {
    return wide ? load((const float*)at + half * 16) : load((const Half*)at + half * 16);
}

// One block of 32 rows times one tile of tokens.
template <int Bits, int Tokens>
void multiply_tile(const Matrix& m, int64_t block, const Operand* x, const float* group_sums, float (*total)[2][16]) {
    const Codes<Bits> codes(m);
    const int64_t groups = num_groups(m), stride = group_bytes(m), units = m.group_size / kUnit;
    const int64_t minima_at = scale_bytes(m), codes_at = codes_offset(m);
    constexpr int64_t unit_bytes = kBlockRows * kUnit * Bits / 8, unit_operands = kUnit / kColumnsPerOperand * Tokens;
    const uint8_t* group = group_at(m, block, 0);
    Sums<Tokens> sums;
    sums.clear();
    if (Bits != 16) memset(total, 0, Tokens * sizeof *total);
    for (int64_t g = 0; g < groups; g++, group += stride) {
        for (int64_t unit = 0; unit < units; unit++, x += unit_operands)
            codes.multiply(sums, group + codes_at + unit * unit_bytes, x);
        if (Bits == 16) continue;
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            Floats scale = load_scales(group, half, m.wide_scales), minimum = {};
            if (m.has_minima) minimum = load_scales(group + minima_at, half, m.wide_scales);
#pragma GCC unroll 12
            for (int t = 0; t < Tokens; t++) {
                Floats sum = load(total[t][half]) + (Floats)sums.v[t][half] * scale;
                store(total[t][half], sum + minimum * group_sums[g * Tokens + t]);
            }
        }
        sums.clear();
    }
    if (Bits == 16)
#pragma GCC unroll 12
        for (int t = 0; t < Tokens; t++)
            for (int half = 0; half < 2; half++) store(total[t][half], (Floats)sums.v[t][half]);
}

typedef void (*TileProduct)(const Matrix&, int64_t, const Operand*, const float*, float (*)[2][16]);

template <int Bits>
TileProduct product_of(int64_t size) {
    switch (size) {
        case 1: return multiply_tile<Bits, 1>;
        case 2: return multiply_tile<Bits, 2>;
        case 3: return multiply_tile<Bits, 3>;
        case 4: return multiply_tile<Bits, 4>;
        case 6: return multiply_tile<Bits, kMaxTile < 6 ? 4 : 6>;
        case 8: return multiply_tile<Bits, kMaxTile < 8 ? 4 : 8>;
        default: return multiply_tile<Bits, kMaxTile>;
    }
}

TileProduct product_of(const Matrix& m, int64_t size) {
    return m.bits == 4 ? product_of<4>(size) : m.bits == 8 ? product_of<8>(size) : product_of<16>(size);
}

}  // namespace

void multiply(const Matrix& m, const float* x, int64_t num_tokens, float* y, int64_t y_stride) {
    static thread_local Tiled tiled;
    Tiled& operands = tiled;  // a lambda that runs on another thread would see that thread's own
    tile_x(m, x, num_tokens, operands);
    int64_t per_token = operands.columns / kColumnsPerOperand;
    parallel_ranges(num_blocks(m), 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; block++) {
            int64_t rows = m.rows - block * kBlockRows < kBlockRows ? m.rows - block * kBlockRows : kBlockRows;
            for (int64_t tile = 0; tile < operands.num_tiles(); tile++) {
                int64_t tokens = operands.tokens_of(tile);
                alignas(64) float total[kMaxTile][2][16];
                product_of(m, compiled_size(tokens))(
                    m, block, operands.operands.data() + tile * kMaxTile * per_token,
                    operands.group_sums.data() + tile * kMaxTile * operands.groups, total);
                for (int64_t t = 0; t < tokens; t++)
                    memcpy(y + (tile * kMaxTile + t) * y_stride + block * kBlockRows, total[t], rows * sizeof(float));
            }
        }
    });
}

}  // namespace ingle
