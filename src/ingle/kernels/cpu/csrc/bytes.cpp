#include "bytes.h"

#include <algorithm>
#include <vector>

#include "codes.h"
#include "pool.h"
#include "spans.h"

namespace ingle {

#if !defined(__x86_64__)

bool multiplies_bytes(const Matrix&) { return false; }

void multiply_bytes(const Matrix* const*, int64_t, PerMatrix<const float>, int64_t, const Output&) {}

#else

namespace {

#if (defined(INGLE_AVX512) && defined(__AVX512VNNI__)) || defined(__AVXVNNI__)
constexpr bool kQuads = true;  // of columns are multiplied and added by one instruction
#else
constexpr bool kQuads = false;
#endif

constexpr int kQuad = 4;              // columns of an operand, a byte each
constexpr int kOperands = kUnit / kQuad;
constexpr float kLargestByte = 127;

// What the bytes of a unit are, which are not negative.
enum class Form {
    kCodes,     // the codes
    kTable,     // what stands for them in the codebook, 128 more
    kExpanded,  // codes of 5 and 6 bits, taken apart before
};

int32_t offset_of(const Matrix& m) { return m.bits == 8 || (m.bits == 4 && !is_linear(m)) ? 128 : -m.codebook[0]; }

template <int Bits, Form How>
struct Bytes {
    static constexpr int64_t kUnitBytes = kBlockRows * kUnit * (How == Form::kExpanded ? 8 : Bits) / 8;
    static constexpr int64_t kRegisterBytes = kLanes * 4;
    static constexpr int kMostTokens = kRegisters == 32 ? 12 : 4;
    // Which columns of a unit an operand has after the other.
    alignas(16) static constexpr uint8_t kOrder[kUnit] = {
        0,     Bits == 4 ? 4 : 2,   1, Bits == 4 ? 5 : 3,    Bits == 4 ? 2 : 4,   6,  Bits == 4 ? 3 : 5,   7,
        8, Bits == 4 ? 12 : 10, 9, Bits == 4 ? 13 : 11, Bits == 4 ? 10 : 12, 14, Bits == 4 ? 11 : 13, 15};

    uint8_t table[16];
    explicit Bytes(const Matrix& m) {
        for (int i = 0; i < 16; i++) table[i] = m.codebook[i] + 128;
    }

    static Words load_words(const uint8_t* p) {
        Words words;
        memcpy(&words, p, sizeof words);
        return words;
    }

    // Of a vector of rows, the bytes that meet operand `r`.
    inline __attribute__((always_inline)) Words bytes(const uint8_t* unit, int r, int vector) const {
        if constexpr (How == Form::kExpanded) {
            return load_words(unit + (r * kVectors + vector) * kRegisterBytes);
        } else if constexpr (Bits == 8) {
            return load_words(unit + (r * kVectors + vector) * kRegisterBytes) ^ (kSigns ^ 0x80808080u);
        } else if constexpr (Bits == 4) {
            const Words stored = load_words(unit + (r / 2 * kVectors + vector) * kRegisterBytes);
            const Words codes = (r % 2 ? stored >> 4 : stored) & 0x0f0f0f0fu;
            if constexpr (How == Form::kCodes) return codes;
#if defined(INGLE_AVX512)
            const __m512i tables = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table));
            return (Words)_mm512_shuffle_epi8(tables, (__m512i)codes);
#else
            const __m256i tables = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
            return (Words)_mm256_shuffle_epi8(tables, (__m256i)codes);
#endif
        } else {
            using Kind = Codes<Bits>;
            Pairs upper[Kind::kUpperVectors];
#pragma GCC unroll 2
            for (int i = 0; i < Kind::kUpperVectors; i++)
                upper[i] = (Pairs)load_words(unit + Kind::kLowerBytes + i * kRegisterBytes);
            const Pairs stored = (Pairs)load_words(unit + (r / 2 * kVectors + vector) * kRegisterBytes);
            return (Words)(Kind::unpack(stored, upper, vector, 2 * r) | Kind::unpack(stored, upper, vector, 2 * r + 1) << 8);
        }
    }
};

// A token alone has several sums, taken in turn: an addition would have to wait for the one before.
template <int Tokens>
struct ByteSums {
    static constexpr int kChains = Tokens == 1 ? 2 : 1;
    Ints v[Tokens * kChains][kVectors];
    void start(const int32_t* starts) {
#pragma GCC unroll 12
        for (int t = 0; t < Tokens * kChains; t++)
            for (int i = 0; i < kVectors; i++) v[t][i] = t % kChains ? Ints{} : splat(starts[t / kChains]);
    }
    Floats value(int t, int i) const {
        Ints all = v[t * kChains][i];
        for (int chain = 1; chain < kChains; chain++) all += v[t * kChains + chain][i];
        return to_floats(all);
    }
};

#if defined(INGLE_AVX512)
typedef int16_t Shorts __attribute__((vector_size(64)));
inline Shorts multiply_pairs(Words w, Ints x) { return (Shorts)_mm512_maddubs_epi16((__m512i)w, (__m512i)x); }
inline Ints add_pairs(Shorts pairs) { return (Ints)_mm512_madd_epi16((__m512i)pairs, _mm512_set1_epi16(1)); }
#else
typedef int16_t Shorts __attribute__((vector_size(32)));
inline Shorts multiply_pairs(Words w, Ints x) { return (Shorts)_mm256_maddubs_epi16((__m256i)w, (__m256i)x); }
inline Ints add_pairs(Shorts pairs) { return (Ints)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi16(1)); }
#endif

// Adds a unit's products, x being [token][operand].
template <int Bits, Form How, int Tokens>
inline __attribute__((always_inline)) void add_unit(const Bytes<Bits, How>& kind, ByteSums<Tokens>& sums,
                                                    const uint8_t* unit, const int32_t* x) {
    constexpr int kChains = ByteSums<Tokens>::kChains;
#if (defined(INGLE_AVX512) && defined(__AVX512VNNI__)) || defined(__AVXVNNI__)
#pragma GCC unroll 4
    for (int r = 0; r < kOperands; r++) {
        Words w[kVectors];
#pragma GCC unroll 2
        for (int i = 0; i < kVectors; i++) w[i] = kind.bytes(unit, r, i);
#pragma GCC unroll 12
        for (int t = 0; t < Tokens; t++) {
            const Ints columns = splat(x[t * kOperands + r]);
#pragma GCC unroll 2
            for (int i = 0; i < kVectors; i++) {
                Ints& sum = sums.v[t * kChains + r % kChains][i];
#if defined(INGLE_AVX512)
                sum = (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w[i], (__m512i)columns);
#else
                sum = (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w[i], (__m256i)columns);
#endif
            }
        }
    }
#else
    constexpr int kTogether = Bits == 6 ? 2 : 4;  // whose sums 16 bits hold: two products each, 63 * 127 at most
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; i++) {
        Words w[kOperands];
#pragma GCC unroll 4
        for (int r = 0; r < kOperands; r++) w[r] = kind.bytes(unit, r, i);
#pragma GCC unroll 12
        for (int t = 0; t < Tokens; t++)
#pragma GCC unroll 2
            for (int first = 0; first < kOperands; first += kTogether) {
                Shorts pairs = multiply_pairs(w[first], splat(x[t * kOperands + first]));
#pragma GCC unroll 3
                for (int r = first + 1; r < first + kTogether; r++)
                    pairs += multiply_pairs(w[r], splat(x[t * kOperands + r]));
                Ints& sum = sums.v[t * kChains + first / kTogether % kChains][i];
                sum += add_pairs(pairs);
                asm("" : "+v"(sum));  // else GCC adds in an order of its own, with all products on the stack meanwhile
            }
    }
#endif
}

// x in tiles of tokens: operands [tile][unit][token][of a unit], and [tile][part][token] what sums start with, the scale,
// and the sum of a part's numbers.
struct TiledBytes {
    std::vector<int32_t> operands, starts;
    std::vector<float> scales, part_sums;
    int64_t num_tokens, parts, units, tile_tokens;

    int64_t num_tiles() const { return (num_tokens + tile_tokens - 1) / tile_tokens; }
    int64_t tokens_of(int64_t tile) const {
        const int64_t left = num_tokens - tile * tile_tokens;
        return left < tile_tokens ? left : tile_tokens;
    }
    int64_t operands_at(int64_t tile) const { return tile * tile_tokens * units * kOperands; }
    int64_t parts_at(int64_t tile) const { return tile * tile_tokens * parts; }
};

// Columns that x has a scale for.
int64_t part_size(const Matrix& m) { return m.group_size < 32 ? m.group_size : 32; }

constexpr int64_t kByteTiles[] = {1, 2, 3, 4, 6, 8, 12};  // tokens for which a product is compiled

int64_t size_of(int64_t tokens) {
    for (int64_t size : kByteTiles)
        if (size >= tokens) return size;
    __builtin_unreachable();
}

// 16 integers of 8 bits in the order of a unit's operands.
inline void store_operands(const Ints* integers, const uint8_t* order, int32_t* out) {
#if defined(INGLE_AVX512)
    const __m128i bytes = _mm512_cvtsepi32_epi8((__m512i)integers[0]);
#else
    const __m256i words =
        _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)integers[0], (__m256i)integers[1]), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#endif
    _mm_storeu_si128((__m128i*)out, _mm_shuffle_epi8(bytes, _mm_loadu_si128((const __m128i*)order)));
}

// Lane i of the result is the largest number of v[i].
inline Ints maxima(const Ints* v) {
    const auto larger = [](Ints a, Ints b) { return a > b ? a : b; };
#if defined(INGLE_AVX512)
    const Ints even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    const auto halve = [&](Ints a, Ints b) {  // neighbours, of both vectors side by side
        return larger((Ints)_mm512_permutex2var_epi32((__m512i)a, (__m512i)even, (__m512i)b),
                      (Ints)_mm512_permutex2var_epi32((__m512i)a, (__m512i)(even + 1), (__m512i)b));
    };
    Ints pairs[8], fours[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) pairs[i] = halve(v[2 * i], v[2 * i + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) fours[i] = halve(pairs[2 * i], pairs[2 * i + 1]);
    return halve(halve(fours[0], fours[1]), halve(fours[2], fours[3]));
#else
    const auto halve = [&](Ints a, Ints b) {  // neighbours in each half
        return larger((Ints)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88), (Ints)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd));
    };
    const __m256i a = (__m256i)halve(halve(v[0], v[1]), halve(v[2], v[3]));
    const __m256i b = (__m256i)halve(halve(v[4], v[5]), halve(v[6], v[7]));
    return larger((Ints)_mm256_permute2x128_si256(a, b, 0x20), (Ints)_mm256_permute2x128_si256(a, b, 0x31));
#endif
}

// Token `t` of a tile that is computed as one of `size`, `row` being whole parts of `Columns`. As many at a time as a vector
// has lanes, so that their largest numbers and their sums are found side by side.
template <int Columns>
void tile_row(const float* row, int32_t offset, int64_t t, int64_t size, int64_t tile, const uint8_t* order, TiledBytes& out) {
    constexpr int kPartVectors = Columns / kLanes, kPartUnits = Columns / kUnit;
    constexpr int32_t infinite = 0x7f800000;
    const int64_t at = out.parts_at(tile) + t;
    int32_t *operands = out.operands.data() + out.operands_at(tile) + t * kOperands, *starts = out.starts.data() + at;
    float *scales = out.scales.data() + at, *part_sums = out.part_sums.data() + at;
    for (int64_t left = out.parts; left > 0; left -= kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, left);
        Ints most[kLanes];
        Floats totals[kLanes];
        alignas(64) float scale_of[kLanes], per_unit[kLanes], sum_of[kLanes];
        const float* from = row;
        for (int64_t p = 0; p < count; p++, from += Columns) {
            Ints most_of = {};
#pragma GCC unroll 4
            for (int v = 0; v < kPartVectors; v++) {  // without their signs, floats are ordered as integers
                const Ints bits = (Ints)load(from + v * kLanes) & 0x7fffffff;
                most_of = bits > most_of ? bits : most_of;
            }
            most[p] = most_of;
        }
        for (int64_t p = count; p < kLanes; p++) most[p] = most[0];
        // NaN for numbers that are not finite, so that the product tells.
        const Ints largest = maxima(most);
        const Floats all = largest < infinite ? (Floats)largest / kLargestByte : splat(NAN);
        store(scale_of, all);
        store(per_unit, all > 0.0f ? 1.0f / all : Floats{});
        for (int64_t p = 0; p < count; p++, row += Columns) {
            Ints total = {};
#pragma GCC unroll 2
            for (int u = 0; u < kPartUnits; u++, operands += size * kOperands) {
                Ints integers[kUnitVectors];
#pragma GCC unroll 2
                for (int v = 0; v < kUnitVectors; v++) {
                    integers[v] = to_nearest(load(row + u * kUnit + v * kLanes) * per_unit[p]);
                    total += integers[v];
                }
                store_operands(integers, order, operands);
            }
            totals[p] = to_floats(total);
        }
        for (int64_t p = count; p < kLanes; p++) totals[p] = totals[0];
        store(sum_of, sums(totals));  // exact
        for (int64_t p = 0; p < count; p++, starts += size, scales += size, part_sums += size) {
            *starts = -offset * (int32_t)sum_of[p];
            *scales = scale_of[p];
            *part_sums = sum_of[p] * scale_of[p];
        }
    }
}

void tile_rows(const Matrix& m, const float* x, int64_t x_stride, int64_t num_tokens, const uint8_t* order,
               int64_t tile_tokens, TiledBytes& out) {
    const int64_t columns = num_groups(m) * m.group_size;  // padded
    out.num_tokens = num_tokens, out.tile_tokens = tile_tokens;
    out.parts = columns / part_size(m), out.units = columns / kUnit;
    out.operands.resize(out.operands_at(out.num_tiles()));
    const int64_t num_parts = out.parts_at(out.num_tiles());
    out.starts.resize(num_parts), out.scales.resize(num_parts), out.part_sums.resize(num_parts);
    parallel_for(out.num_tiles(), [&](int64_t tile) {
        const int64_t tokens = out.tokens_of(tile), size = size_of(tokens), at = out.parts_at(tile);
        if (size != tokens) {
            memset(&out.starts[at], 0, size * out.parts * sizeof(int32_t));
            memset(&out.scales[at], 0, size * out.parts * sizeof(float));
            memset(&out.part_sums[at], 0, size * out.parts * sizeof(float));
            memset(&out.operands[out.operands_at(tile)], 0, size * out.units * kOperands * sizeof(int32_t));
        }
        for (int64_t t = 0; t < tokens; t++) {
            const float* row = x + (tile * tile_tokens + t) * x_stride;
            if (m.order || columns > m.columns) {
                static thread_local std::vector<float> whole;  // sorted, and up to the last part's end
                whole.assign(columns, 0.0f);
                for (int64_t c = 0; c < m.columns; c++) whole[c] = row[m.order ? m.order[c] : c];
                row = whole.data();
            }
            if (m.group_size < 32) tile_row<16>(row, offset_of(m), t, size, tile, order, out);
            else tile_row<32>(row, offset_of(m), t, size, tile, order, out);
        }
    });
}

typedef float Totals[kVectors][kLanes];

// Whether registers hold a part's weights, while tokens pass a few at a time: what scales one's sums then runs beside the
// products of the next.
#if defined(INGLE_AVX512) && defined(__AVX512VNNI__)
constexpr bool kHoldsWeights = true;

struct PartOfTile {
    const int32_t *x, *starts;
    const float *x_scales, *sums;
};

// Adds what a part of the columns contributes, x being [unit][token][operand].
template <int Bits, Form How, int Units, int Tokens>
inline __attribute__((always_inline)) void add_part(const Bytes<Bits, How>& kind, const Matrix& m, const uint8_t* span,
                                                    const uint8_t* scales, const uint8_t* unit, const PartOfTile& part,
                                                    Totals* total) {
    constexpr int kMost = Units == 1 ? 6 : 3, kSteps = Units * kOperands;
    constexpr int kTogether = Tokens % kMost == 0 ? kMost : Tokens % 3 == 0 ? 3 : 2;
    Words w[kSteps][kVectors];
#pragma GCC unroll 8
    for (int s = 0; s < kSteps; s++)
#pragma GCC unroll 2
        for (int i = 0; i < kVectors; i++)
            w[s][i] = kind.bytes(unit + s / kOperands * Bytes<Bits, How>::kUnitBytes, s % kOperands, i);
    ScaleAndMinimum of[kVectors];
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; i++) of[i] = load_scales(m, span, scales, i);
#pragma GCC unroll 1
    for (int first = 0; first < Tokens; first += kTogether) {
        Ints sums[kTogether][kVectors];
#pragma GCC unroll 6
        for (int t = 0; t < kTogether; t++)
#pragma GCC unroll 2
            for (int i = 0; i < kVectors; i++) sums[t][i] = splat(part.starts[first + t]);
#pragma GCC unroll 8
        for (int s = 0; s < kSteps; s++)
#pragma GCC unroll 6
            for (int t = 0; t < kTogether; t++) {
                const Ints columns = splat(part.x[(s / kOperands * Tokens + first + t) * kOperands + s % kOperands]);
#pragma GCC unroll 2
                for (int i = 0; i < kVectors; i++)
                    sums[t][i] = (Ints)_mm512_dpbusd_epi32((__m512i)sums[t][i], (__m512i)w[s][i], (__m512i)columns);
            }
#pragma GCC unroll 6
        for (int t = 0; t < kTogether; t++)
#pragma GCC unroll 2
            for (int i = 0; i < kVectors; i++) {
                float* to = total[first + t][i];
                Floats all = load(to) + to_floats(sums[t][i]) * (of[i].scale * part.x_scales[first + t]);
                if (m.has_minima) all += of[i].minimum * part.sums[first + t];
                store(to, all);
            }
    }
}
#else
constexpr bool kHoldsWeights = false;
#endif

// One block of rows times one tile of tokens. `Units`: those of a part, 1 or 2.
template <int Bits, Form How, int Units, int Tokens>
void multiply_tile(const Matrix& m, int64_t block, const TiledBytes& tiled, int64_t tile, Totals* total) {
    using Kind = Bytes<Bits, How>;
    const Kind kind(m);
    const int64_t spans = num_spans(m), groups = span_groups(m), stride = span_bytes(m), scales_stride = scales_bytes(m);
    const int64_t codes_at = codes_offset(m), scales_at = factor_bytes(m), parts = m.group_size / (Units * kUnit);
    const int64_t first = tiled.parts_at(tile);
    const int32_t *x = tiled.operands.data() + tiled.operands_at(tile), *starts = tiled.starts.data() + first;
    const float *x_scales = tiled.scales.data() + first, *part_sums = tiled.part_sums.data() + first;
    const bool has_minima = m.has_minima;
    const uint8_t* span = span_at(m, block, 0);
    memset(total, 0, Tokens * sizeof *total);
    for (int64_t s = 0; s < spans; s++, span += stride) {
        const uint8_t *unit = span + codes_at, *scales = span + scales_at;
        for (int64_t g = 0; g < groups; g++, scales += scales_stride)
            for (int64_t p = 0; p < parts; p++, starts += Tokens, x_scales += Tokens, part_sums += Tokens) {
                if constexpr (How != Form::kExpanded) prefetch<Units * Kind::kUnitBytes>(unit + kAhead);
                if constexpr (kHoldsWeights && Tokens > 2) {
                    add_part<Bits, How, Units, Tokens>(kind, m, span, scales, unit, {x, starts, x_scales, part_sums}, total);
                    x += Units * Tokens * kOperands, unit += Units * Kind::kUnitBytes;
                    continue;
                }
                ByteSums<Tokens> sums;
                sums.start(starts);
#pragma GCC unroll 2
                for (int u = 0; u < Units; u++, x += Tokens * kOperands, unit += Kind::kUnitBytes)
                    add_unit<Bits, How, Tokens>(kind, sums, unit, x);
#pragma GCC unroll 2
                for (int i = 0; i < kVectors; i++) {
                    const ScaleAndMinimum of = load_scales(m, span, scales, i);
#pragma GCC unroll 12
                    for (int t = 0; t < Tokens; t++)
                        store(total[t][i], load(total[t][i]) + sums.value(t, i) * (of.scale * x_scales[t]));
                    if (!has_minima) continue;
#pragma GCC unroll 12
                    for (int t = 0; t < Tokens; t++)
                        store(total[t][i], load(total[t][i]) + of.minimum * part_sums[t]);
                }
                // Totals stay in memory: there are no registers left.
                asm volatile("" ::: "memory");
            }
    }
}

template <int Bits, Form How>
struct Product {
    typedef void (*Tile)(const Matrix& m, int64_t block, const TiledBytes& tiled, int64_t tile, Totals* total);

    template <int Units>
    static Tile of_size(int64_t size) {
        constexpr int most = Bytes<Bits, How>::kMostTokens;
        switch (size) {
            case 1: return multiply_tile<Bits, How, Units, 1>;
            case 2: return multiply_tile<Bits, How, Units, 2>;
            case 3: return multiply_tile<Bits, How, Units, 3>;
            case 4: return multiply_tile<Bits, How, Units, 4>;
            case 6: return multiply_tile<Bits, How, Units, most < 6 ? most : 6>;
            case 8: return multiply_tile<Bits, How, Units, most < 8 ? most : 8>;
            default: return multiply_tile<Bits, How, Units, most>;
        }
    }

    // A block of rows, and its other half if it gates, times the tokens of tiles [first, end): to `y`.
    static void multiply_block(const Matrix& m, int64_t block, const Matrix* up, int64_t up_block, const TiledBytes& tiled,
                               int64_t first, int64_t end, const Output& out, float* y) {
        const int64_t left = m.rows - block * kBlockRows, rows = left < kBlockRows ? left : kBlockRows;
        for (int64_t tile = first; tile < end; tile++) {
            const int64_t tokens = tiled.tokens_of(tile), size = size_of(tokens);
            alignas(64) Totals total[Bytes<Bits, How>::kMostTokens], other[Bytes<Bits, How>::kMostTokens];
            const Tile product = m.group_size < 32 ? of_size<1>(size) : of_size<2>(size);
            product(m, block, tiled, tile, total);
            if (up) product(*up, up_block, tiled, tile, other);
            put_tile(out, total, up ? other : nullptr, tokens, [&](int64_t) { return m.unit; }, rows,
                     y + tile * tiled.tile_tokens * out.y.token);
        }
    }
};

// Tiles of tokens from which on a block's codes of 5 and 6 bits are taken apart once for all.
constexpr int64_t kExpandedTiles = 2;

// Bytes of weights, and of x, that stay in a core's second cache while they are multiplied.
constexpr int64_t kTogetherBytes = 160 << 10;

// Blocks [first, first + count) of `m` as those of a matrix in `data`, with a byte a code.
template <int Bits>
Matrix expanded(const Matrix& m, int64_t first, int64_t count, std::vector<uint8_t>& data) {
    using Kind = Bytes<Bits, Form::kCodes>;
    Matrix out = m;
    out.bits = 8, out.rows = m.rows - first * kBlockRows;
    if (out.rows > count * kBlockRows) out.rows = count * kBlockRows;
    constexpr int64_t line = 64, to_bytes = kBlockRows * kUnit;
    data.resize(matrix_bytes(out) + line);
    out.data = data.data() + (line - (uintptr_t)data.data() % line) % line;
    const int64_t units = span_groups(m) * m.group_size / kUnit, head = codes_offset(m);
    const Kind kind(m);
    for (int64_t s = 0; s < count * num_spans(m); s++) {
        const uint8_t* from = span_at(m, first, s);
        uint8_t* to = span_at(out, 0, s);
        memcpy(to, from, head);
        from += head, to += head;
        for (int64_t u = 0; u < units; u++, from += Kind::kUnitBytes, to += to_bytes) {
            prefetch<Kind::kUnitBytes>(from + kAhead);
#pragma GCC unroll 4
            for (int r = 0; r < kOperands; r++)
#pragma GCC unroll 2
                for (int i = 0; i < kVectors; i++) {
                    const Words bytes = kind.bytes(from, r, i);
                    memcpy(to + (r * kVectors + i) * Kind::kRegisterBytes, &bytes, sizeof bytes);
                }
        }
    }
    return out;
}

template <int Bits, Form How>
void multiply_as(const Matrix* const* matrices, int64_t count, PerMatrix<const float> x, int64_t num_tokens,
                 const Output& out) {
    using Kind = Bytes<Bits, How>;
    static thread_local std::vector<TiledBytes> own;
    if ((int64_t)own.size() < count) own.resize(count);
    TiledBytes* tiled = own.data();  // in a lambda, another thread would name its own
    for (int64_t i = 0; i < count; i++)
        tile_rows(*matrices[i], x.data + i * x.matrix, x.token, num_tokens, Kind::kOrder, Kind::kMostTokens, tiled[i]);
    const int64_t all = num_blocks(*matrices[0]), blocks = out.blocks(all), columns = tiled[0].units * kUnit;
    const bool expands = (Bits == 5 || Bits == 6) && num_tokens > kExpandedTiles * Kind::kMostTokens;
    const int64_t block_bytes = columns * kBlockRows * (expands ? 8 : Bits) / 8 * (out.gates ? 2 : 1);
    const int64_t together = std::max<int64_t>(1, kTogetherBytes / block_bytes);
    const int64_t tiles = std::max<int64_t>(1, kTogetherBytes / (columns * Kind::kMostTokens));
    const int64_t num_tiles = tiled[0].num_tiles(), segments = num_segments(count * blocks, num_tiles, num_threads());
    const int64_t segment_tiles = (num_tiles + segments - 1) / segments;
    const auto body = [&](int64_t begin, int64_t end) {
        static thread_local std::vector<uint8_t> data, up_data;
        for (int64_t at = begin, next; at < end; at = next) {
            const int64_t i = at / (blocks * segments), first = at / segments % blocks, segment = at % segments;
            next = segments > 1 ? at + 1 : std::min({end, at + together, (i + 1) * blocks});
            const int64_t first_tile = segment * segment_tiles, end_tile = std::min(first_tile + segment_tiles, num_tiles);
            const Matrix& m = *matrices[i];
            float* y = out.y.data + i * out.y.matrix + first * kBlockRows;
            const auto multiply = [&](auto product, const Matrix& of, int64_t block, const Matrix& up, int64_t up_block) {
                for (int64_t tile = first_tile; tile < end_tile; tile += tiles)
                    for (int64_t b = 0; b < next - at; b++)
                        product.multiply_block(of, block + b, out.gates ? &up : nullptr, up_block + b, tiled[i], tile,
                                               std::min(tile + tiles, end_tile), out, y + b * kBlockRows);
            };
            if constexpr (Bits == 5 || Bits == 6)
                if (expands) {
                    const Matrix wide = expanded<Bits>(m, first, next - at, data);
                    const Matrix up = out.gates ? expanded<Bits>(m, blocks + first, next - at, up_data) : wide;
                    multiply(Product<Bits, Form::kExpanded>(), wide, 0, up, 0);
                    continue;
                }
            multiply(Product<Bits, How>(), m, first, m, blocks + first);
        }
    };
    parallel_ranges(count * blocks * segments, 1, body, most_blocks(*matrices[0]));
}

}  // namespace

bool multiplies_bytes(const Matrix& m) {
    if (m.operand_bits != 8 || !have_scales(m.bits) || m.bits == kFloat8) return false;
    if (m.bits == 4 && is_wide(m)) return false;
    // Without the instruction, two products of 8 bits each have to fit 16.
    return kQuads || m.bits == 5 || m.bits == 6 || (m.bits == 4 && is_linear(m));
}

void multiply_bytes(const Matrix* const* matrices, int64_t count, PerMatrix<const float> x, int64_t num_tokens,
                    const Output& out) {
    const Matrix& m = *matrices[0];
    switch (m.bits) {
        case 4:
            if (is_linear(m)) return multiply_as<4, Form::kCodes>(matrices, count, x, num_tokens, out);
            if constexpr (kQuads) return multiply_as<4, Form::kTable>(matrices, count, x, num_tokens, out);
            return;
        case 5: return multiply_as<5, Form::kCodes>(matrices, count, x, num_tokens, out);
        case 6: return multiply_as<6, Form::kCodes>(matrices, count, x, num_tokens, out);
        default:
            if constexpr (kQuads) multiply_as<8, Form::kCodes>(matrices, count, x, num_tokens, out);
    }
}

#endif

}  // namespace ingle
