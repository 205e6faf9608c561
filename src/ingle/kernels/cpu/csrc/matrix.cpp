#include "matrix.h"

#include <type_traits>
#include <vector>

#include "bytes.h"
#include "codes.h"
#include "pool.h"
#include "spans.h"

namespace ingle {

const char* instructions() { return kInstructions; }

// body(bits), where that is a constant.
template <typename Body>
static auto with_bits(int32_t bits, const Body& body) {
    switch (bits) {
        case 4: return body(std::integral_constant<int, 4>());
        case 5: return body(std::integral_constant<int, 5>());
        case 6: return body(std::integral_constant<int, 6>());
        case 8: return body(std::integral_constant<int, 8>());
        case kFloat8: return body(std::integral_constant<int, kFloat8>());
        case 16: return body(std::integral_constant<int, 16>());
        default: return body(std::integral_constant<int, 32>());
    }
}

const char* factors(const Matrix& m) {
    if (multiplies_bytes(m)) return "8-bit integers";
    return with_bits(m.bits, [](auto b) -> const char* { return Codes<b>::kFactors; });
}

int64_t num_groups(const Matrix& m) { return num_spans(m) * span_groups(m); }

int64_t matrix_bytes(const Matrix& m) { return num_blocks(m) * num_spans(m) * span_bytes(m); }

// ---- packing, and the way back

// A group's scales, behind which its minima lie, and the factors of both.
struct Scales {
    uint8_t* factors;
    uint8_t* at;
};

static void put_scale(uint8_t* at, int64_t row, float value, bool wide) {
    if (wide) {
        memcpy(at + row * 4, &value, 4);
    } else {
        Half half[kLanes];
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

// Calls body(scales, unit, column) for each unit of a row's columns.
template <typename Body>
static void for_each_unit(const Matrix& m, int64_t row, const Body& body) {
    const int64_t spans = num_spans(m), groups = span_groups(m), unit_bytes = kBlockRows * kUnit * width(m.bits) / 8;
    uint8_t* span = span_at(m, row / kBlockRows, 0);
    for (int64_t s = 0, column = 0; s < spans; s++, span += span_bytes(m)) {
        uint8_t* unit = span + codes_offset(m);
        for (int64_t g = 0; g < groups; g++) {
            const Scales scales = {span, span + factor_bytes(m) + g * scales_bytes(m)};
            for (int64_t c = 0; c < m.group_size; c += kUnit, column += kUnit, unit += unit_bytes)
                if (column < m.columns) body(scales, unit, column);
        }
    }
}

template <int Bits>
static void pack_codes(const Matrix& m, const uint8_t* codes, int64_t row) {
    constexpr int64_t size = have_scales(Bits) ? 1 : Bits / 8;
    for_each_unit(m, row, [&](Scales, uint8_t* unit, int64_t column) {
        int64_t left = m.columns - column;
        uint8_t part[kUnit * size] = {};
        memcpy(part, codes + column * size, (left < kUnit ? left : kUnit) * size);
        if constexpr (kAreOffset<Bits>)
            for (uint8_t& code : part) code -= m.codebook[0];
        Codes<Bits>::put(unit, row % kBlockRows, part);
    });
}

static void pack_scales(const Matrix& m, const float* scales, const float* minima, const float* factors, int64_t row) {
    const int64_t spans = num_spans(m), groups = span_groups(m), r = row % kBlockRows;
    uint8_t* span = span_at(m, row / kBlockRows, 0);
    for (int64_t s = 0; s < spans; s++, span += span_bytes(m)) {
        if (m.scales == kSteps) {
            put_scale(span, r, factors[2 * s], false);
            if (m.has_minima) put_scale(span + kBlockRows * 2, r, factors[2 * s + 1], false);
        }
        uint8_t* at = span + factor_bytes(m);
        for (int64_t g = s * groups; g < (s + 1) * groups; g++, at += scales_bytes(m)) {
            uint8_t* minimum = at + scale_bytes(m);
            if (m.scales == kSteps) at[r] = (int8_t)scales[g];
            else put_scale(at, r, scales[g], m.scales == kWide);
            if (!m.has_minima) continue;
            if (m.scales == kSteps) minimum[r] = (int8_t)minima[g];
            else if (m.has_minima == kInScales) minimum[r] = (int8_t)-minima[g];
            else put_scale(minimum, r, minima[g], m.scales == kWide);
        }
    }
}

void pack_rows(const Matrix& m, const void* codes, const float* scales, const float* minima, const float* factors,
               int64_t first, int64_t count) {
    const int64_t groups = num_groups(m), row_bytes = m.columns * (have_scales(m.bits) ? 1 : m.bits / 8);
    for (int64_t i = 0; i < count; i++) {
        if (have_scales(m.bits))
            pack_scales(m, scales + i * groups, m.has_minima ? minima + i * groups : nullptr,
                        m.scales == kSteps ? factors + i * num_spans(m) * 2 : nullptr, first + i);
        const uint8_t* from = (const uint8_t*)codes + i * row_bytes;
        with_bits(m.bits, [&](auto bits) { pack_codes<bits>(m, from, first + i); });
    }
}

template <int Bits>
static void get_codes(const uint8_t* unit, int64_t row, const Matrix& m, float* out) {
    if constexpr (are_floats(Bits)) Codes<Bits>::get(unit, row, out);
    else Codes<Bits>::get(unit, row, m, out);
}

template <int Bits>
static void unpack_row(const Matrix& m, int64_t row, float* out) {
    const int64_t r = row % kBlockRows;
    for_each_unit(m, row, [&](Scales scales, uint8_t* unit, int64_t column) {
        float values[kUnit];
        get_codes<Bits>(unit, r, m, values);
        if (have_scales(Bits)) {
            const uint8_t* minima = scales.at + scale_bytes(m);
            float scale, minimum = 0;
            if (m.scales == kSteps) {
                scale = (int8_t)scales.at[r] * get_scale(scales.factors, r, false);
                if (m.has_minima) minimum = (int8_t)minima[r] * get_scale(scales.factors + kBlockRows * 2, r, false);
            } else {
                scale = get_scale(scales.at, r, m.scales == kWide);
                if (m.has_minima == kInScales) minimum = -(int8_t)minima[r] * scale;
                else if (m.has_minima) minimum = get_scale(minima, r, m.scales == kWide);
            }
            for (float& value : values) value = (value * scale + minimum) * m.unit;
        }
        int64_t left = m.columns - column;
        memcpy(out + column, values, (left < kUnit ? left : kUnit) * sizeof(float));
    });
}

void gather_rows(const Matrix& m, const int64_t* indices, int64_t count, float* out) {
    parallel_ranges(count, 8, [&](int64_t begin, int64_t end) {
        std::vector<float> sorted(m.order ? m.columns : 0);
        for (int64_t i = begin; i < end; i++) {
            float* to = out + i * m.inputs;
            with_bits(m.bits, [&](auto bits) { unpack_row<bits>(m, indices[i], m.order ? sorted.data() : to); });
            for (int64_t c = m.columns - 1; m.order && c >= 0; c--) to[m.order[c]] = sorted[c];  // the first of an input stays
        }
    });
}

void pack_groups(const Matrix& m, const uint8_t* codes, int64_t row_bytes, const float* scales, const float* minima,
                 int64_t first, int64_t count) {
    const int64_t groups = num_groups(m), first_block = first / kBlockRows, last_block = (first + count - 1) / kBlockRows;
    // A block of packed rows belongs to one thread: its lines are written row by row.
    parallel_ranges(last_block - first_block + 1, 1, [&](int64_t begin, int64_t end) {
        std::vector<uint8_t> row(m.columns + 1);
        int64_t from = (first_block + begin) * kBlockRows - first, to = (first_block + end) * kBlockRows - first;
        for (int64_t i = from < 0 ? 0 : from; i < to && i < count; i++) {
            const uint8_t* stored = codes + i * row_bytes;
            for (int64_t c = 0; c < m.columns; c++)
                row[c] = m.bits == 4 ? stored[c / 2] >> c % 2 * 4 & 15 : m.bits == 8 ? stored[c] ^ 128 : stored[c];
            pack_rows(m, row.data(), scales + i * groups, m.has_minima ? minima + i * groups : nullptr, nullptr, first + i, 1);
        }
    });
}

// ---- the product

namespace {

// x in tiles of tokens: operands [tile][unit][token][of a unit]; of integers also, [tile][group][token], what sums start
// with and the sum of a group's numbers; and the scale of each token's operands.
template <typename Kind>
struct Tiled {
    std::vector<typename Kind::Operand> operands;
    std::vector<int32_t> starts;
    std::vector<float> group_sums;
    std::vector<float> scales;
    int64_t num_tokens, groups, operands_per_token;

    int64_t num_tiles() const { return (num_tokens + Kind::kMostTokens - 1) / Kind::kMostTokens; }
    int64_t tokens_of(int64_t tile) const {
        int64_t left = num_tokens - tile * Kind::kMostTokens;
        return left < Kind::kMostTokens ? left : Kind::kMostTokens;
    }
    auto* operands_of(int64_t tile) { return operands.data() + tile * Kind::kMostTokens * operands_per_token; }
    int32_t* starts_of(int64_t tile) { return starts.data() + tile * Kind::kMostTokens * groups; }
    float* group_sums_of(int64_t tile) { return group_sums.data() + tile * Kind::kMostTokens * groups; }
};

// The sizes for which a product is compiled; a tile is computed in the least that holds it.
constexpr int64_t kTileSizes[] = {1, 2, 3, 4, 6, 8, 12};

template <typename Kind>
int64_t compiled_size(int64_t tokens) {
    for (int64_t size : kTileSizes)
        if (size >= tokens && size <= Kind::kMostTokens) return size;
    return Kind::kMostTokens;
}

// A unit of x's columns from `column` on, with zeros beyond its last.
const float* unit_of(const float* row, int64_t columns, int64_t column, float* padded) {
    if (columns - column >= kUnit) return row + column;
    memset(padded, 0, kUnit * sizeof(float));
    if (column < columns) memcpy(padded, row + column, (columns - column) * sizeof(float));
    return padded;
}

template <int Bits>
void tile_token(const Matrix& m, const float* row, int64_t t, int64_t size, int64_t groups, int32_t offset, float scale,
                typename Codes<Bits>::Operand* operands, int32_t* starts, float* sums) {
    using Kind = Codes<Bits>;
    const float per_unit = scale > 0 ? 1 / scale : 0.0f;
    float padded[kUnit];
    for (int64_t g = 0, c = 0; g < groups; g++) {
        Ints total = {};
        for (const int64_t end = c + m.group_size; c < end; c += kUnit) {
            const float* unit = unit_of(row, m.columns, c, padded);
            auto* to = operands + (c * size + t * kUnit) / Kind::kColumnsPerOperand;
            if constexpr (are_floats(Bits)) Kind::put_operands(unit, to);
            else total += Kind::put_operands(unit, per_unit, to);
        }
        if constexpr (are_floats(Bits)) continue;
        const int32_t group_sum = sum(total);
        starts[g * size + t] = -offset * group_sum;
        sums[g * size + t] = group_sum;
    }
}

template <int Bits>
void tile_x(const Matrix& m, const float* x, int64_t x_stride, int64_t num_tokens, Tiled<Codes<Bits>>& out) {
    using Kind = Codes<Bits>;
    const int64_t columns = num_groups(m) * m.group_size;  // padded
    int32_t offset = 0;
    if constexpr (!are_floats(Bits)) offset = Kind::offset_of(m);
    out.num_tokens = num_tokens;
    out.groups = are_floats(Bits) ? 0 : num_groups(m);
    out.operands_per_token = columns / Kind::kColumnsPerOperand;
    out.operands.resize(out.num_tiles() * Kind::kMostTokens * out.operands_per_token);
    out.starts.resize(out.num_tiles() * Kind::kMostTokens * out.groups);
    out.group_sums.resize(out.num_tiles() * Kind::kMostTokens * out.groups);
    out.scales.resize(num_tokens);
    parallel_for(out.num_tiles(), [&](int64_t tile) {
        const int64_t tokens = out.tokens_of(tile), size = compiled_size<Kind>(tokens);
        auto* operands = out.operands_of(tile);
        if (size != tokens) {
            memset(out.starts_of(tile), 0, size * out.groups * sizeof(int32_t));
            memset(out.group_sums_of(tile), 0, size * out.groups * sizeof(float));
            memset((void*)operands, 0, size * out.operands_per_token * sizeof *operands);
        }
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t token = tile * Kind::kMostTokens + t;
            const float* row = x + token * x_stride;
            if (m.order) {
                static thread_local std::vector<float> sorted;
                sorted.resize(m.columns);
                for (int64_t c = 0; c < m.columns; c++) sorted[c] = row[m.order[c]];
                row = sorted.data();
            }
            float scale = 1;
            if constexpr (!are_floats(Bits)) scale = integer_scale(row, m.columns);
            out.scales[token] = scale;
            tile_token<Bits>(m, row, t, size, num_groups(m), offset, scale, operands, out.starts_of(tile),
                             out.group_sums_of(tile));
        }
    });
}

// What a tile's product takes and gives: `total` in units of the tokens' scales.
template <typename Kind>
struct TileProduct {
    const Matrix& m;
    int64_t block;
    const typename Kind::Operand* x;
    const int32_t* starts;
    const float* group_sums;
    float (*total)[kVectors][kLanes];
};

constexpr int kLong = 0;  // columns of a group that are more than 32, as many as the matrix says

// One block of rows times one tile of tokens; groups of 16 columns, 32 or more.
template <int Bits, int Tokens, int GroupSize, Reading How>
void multiply_tile(const TileProduct<Codes<Bits>>& p) {
    const Matrix& m = p.m;
    const Codes<Bits> codes(m);
    const int64_t spans = num_spans(m), groups = span_groups(m), stride = span_bytes(m), scales_stride = scales_bytes(m);
    const int64_t units = GroupSize == kLong ? m.group_size / kUnit : GroupSize / kUnit, ahead_stride = stride / groups;
    const int64_t codes_at = codes_offset(m), scales_at = factor_bytes(m);
    constexpr int64_t unit_bytes = kBlockRows * kUnit * width(Bits) / 8;
    constexpr int64_t unit_operands = kUnit / Codes<Bits>::kColumnsPerOperand * Tokens;
    const uint8_t* span = span_at(m, p.block, 0);
    const auto* x = p.x;
    const int32_t* starts = p.starts;
    const float* group_sums = p.group_sums;
    float (*const total)[kVectors][kLanes] = p.total;
    const bool has_minima = m.has_minima;
    memset(total, 0, Tokens * sizeof *total);
    for (int64_t s = 0; s < spans; s++, span += stride) {
        const uint8_t *unit = span + codes_at, *scales = span + scales_at, *ahead = span + kAhead;
        for (int64_t g = 0; g < groups; g++, scales += scales_stride, starts += Tokens, group_sums += Tokens) {
            typename Codes<Bits>::template Sums<Tokens> sums;
            if constexpr (How == Reading::kPlain || How == Reading::kWide) sums.clear();
            else sums.start(starts);
            if constexpr (GroupSize == kLong) {
                for (int64_t u = 0; u < units; u++, x += unit_operands, unit += unit_bytes) {
                    prefetch<unit_bytes>(unit + kAhead);
                    codes.template multiply<Tokens, How>(sums, unit, x);
                }
            } else {
                prefetch<kBlockRows * (GroupSize * width(Bits) / 8 + 4)>(ahead);
                ahead += ahead_stride;
#pragma GCC unroll 2
                for (int u = 0; u < GroupSize / kUnit; u++, x += unit_operands, unit += unit_bytes)
                    codes.template multiply<Tokens, How>(sums, unit, x);
            }
#pragma GCC unroll 4
            for (int i = 0; i < kVectors; i++) {
                const ScaleAndMinimum of = load_scales(m, span, scales, i);
                if (!has_minima) {
#pragma GCC unroll 12
                    for (int t = 0; t < Tokens; t++)
                        store(total[t][i], load(total[t][i]) + sums.value(t, i) * of.scale);
                    continue;
                }
#pragma GCC unroll 12
                for (int t = 0; t < Tokens; t++) {
                    const Floats sum = load(total[t][i]) + sums.value(t, i) * of.scale;
                    store(total[t][i], sum + of.minimum * group_sums[t]);
                }
            }
            // Totals stay in memory: registers, of which there are none left, they would only be copied to the stack from.
            asm volatile("" ::: "memory");
        }
    }
}

// The same for floats, whose sums have no scale to wait for.
template <int Bits, int Tokens>
void multiply_plain_tile(const TileProduct<Codes<Bits>>& p) {
    constexpr int64_t unit_operands = kUnit / Codes<Bits>::kColumnsPerOperand * Tokens;
    constexpr int64_t unit_bytes = kBlockRows * kUnit * width(Bits) / 8;
    const uint8_t* unit = span_at(p.m, p.block, 0);
    const auto* x = p.x;
    typename Codes<Bits>::template Sums<Tokens> sums;
    sums.clear();
    const int64_t units = num_groups(p.m) * p.m.group_size / kUnit;
    for (int64_t u = 0; u < units; u++, unit += unit_bytes, x += unit_operands) {
        prefetch<unit_bytes>(unit + kAhead);
        Codes<Bits>::multiply(sums, unit, x);
    }
#pragma GCC unroll 12
    for (int t = 0; t < Tokens; t++)
        for (int i = 0; i < kVectors; i++) store(p.total[t][i], sums.value(t, i));
}

// The same for floats of 8 bits, whose groups have scales.
template <int Bits, int Tokens>
void multiply_scaled_tile(const TileProduct<Codes<Bits>>& p) {
    constexpr int64_t unit_operands = kUnit / Codes<Bits>::kColumnsPerOperand * Tokens;
    constexpr int64_t unit_bytes = kBlockRows * kUnit * width(Bits) / 8;
    constexpr int kChains = Tokens == 1 ? 2 : 1;  // of additions, each of which waits for the one before
    const Matrix& m = p.m;
    const int64_t groups = num_groups(m), stride = span_bytes(m), units = m.group_size / kUnit;
    const uint8_t* group = span_at(m, p.block, 0);
    const auto* x = p.x;
    memset(p.total, 0, Tokens * sizeof *p.total);
    for (int64_t g = 0; g < groups; g++, group += stride) {
        typename Codes<Bits>::template Sums<Tokens> sums[kChains];
        for (auto& each : sums) each.clear();
        const uint8_t* unit = group + codes_offset(m);
        for (int64_t u = 0; u < units; u += kChains) {
#pragma GCC unroll 2
            for (int i = 0; i < kChains; i++, unit += unit_bytes, x += unit_operands) {
                if (i && u + i >= units) break;
                prefetch<unit_bytes>(unit + kAhead);
                Codes<Bits>::multiply(sums[i], unit, x);
            }
        }
        for (int i = 0; i < kVectors; i++) {
            const Floats scale = load_scales(m, group, group, i).scale * Codes<Bits>::kScale;
            for (int t = 0; t < Tokens; t++) {
                Floats sum = sums[0].value(t, i);
                for (int chain = 1; chain < kChains; chain++) sum += sums[chain].value(t, i);
                store(p.total[t][i], load(p.total[t][i]) + sum * scale);
            }
        }
    }
}

template <int Bits, int Tokens, Reading How>
auto of_group_size(const Matrix& m) {
    switch (m.group_size) {
        case 16: return multiply_tile<Bits, Tokens, 16, How>;
        case 32: return multiply_tile<Bits, Tokens, 32, How>;
        default: return multiply_tile<Bits, Tokens, kLong, How>;
    }
}

template <int Bits, int Tokens>
auto tile_product(const Matrix& m) {
    if constexpr (are_floats(Bits) && have_scales(Bits)) {
        return multiply_scaled_tile<Bits, Tokens>;
    } else if constexpr (are_floats(Bits)) {
        return multiply_plain_tile<Bits, Tokens>;
    } else if constexpr (kAreOffset<Bits>) {
        return of_group_size<Bits, Tokens, Reading::kOffset>(m);
    } else {
        using Kind = Codes<Bits>;
        const Reading how = Kind::reading_of(m);
        if constexpr (Kind::reads(Reading::kOffset))
            if (how == Reading::kOffset) return of_group_size<Bits, Tokens, Reading::kOffset>(m);
        if constexpr (Kind::reads(Reading::kTable))
            if (how == Reading::kTable) return of_group_size<Bits, Tokens, Reading::kTable>(m);
        if constexpr (Kind::reads(Reading::kWide))
            if (how == Reading::kWide) return of_group_size<Bits, Tokens, Reading::kWide>(m);
        if constexpr (Kind::reads(Reading::kPlain)) return of_group_size<Bits, Tokens, Reading::kPlain>(m);
        __builtin_unreachable();
    }
}

template <int Bits>
auto product_of(const Matrix& m, int64_t size) {
    constexpr int most = Codes<Bits>::kMostTokens;
    switch (size) {
        case 1: return tile_product<Bits, 1>(m);
        case 2: return tile_product<Bits, 2>(m);
        case 3: return tile_product<Bits, 3>(m);
        case 4: return tile_product<Bits, most < 4 ? most : 4>(m);
        case 6: return tile_product<Bits, most < 6 ? most : 6>(m);
        case 8: return tile_product<Bits, most < 8 ? most : 8>(m);
        default: return tile_product<Bits, most>(m);
    }
}

// A part of the tiles of tokens.
struct Tiles {
    int64_t first, end;

    static Tiles of(int64_t segment, int64_t segments, int64_t tiles) {
        return {tiles * segment / segments, tiles * (segment + 1) / segments};
    }
};

// A block of rows, and its other half if it gates, times the tokens of some tiles: to `y`.
template <int Bits>
void multiply_block(const Matrix& m, int64_t block, const Matrix* up, int64_t up_block, Tiled<Codes<Bits>>& tiled,
                    Tiles tiles, const Output& out, float* y) {
    using Kind = Codes<Bits>;
    const int64_t left = m.rows - block * kBlockRows, rows = left < kBlockRows ? left : kBlockRows;
    for (int64_t tile = tiles.first; tile < tiles.end; tile++) {
        const int64_t tokens = tiled.tokens_of(tile);
        alignas(64) float total[Kind::kMostTokens][kVectors][kLanes], other[Kind::kMostTokens][kVectors][kLanes];
        const auto multiply = [&](const Matrix& of, int64_t at, auto to) {
            product_of<Bits>(of, compiled_size<Kind>(tokens))(
                {of, at, tiled.operands_of(tile), tiled.starts_of(tile), tiled.group_sums_of(tile), to});
        };
        multiply(m, block, total);
        if (up) multiply(*up, up_block, other);
        const int64_t first = tile * Kind::kMostTokens;
        const auto factor = [&](int64_t t) { return have_scales(Bits) ? tiled.scales[first + t] * m.unit : 1.0f; };
        put_tile(out, total, up ? other : nullptr, tokens, factor, rows, y + first * out.y.token);
    }
}

// Tiles of tokens from which on a block's codes of 5 and 6 bits are taken apart once for all, to 8 bits.
constexpr int64_t kExpandedTiles = 8;

// The block of `m` as the only one of a matrix in `data`, which is as `m` with codes of 8 bits.
template <int Bits>
Matrix expanded(const Matrix& m, int64_t block, std::vector<uint8_t>& data) {
    Matrix out = m;
    out.bits = 8, out.rows = m.rows - block * kBlockRows;
    if (out.rows > kBlockRows) out.rows = kBlockRows;
    constexpr int64_t line = 64, from_bytes = kBlockRows * kUnit * Bits / 8, to_bytes = kBlockRows * kUnit;
    data.resize(num_spans(m) * span_bytes(out) + kAhead + 2 * line);
    out.data = data.data() + (line - (uintptr_t)data.data() % line) % line;
    const int64_t units = span_groups(m) * m.group_size / kUnit, head = codes_offset(m);
    for (int64_t s = 0; s < num_spans(m); s++) {
        const uint8_t* from = span_at(m, block, s);
        uint8_t* to = span_at(out, 0, s);
        memcpy(to, from, head);
        for (int64_t u = 0; u < units; u++) Codes<Bits>::expand(from + head + u * from_bytes, m, to + head + u * to_bytes);
    }
    return out;
}

template <int Bits>
void multiply_expanded(const Matrix& m, const float* x, int64_t x_stride, int64_t num_tokens, const Output& out, float* y) {
    static thread_local Tiled<Codes<8>> own;
    auto& tiled = own;  // in a lambda, another thread would name its own
    Matrix wide = m;
    wide.bits = 8;
    tile_x<8>(wide, x, x_stride, num_tokens, tiled);
    const int64_t blocks = out.blocks(num_blocks(m)), segments = num_segments(blocks, tiled.num_tiles(), num_threads());
    parallel_ranges(blocks * segments, 1, [&](int64_t begin, int64_t end) {
        static thread_local std::vector<uint8_t> data, up_data;
        for (int64_t at = begin; at < end; at++) {
            const int64_t block = at / segments;
            const Matrix own = expanded<Bits>(m, block, data);
            const Matrix up = out.gates ? expanded<Bits>(m, blocks + block, up_data) : own;
            multiply_block<8>(own, 0, out.gates ? &up : nullptr, 0, tiled, Tiles::of(at % segments, segments, tiled.num_tiles()),
                              out, y + block * kBlockRows);
        }
    });
}

template <int Bits>
void multiply_as(const Matrix* const* matrices, int64_t count, PerMatrix<const float> x, int64_t num_tokens,
                 const Output& out) {
    if constexpr (kAreOffset<Bits>)
        if (num_tokens > kExpandedTiles * Codes<Bits>::kMostTokens) {
            for (int64_t i = 0; i < count; i++)
                multiply_expanded<Bits>(*matrices[i], x.data + i * x.matrix, x.token, num_tokens, out,
                                        out.y.data + i * out.y.matrix);
            return;
        }
    static thread_local std::vector<Tiled<Codes<Bits>>> own;
    if ((int64_t)own.size() < count) own.resize(count);
    auto* tiled = own.data();  // in a lambda, another thread would name its own
    for (int64_t i = 0; i < count; i++)
        tile_x<Bits>(*matrices[i], x.data + i * x.matrix, x.token, num_tokens, tiled[i]);
    const int64_t blocks = out.blocks(num_blocks(*matrices[0])), tiles = tiled[0].num_tiles();
    const int64_t segments = num_segments(count * blocks, tiles, num_threads());
    const auto body = [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; at++) {
            const int64_t i = at / (blocks * segments), block = at / segments % blocks;
            const Matrix& m = *matrices[i];
            multiply_block<Bits>(m, block, out.gates ? &m : nullptr, blocks + block, tiled[i],
                                 Tiles::of(at % segments, segments, tiles), out,
                                 out.y.data + i * out.y.matrix + block * kBlockRows);
        }
    };
    parallel_ranges(count * blocks * segments, 1, body, most_blocks(*matrices[0]));
}

void multiply_to(const Matrix* const* matrices, int64_t count, PerMatrix<const float> x, int64_t num_tokens,
                 const Output& out) {
    if (multiplies_bytes(*matrices[0])) return multiply_bytes(matrices, count, x, num_tokens, out);
    with_bits(matrices[0]->bits, [&](auto bits) { multiply_as<bits>(matrices, count, x, num_tokens, out); });
}

}  // namespace

void multiply_each(const Matrix* const* matrices, int64_t count, PerMatrix<const float> x, int64_t num_tokens,
                   PerMatrix<float> y) {
    multiply_to(matrices, count, x, num_tokens, {y});
}

void multiply(const Matrix& m, const float* x, int64_t num_tokens, float* y, int64_t y_stride) {
    const Matrix* only = &m;
    multiply_each(&only, 1, {x, m.inputs, 0}, num_tokens, {y, y_stride, 0});
}

void multiply_gated(const Matrix& m, const float* x, int64_t num_tokens, int32_t activation, float* y, int64_t y_stride) {
    const Matrix* only = &m;
    multiply_to(&only, 1, {x, m.inputs, 0}, num_tokens, {{y, y_stride, 0}, true, activation});
}

}  // namespace ingle
