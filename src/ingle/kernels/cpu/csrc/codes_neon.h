// Products of codes on arm64, by 8-bit integers: a token's number of 16 bits is 256 times one of 8 bits plus another, and
// both are multiplied with the codes.
//
// With i8mm an instruction multiplies two rows of 8 columns with both halves of a token's numbers; with the dot-product
// extension it multiplies four rows of 4 columns with one half; without, some more do that.
#pragma once

namespace ingle {

#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr char kInstructions[] = "NEON with i8mm";
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr char kInstructions[] = "NEON with dot products";
#else
constexpr char kInstructions[] = "NEON";
#endif

#if defined(__ARM_FEATURE_MATMUL_INT8)

constexpr int kRegisterRows = 2, kRegisterColumns = 8;

// Of a token: [high 8 columns, low 8 columns] twice.
inline void store_halves(int8x16_t high, int8x16_t low, int8_t* out) {
    vst1q_s8(out, vcombine_s8(vget_low_s8(high), vget_low_s8(low)));
    vst1q_s8(out + 16, vcombine_s8(vget_high_s8(high), vget_high_s8(low)));
}

template <int Tokens>
struct HalfSums {
    int32x4_t v[Tokens][kBlockRows / 2];  // of two rows: high and low of the first, high and low of the second

    void clear() {
        for (int t = 0; t < Tokens; t++)
            for (auto& sum : v[t]) sum = vdupq_n_s32(0);
    }
    template <int Columns>
    void add(int rows, int8x16_t w, const int8_t* x) {
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; t++)
            v[t][rows] = vmmlaq_s32(v[t][rows], w, vld1q_s8(x + t * 2 * kUnit + Columns * 16));
    }
    Ints value(int t, int i) const {
        const int32x4_t high = vuzp1q_s32(v[t][2 * i], v[t][2 * i + 1]), low = vuzp2q_s32(v[t][2 * i], v[t][2 * i + 1]);
        return (Ints)vaddq_s32(vshlq_n_s32(high, 8), low);
    }
};

#else

constexpr int kRegisterRows = 4, kRegisterColumns = 4;

// Of a token: [high 16 columns, low 16 columns].
inline void store_halves(int8x16_t high, int8x16_t low, int8_t* out) {
    vst1q_s8(out, high);
    vst1q_s8(out + 16, low);
}

// sum + the products of 4 columns, those of x at [4 Columns, 4 Columns + 4), of each row.
template <int Columns>
inline int32x4_t add_products(int32x4_t sum, int8x16_t w, int8x16_t x) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_laneq_s32(sum, w, x, Columns);
#else
    const int8x16_t four = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(x), Columns));
    const int16x8_t first = vmull_s8(vget_low_s8(w), vget_low_s8(four)), last = vmull_high_s8(w, four);
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(first), vpaddlq_s16(last)));
#endif
}

template <int Tokens>
struct HalfSums {
    int32x4_t high[Tokens][kVectors], low[Tokens][kVectors];

    void clear() {
        for (int t = 0; t < Tokens; t++)
            for (int i = 0; i < kVectors; i++) high[t][i] = low[t][i] = vdupq_n_s32(0);
    }
    template <int Columns>
    void add(int rows, int8x16_t w, const int8_t* x) {
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; t++) {
            high[t][rows] = add_products<Columns>(high[t][rows], w, vld1q_s8(x + t * 2 * kUnit));
            low[t][rows] = add_products<Columns>(low[t][rows], w, vld1q_s8(x + t * 2 * kUnit + 16));
        }
    }
    Ints value(int t, int i) const { return (Ints)vaddq_s32(vshlq_n_s32(high[t][i], 8), low[t][i]); }
};

#endif

// A register holds kRegisterRows rows of kRegisterColumns columns; in each byte one 8-bit number, or two codes of 4 bits,
// the upper one that of kRegisterColumns columns further on.
template <int Bits>
struct Codes {
    static constexpr char kFactors[] = "16-bit integers";
    static constexpr int kMostTokens = 3;  // 24 sums, and a few registers more
    static constexpr int kCodes = 8 / Bits;
    static constexpr int kRegistersOfRows = kBlockRows / kRegisterRows;
    typedef uint32_t Operand;
    static constexpr int64_t kColumnsPerOperand = 2;

    // Numbers of more than 8 bits are 64 times a coarse one and another; without such, the coarse sums stay zero.
    template <int Tokens>
    struct Sums : HalfSums<Tokens> {
        HalfSums<Tokens> coarse;
        void clear() { HalfSums<Tokens>::clear(), coarse.clear(); }
        Floats value(int t, int i) const {
            return to_floats(HalfSums<Tokens>::value(t, i) + coarse.value(t, i) * 64);
        }
    };

    static Ints put_operands(const float* x, float per_unit, Operand* out) {
        int16x8_t integers[2];
        Ints total = {};
        for (int i = 0; i < 2; i++) {
            const Ints a = to_nearest(load(x + i * 8) * per_unit), b = to_nearest(load(x + i * 8 + 4) * per_unit);
            integers[i] = vcombine_s16(vqmovn_s32((int32x4_t)a), vqmovn_s32((int32x4_t)b));
            total += a + b;
        }
        const int8x16_t high = vcombine_s8(vrshrn_n_s16(integers[0], 8), vrshrn_n_s16(integers[1], 8));
        store_halves(high, vcombine_s8(vmovn_s16(integers[0]), vmovn_s16(integers[1])), (int8_t*)out);
        return total;
    }

    // Codes are looked up as the signed numbers that they stand for.
    static constexpr bool reads(Reading how) { return how == Reading::kPlain || (Bits == 4 && how == Reading::kWide); }
    static Reading reading_of(const Matrix& m) { return Bits == 4 && is_wide(m) ? Reading::kWide : Reading::kPlain; }
    static int32_t offset_of(const Matrix&) { return 0; }

    static uint8_t* byte_of(uint8_t* unit, int64_t row, int64_t c) {
        const int64_t register_ = c / (kCodes * kRegisterColumns) * kRegistersOfRows + row / kRegisterRows;
        return unit + register_ * 16 + row % kRegisterRows * kRegisterColumns + c % kRegisterColumns;
    }
    static int shift_of(int64_t c) { return Bits == 4 ? c / kRegisterColumns % 2 * 4 : 0; }
    static void put(uint8_t* unit, int64_t row, const uint8_t* codes) {
        for (int64_t c = 0; c < kUnit; c++) {
            uint8_t* at = byte_of(unit, row, c);
            if constexpr (Bits == 8) *at = codes[c];
            else *at = (*at & (shift_of(c) ? 15 : 0)) | codes[c] << shift_of(c);
        }
    }
    static void get(const uint8_t* unit, int64_t row, const Matrix& m, float* out) {
        for (int64_t c = 0; c < kUnit; c++) {
            const uint8_t byte = *byte_of((uint8_t*)unit, row, c);
            out[c] = Bits == 8 ? (int8_t)byte : m.codebook[byte >> shift_of(c) & 15];
        }
    }

    int8_t table[16], coarse[16] = {};
    explicit Codes(const Matrix& m) {
        const bool wide = is_wide(m);
        for (int i = 0; i < 16; i++) {
            if (wide) coarse[i] = (m.codebook[i] + 32) >> 6;
            table[i] = m.codebook[i] - 64 * coarse[i];
        }
    }

    template <int Tokens, Reading How>
    inline __attribute__((always_inline)) void multiply(Sums<Tokens>& sums, const uint8_t* codes, const Operand* x) const {
        multiply_registers<Tokens, 0, How>(sums, codes, (const int8_t*)x);
    }

private:
    template <int Tokens, int Columns, Reading How>
    inline __attribute__((always_inline)) void multiply_registers(Sums<Tokens>& sums, const uint8_t* codes, const int8_t* x) const {
#pragma GCC unroll 8
        for (int rows = 0; rows < kRegistersOfRows; rows++) {
            const uint8x16_t stored = vld1q_u8(codes + rows * 16);
            if constexpr (Bits == 8) {
                sums.template add<Columns>(rows, vreinterpretq_s8_u8(stored), x);
            } else {
                const uint8x16_t first = vandq_u8(stored, vdupq_n_u8(15)), second = vshrq_n_u8(stored, 4);
                sums.template add<Columns>(rows, vqtbl1q_s8(vld1q_s8(table), first), x);
                sums.template add<Columns + 1>(rows, vqtbl1q_s8(vld1q_s8(table), second), x);
                if constexpr (How == Reading::kWide) {
                    sums.coarse.template add<Columns>(rows, vqtbl1q_s8(vld1q_s8(coarse), first), x);
                    sums.coarse.template add<Columns + 1>(rows, vqtbl1q_s8(vld1q_s8(coarse), second), x);
                }
            }
        }
        if constexpr ((Columns + kCodes) * kRegisterColumns < kUnit)
            multiply_registers<Tokens, Columns + kCodes, How>(sums, codes + kRegistersOfRows * 16, x);
    }
};

template <>
struct Codes<5> : Codes<8> {
    using Codes<8>::Codes;
};
template <>
struct Codes<6> : Codes<8> {
    using Codes<8>::Codes;
};

}  // namespace ingle
