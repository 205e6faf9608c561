// The activation of a gated MLP, and products that end with it.
#pragma once

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

inline Floats gated(Floats gate, Floats up, int32_t activation) {
    if (activation == kSwigluClamped) return swiglu_clamped(gate, up);
    const Floats activated = activation == kSilu
                                 ? gate / (1.0f + exponential(-gate))
                                 : 0.5f * gate * (1.0f + hyperbolic_tangent(0.7978845608f * (gate + 0.044715f * gate * gate * gate)));
    return activated * up;
}

// Where a product goes. With `gates` only the upper half of a matrix's rows has columns in y: what the activation makes of
// them and of the lower half.
struct Output {
    PerMatrix<float> y;
    bool gates = false;
    int32_t activation = kSilu;

    int64_t blocks(int64_t all) const { return gates ? all / 2 : all; }
};

// A token's numbers of a block's rows, of which there are `rows`, to y. `up`: those of the lower half, if it gates.
template <typename Numbers>
inline void put_block(const Output& out, const Numbers& numbers, const Numbers* up, float factor, int64_t rows, float* to) {
    for (int64_t i = 0; i * kLanes < rows; i++) {
        Floats values = rounded(load(numbers[i]) * factor);
        if (up) values = gated(values, rounded(load((*up)[i]) * factor), out.activation);
        const int64_t count = rows - i * kLanes;
        count >= kLanes ? store(to + i * kLanes, values) : store_part(to + i * kLanes, values, count);
    }
}

// Whether both halves of a matrix's rows are whole blocks.
inline bool can_gate(const Matrix& m) { return m.rows % (2 * kBlockRows) == 0; }

// y [num_tokens, y_stride]: what the activation makes of both halves of the product.
void multiply_gated(const Matrix& m, const float* x, int64_t num_tokens, int32_t activation, float* y, int64_t y_stride);

}  // namespace ingle
