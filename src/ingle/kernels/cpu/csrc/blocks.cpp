// GGUF's blocks to packed rows, and plain numbers too. The layouts are those of ggml-common.h (`block_q4_0` and so on),
// the numbers of types the enum ggml_type's. In Python and for any device the same is `ingle.weights.codes`, against
// which this is tested.
#include <vector>

#include "operators.h"
#include "pool.h"
#include "simd.h"

namespace ingle {
namespace {

// What a block holds: codes (or signed values, as their bytes), and scales and minima of its groups, or their steps and, of
// both, what those are multiplied with.
struct Contents {
    uint8_t* codes;
    float* scales;
    float* minima;
    float* factors;
    const uint16_t* grid;  // of types that have one, as `ingle.weights.grids` packs it
};

// Stored bytes of a block, the numbers in it, its groups, the bits of its codes, whether its scales are steps, and how it
// is taken apart.
struct BlockType {
    int64_t bytes, elements, groups, bits;
    bool steps;
    void (*split)(const uint8_t* block, const Contents& out);
};

// One binary16, which the conversion of sixteen would wait for: exponent and fraction become those of a float that is
// too small by 2 ** 112, and infinity and NaN what they are.
float half_at(const uint8_t* p) {
    uint16_t half;
    memcpy(&half, p, 2);
    const uint32_t magnitude = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
    float value;
    memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits = (magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000u : bits) | sign;
    memcpy(&value, &bits, 4);
    return value;
}

// Values of Bits bits out of N bytes. Each run of Width bytes gives its lowest bits as a run of Width values, then the
// next bits as the next run.
template <int N, int Bits, int Width>
inline void fields(const uint8_t* packed, uint8_t* out) {
    constexpr int kTogether = Width < 16 ? Width : 16;  // as many as fit a vector of 16; compilers do not find that
    typedef uint8_t Bytes __attribute__((vector_size(kTogether)));
    for (int run = 0; run < N; run += Width)
        for (int shift = 0; shift < 8; shift += Bits, out += Width)
            for (int i = 0; i < Width; i += kTogether) {
                Bytes values;
                memcpy(&values, packed + run + i, kTogether);
                values = values >> (uint8_t)shift & (uint8_t)((1 << Bits) - 1);
                memcpy(out + i, &values, kTogether);
            }
}

// The same as the upper bits, from bit Left on, of values that are there.
template <int N, int Bits, int Width, int Left>
inline void add_fields(const uint8_t* packed, uint8_t* out) {
    uint8_t upper[N * 8 / Bits];
    fields<N, Bits, Width>(packed, upper);
    for (int i = 0; i < N * 8 / Bits; i++) out[i] |= upper[i] << Left;
}

void subtract(uint8_t* values, int64_t n, int amount) {
    for (int64_t i = 0; i < n; i++) values[i] -= amount;
}

void q4_0(const uint8_t* b, const Contents& out) {  // and IQ4_NL
    fields<16, 4, 16>(b + 2, out.codes);
    out.scales[0] = half_at(b);
}

void q4_1(const uint8_t* b, const Contents& out) {
    fields<16, 4, 16>(b + 4, out.codes);
    out.scales[0] = half_at(b), out.minima[0] = half_at(b + 2);
}

void q5_0(const uint8_t* b, const Contents& out) {
    fields<16, 4, 16>(b + 6, out.codes);
    add_fields<4, 1, 1, 4>(b + 2, out.codes);
    subtract(out.codes, 32, 16);
    out.scales[0] = half_at(b);
}

void q5_1(const uint8_t* b, const Contents& out) {
    fields<16, 4, 16>(b + 8, out.codes);
    add_fields<4, 1, 1, 4>(b + 4, out.codes);
    out.scales[0] = half_at(b), out.minima[0] = half_at(b + 2);
}

void q8_0(const uint8_t* b, const Contents& out) {
    memcpy(out.codes, b + 2, 32);
    out.scales[0] = half_at(b);
}

void q2_k(const uint8_t* b, const Contents& out) {
    fields<64, 2, 32>(b + 16, out.codes);
    out.factors[0] = half_at(b + 80), out.factors[1] = -half_at(b + 82);
    for (int g = 0; g < 16; g++) out.scales[g] = b[g] & 15, out.minima[g] = b[g] >> 4;
}

void q3_k(const uint8_t* b, const Contents& out) {
    fields<64, 2, 32>(b + 32, out.codes);
    add_fields<32, 1, 32, 2>(b, out.codes);
    uint8_t scales[16];
    fields<8, 4, 8>(b + 96, scales);
    add_fields<4, 2, 4, 4>(b + 104, scales);
    out.factors[0] = half_at(b + 108);
    for (int g = 0; g < 16; g++) out.scales[g] = scales[g] - 32;
}

// 6 bits each, in the bytes 4 to 16 of a block.
void six_bit_scales(const uint8_t* b, const Contents& out) {
    out.factors[0] = half_at(b), out.factors[1] = -half_at(b + 2);
    for (int g = 0; g < 4; g++) {
        const int first = b[4 + g], second = b[8 + g], rest = b[12 + g];
        out.scales[g] = first & 63, out.scales[4 + g] = (rest & 15) | first >> 6 << 4;
        out.minima[g] = second & 63, out.minima[4 + g] = rest >> 4 | second >> 6 << 4;
    }
}

void q4_k(const uint8_t* b, const Contents& out) {
    fields<128, 4, 32>(b + 16, out.codes);
    six_bit_scales(b, out);
}

void q5_k(const uint8_t* b, const Contents& out) {
    fields<128, 4, 32>(b + 48, out.codes);
    add_fields<32, 1, 32, 4>(b + 16, out.codes);
    six_bit_scales(b, out);
}

void q6_k(const uint8_t* b, const Contents& out) {
    fields<128, 4, 64>(b, out.codes);
    add_fields<64, 2, 32, 4>(b + 128, out.codes);
    subtract(out.codes, 256, 32);
    out.factors[0] = half_at(b + 208);
    for (int g = 0; g < 16; g++) out.scales[g] = (int8_t)b[192 + g];
}

void iq4_xs(const uint8_t* b, const Contents& out) {
    fields<128, 4, 16>(b + 8, out.codes);
    uint8_t scales[8];
    fields<4, 4, 1>(b + 4, scales);
    add_fields<2, 2, 1, 4>(b + 2, scales);
    out.factors[0] = half_at(b);
    for (int g = 0; g < 8; g++) out.scales[g] = scales[g] - 32;
}

// Five ternary digits to a byte, as a fraction of 256: the n-th is the carry of `byte * 3**n mod 256` times 3.
void tq1_0(const uint8_t* b, const Contents& out) {
    uint8_t* to = out.codes;
    struct { int at, width, digits; } runs[] = {{0, 32, 5}, {32, 16, 5}, {48, 4, 4}};
    for (auto run : runs) {
        uint8_t power = 1;
        for (int digit = 0; digit < run.digits; digit++, power *= 3)
            for (int i = 0; i < run.width; i++) *to++ = (uint8_t)(b[run.at + i] * power) * 3 >> 8;
    }
    for (int g = 0; g < 8; g++) out.scales[g] = half_at(b + 52);
}

void tq2_0(const uint8_t* b, const Contents& out) {
    fields<64, 2, 32>(b, out.codes);
    for (int g = 0; g < 8; g++) out.scales[g] = half_at(b + 64);
}

// OCP Microscaling: FP4 E2M1 under a power of two. The codebook holds doubled values, so the scale is halved.
void mxfp4(const uint8_t* b, const Contents& out) {
    fields<16, 4, 16>(b + 1, out.codes);
    const uint32_t exponent = b[0], bits = exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23;
    memcpy(out.scales, &bits, 4);
}

// Eight codes of 3 bits: an entry of the grid, and their signs.
inline void grid_codes(uint16_t entry, uint32_t signs, uint8_t* to) {
    for (int i = 0; i < 8; i++) to[i] = (entry >> 2 * i & 3) | (signs >> i & 1) << 2;
}

// Four codes of 4 bits, whose signs are in the lower half of `signs`.
inline void grid_codes_of_4(uint16_t entry, uint32_t signs, uint8_t* to) {
    for (int i = 0; i < 4; i++) to[i] = (entry >> 3 * i & 7) | (signs >> i & 1) << 3;
}

// Seven signs and an eighth, so that their number is even.
inline uint32_t eight_signs(uint32_t seven) { return seven | (uint32_t)__builtin_parity(seven) << 7; }

inline uint32_t half_bits(const uint8_t* p) { return p[0] | p[1] << 8; }

inline uint32_t word_bits(const uint8_t* p) { return half_bits(p) | half_bits(p + 2) << 16; }

// Of 32 numbers 4 indices of the grid, and a word: 4 sets of signs of 7 bits, and the scale.
void iq2_xxs(const uint8_t* b, const Contents& out) {
    out.factors[0] = half_at(b);
    for (int g = 0; g < 8; g++) {
        const uint8_t* at = b + 2 + 8 * g;
        const uint32_t word = word_bits(at + 4);
        out.scales[g] = 2 * (int)(word >> 28) + 1;
        for (int i = 0; i < 4; i++)
            grid_codes(out.grid[at[i]], eight_signs(word >> 7 * i & 127), out.codes + 32 * g + 8 * i);
    }
}

// A scale of 4 bits for 16 numbers.
void nibble_steps(const uint8_t* packed, int bytes, float* scales) {
    for (int i = 0; i < bytes; i++) scales[2 * i] = 2 * (packed[i] & 15) + 1, scales[2 * i + 1] = 2 * (packed[i] >> 4) + 1;
}

void iq2_xs(const uint8_t* b, const Contents& out) {
    out.factors[0] = half_at(b);
    nibble_steps(b + 66, 8, out.scales);
    for (int i = 0; i < 32; i++) {
        const uint32_t both = half_bits(b + 2 + 2 * i);
        grid_codes(out.grid[both & 511], eight_signs(both >> 9), out.codes + 8 * i);
    }
}

void iq2_s(const uint8_t* b, const Contents& out) {
    out.factors[0] = half_at(b);
    nibble_steps(b + 74, 8, out.scales);
    for (int i = 0; i < 32; i++) {
        const uint32_t index = b[2 + i] | (b[66 + i / 4] >> i % 4 * 2 & 3) << 8;
        grid_codes(out.grid[index], b[34 + i], out.codes + 8 * i);
    }
}

void iq3_xxs(const uint8_t* b, const Contents& out) {
    out.factors[0] = half_at(b);
    for (int g = 0; g < 8; g++) {
        const uint32_t word = word_bits(b + 66 + 4 * g);
        out.scales[g] = 2 * (int)(word >> 28) + 1;
        for (int i = 0; i < 8; i++) {
            const uint32_t signs = eight_signs(word >> i / 2 * 7 & 127) >> i % 2 * 4;
            grid_codes_of_4(out.grid[b[2 + 8 * g + i]], signs, out.codes + 32 * g + 4 * i);
        }
    }
}

void iq3_s(const uint8_t* b, const Contents& out) {
    out.factors[0] = half_at(b);
    nibble_steps(b + 106, 4, out.scales);
    for (int i = 0; i < 64; i++) {
        const uint32_t index = b[2 + i] | (b[66 + i / 8] >> i % 8 & 1) << 8;
        grid_codes_of_4(out.grid[index], b[74 + i / 2] >> i % 2 * 4, out.codes + 4 * i);
    }
}

// Of 32 numbers a half: 3 upper bits of 4 indices, the scale, and whether an eighth is taken off or added, which the
// codes' highest bit tells.
void iq1_s(const uint8_t* b, const Contents& out) {
    out.factors[0] = half_at(b);
    for (int g = 0; g < 8; g++) {
        const uint32_t half = half_bits(b + 34 + 2 * g);
        out.scales[g] = 2 * (int)(half >> 12 & 7) + 1;
        for (int i = 0; i < 4; i++) {
            const uint32_t index = b[2 + 4 * g + i] | (half >> 3 * i & 7) << 8;
            grid_codes(out.grid[index], half >> 15 ? 255 : 0, out.codes + 32 * g + 8 * i);
        }
    }
}

// The block's scale is in the upper bits of four halves, whose lower ones have steps, each of 16 numbers.
void iq1_m(const uint8_t* b, const Contents& out) {
    uint32_t scale = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t half = half_bits(b + 48 + 2 * i);
        scale |= half >> 12 << 4 * i;
        for (int g = 0; g < 4; g++) out.scales[4 * i + g] = 2 * (int)(half >> 3 * g & 7) + 1;
    }
    const uint8_t bytes[2] = {(uint8_t)scale, (uint8_t)(scale >> 8)};
    out.factors[0] = half_at(bytes);
    for (int i = 0; i < 32; i++) {
        const uint32_t upper = b[32 + i / 2] >> i % 2 * 4;
        grid_codes(out.grid[b[i] | (upper & 7) << 8], upper & 8 ? 255 : 0, out.codes + 8 * i);
    }
}

BlockType block_type(int32_t number) {
    switch (number) {
        case 2: return {18, 32, 1, 4, false, q4_0};
        case 3: return {20, 32, 1, 4, false, q4_1};
        case 6: return {22, 32, 1, 8, false, q5_0};
        case 7: return {24, 32, 1, 8, false, q5_1};
        case 8: return {34, 32, 1, 8, false, q8_0};
        case 10: return {84, 256, 16, 4, true, q2_k};
        case 11: return {110, 256, 16, 4, true, q3_k};
        case 12: return {144, 256, 8, 4, true, q4_k};
        case 13: return {176, 256, 8, 8, true, q5_k};
        case 14: return {210, 256, 16, 8, true, q6_k};
        case 16: return {66, 256, 8, 4, true, iq2_xxs};
        case 17: return {74, 256, 16, 4, true, iq2_xs};
        case 18: return {98, 256, 8, 4, true, iq3_xxs};
        case 19: return {50, 256, 8, 4, true, iq1_s};
        case 20: return {18, 32, 1, 4, false, q4_0};
        case 21: return {110, 256, 8, 4, true, iq3_s};
        case 22: return {82, 256, 16, 4, true, iq2_s};
        case 23: return {136, 256, 8, 4, true, iq4_xs};
        case 29: return {56, 256, 16, 4, true, iq1_m};
        case 34: return {54, 256, 8, 4, false, tq1_0};
        case 35: return {66, 256, 8, 4, false, tq2_0};
        case 39: return {17, 32, 1, 4, false, mxfp4};
        default: return {};
    }
}

// Stored bytes of a number of a float type; 0 for a type that is none.
int64_t size_of_float(int32_t type) { return type == 0 ? 4 : type == 1 || type == 30 ? 2 : 0; }

template <typename T>
void widen(const T* from, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, load(from + i));
    if (i < count) store_part(out + i, load_part(from + i, count - i), count - i);
}

// A stored row of blocks, packed as row `row`.
void pack_block_row(const Matrix& m, const BlockType& block, const uint8_t* stored, const uint16_t* grid, int64_t row) {
    const int64_t blocks = m.columns / block.elements, groups = blocks * block.groups;
    static thread_local std::vector<uint8_t> codes;
    static thread_local std::vector<float> scales, minima, factors, decoded;
    codes.resize(m.columns), scales.resize(groups), minima.assign(groups, 0.0f), decoded.resize(m.columns);
    factors.assign(blocks * 2, 1.0f);
    for (int64_t b = 0; b < blocks; b++)
        block.split(stored + b * block.bytes, {&codes[b * block.elements], &scales[b * block.groups],
                                               &minima[b * block.groups], &factors[b * 2], grid});
    if (m.bits != 32) return pack_rows(m, codes.data(), scales.data(), minima.data(), factors.data(), row, 1);
    const int64_t size = block.elements / block.groups;
    for (int64_t g = 0; g < groups; g++) {
        const float* factor = &factors[g / block.groups * 2];
        const float scale = scales[g] * factor[0] * m.unit, minimum = minima[g] * factor[1] * m.unit;
        for (int64_t c = g * size; c < (g + 1) * size; c++)
            decoded[c] = (block.bits == 4 ? m.codebook[codes[c]] : (int8_t)codes[c]) * scale + minimum;
    }
    pack_rows(m, decoded.data(), nullptr, nullptr, nullptr, row, 1);
}

// The same of a row of floats.
void pack_float_row(const Matrix& m, int32_t type, const uint8_t* stored, int64_t row) {
    static thread_local std::vector<float> values;
    static thread_local std::vector<Brain> rounded;
    values.resize(m.columns), rounded.resize(m.columns);
    if (type == 0) memcpy(values.data(), stored, m.columns * sizeof(float));
    else if (type == 1) widen((const Half*)stored, m.columns, values.data());
    else widen((const Brain*)stored, m.columns, values.data());
    if (m.bits == 32) return pack_rows(m, values.data(), nullptr, nullptr, nullptr, row, 1);
    for (int64_t c = 0; c < m.columns; c++) rounded[c] = to_brain(values[c]);
    pack_rows(m, rounded.data(), nullptr, nullptr, nullptr, row, 1);
}

}  // namespace
}  // namespace ingle

using namespace ingle;

extern "C" int32_t ingle_pack_blocks(const Matrix* m, int32_t type, const uint8_t* stored, const uint16_t* grid,
                                     const int64_t* order, int64_t first, int64_t count) {
    const BlockType block = block_type(type);
    const int64_t float_bytes = size_of_float(type);
    if (!block.split && !float_bytes) return 0;
    const int64_t row_bytes = block.split ? m->columns / block.elements * block.bytes : m->columns * float_bytes;
    const int64_t first_block = first / kBlockRows, last_block = (first + count - 1) / kBlockRows;
    // A block of packed rows belongs to one thread: its lines are written row by row.
    parallel_ranges(last_block - first_block + 1, 1, [&](int64_t begin, int64_t end) {
        int64_t from = (first_block + begin) * kBlockRows, to = (first_block + end) * kBlockRows;
        if (from < first) from = first;
        if (to > first + count) to = first + count;
        for (int64_t row = from; row < to; row++) {
            const uint8_t* bytes = stored + (order ? order[row - first] : row - first) * row_bytes;
            block.split ? pack_block_row(*m, block, bytes, grid, row) : pack_float_row(*m, type, bytes, row);
        }
    });
    return 1;
}
