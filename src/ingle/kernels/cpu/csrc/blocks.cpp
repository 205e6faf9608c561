// GGUF's blocks to packed rows. The layouts are those of ggml-common.h (`block_q4_0` and so on), the numbers the enum
// ggml_type's. In Python and for any device the same is `ingle.weights.codes`, against which this is tested.
#include <vector>

#include "operators.h"
#include "pool.h"
#include "simd.h"

namespace ingle {
namespace {

// What a block holds: codes (or signed values, as their bytes), and scales and minima of its groups.
struct Contents {
    uint8_t* codes;
    float* scales;
    float* minima;
};

// Stored bytes of a block, the numbers in it, its groups, and how it is taken apart.
struct BlockType {
    int64_t bytes, elements, groups;
    void (*split)(const uint8_t* block, const Contents& out);
};

float half_at(const uint8_t* p) {
    Half value;
    memcpy(&value, p, 2);
    return to_float(value);
}

// Values of `bits` bits out of n bytes, shifted left and added to out. Each run of `width` bytes gives its lowest bits
// as a run of `width` values, then the next bits as the next run.
void add_fields(const uint8_t* packed, int64_t n, int bits, int64_t width, int left, uint8_t* out) {
    const int mask = (1 << bits) - 1;
    for (int64_t run = 0; run < n; run += width)
        for (int shift = 0; shift < 8; shift += bits, out += width)
            for (int64_t i = 0; i < width; i++) out[i] |= (packed[run + i] >> shift & mask) << left;
}

void fields(const uint8_t* packed, int64_t n, int bits, int64_t width, uint8_t* out) {
    memset(out, 0, n * 8 / bits);
    add_fields(packed, n, bits, width, 0, out);
}

void subtract(uint8_t* values, int64_t n, int amount) {
    for (int64_t i = 0; i < n; i++) values[i] -= amount;
}

void q4_0(const uint8_t* b, const Contents& out) {  // and IQ4_NL
    fields(b + 2, 16, 4, 16, out.codes);
    out.scales[0] = half_at(b);
}

void q4_1(const uint8_t* b, const Contents& out) {
    fields(b + 4, 16, 4, 16, out.codes);
    out.scales[0] = half_at(b), out.minima[0] = half_at(b + 2);
}

void q5_0(const uint8_t* b, const Contents& out) {
    fields(b + 6, 16, 4, 16, out.codes);
    add_fields(b + 2, 4, 1, 1, 4, out.codes);
    subtract(out.codes, 32, 16);
    out.scales[0] = half_at(b);
}

void q5_1(const uint8_t* b, const Contents& out) {
    fields(b + 8, 16, 4, 16, out.codes);
    add_fields(b + 4, 4, 1, 1, 4, out.codes);
    out.scales[0] = half_at(b), out.minima[0] = half_at(b + 2);
}

void q8_0(const uint8_t* b, const Contents& out) {
    memcpy(out.codes, b + 2, 32);
    out.scales[0] = half_at(b);
}

void q2_k(const uint8_t* b, const Contents& out) {
    fields(b + 16, 64, 2, 32, out.codes);
    const float scale = half_at(b + 80), minimum = half_at(b + 82);
    for (int g = 0; g < 16; g++) out.scales[g] = (b[g] & 15) * scale, out.minima[g] = -((b[g] >> 4) * minimum);
}

void q3_k(const uint8_t* b, const Contents& out) {
    fields(b + 32, 64, 2, 32, out.codes);
    add_fields(b, 32, 1, 32, 2, out.codes);
    uint8_t scales[16];
    fields(b + 96, 8, 4, 8, scales);
    add_fields(b + 104, 4, 2, 4, 4, scales);
    const float scale = half_at(b + 108);
    for (int g = 0; g < 16; g++) out.scales[g] = (scales[g] - 32) * scale;
}

// 6 bits each, in the bytes 4 to 16 of a block.
void six_bit_scales(const uint8_t* b, const Contents& out) {
    const float scale = half_at(b), minimum = half_at(b + 2);
    for (int g = 0; g < 4; g++) {
        const int first = b[4 + g], second = b[8 + g], rest = b[12 + g];
        out.scales[g] = (first & 63) * scale, out.scales[4 + g] = ((rest & 15) | first >> 6 << 4) * scale;
        out.minima[g] = -((second & 63) * minimum), out.minima[4 + g] = -((rest >> 4 | second >> 6 << 4) * minimum);
    }
}

void q4_k(const uint8_t* b, const Contents& out) {
    fields(b + 16, 128, 4, 32, out.codes);
    six_bit_scales(b, out);
}

void q5_k(const uint8_t* b, const Contents& out) {
    fields(b + 48, 128, 4, 32, out.codes);
    add_fields(b + 16, 32, 1, 32, 4, out.codes);
    six_bit_scales(b, out);
}

void q6_k(const uint8_t* b, const Contents& out) {
    fields(b, 128, 4, 64, out.codes);
    add_fields(b + 128, 64, 2, 32, 4, out.codes);
    subtract(out.codes, 256, 32);
    const float scale = half_at(b + 208);
    for (int g = 0; g < 16; g++) out.scales[g] = (int8_t)b[192 + g] * scale;
}

void iq4_xs(const uint8_t* b, const Contents& out) {
    fields(b + 8, 128, 4, 16, out.codes);
    uint8_t scales[8];
    fields(b + 4, 4, 4, 1, scales);
    add_fields(b + 2, 2, 2, 1, 4, scales);
    const float scale = half_at(b);
    for (int g = 0; g < 8; g++) out.scales[g] = (scales[g] - 32) * scale;
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
    fields(b, 64, 2, 32, out.codes);
    for (int g = 0; g < 8; g++) out.scales[g] = half_at(b + 64);
}

// OCP Microscaling: FP4 E2M1 under a power of two. The codebook holds doubled values, so the scale is halved.
void mxfp4(const uint8_t* b, const Contents& out) {
    fields(b + 1, 16, 4, 16, out.codes);
    const uint32_t exponent = b[0], bits = exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23;
    memcpy(out.scales, &bits, 4);
}

void put_brain(float value, const Contents& out) {
    const Brain rounded = to_brain(value);
    memcpy(out.codes, &rounded, 2);
}

void f32(const uint8_t* b, const Contents& out) {
    float value;
    memcpy(&value, b, 4);
    put_brain(value, out);
}

void f16(const uint8_t* b, const Contents& out) { put_brain(half_at(b), out); }

void bf16(const uint8_t* b, const Contents& out) { memcpy(out.codes, b, 2); }

BlockType block_type(int32_t number) {
    switch (number) {
        case 0: return {4, 1, 0, f32};
        case 1: return {2, 1, 0, f16};
        case 2: return {18, 32, 1, q4_0};
        case 3: return {20, 32, 1, q4_1};
        case 6: return {22, 32, 1, q5_0};
        case 7: return {24, 32, 1, q5_1};
        case 8: return {34, 32, 1, q8_0};
        case 10: return {84, 256, 16, q2_k};
        case 11: return {110, 256, 16, q3_k};
        case 12: return {144, 256, 8, q4_k};
        case 13: return {176, 256, 8, q5_k};
        case 14: return {210, 256, 16, q6_k};
        case 20: return {18, 32, 1, q4_0};
        case 23: return {136, 256, 8, iq4_xs};
        case 30: return {2, 1, 0, bf16};
        case 34: return {54, 256, 8, tq1_0};
        case 35: return {66, 256, 8, tq2_0};
        case 39: return {17, 32, 1, mxfp4};
        default: return {};
    }
}

}  // namespace
}  // namespace ingle

using namespace ingle;

extern "C" int32_t ingle_pack_blocks(const Matrix* m, int32_t type, const uint8_t* stored, const int64_t* order,
                                     int64_t first, int64_t count) {
    const BlockType block = block_type(type);
    if (!block.split) return 0;
    const int64_t blocks = m->columns / block.elements, groups = blocks * block.groups;
    const int64_t code_bytes = m->bits == 16 ? 2 : 1;
    const int64_t first_block = first / kBlockRows, last_block = (first + count - 1) / kBlockRows;
    // A block of packed rows belongs to one thread: its lines are written row by row.
    parallel_ranges(last_block - first_block + 1, 1, [&](int64_t begin, int64_t end) {
        std::vector<uint8_t> codes(m->columns * code_bytes);
        std::vector<float> scales(groups), minima(groups);
        int64_t from = (first_block + begin) * kBlockRows, to = (first_block + end) * kBlockRows;
        if (from < first) from = first;
        if (to > first + count) to = first + count;
        for (int64_t row = from; row < to; row++) {
            const int64_t at = order ? order[row - first] : row - first;
            const uint8_t* bytes = stored + at * blocks * block.bytes;
            for (int64_t b = 0; b < blocks; b++, bytes += block.bytes)
                block.split(bytes, {codes.data() + b * block.elements * code_bytes, scales.data() + b * block.groups,
                                    minima.data() + b * block.groups});
            pack_rows(*m, codes.data(), scales.data(), minima.data(), row, 1);
        }
    });
    return 1;
}
