// The activation of a gated MLP, and products that end with it.
#pragma once

#include <type_traits>

#include "matrix.h"
#include "simd.h"

namespace ingle {

enum Activation : int32_t { kSilu = 0, kGeluTanh = 1, kSwigluClamped = 2 };

// gpt-oss': gate * sigmoid(1.702 * gate) * (up + 1), of numbers that are cut off at 7. What is no number stays none.
inline Floats swiglu_clamped(Floats gate, Floats up) {
    constexpr float kLimit = 7.0f, kGain = 1.702f;
    gate = gate > kLimit ? splat(kLimit) : gate;
    up = up > kLimit ? splat(kLimit) : up;
    up = up < -kLimit ? splat(-kLimit) : up;
    return gate / (1.0f + exponential(-kGain * gate)) * (up + 1.0f);
}

// What the activation makes of a gate, times `up`. GELU by its tanh, of which (1 + tanh u) / 2 is 1 / (1 + e^-2u).
template <Activation A>
inline Floats gated(Floats gate, Floats up) {
    if (A == kSwigluClamped) return swiglu_clamped(gate, up);
    const Floats x = A == kSilu ? gate : gate * (1.5957691216f + 0.0713548163f * gate * gate);
    return gate / (1.0f + exponential(-x)) * up;
}

// body(activation), where that is a constant.
template <typename Body>
inline void with_activation(int32_t activation, const Body& body) {
    if (activation == kSilu) body(std::integral_constant<Activation, kSilu>());
    else if (activation == kGeluTanh) body(std::integral_constant<Activation, kGeluTanh>());
    else body(std::integral_constant<Activation, kSwigluClamped>());
}

// Where a product goes. With `gates` only the upper half of a matrix's rows has columns in y: what the activation makes of
// them and of the lower half.
struct Output {
    PerMatrix<float> y;
    bool gates = false;
    int32_t activation = kSilu;

    int64_t blocks(int64_t all) const { return gates ? all / 2 : all; }
};

// A tile's numbers of a block's rows, of which there are `rows`, times factor(token), to y. `up`: those of the lower half, if
// it gates.
template <typename Numbers, typename Factor>
inline void put_tile(const Output& out, const Numbers* numbers, const Numbers* up, int64_t tokens, const Factor& factor,
                     int64_t rows, float* y) {
    const auto put_all = [&](const auto& value) {  // value(token, vector)
        for (int64_t t = 0; t < tokens; t++, y += out.y.token) {
            if (rows == kBlockRows) {
#pragma GCC unroll 4
                for (int i = 0; i < kBlockRows / kLanes; i++) store(y + i * kLanes, value(t, i));
                continue;
            }
            for (int64_t i = 0; i * kLanes < rows; i++) {
                const int64_t count = rows - i * kLanes;
                count >= kLanes ? store(y + i * kLanes, value(t, i)) : store_part(y + i * kLanes, value(t, i), count);
            }
        }
    };
    const auto scaled = [&](const Numbers* of, int64_t t, int64_t i) { return rounded(load(of[t][i]) * factor(t)); };
    if (!up) return put_all([&](int64_t t, int64_t i) { return scaled(numbers, t, i); });
    with_activation(out.activation, [&](auto activation) {
        put_all([&](int64_t t, int64_t i) { return gated<activation>(scaled(numbers, t, i), scaled(up, t, i)); });
    });
}

// Whether both halves of a matrix's rows are whole blocks.
inline bool can_gate(const Matrix& m) { return m.rows % (2 * kBlockRows) == 0; }

// y [num_tokens, y_stride]: what the activation makes of both halves of the product.
void multiply_gated(const Matrix& m, const float* x, int64_t num_tokens, int32_t activation, float* y, int64_t y_stride);

}  // namespace ingle
