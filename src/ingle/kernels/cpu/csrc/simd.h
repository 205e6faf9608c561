// Sixteen floats at a time, in whatever registers this machine has: the compiler splits them where they are narrower.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ingle {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

// What keys, values and scales are stored as.
struct Half { uint16_t bits; };      // IEEE binary16
struct Brain { uint16_t bits; };     // bfloat16

inline Floats splat(float x) { return x - Floats{}; }

inline Floats load(const float* p) {
    Floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline Floats load(const Brain* p) {
    Halves v;
    memcpy(&v, p, sizeof v);
    return (Floats)(__builtin_convertvector(v, Words) << 16);
}

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

inline void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }

inline void store(Brain* p, Floats v) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    for (int i = 0; i < 16; i++) p[i] = to_brain(v[i]);
#endif
}

#if defined(__AVX512F__)

inline Floats load(const Half* p) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void store(Half* p, Floats v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0)); }

#elif defined(__F16C__)

inline Floats load(const Half* p) {
    __m256 parts[2] = {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
                       _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
    Floats v;
    memcpy(&v, parts, sizeof v);
    return v;
}
inline void store(Half* p, Floats v) {
    __m256 parts[2];
    memcpy(parts, &v, sizeof v);
    for (int i = 0; i < 2; i++) _mm_storeu_si128((__m128i*)p + i, _mm256_cvtps_ph(parts[i], 0));
}

#elif defined(__aarch64__)

inline Floats load(const Half* p) {
    float32x4_t parts[4];
    for (int i = 0; i < 4; i++) parts[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p[4 * i].bits)));
    Floats v;
    memcpy(&v, parts, sizeof v);
    return v;
}
inline void store(Half* p, Floats v) {
    float32x4_t parts[4];
    memcpy(parts, &v, sizeof v);
    for (int i = 0; i < 4; i++) vst1_u16(&p[4 * i].bits, vreinterpret_u16_f16(vcvt_f16_f32(parts[i])));
}

#else
#error "this processor converts no 16-bit floats; ingle runs on PyTorch's operators here"
#endif

// The first n < 16 numbers at p, zeros after them; and their way back.
template <typename T>
inline Floats load_part(const T* p, int64_t n) {
    T padded[16] = {};
    memcpy(padded, p, n * sizeof(T));
    return load(padded);
}

template <typename T>
inline void store_part(T* p, Floats v, int64_t n) {
    T padded[16];
    store(padded, v);
    memcpy(p, padded, n * sizeof(T));
}

inline float to_float(Half x) {
    Half wide[16] = {x};
    return load(wide)[0];
}

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }

inline float sum(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int i = 0; i < 16; i++) total += v[i];
    return total;
#endif
}

// Lane i of the result is the sum of v[i].
inline Floats sums(const Floats* v) {
#if defined(__AVX512F__)
    // Neighbours are added, those of two vectors side by side: after four rounds one vector is left.
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
#else
    Floats total;
    for (int i = 0; i < 16; i++) total[i] = sum(v[i]);
    return total;
#endif
}

inline float maximum(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float most = v[0];
    for (int i = 1; i < 16; i++) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

// e^x for x <= 88, relative error below 2e-7; 0 below -87. Cephes' expf: 2^n times a polynomial on [-ln2/2, ln2/2].
inline Floats exponential(Floats x) {
    x = x > 88.0f ? splat(88.0f) : x;
    Floats least = splat(-87.3f);
    Ints live = x > least;
    x = live ? x : least;
    Floats scaled = x * 1.44269504088896341f;
    Ints n = __builtin_convertvector(scaled + (scaled < 0.0f ? splat(-0.5f) : splat(0.5f)), Ints);
    Floats whole = __builtin_convertvector(n, Floats);
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
