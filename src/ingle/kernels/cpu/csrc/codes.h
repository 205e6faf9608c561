// Codes of a block's rows, and how this processor multiplies them: `Codes<Bits>` for 4 and 8 bits, bfloat16 and float32.
//
// Codes of 5 and 6 bits are numbers one after the other from `codebook[0]` on. On x86 they lie so, on arm64 as 8 bits.
//
// Codes are multiplied as integers. A token's numbers become integers of 16 bits under one scale, the largest being
// kLargest: an error some ten times below bfloat16's, at a higher rate. 32 products of 8-bit codes stay below 2^28. So
// what is summed up is the same on every processor.
// bfloat16 is multiplied in pairs where the processor can (AVX-512 BF16), elsewhere as float32.
//
// What all kinds have: `put` and `get`, which move 16 columns of a row, a byte (or a float) each, into and out of a unit; `Operand`, one or two of x's columns; `Sums` of a tile, [token][vector of the block's rows]; `put_operands`,
// which writes those of a unit; and `multiply`, which adds a unit's products to the sums of a tile whose operands lie
// [token][of a unit].
//
// The integers' kinds have a layout of their own for each family of processors (codes_x86.h, codes_neon.h). There a code
// stands for `codebook[code]`, or for the 8-bit number it is. What is multiplied may be that number plus an `offset`: sums
// then begin with what this adds too much.
#pragma once

#include <cmath>
#include <initializer_list>

#include "matrix.h"
#include "simd.h"

namespace ingle {

constexpr int kVectors = kBlockRows / kLanes;      // of a block's rows
constexpr int kUnitVectors = kUnit / kLanes;       // of a unit's columns
constexpr float kLargest = 127 * 256 + 127;        // NEON's products take such a number apart into two of 8 bits

// How codes become the numbers that are multiplied. A processor's kind says which of these it `reads`.
enum class Reading {
    kPlain,    // as their kind does it without more ado
    kOffset,   // the same, with an offset
    kTable,    // looked up, with an offset
    kWide,     // looked up, in numbers of more than 8 bits
};

// Whether 8 bits do not hold what codes stand for. Times kLargest and a group's columns it stays below 2^31.
inline bool is_wide(const Matrix& m) {
    for (int16_t number : m.codebook)
        if (number != (int8_t)number) return true;
    return false;
}

// Whether what is packed are those above the least of a matrix.
template <int Bits>
#if defined(__x86_64__)
constexpr bool kAreOffset = Bits == 5 || Bits == 6;
#else
constexpr bool kAreOffset = false;
#endif

// Whether codes are numbers one after the other: then no table is needed.
inline bool is_linear(const Matrix& m) {
    for (int i = 1; i < 16; i++)
        if (m.codebook[i] != m.codebook[0] + i) return false;
    return true;
}

// The scale of integers up to `most_of` for a token's numbers. NaN for numbers that are not finite, so that the product tells. Without their signs,
// floats are ordered as integers.
inline float integer_scale(const float* x, int64_t count, float most_of = kLargest) {
    Ints most = {};
    for (int64_t i = 0; i < count; i += kLanes) {
        const Ints bits = (Ints)(count - i < kLanes ? load_part(x + i, count - i) : load(x + i)) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    const int32_t largest = maximum(most), infinite = 0x7f800000;
    float value;
    memcpy(&value, &largest, 4);
    return largest < infinite ? value / most_of : NAN;
}

}  // namespace ingle

#if defined(__x86_64__)
#include "codes_x86.h"
#else
#include "codes_neon.h"
#endif

namespace ingle {

// Sums of products of floats, without scales.
template <int Tokens>
struct FloatSums {
    Floats v[Tokens][kVectors];
    void clear() {
#pragma GCC unroll 12
        for (int t = 0; t < Tokens; t++)
#pragma GCC unroll 4
            for (int i = 0; i < kVectors; i++) v[t][i] = Floats{};
    }
    // A column of the block's rows, times that of each token, `stride` apart.
    inline __attribute__((always_inline)) void add(const Floats* w, const float* x, int64_t stride) {
#pragma GCC unroll 12
        for (int t = 0; t < Tokens; t++) {
            const Floats column = splat(x[t * stride]);
#pragma GCC unroll 4
            for (int i = 0; i < kVectors; i++) v[t][i] += w[i] * column;
        }
    }
    Floats value(int t, int i) const { return v[t][i]; }
};

// Lane i holds a column of row i.
template <>
struct Codes<32> {
    static constexpr char kFactors[] = "float32";
    static constexpr int kMostTokens = kRegisters * 3 / 4 / kVectors;
    typedef float Operand;
    static constexpr int64_t kColumnsPerOperand = 1;
    template <int Tokens>
    using Sums = FloatSums<Tokens>;
    static void put_operands(const float* x, Operand* out) { memcpy(out, x, kUnit * sizeof(float)); }
    static void put(uint8_t* unit, int64_t row, const uint8_t* codes) {
        for (int64_t c = 0; c < kUnit; c++) memcpy(unit + (c * kBlockRows + row) * 4, codes + c * 4, 4);
    }
    static void get(const uint8_t* unit, int64_t row, float* out) {
        for (int64_t c = 0; c < kUnit; c++) out[c] = ((const float*)unit)[c * kBlockRows + row];
    }
    template <int Tokens>
    static inline __attribute__((always_inline)) void multiply(Sums<Tokens>& sums, const uint8_t* codes, const Operand* x) {
#pragma GCC unroll 16
        for (int c = 0; c < kUnit; c++) {
            Floats w[kVectors];
#pragma GCC unroll 4
            for (int i = 0; i < kVectors; i++) w[i] = load((const float*)codes + c * kBlockRows + i * kLanes);
            sums.add(w, x + c, kUnit);
        }
    }
};

// What FP8's bits stand for (E4M3): a float's bits that are too small by 2 ** 120, and one NaN.
inline float from_float8(uint8_t code) {
    const uint32_t bits = (code & 0x80u) << 24 | (code & 0x7fu) << 20;
    float value;
    memcpy(&value, &bits, 4);
    return (code & 0x7f) == 0x7f ? NAN : value * 0x1p120f;
}

#if defined(INGLE_AVX512) && defined(__AVX512BF16__)

// Lane i holds two columns of row i.
template <>
struct Codes<16> {
    static constexpr char kFactors[] = "bfloat16";
    static constexpr int kMostTokens = 12;
    typedef uint32_t Operand;
    static constexpr int64_t kColumnsPerOperand = 2;
    template <int Tokens>
    struct Sums {
        __m512 v[Tokens][kVectors];
        void clear() {
#pragma GCC unroll 12
            for (int t = 0; t < Tokens; t++)
                for (int i = 0; i < kVectors; i++) v[t][i] = _mm512_setzero_ps();
        }
        Floats value(int t, int i) const { return (Floats)v[t][i]; }
    };
    static void put_operands(const float* x, Operand* out) { store((Brain*)out, load(x)); }
    static void put(uint8_t* unit, int64_t row, const uint8_t* codes) {
        for (int64_t c = 0; c < kUnit; c += 2) memcpy(unit + c * kBlockRows * 2 + row * 4, codes + c * 2, 4);
    }
    static void get(const uint8_t* unit, int64_t row, float* out) {
        const Brain* stored = (const Brain*)unit;
        for (int64_t c = 0; c < kUnit; c++) out[c] = to_float(stored[c / 2 * 2 * kBlockRows + row * 2 + c % 2]);
    }
    template <int Tokens>
    static inline __attribute__((always_inline)) void multiply(Sums<Tokens>& sums, const uint8_t* codes, const Operand* x) {
#pragma GCC unroll 8
        for (int pair = 0; pair < kUnit / 2; pair++) {
            __m512bh w0 = (__m512bh)_mm512_loadu_si512(codes + pair * 128);
            __m512bh w1 = (__m512bh)_mm512_loadu_si512(codes + pair * 128 + 64);
#pragma GCC unroll 12
            for (int t = 0; t < Tokens; t++) {
                __m512bh both = (__m512bh)_mm512_set1_epi32(x[t * kUnit / 2 + pair]);
                sums.v[t][0] = _mm512_dpbf16_ps(sums.v[t][0], w0, both);
                sums.v[t][1] = _mm512_dpbf16_ps(sums.v[t][1], w1, both);
            }
        }
    }
};

// A unit has pairs of columns: of each the block's rows, two bytes a row. bfloat16 has all numbers of 8 bits: those with an
// exponent get another bias, the eight without one are looked up.
template <>
struct Codes<kFloat8> {
    static constexpr char kFactors[] = "bfloat16";
    static constexpr int kMostTokens = 12;
    typedef uint32_t Operand;
    static constexpr int64_t kColumnsPerOperand = 2;
    template <int Tokens>
    using Sums = Codes<16>::Sums<Tokens>;
    static void put_operands(const float* x, Operand* out) { store((Brain*)out, load(x)); }
    static constexpr float kScale = 1;  // of sums
    static void put(uint8_t* unit, int64_t row, const uint8_t* codes) {
        for (int64_t c = 0; c < kUnit; c++) unit[(c / 2 * kBlockRows + row) * 2 + c % 2] = codes[c];
    }
    static void get(const uint8_t* unit, int64_t row, float* out) {
        for (int64_t c = 0; c < kUnit; c++) out[c] = from_float8(unit[(c / 2 * kBlockRows + row) * 2 + c % 2]);
    }
    static inline __m512bh unpack(const uint8_t* p) {  // kLeast are 0 to 7 times 2 ** -9
        alignas(64) static constexpr uint16_t kLeast[32] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
        const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
        const __m512i magnitude = _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x7f)), 4);
        const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x80)), 8);
        const __mmask32 tiny = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(0x80));
        const __m512i usual = _mm512_add_epi16(magnitude, _mm512_set1_epi16(120 << 7));
        return (__m512bh)_mm512_or_si512(_mm512_mask_permutexvar_epi16(usual, tiny, code, _mm512_load_si512(kLeast)), sign);
    }
    template <int Tokens>
    static inline __attribute__((always_inline)) void multiply(Sums<Tokens>& sums, const uint8_t* codes, const Operand* x) {
#pragma GCC unroll 8
        for (int pair = 0; pair < kUnit / 2; pair++) {
            const __m512bh w0 = unpack(codes + pair * 64), w1 = unpack(codes + pair * 64 + 32);
#pragma GCC unroll 12
            for (int t = 0; t < Tokens; t++) {
                __m512bh both = (__m512bh)_mm512_set1_epi32(x[t * kUnit / 2 + pair]);
                sums.v[t][0] = _mm512_dpbf16_ps(sums.v[t][0], w0, both);
                sums.v[t][1] = _mm512_dpbf16_ps(sums.v[t][1], w1, both);
            }
        }
    }
};

#else

// Lane i holds two columns of row i, the first in its lower half: either becomes a float by one instruction.
template <>
struct Codes<16> {
    static constexpr char kFactors[] = "float32";
    static constexpr int kMostTokens = kRegisters * 3 / 4 / kVectors;
    typedef float Operand;
    static constexpr int64_t kColumnsPerOperand = 1;
    template <int Tokens>
    using Sums = FloatSums<Tokens>;
    static void put_operands(const float* x, Operand* out) { memcpy(out, x, kUnit * sizeof(float)); }
    static void put(uint8_t* unit, int64_t row, const uint8_t* codes) {
        for (int64_t c = 0; c < kUnit; c += 2) memcpy(unit + c * kBlockRows * 2 + row * 4, codes + c * 2, 4);
    }
    static void get(const uint8_t* unit, int64_t row, float* out) {
        const Brain* stored = (const Brain*)unit;
        for (int64_t c = 0; c < kUnit; c++) out[c] = to_float(stored[c / 2 * 2 * kBlockRows + row * 2 + c % 2]);
    }
    template <int Tokens>
    static inline __attribute__((always_inline)) void multiply(Sums<Tokens>& sums, const uint8_t* codes, const Operand* x) {
#pragma GCC unroll 8
        for (int pair = 0; pair < kUnit / 2; pair++) {
            Words stored[kVectors];
#pragma GCC unroll 4
            for (int i = 0; i < kVectors; i++) stored[i] = (Words)load((const int32_t*)codes + pair * kBlockRows + i * kLanes);
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++) {
                Floats w[kVectors];
#pragma GCC unroll 4
                for (int i = 0; i < kVectors; i++) w[i] = (Floats)(odd ? stored[i] & 0xffff0000u : stored[i] << 16);
                sums.add(w, x + 2 * pair + odd, kUnit);
            }
        }
    }
};

// Lane i holds a column of row i, a byte. Its bits, moved to where a float has them, are those of a number that is too
// small by 2 ** 120: x and sums make up for half of that each, so that no product is too small to be exact.
template <>
struct Codes<kFloat8> {
    static constexpr char kFactors[] = "float32";
    static constexpr int kMostTokens = kRegisters * 3 / 4 / kVectors;
    typedef float Operand;
    static constexpr int64_t kColumnsPerOperand = 1;
    template <int Tokens>
    using Sums = FloatSums<Tokens>;
    static constexpr float kScale = 0x1p60f;  // of sums
    static void put_operands(const float* x, Operand* out) {
        for (int64_t c = 0; c < kUnit; c++) out[c] = x[c] * 0x1p60f;
    }
    static void put(uint8_t* unit, int64_t row, const uint8_t* codes) {
        for (int64_t c = 0; c < kUnit; c++) unit[c * kBlockRows + row] = codes[c];
    }
    static void get(const uint8_t* unit, int64_t row, float* out) {
        for (int64_t c = 0; c < kUnit; c++) out[c] = from_float8(unit[c * kBlockRows + row]);
    }
    template <int Tokens>
    static inline __attribute__((always_inline)) void multiply(Sums<Tokens>& sums, const uint8_t* codes, const Operand* x) {
#pragma GCC unroll 16
        for (int c = 0; c < kUnit; c++) {
            Floats w[kVectors];
#pragma GCC unroll 4
            for (int i = 0; i < kVectors; i++) {
                const Ints stored = load((const int8_t*)codes + c * kBlockRows + i * kLanes);
                w[i] = (Floats)(stored << 20 & (int32_t)0x87f00000);
            }
            sums.add(w, x + c, kUnit);
        }
    }
};

#endif

}  // namespace ingle
