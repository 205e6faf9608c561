// Products of codes on x86-64: pairs of neighbouring columns are multiplied as 16-bit integers and both products added to
// a 32-bit sum, by one instruction with VNNI (of AVX-512 or AVX), by two without.
//
// Lane i of a register belongs to row i. Its lower 16 bits hold codes of even columns, its upper ones of odd columns: the
// n-th code of each half is of the n-th pair of columns. A shift and a mask make the register's next pair of it.
#pragma once

namespace ingle {

#if defined(INGLE_AVX512)
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
constexpr char kInstructions[] = "AVX-512 VNNI and BF16";
#elif defined(__AVX512VNNI__)
constexpr char kInstructions[] = "AVX-512 VNNI";
#else
constexpr char kInstructions[] = "AVX-512";
#endif
#elif defined(__AVXVNNI__)
constexpr char kInstructions[] = "AVX2 and AVX-VNNI";
#else
constexpr char kInstructions[] = "AVX2";
#endif

typedef uint16_t Pairs __attribute__((vector_size(kLanes * 4)));  // of columns, for each row

// sum + the products of both columns, of each row.
inline Ints add_products(Ints sum, Pairs w, Ints x) {
#if defined(INGLE_AVX512) && defined(__AVX512VNNI__)
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__)
    return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
#else
#if defined(INGLE_AVX512)
    sum += (Ints)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#else
    sum += (Ints)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#endif
    // Else GCC computes all products first, adds them in an order of its own, and keeps them on the stack meanwhile.
    asm("" : "+v"(sum));
    return sum;
#endif
}

#if defined(INGLE_AVX512)
constexpr uint32_t kSigns = 0;
#else
constexpr uint32_t kSigns = 0x80808080;  // 8-bit numbers are stored as they are multiplied, 128 more
#endif

// Four columns of 16 bits become pairs, saturated.
inline void store_pairs(const Ints* integers, uint32_t* out) {
#if defined(INGLE_AVX512)
    _mm256_storeu_si256((__m256i*)out, _mm512_cvtsepi32_epi16((__m512i)integers[0]));
#else
    const __m256i packed = _mm256_packs_epi32((__m256i)integers[0], (__m256i)integers[1]);
    _mm256_storeu_si256((__m256i*)out, _mm256_permute4x64_epi64(packed, 0xd8));
#endif
}

template <int Bits>
struct Codes {
    static constexpr char kFactors[] = "16-bit integers";
    static constexpr int kMostTokens = kRegisters == 32 ? 12 : 4;  // sums, and a few registers more
    static constexpr int kPairs = 16 / Bits;                       // of columns in a register
    static constexpr int64_t kRegisterBytes = kLanes * 4;
    typedef uint32_t Operand;
    static constexpr int64_t kColumnsPerOperand = 2;

    // A token alone has several sums, taken in turn: an addition would have to wait for the one before.
    template <int Tokens>
    struct Sums {
        static constexpr int kChains = Tokens == 1 ? 2 : 1;
        Ints v[Tokens * kChains][kVectors];
        void clear() {
#pragma GCC unroll 12
            for (int t = 0; t < Tokens * kChains; t++)
                for (int i = 0; i < kVectors; i++) v[t][i] = Ints{};
        }
        void start(const int32_t* starts) {
#pragma GCC unroll 12
            for (int t = 0; t < Tokens * kChains; t++)
                for (int i = 0; i < kVectors; i++) v[t][i] = t % kChains ? Ints{} : splat(starts[t / kChains]);
        }
        void add(int t, int pair, int i, Pairs w, Ints both) {
            Ints& sum = v[t * kChains + pair % kChains][i];
            sum = add_products(sum, w, both);
        }
        Floats value(int t, int i) const {
            Ints all = v[t * kChains][i];
            for (int chain = 1; chain < kChains; chain++) all += v[t * kChains + chain][i];
            return to_floats(all);
        }
    };

    static Ints put_operands(const float* x, float per_unit, Operand* out) {
        Ints integers[kUnitVectors], total = {};
        for (int i = 0; i < kUnitVectors; i++) {
            integers[i] = to_nearest(load(x + i * kLanes) * per_unit);
            total += integers[i];
        }
        store_pairs(integers, out);
        return total;
    }

#if defined(INGLE_AVX512)
    static constexpr bool reads(Reading how) { return how == Reading::kPlain; }
    static Reading reading_of(const Matrix&) { return Reading::kPlain; }
    static int32_t offset_of(const Matrix&) { return 0; }
#else
    static constexpr bool reads(Reading how) { return Bits == 4 || how == Reading::kOffset; }
    static Reading reading_of(const Matrix& m) {
        if (Bits == 8) return Reading::kOffset;
        if (is_wide(m)) return Reading::kWide;
        return !is_linear(m) ? Reading::kTable : m.codebook[0] ? Reading::kOffset : Reading::kPlain;
    }
    // What is added to numbers so that none is negative.
    static int32_t offset_of(const Matrix& m) {
        if (Bits == 4 && is_wide(m)) return 0;
        return Bits == 8 || !is_linear(m) ? 128 : -m.codebook[0];
    }
#endif

    static uint8_t* lane(uint8_t* unit, int64_t row, int64_t register_) {
        return unit + (register_ * kVectors + row / kLanes) * kRegisterBytes + row % kLanes * 4;
    }
    static void put(uint8_t* unit, int64_t row, const uint8_t* codes) {
        for (int64_t r = 0; r < kUnit / (2 * kPairs); r++, codes += 2 * kPairs) {
            uint32_t bits = Bits == 8 ? kSigns : 0;
            for (int pair = 0; pair < kPairs; pair++)
                bits ^= codes[2 * pair] << Bits * pair | (uint32_t)codes[2 * pair + 1] << (Bits * pair + 16);
            memcpy(lane(unit, row, r), &bits, 4);
        }
    }
    static void get(const uint8_t* unit, int64_t row, const Matrix& m, float* out) {
        for (int64_t c = 0; c < kUnit; c++) {
            uint32_t bits;
            memcpy(&bits, lane((uint8_t*)unit, row, c / (2 * kPairs)), 4);
            const int code = bits >> (c % (2 * kPairs) / 2 * Bits + c % 2 * 16) & ((1 << Bits) - 1);
            out[c] = Bits == 8 ? (int8_t)(code ^ (kSigns & 0xff)) : m.codebook[code];
        }
    }

#if defined(INGLE_AVX512)
    Pairs table;
    explicit Codes(const Matrix& m) {
        for (int i = 0; i < 32; i++) table[i] = m.codebook[i % 16];  // the fifth bit of an index is of the next code
    }
    template <Reading How>
    Pairs unpack(Pairs stored, int pair) const {
        if (Bits == 4) return (Pairs)_mm512_permutexvar_epi16((__m512i)(stored >> 4 * pair), (__m512i)table);
        typedef int16_t Signed __attribute__((vector_size(64)));
        return (Pairs)((Signed)(pair ? stored : stored << 8) >> 8);
    }
#else
    uint8_t table[16], upper[16];
    explicit Codes(const Matrix& m) {
        const int offset = is_wide(m) ? 0 : 128;
        for (int i = 0; i < 16; i++) table[i] = m.codebook[i] + offset, upper[i] = m.codebook[i] >> 8;
    }
    template <Reading How>
    Pairs unpack(Pairs stored, int pair) const {
        Pairs codes = stored >> Bits * pair;
        if (pair + 1 < kPairs) codes &= (uint16_t)((1 << Bits) - 1);
        if (How != Reading::kTable && How != Reading::kWide) return codes;
        const __m256i tables = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
        const Pairs lower = (Pairs)_mm256_shuffle_epi8(tables, (__m256i)(codes | (uint16_t)0x8000));  // the upper byte is 0
        if (How == Reading::kTable) return lower;
        const __m256i uppers = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)upper));
        return lower | (Pairs)_mm256_shuffle_epi8(uppers, (__m256i)(codes << 8 | (uint16_t)0x80));
    }
#endif

    template <int Tokens, Reading How>
    inline __attribute__((always_inline)) void multiply(Sums<Tokens>& sums, const uint8_t* codes, const Operand* x) const {
#pragma GCC unroll 4
        for (int r = 0; r < kUnit / (2 * kPairs); r++) {
            Pairs stored[kVectors];
#pragma GCC unroll 2
            for (int i = 0; i < kVectors; i++) stored[i] = (Pairs)load((const int32_t*)codes + (r * kVectors + i) * kLanes);
#pragma GCC unroll 4
            for (int pair = 0; pair < kPairs; pair++) {
                Pairs w[kVectors];
#pragma GCC unroll 2
                for (int i = 0; i < kVectors; i++) w[i] = unpack<How>(stored[i], pair);
#pragma GCC unroll 12
                for (int t = 0; t < Tokens; t++) {
                    const Ints both = splat((int32_t)x[t * kUnit / 2 + r * kPairs + pair]);
#pragma GCC unroll 2
                    for (int i = 0; i < kVectors; i++) sums.add(t, pair, i, w[i], both);
                }
            }
        }
    }
};

// Codes of 4 + Upper bits. A unit has their lower 4 bits as codes of 4 bits would lie, then the others: those of the n-th
// pair of columns are, in both halves of a row's lane, Upper bits from bit `upper_bit(vector, n)` on.
template <int Upper>
struct UpperCodes : Codes<4> {
    static int32_t offset_of(const Matrix& m) { return -m.codebook[0]; }

    static constexpr int kUpperVectors = Upper * kVectors / 2;  // of 16 bits for each row and half
    static constexpr int64_t kLowerBytes = kBlockRows * kUnit / 2;
    static constexpr int upper_bit(int vector, int pair) {
        return vector * kUpperVectors % kVectors * (16 / kVectors) + Upper * pair;
    }
    static uint8_t* upper_lane(uint8_t* unit, int64_t row) {
        return unit + kLowerBytes + row / kLanes * kUpperVectors / kVectors * kRegisterBytes + row % kLanes * 4;
    }
    static void put(uint8_t* unit, int64_t row, const uint8_t* codes) {
        uint8_t lower[kUnit];
        uint32_t bits, at, mask = 0, upper = 0;
        for (int64_t c = 0; c < kUnit; c++) {
            lower[c] = codes[c] & 15;
            at = upper_bit(row / kLanes, c / 2) + c % 2 * 16;
            mask |= ((1u << Upper) - 1) << at;
            upper |= (uint32_t)(codes[c] >> 4) << at;
        }
        Codes<4>::put(unit, row, lower);
        memcpy(&bits, upper_lane(unit, row), 4);
        bits = (bits & ~mask) | upper;
        memcpy(upper_lane(unit, row), &bits, 4);
    }
    static void get(const uint8_t* unit, int64_t row, const Matrix& m, float* out) {
        Matrix lower = m;
        for (int i = 0; i < 16; i++) lower.codebook[i] = i;
        Codes<4>::get(unit, row, lower, out);
        uint32_t bits;
        memcpy(&bits, upper_lane((uint8_t*)unit, row), 4);
        for (int64_t c = 0; c < kUnit; c++) {
            const uint32_t upper = bits >> (upper_bit(row / kLanes, c / 2) + c % 2 * 16) & ((1u << Upper) - 1);
            out[c] += (int)(upper << 4) + m.codebook[0];
        }
    }

    using Codes<4>::Codes;

    // Of a vector of rows, the numbers of a pair of columns less the least.
    static inline __attribute__((always_inline)) Pairs unpack(Pairs stored, const Pairs* upper, int vector, int pair) {
        const Pairs of = upper[vector * kUpperVectors / kVectors];
        const int shift = upper_bit(vector, pair) - 4;
        constexpr uint16_t mask = ((1 << Upper) - 1) << 4;
        return (stored >> 4 * (pair % kPairs) & 15) | ((shift < 0 ? of << -shift : of >> shift) & mask);
    }

    // A unit as Codes<8> has it.
    static void expand(const uint8_t* unit, const Matrix& m, uint8_t* out) {
        const uint16_t least = m.codebook[0] + (kSigns & 128);
        Pairs upper[kUpperVectors];
        for (int i = 0; i < kUpperVectors; i++) upper[i] = (Pairs)load((const int32_t*)(unit + kLowerBytes) + i * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
#pragma GCC unroll 2
            for (int i = 0; i < kVectors; i++) {
                const Pairs stored = (Pairs)load((const int32_t*)unit + (r / 2 * kVectors + i) * kLanes);
                const Pairs first = unpack(stored, upper, i, 2 * r), second = unpack(stored, upper, i, 2 * r + 1);
                const Pairs both = ((first + least) & 255) | (second + least) << 8;
                memcpy(out + (r * kVectors + i) * kRegisterBytes, &both, sizeof both);
            }
    }

    template <int Tokens, Reading How>
    inline __attribute__((always_inline)) void multiply(Sums<Tokens>& sums, const uint8_t* codes, const Operand* x) const {
        Pairs upper[kUpperVectors];
#pragma GCC unroll 2
        for (int i = 0; i < kUpperVectors; i++) upper[i] = (Pairs)load((const int32_t*)(codes + kLowerBytes) + i * kLanes);
#pragma GCC unroll 2
        for (int r = 0; r < kUnit / (2 * kPairs); r++) {
            Pairs stored[kVectors];
#pragma GCC unroll 2
            for (int i = 0; i < kVectors; i++) stored[i] = (Pairs)load((const int32_t*)codes + (r * kVectors + i) * kLanes);
#pragma GCC unroll 4
            for (int pair = 0; pair < kPairs; pair++) {
                Pairs w[kVectors];
#pragma GCC unroll 2
                for (int i = 0; i < kVectors; i++) w[i] = unpack(stored[i], upper, i, r * kPairs + pair);
#pragma GCC unroll 12
                for (int t = 0; t < Tokens; t++) {
                    const Ints both = splat((int32_t)x[t * kUnit / 2 + r * kPairs + pair]);
#pragma GCC unroll 2
                    for (int i = 0; i < kVectors; i++) sums.add(t, pair, i, w[i], both);
                }
            }
        }
    }
};

template <>
struct Codes<5> : UpperCodes<1> {
    using UpperCodes<1>::UpperCodes;
};
template <>
struct Codes<6> : UpperCodes<2> {
    using UpperCodes<2>::UpperCodes;
};

}  // namespace ingle
