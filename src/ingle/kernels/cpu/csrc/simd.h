// Vectors as wide as this processor's registers, of kLanes 32-bit numbers each.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define INGLE_AVX512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define INGLE_AVX2
#elif !defined(__aarch64__)
#error "this processor lacks AVX2, FMA or F16C; ingle runs on PyTorch's operators here"
#endif

namespace ingle {

#if defined(INGLE_AVX512)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(INGLE_AVX2)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));

// What keys, values and scales are stored as.
struct Half { uint16_t bits; };      // IEEE binary16
struct Brain { uint16_t bits; };     // bfloat16

inline Floats splat(float x) { return x - Floats{}; }
inline Ints splat(int32_t x) { return x - Ints{}; }

inline Floats load(const float* p) {
    Floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline Ints load(const int32_t* p) {
    Ints v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }

inline float to_float(Brain x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

inline Brain to_brain(float x) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return {(uint16_t)(bits >> 16 | 64)};  // a NaN stays one
    return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// The same of each lane, in its lower half.
inline Words to_brains(Floats v) {
    const Words bits = (Words)v;
    const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 64 : rounded;
}

#if defined(INGLE_AVX512)

inline Floats load(const Brain* p) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
inline Floats load(const Half* p) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline Ints load(const int8_t* p) { return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline void store(Half* p, Floats v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0)); }
inline void store(Brain* p, Floats v) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)to_brains(v)));
#endif
}

inline float sum(Floats v) { return _mm512_reduce_add_ps((__m512)v); }
inline int32_t sum(Ints v) { return _mm512_reduce_add_epi32((__m512i)v); }
inline float maximum(Floats v) { return _mm512_reduce_max_ps((__m512)v); }
inline int32_t maximum(Ints v) { return _mm512_reduce_max_epi32((__m512i)v); }
inline Floats to_floats(Ints v) { return (Floats)_mm512_cvtepi32_ps((__m512i)v); }
inline Ints to_nearest(Floats v) { return (Ints)_mm512_cvtps_epi32((__m512)v); }

// Lane i of the result is the sum of v[i]. Neighbours are added, those of two vectors side by side: after four rounds one
// vector is left.
inline Floats sums(const Floats* v) {
    const Ints even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    auto halve = [even](Floats a, Floats b) {
        return (Floats)(_mm512_permutex2var_ps((__m512)a, (__m512i)even, (__m512)b) +
                        _mm512_permutex2var_ps((__m512)a, (__m512i)(even + 1), (__m512)b));
    };
    Floats pairs[8], fours[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) pairs[i] = halve(v[2 * i], v[2 * i + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) fours[i] = halve(pairs[2 * i], pairs[2 * i + 1]);
    return halve(halve(fours[0], fours[1]), halve(fours[2], fours[3]));
}

#elif defined(INGLE_AVX2)

inline Floats load(const Brain* p) {
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
inline Floats load(const Half* p) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline Ints load(const int8_t* p) { return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline void store(Half* p, Floats v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0)); }
inline void store(Brain* p, Floats v) {
    const __m256i words = (__m256i)to_brains(v);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

inline float sum(Floats v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline int32_t sum(Ints v) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
inline float maximum(Floats v) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline int32_t maximum(Ints v) {
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
inline Floats to_floats(Ints v) { return (Floats)_mm256_cvtepi32_ps((__m256i)v); }
inline Ints to_nearest(Floats v) { return (Ints)_mm256_cvtps_epi32((__m256)v); }

// Lane i of the result is the sum of v[i].
inline Floats sums(const Floats* v) {
    auto four = [](const Floats* from) {  // sums of each half, of four vectors
        return _mm256_hadd_ps(_mm256_hadd_ps((__m256)from[0], (__m256)from[1]),
                              _mm256_hadd_ps((__m256)from[2], (__m256)from[3]));
    };
    const __m256 a = four(v), b = four(v + 4);
    return (Floats)_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

#else

inline Floats load(const Brain* p) { return (Floats)vshll_n_u16(vld1_u16(&p->bits), 16); }
inline Floats load(const Half* p) { return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
inline Ints load(const int8_t* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return (Ints)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
}
inline void store(Half* p, Floats v) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v))); }
inline void store(Brain* p, Floats v) { vst1_u16(&p->bits, vmovn_u32((uint32x4_t)to_brains(v))); }

inline float sum(Floats v) { return vaddvq_f32((float32x4_t)v); }
inline int32_t sum(Ints v) { return vaddvq_s32((int32x4_t)v); }
inline float maximum(Floats v) { return vmaxvq_f32((float32x4_t)v); }
inline int32_t maximum(Ints v) { return vmaxvq_s32((int32x4_t)v); }
inline Floats to_floats(Ints v) { return (Floats)vcvtq_f32_s32((int32x4_t)v); }
inline Ints to_nearest(Floats v) { return (Ints)vcvtnq_s32_f32((float32x4_t)v); }

// Lane i of the result is the sum of v[i].
inline Floats sums(const Floats* v) {
    return (Floats)vpaddq_f32(vpaddq_f32((float32x4_t)v[0], (float32x4_t)v[1]),
                              vpaddq_f32((float32x4_t)v[2], (float32x4_t)v[3]));
}

#endif

// The same, and no multiplication that gave it becomes part of an addition: as if it had been stored and read.
inline Floats rounded(Floats v) {
#if defined(INGLE_AVX512)
    asm("" : "+v"(v));
#elif defined(INGLE_AVX2)
    asm("" : "+x"(v));
#else
    asm("" : "+w"(v));
#endif
    return v;
}

// The first n < kLanes numbers at p, zeros after them; and their way back.
template <typename T>
inline Floats load_part(const T* p, int64_t n) {
    T padded[kLanes] = {};
    memcpy(padded, p, n * sizeof(T));
    return load(padded);
}

template <typename T>
inline void store_part(T* p, Floats v, int64_t n) {
    T padded[kLanes];
    store(padded, v);
    memcpy(p, padded, n * sizeof(T));
}

inline float to_float(Half x) {
    Half wide[kLanes] = {x};
    return load(wide)[0];
}

// e^x for x <= 88, relative error below 2e-7; 0 below -87. Cephes' expf: 2^n times a polynomial on [-ln2/2, ln2/2].
inline Floats exponential(Floats x) {
    x = x > 88.0f ? splat(88.0f) : x;
    Floats least = splat(-87.3f);
    Ints live = x > least;
    x = live ? x : least;
    const Ints n = to_nearest(x * 1.44269504088896341f);
    const Floats whole = to_floats(n);
    Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    Floats y = (p * r * r + r + 1.0f) * (Floats)((n + 127) << 23);
    return live ? y : splat(0.0f);
}

// tanh by the exponential: 1 - 2 / (e^2x + 1).
inline Floats hyperbolic_tangent(Floats x) {
    Floats bounded = x > 40.0f ? splat(40.0f) : x;
    return 1.0f - 2.0f / (exponential(bounded * 2.0f) + 1.0f);
}

}  // namespace ingle
