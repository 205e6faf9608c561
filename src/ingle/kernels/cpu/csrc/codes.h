// Codes of 32 rows, and how this processor multiplies them.
//
// With AVX-512 VNNI an instruction multiplies pairs of neighbouring columns, as 16-bit integers, and adds both products
// to a 32-bit sum. A token's numbers become such integers under one scale, its largest being 32767: an error some ten
// times below bfloat16's, at a higher rate. 32 products of 8-bit codes stay below 2^28. Weights in bfloat16 are
// multiplied in pairs by AVX-512 BF16. Everywhere else products are float32, and nothing is rounded before them.
//
// `put` and `get` move 16 columns of a row, a byte (or a bfloat16) each, into and out of a unit.
#pragma once

#include <cmath>
#include <initializer_list>

#include "matrix.h"
#include "simd.h"

namespace ingle {

#if defined(__AVX512F__)
constexpr int kMaxTile = 12;  // tokens that share an unpacked unit: 24 sums, and a few registers more, of 32
#else
constexpr int kMaxTile = 4;
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
constexpr char kInstructions[] = "AVX-512 VNNI and BF16";
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr char kInstructions[] = "AVX-512 VNNI";
#elif defined(__AVX512F__)
constexpr char kInstructions[] = "AVX-512";
#elif defined(__AVX2__)
constexpr char kInstructions[] = "AVX2";
#elif defined(__aarch64__)
constexpr char kInstructions[] = "NEON";
#else
constexpr char kInstructions[] = "AVX";
#endif

// What all kinds of products have: the type of their factors, for people; `Operand`, one or two of x's columns; `Sums` of
// a tile, [token][half of the block's rows]; the scale of a token's operands; and `put_operands`, which writes those of a
// unit and returns what they stand for, `Rounded`. A tile's operands lie [unit][token][of a unit].

struct FloatProducts {
    static constexpr char kFactors[] = "float32";
    typedef float Operand;
    typedef Floats Rounded;
    static constexpr int64_t kColumnsPerOperand = 1;
    template <int Tokens>
    struct Sums {
        Floats v[Tokens][2];
        void clear() {
            for (int t = 0; t < Tokens; t++) v[t][0] = v[t][1] = Floats{};
        }
        Floats value(int t, int half) const { return v[t][half]; }
    };
    static float scale_of(const float*, int64_t) { return 1; }
    static Rounded put_operands(Floats x, float, Operand* out) {
        store(out, x);
        return x;
    }
};

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

inline float sum(Ints v) { return _mm512_reduce_add_epi32((__m512i)v); }

struct IntegerProducts {
    static constexpr char kFactors[] = "16-bit integers";
    typedef uint32_t Operand;
    typedef Ints Rounded;
    static constexpr int64_t kColumnsPerOperand = 2;
    template <int Tokens>
    struct Sums {
        __m512i v[Tokens][2];
        void clear() {
#pragma GCC unroll 12
            for (int t = 0; t < Tokens; t++) v[t][0] = v[t][1] = _mm512_setzero_si512();
        }
        Floats value(int t, int half) const { return (Floats)_mm512_cvtepi32_ps(v[t][half]); }
    };
    // NaN for numbers that are not finite, so that the product tells. Without their signs, floats are ordered as integers.
    static float scale_of(const float* x, int64_t count) {
        Ints most = {};
        for (int64_t i = 0; i < count; i += 16) {
            Ints bits = (Ints)(count - i < 16 ? load_part(x + i, count - i) : load(x + i)) & 0x7fffffff;
            most = bits > most ? bits : most;
        }
        const int32_t largest = _mm512_reduce_max_epi32((__m512i)most), infinite = 0x7f800000;
        float value;
        memcpy(&value, &largest, 4);
        return largest < infinite ? value / 32767 : NAN;
    }
    static Rounded put_operands(Floats x, float scale, Operand* out) {
        __m512i integers = _mm512_cvtps_epi32((__m512)(x * (scale > 0 ? 1 / scale : 0.0f)));
        _mm256_storeu_si256((__m256i*)out, _mm512_cvtsepi32_epi16(integers));
        return (Ints)integers;
    }
    template <int Tokens>
    static inline __attribute__((always_inline)) void multiply_pair(Sums<Tokens>& sums, __m512i w0, __m512i w1,
                                                                    const Operand* x) {
#pragma GCC unroll 12
        for (int t = 0; t < Tokens; t++) {
            __m512i both = _mm512_set1_epi32(x[t * 8]);
            sums.v[t][0] = _mm512_dpwssd_epi32(sums.v[t][0], w0, both);
            sums.v[t][1] = _mm512_dpwssd_epi32(sums.v[t][1], w1, both);
        }
    }
};

#endif

template <int Bits>
struct Codes;

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

// The 16 bits of lane 2 * row + parity hold what belongs to a row and a column's parity.
template <>
struct Codes<4> : IntegerProducts {
    // Four zmm for 16 columns: (columns 0..7, rows 0..15), (columns 0..7, rows 16..31), then the same for columns 8..15.
    // The n-th nibble of a lane is of the n-th pair of columns.
    static uint8_t* lane(uint8_t* unit, int64_t row, int64_t column) {
        return unit + column / 8 * 128 + row / 16 * 64 + row % 16 * 4 + column % 2 * 2;
    }
    static void put(uint8_t* unit, int64_t row, const uint8_t* codes) {
        for (int64_t c : {0, 1, 8, 9}) {
            uint8_t* at = lane(unit, row, c);
            at[0] = codes[c] | codes[c + 2] << 4;
            at[1] = codes[c + 4] | codes[c + 6] << 4;
        }
    }
    static void get(const uint8_t* unit, int64_t row, const Matrix& m, float* out) {
        for (int64_t c = 0; c < kUnit; c++) {
            int64_t pair = c % 8 / 2;
            out[c] = m.codebook[lane((uint8_t*)unit, row, c)[pair / 2] >> pair % 2 * 4 & 15];
        }
    }
    __m512i table;
    explicit Codes(const Matrix& m) {
        int16_t values[32];  // twice the codebook: the fifth bit of an index belongs to the next nibble
        for (int i = 0; i < 32; i++) values[i] = m.codebook[i % 16];
        memcpy(&table, values, 64);
    }
    template <int Tokens>
    inline __attribute__((always_inline)) void multiply(Sums<Tokens>& sums, const uint8_t* codes,
                                                        const Operand* x) const {
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            __m512i c0 = _mm512_loadu_si512(codes + i * 128), c1 = _mm512_loadu_si512(codes + i * 128 + 64);
#pragma GCC unroll 4
            for (int pair = 0; pair < 4; pair++) {
                multiply_pair<Tokens>(sums, _mm512_permutexvar_epi16(c0, table), _mm512_permutexvar_epi16(c1, table),
                                      x + i * 4 + pair);
                c0 = _mm512_srli_epi16(c0, 4);
                c1 = _mm512_srli_epi16(c1, 4);
            }
        }
    }
};

template <>
struct Codes<8> : IntegerProducts {
    static void put(uint8_t* unit, int64_t row, const uint8_t* codes) {
        for (int64_t c = 0; c < kUnit; c += 2) memcpy(unit + c * 32 + row * 2, codes + c, 2);
    }
    static void get(const uint8_t* unit, int64_t row, const Matrix&, float* out) {
        for (int64_t c = 0; c < kUnit; c++) out[c] = (int8_t)unit[c / 2 * 64 + row * 2 + c % 2];
    }
    explicit Codes(const Matrix&) {}
    static __m512i widen(const uint8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
    template <int Tokens>
    inline __attribute__((always_inline)) void multiply(Sums<Tokens>& sums, const uint8_t* codes,
                                                        const Operand* x) const {
#pragma GCC unroll 8
        for (int pair = 0; pair < 8; pair++)
            multiply_pair<Tokens>(sums, widen(codes + pair * 64), widen(codes + pair * 64 + 32), x + pair);
    }
};

#else

// 32 bytes for every two columns: a row's byte holds the even column's code in its low half.
template <>
struct Codes<4> : FloatProducts {
    static void put(uint8_t* unit, int64_t row, const uint8_t* codes) {
        for (int64_t c = 0; c < kUnit; c += 2) unit[c * 16 + row] = codes[c] | codes[c + 1] << 4;
    }
    static void get(const uint8_t* unit, int64_t row, const Matrix& m, float* out) {
        for (int64_t c = 0; c < kUnit; c++) out[c] = m.codebook[unit[c / 2 * 32 + row] >> c % 2 * 4 & 15];
    }
    int8_t table[16];
    explicit Codes(const Matrix& m) { memcpy(table, m.codebook, 16); }
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    typedef int8_t Numbers __attribute__((vector_size(16)));
    Numbers look_up(Bytes codes) const {
#if defined(__SSSE3__)
        return (Numbers)_mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)table), (__m128i)codes);
#elif defined(__aarch64__)
        return (Numbers)vqtbl1q_s8(vld1q_s8(table), (uint8x16_t)codes);
#else
        Numbers values;
        for (int i = 0; i < 16; i++) values[i] = table[codes[i]];
        return values;
#endif
    }
    template <int Tokens>
    inline void multiply(Sums<Tokens>& sums, const uint8_t* codes, const Operand* x) const {
        for (int half = 0; half < 2; half++)
            for (int pair = 0; pair < 8; pair++) {
                Bytes both;
                memcpy(&both, codes + pair * 32 + half * 16, 16);
                Floats even = __builtin_convertvector(look_up(both & 15), Floats);
                Floats odd = __builtin_convertvector(look_up(both >> 4), Floats);
#pragma GCC unroll 12
                for (int t = 0; t < Tokens; t++) {
                    sums.v[t][half] += even * x[t * kUnit + 2 * pair];
                    sums.v[t][half] += odd * x[t * kUnit + 2 * pair + 1];
                }
            }
    }
};

#endif

// A number for each row, column after column.
template <typename Stored>
struct PlainCodes : FloatProducts {
    static void put(uint8_t* unit, int64_t row, const uint8_t* codes) {
        for (int64_t c = 0; c < kUnit; c++)
            memcpy(unit + (c * 32 + row) * sizeof(Stored), codes + c * sizeof(Stored), sizeof(Stored));
    }
    static void get(const uint8_t* unit, int64_t row, const Matrix&, float* out) {
        for (int64_t c = 0; c < kUnit; c++) out[c] = to_float(((const Stored*)unit)[c * 32 + row]);
    }
    explicit PlainCodes(const Matrix&) {}
    static Floats widen(const int8_t* p) {
        typedef int8_t Numbers __attribute__((vector_size(16)));
        Numbers v;
        memcpy(&v, p, 16);
        return __builtin_convertvector(v, Floats);
    }
    static Floats widen(const Brain* p) { return load(p); }
    template <int Tokens>
    inline void multiply(Sums<Tokens>& sums, const uint8_t* codes, const Operand* x) const {
        const Stored* stored = (const Stored*)codes;
        for (int half = 0; half < 2; half++)
            for (int column = 0; column < kUnit; column++) {
                Floats w = widen(stored + column * 32 + half * 16);
#pragma GCC unroll 12
                for (int t = 0; t < Tokens; t++) sums.v[t][half] += w * x[t * kUnit + column];
            }
    }
};

#if !(defined(__AVX512VNNI__) && defined(__AVX512BW__))
template <>
struct Codes<8> : PlainCodes<int8_t> {
    using PlainCodes::PlainCodes;
};
#endif

#if defined(__AVX512BF16__)

// Pairs of columns, as in the integer products.
template <>
struct Codes<16> {
    static constexpr char kFactors[] = "bfloat16";
    typedef uint32_t Operand;
    typedef Floats Rounded;
    static constexpr int64_t kColumnsPerOperand = 2;
    template <int Tokens>
    struct Sums {
        __m512 v[Tokens][2];
        void clear() {
#pragma GCC unroll 12
            for (int t = 0; t < Tokens; t++) v[t][0] = v[t][1] = _mm512_setzero_ps();
        }
        Floats value(int t, int half) const { return (Floats)v[t][half]; }
    };
    static float scale_of(const float*, int64_t) { return 1; }
    static Rounded put_operands(Floats x, float, Operand* out) {
        store((Brain*)out, x);
        return Floats{};  // there are no minima that would need it
    }
    static void put(uint8_t* unit, int64_t row, const uint8_t* codes) {
        for (int64_t c = 0; c < kUnit; c += 2) memcpy(unit + c * 64 + row * 4, codes + c * 2, 4);
    }
    static void get(const uint8_t* unit, int64_t row, const Matrix&, float* out) {
        const Brain* stored = (const Brain*)unit;
        for (int64_t c = 0; c < kUnit; c++) out[c] = to_float(stored[c / 2 * 64 + row * 2 + c % 2]);
    }
    explicit Codes(const Matrix&) {}
    template <int Tokens>
    inline __attribute__((always_inline)) void multiply(Sums<Tokens>& sums, const uint8_t* codes,
                                                        const Operand* x) const {
#pragma GCC unroll 8
        for (int pair = 0; pair < 8; pair++) {
            __m512bh w0 = (__m512bh)_mm512_loadu_si512(codes + pair * 128);
            __m512bh w1 = (__m512bh)_mm512_loadu_si512(codes + pair * 128 + 64);
#pragma GCC unroll 12
            for (int t = 0; t < Tokens; t++) {
                __m512bh both = (__m512bh)_mm512_set1_epi32(x[t * 8 + pair]);
                sums.v[t][0] = _mm512_dpbf16_ps(sums.v[t][0], w0, both);
                sums.v[t][1] = _mm512_dpbf16_ps(sums.v[t][1], w1, both);
            }
        }
    }
};

#else

template <>
struct Codes<16> : PlainCodes<Brain> {
    using PlainCodes::PlainCodes;
};

#endif

}  // namespace ingle
