#include "matrix.h"

#include <vector>

#include "codes.h"
#include "pool.h"

namespace ingle {

const char* instructions() { return kInstructions; }

const char* factors(int32_t bits) {
    return bits == 4 ? Codes<4>::kFactors : bits == 8 ? Codes<8>::kFactors : Codes<16>::kFactors;
}

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
    const int64_t groups = num_groups(m), stride = group_bytes(m), unit_bytes = kBlockRows * kUnit * m.bits / 8;
    uint8_t* group = group_at(m, row / kBlockRows, 0);
    for (int64_t g = 0; g < groups; g++, group += stride) {
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
    const int64_t groups = num_groups(m), stride = group_bytes(m), row_bytes = m.columns * (m.bits == 16 ? 2 : 1);
    for (int64_t i = 0; i < count; i++) {
        int64_t row = first + i;
        uint8_t* group = group_at(m, row / kBlockRows, 0);
        for (int64_t g = 0; m.bits != 16 && g < groups; g++, group += stride) {
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

// x in tiles of tokens: operands [tile][unit][token][of a unit], sums of each group's operands [tile][group][token], and the
// scale of each token's operands.
template <typename Kind>
struct Tiled {
    std::vector<typename Kind::Operand> operands;
    std::vector<float> group_sums;
    std::vector<float> scales;
    int64_t num_tokens, groups, operands_per_token;

    int64_t num_tiles() const { return (num_tokens + kMaxTile - 1) / kMaxTile; }
    int64_t tokens_of(int64_t tile) const {
        int64_t left = num_tokens - tile * kMaxTile;
        return left < kMaxTile ? left : kMaxTile;
    }
    auto* operands_of(int64_t tile) { return operands.data() + tile * kMaxTile * operands_per_token; }
    float* group_sums_of(int64_t tile) { return group_sums.data() + tile * kMaxTile * groups; }
};

// The sizes for which a product is compiled; a tile is computed in the least that holds it.
constexpr int64_t kTileSizes[] = {1, 2, 3, 4, 6, 8, 12};

int64_t compiled_size(int64_t tokens) {
    for (int64_t size : kTileSizes)
        if (size >= tokens) return size;
    return kMaxTile;
}

template <typename Kind>
void tile_x(const Matrix& m, const float* x, int64_t num_tokens, Tiled<Kind>& out) {
    const int64_t columns = num_groups(m) * m.group_size;  // padded
    out.num_tokens = num_tokens;
    out.groups = num_groups(m);
    out.operands_per_token = columns / Kind::kColumnsPerOperand;
    out.operands.resize(out.num_tiles() * kMaxTile * out.operands_per_token);
    out.group_sums.resize(out.num_tiles() * kMaxTile * out.groups);
    out.scales.resize(num_tokens);
    parallel_for(out.num_tiles(), [&](int64_t tile) {
        const int64_t tokens = out.tokens_of(tile), size = compiled_size(tokens);
        auto* operands = out.operands_of(tile);
        float* sums = out.group_sums_of(tile);
        if (size != tokens) {
            memset(sums, 0, size * out.groups * sizeof(float));
            memset((void*)operands, 0, size * out.operands_per_token * sizeof *operands);
        }
        for (int64_t t = 0; t < tokens; t++) {
            const float* row = x + (tile * kMaxTile + t) * m.columns;
            const float scale = out.scales[tile * kMaxTile + t] = Kind::scale_of(row, m.columns);
            for (int64_t g = 0, c = 0; g < out.groups; g++) {
                typename Kind::Rounded total = {};
                for (const int64_t end = c + m.group_size; c < end; c += kUnit) {
                    int64_t left = m.columns - c;
                    Floats v = left >= kUnit ? load(row + c) : left > 0 ? load_part(row + c, left) : Floats{};
                    total += Kind::put_operands(v, scale, operands + (c * size + t * kUnit) / Kind::kColumnsPerOperand);
                }
                sums[g * size + t] = sum(total);
            }
        }
    });
}

Floats load_scales(const uint8_t* at, int64_t half, bool wide) {
    return wide ? load((const float*)at + half * 16) : load((const Half*)at + half * 16);
}

// Enough ahead of their use for weights to arrive from memory: the processor does not look so far by itself.
constexpr int64_t kAhead = 5120;

template <int64_t Bytes>
void prefetch(const uint8_t* p) {
#pragma GCC unroll 64
    for (int64_t i = 0; i < Bytes; i += 64) __builtin_prefetch(p + i);
}

// One block of 32 rows times one tile of tokens, in units of the tokens' scales; groups of 16 columns or 32.
template <int Bits, int Tokens, int GroupSize>
void multiply_tile(const Matrix& m, int64_t block, const typename Codes<Bits>::Operand* x, const float* group_sums,
                   float (*total)[2][16]) {
    const Codes<Bits> codes(m);
    const int64_t groups = num_groups(m), stride = group_bytes(m), minima_at = scale_bytes(m), codes_at = codes_offset(m);
    const bool wide = m.wide_scales, has_minima = m.has_minima;
    constexpr int64_t unit_bytes = kBlockRows * kUnit * Bits / 8;
    constexpr int64_t unit_operands = kUnit / Codes<Bits>::kColumnsPerOperand * Tokens;
    const uint8_t* group = group_at(m, block, 0);
    memset(total, 0, Tokens * sizeof *total);
    for (int64_t g = 0; g < groups; g++, group += stride) {
        typename Codes<Bits>::template Sums<Tokens> sums;
        sums.clear();
        prefetch<kBlockRows * (GroupSize * Bits / 8 + 4)>(group + kAhead);
#pragma GCC unroll 2
        for (int unit = 0; unit < GroupSize / kUnit; unit++, x += unit_operands)
            codes.multiply(sums, group + codes_at + unit * unit_bytes, x);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            Floats scale = splat(1.0f), minimum = {};
            if (Bits != 16) scale = load_scales(group, half, wide);
            if (has_minima) minimum = load_scales(group + minima_at, half, wide);
#pragma GCC unroll 12
            for (int t = 0; t < Tokens; t++) {
                Floats sum = load(total[t][half]) + sums.value(t, half) * scale;
                store(total[t][half], sum + minimum * group_sums[g * Tokens + t]);
            }
        }
        // Totals stay in memory: registers, of which there are none left, they would only be copied to the stack from.
        asm volatile("" ::: "memory");
    }
}

// The same for bfloat16, whose sums have no scale to wait for.
template <int Tokens>
void multiply_plain_tile(const Matrix& m, int64_t block, const Codes<16>::Operand* x, const float*,
                         float (*total)[2][16]) {
    const Codes<16> codes(m);
    constexpr int64_t unit_operands = kUnit / Codes<16>::kColumnsPerOperand * Tokens;
    const uint8_t* unit = group_at(m, block, 0);
    Codes<16>::Sums<Tokens> sums;
    sums.clear();
    const int64_t units = num_groups(m) * m.group_size / kUnit;
    for (int64_t u = 0; u < units; u++, unit += kBlockRows * kUnit * 2, x += unit_operands) {
        prefetch<kBlockRows * kUnit * 2>(unit + kAhead);
        codes.multiply(sums, unit, x);
    }
#pragma GCC unroll 12
    for (int t = 0; t < Tokens; t++)
        for (int half = 0; half < 2; half++) store(total[t][half], sums.value(t, half));
}

template <int Bits, int Tokens>
auto tile_product(const Matrix& m) {
    if constexpr (Bits == 16) return multiply_plain_tile<Tokens>;
    else return m.group_size == 16 ? multiply_tile<Bits, Tokens, 16> : multiply_tile<Bits, Tokens, 32>;
}

template <int Bits>
auto product_of(const Matrix& m, int64_t size) {
    switch (size) {
        case 1: return tile_product<Bits, 1>(m);
        case 2: return tile_product<Bits, 2>(m);
        case 3: return tile_product<Bits, 3>(m);
        case 4: return tile_product<Bits, 4>(m);
        case 6: return tile_product<Bits, kMaxTile < 6 ? 4 : 6>(m);
        case 8: return tile_product<Bits, kMaxTile < 8 ? 4 : 8>(m);
        default: return tile_product<Bits, kMaxTile>(m);
    }
}

template <int Bits>
void multiply_as(const Matrix& m, const float* x, int64_t num_tokens, float* y, int64_t y_stride) {
    static thread_local Tiled<Codes<Bits>> own;
    Tiled<Codes<Bits>>& tiled = own;  // in a lambda, another thread would name its own
    tile_x(m, x, num_tokens, tiled);
    parallel_ranges(num_blocks(m), 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; block++) {
            const int64_t left = m.rows - block * kBlockRows, rows = left < kBlockRows ? left : kBlockRows;
            for (int64_t tile = 0; tile < tiled.num_tiles(); tile++) {
                const int64_t tokens = tiled.tokens_of(tile);
                alignas(64) float total[kMaxTile][2][16];
                product_of<Bits>(m, compiled_size(tokens))(m, block, tiled.operands_of(tile), tiled.group_sums_of(tile),
                                                        total);
                for (int64_t t = 0; t < tokens; t++) {
                    const int64_t token = tile * kMaxTile + t;
                    float* to = y + token * y_stride + block * kBlockRows;
                    for (int64_t half = 0; half * 16 < rows; half++) {
                        const Floats values = load(total[t][half]) * tiled.scales[token];
                        const int64_t count = rows - half * 16;
                        count >= 16 ? store(to + half * 16, values) : store_part(to + half * 16, values, count);
                    }
                }
            }
        }
    });
}

}  // namespace

void multiply(const Matrix& m, const float* x, int64_t num_tokens, float* y, int64_t y_stride) {
    m.bits == 4   ? multiply_as<4>(m, x, num_tokens, y, y_stride)
    : m.bits == 8 ? multiply_as<8>(m, x, num_tokens, y, y_stride)
                  : multiply_as<16>(m, x, num_tokens, y, y_stride);
}

}  // namespace ingle
