// Keys and values as the KV cache holds them: floats, or codes of a byte with a scale for each key and value of a head.
// `ingle.kernels.reference_kv` says what codes stand for. In a page the scales, [num_kv_heads][page_size], lie behind the
// codes, [num_kv_heads][page_size][head_dim]; floats lie [page_size][num_kv_heads][head_dim].
#pragma once

#include <limits>

#include "operators.h"
#include "simd.h"

namespace ingle {

struct Int8 { int8_t bits; };
struct E4m3 { uint8_t bits; };  // 4 bits of exponent and 3 of fraction, without infinity
struct E5m2 { uint8_t bits; };  // the upper half of an IEEE binary16

template <typename T>
constexpr float kLargestCode = 0;  // of floats, that have no scale
template <>
constexpr float kLargestCode<Int8> = 127;
template <>
constexpr float kLargestCode<E4m3> = 448;
template <>
constexpr float kLargestCode<E5m2> = 57344;
template <typename T>
constexpr bool kCoded = kLargestCode<T> > 0;

// Calls body with a number of the type that a cache holds.
template <typename Body>
void with_kv_type(int32_t kv_type, const Body& body) {
    switch (kv_type) {
        case kHalf: return body(Half{});
        case kBrain: return body(Brain{});
        case kInt8: return body(Int8{});
        case kE4m3: return body(E4m3{});
        case kE5m2: return body(E5m2{});
        default: return body(float{});
    }
}

inline Floats load(const Int8* p) { return to_floats(load((const int8_t*)p)); }

// By binary16, which has the numbers of both, but for the exponent that E4m3's counts from.
#if defined(INGLE_AVX512)
inline __m256i load_words(const void* p) { return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)); }
inline Floats load(const E4m3* p) {
    const __m256i words = load_words(p);
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(words, _mm256_set1_epi16(0x80)), 8);
    const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(words, _mm256_set1_epi16(0x7f)), 7);
    return (Floats)_mm512_cvtph_ps(_mm256_or_si256(sign, rest)) * 256.0f;
}
inline Floats load(const E5m2* p) { return (Floats)_mm512_cvtph_ps(_mm256_slli_epi16(load_words(p), 8)); }
#elif defined(INGLE_AVX2)
inline __m128i load_words(const void* p) { return _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p)); }
inline Floats load(const E4m3* p) {
    const __m128i words = load_words(p);
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(words, _mm_set1_epi16(0x80)), 8);
    const __m128i rest = _mm_slli_epi16(_mm_and_si128(words, _mm_set1_epi16(0x7f)), 7);
    return (Floats)_mm256_cvtph_ps(_mm_or_si128(sign, rest)) * 256.0f;
}
inline Floats load(const E5m2* p) { return (Floats)_mm256_cvtph_ps(_mm_slli_epi16(load_words(p), 8)); }
#else
inline uint16x4_t load_words(const void* p) {
    uint32_t four;
    memcpy(&four, p, 4);
    return vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four))));
}
inline Floats load(const E4m3* p) {
    const uint16x4_t words = load_words(p);
    const uint16x4_t sign = vshl_n_u16(vand_u16(words, vdup_n_u16(0x80)), 8);
    const uint16x4_t rest = vshl_n_u16(vand_u16(words, vdup_n_u16(0x7f)), 7);
    return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vorr_u16(sign, rest))) * 256.0f;
}
inline Floats load(const E5m2* p) {
    return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vshl_n_u16(load_words(p), 8)));
}
#endif

// Codes, in the low bytes, of numbers up to the largest: to nearest, ties to even.
inline Ints codes_of(Floats x, Int8) { return to_nearest(x); }

template <int Shift, int Bias>  // bits of float's fraction that are lacking; what exponents count from
Ints float_codes(Floats x) {
    const Ints bits = (Ints)x, magnitude = bits & 0x7fffffff;
    const Ints normal = ((magnitude + ((1 << (Shift - 1)) - 1) + (magnitude >> Shift & 1)) >> Shift) -
                        ((127 - Bias) << (23 - Shift));
    constexpr float units = 1 << (Bias - 1 + 23 - Shift);  // of the numbers that are too small to be normal, in 1
    const Ints small = to_nearest((Floats)magnitude * units);
    const Ints is_small = (Floats)magnitude < splat(1.0f / (1 << (Bias - 1)));
    return (is_small ? small : normal) | (bits >> 24 & 0x80);
}
inline Ints codes_of(Floats x, E4m3) { return float_codes<20, 7>(x); }
inline Ints codes_of(Floats x, E5m2) { return float_codes<21, 15>(x); }

// A head's numbers in codes, and their scale: infinite where one is not finite, so that all come back as NaN.
template <typename T>
float encode(const float* head, int64_t size, T* out) {
    constexpr float largest = kLargestCode<T>;
    Floats most = {};
    Ints finite = Ints{} - 1;
    for (int64_t i = 0; i < size; i += kLanes) {
        const Floats x = size - i < kLanes ? load_part(head + i, size - i) : load(head + i);
        const Floats magnitude = (Floats)((Ints)x & 0x7fffffff);
        most = magnitude > most ? magnitude : most;
        finite &= magnitude <= splat(std::numeric_limits<float>::max());
    }
    const bool is_finite = sum(finite) == -kLanes;
    const float largest_of = is_finite ? maximum(most) : std::numeric_limits<float>::infinity();
    const float factor = is_finite && largest_of > 0 ? largest / largest_of : 0;
    for (int64_t i = 0; i < size; i += kLanes) {
        const int64_t count = size - i < kLanes ? size - i : kLanes;
        Floats x = (count < kLanes ? load_part(head + i, count) : load(head + i)) * factor;
        x = x > largest ? splat(largest) : x;
        x = x < -largest ? splat(-largest) : x;
        x = is_finite ? x : Floats{};  // zeros times that scale
        const Ints codes = codes_of(x, T{});
        for (int64_t j = 0; j < count; j++) out[i + j].bits = codes[j];
    }
    return largest_of / largest;
}

// One side of a layer's cache, for one key head.
template <typename T>
struct Pages {
    uint8_t* data;
    int64_t page_size, num_kv_heads, head_dim, kv_head;

    // From one token to the next.
    int64_t stride() const { return kCoded<T> ? head_dim : num_kv_heads * head_dim; }
    int64_t page_numbers() const { return page_size * num_kv_heads * head_dim; }
    int64_t page_bytes() const {
        return page_numbers() * (int64_t)sizeof(T) + (kCoded<T> ? page_size * num_kv_heads * 4 : 0);
    }
    T* numbers(int64_t page, int64_t offset) const {
        const int64_t head = kv_head * (kCoded<T> ? page_size : 1) * head_dim;
        return (T*)(data + page * page_bytes()) + head + offset * stride();
    }
    float* scales(int64_t page, int64_t offset) const {
        return (float*)(data + page * page_bytes() + page_numbers()) + kv_head * page_size + offset;
    }
};

}  // namespace ingle
