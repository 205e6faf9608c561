// Matrices of floats to codes with scales: of each group the scale, and the zero, that leave the least squared error of
// several that are tried. The same by PyTorch is `ingle.weights.quantized.rounding_torch`, against which this is tested.
#include <cmath>
#include <vector>

#include "matrix.h"
#include "operators.h"
#include "pool.h"
#include "simd.h"

namespace ingle {
namespace {

// What scales are stored as.
constexpr int32_t kHalf = 0, kBrain = 1;

float stored(float scale, int32_t type) {
    if (type == kBrain) return to_float(to_brain(scale));
    if (type != kHalf) return scale;
    const float most = 65504;
    Half half[kLanes];
    store(half, splat(scale > most ? most : scale < -most ? -most : scale));
    return to_float(half[0]);
}

struct Trial {
    float scale = 0, zero = 0, error = INFINITY;
};

Floats bounded(Floats x, float least, float most) {
    x = x < least ? splat(least) : x;
    return x > most ? splat(most) : x;
}

// The nearest number of E4M3, ties to even.
Floats to_float8(Floats x) {
    const Words sign = (Words)x & 0x80000000u;
    const Floats magnitude = bounded((Floats)((Words)x & 0x7fffffffu), 0, 448);
    const Words bits = (Words)magnitude;
    const Floats usual = (Floats)((bits + 0x7ffff + (bits >> 20 & 1)) & 0xfff00000u);
    const Floats least = to_floats(to_nearest(magnitude * 512.0f)) * (1 / 512.0f);
    return (Floats)((Words)(magnitude < 0x1p-6f ? least : usual) | sign);
}

// The numbers that codes are tried for: codes less the zero, or what FP8 holds.
struct Rounding {
    float least, most;  // of codes
    bool is_float8;

    Floats operator()(Floats x, float zero) const {
        if (is_float8) return to_float8(x);
        return bounded(to_floats(to_nearest(x)), least - zero, most - zero);
    }
};

// A group's numbers, followed by zeros up to a whole vector.
struct Group {
    const float* values;
    int64_t count;

    // The error of a scale and a zero, and the scale that would be best for the codes that they give.
    Trial tried(const Rounding& round, float scale, float zero, float* better) const {
        const float per_unit = scale != 0 ? 1 / scale : 0;
        Floats error = {}, products = {}, squares = {};
        for (int64_t i = 0; i < count; i += kLanes) {
            const Floats w = load(values + i), q = round(w * per_unit, zero), off = w - q * scale;
            error += off * off, products += w * q, squares += q * q;
        }
        const float all = sum(squares);
        *better = all > 0 ? sum(products) / all : scale;
        return {scale, zero, sum(error)};
    }
};

// Tries a scale, and the one that its codes would like better.
void try_scale(const Group& group, const Rounding& round, int32_t type, float scale, float zero, Trial& best) {
    float better, again;
    scale = stored(scale, type);
    const Trial first = group.tried(round, scale, zero, &better);
    if (first.error < best.error) best = first;
    better = stored(better, type);
    if (better == scale || !std::isfinite(better)) return;
    const Trial second = group.tried(round, better, zero, &again);
    if (second.error < best.error) best = second;
}

uint8_t float8_code(float x) {
    const float magnitude = std::fabs(x);
    uint32_t bits;
    memcpy(&bits, &magnitude, 4);
    const uint32_t code = magnitude < 0x1p-6f ? (uint32_t)(magnitude * 512) : (bits >> 20) - (120 << 3);
    return code | (std::signbit(x) ? 128 : 0);
}

struct RoundedRow {
    uint8_t* codes;  // a byte each
    float* scales;
    uint8_t* zeros;  // or null
    double error, squares;
};

void round_group(const Group& group, int64_t count, const IngleRounding& how, uint8_t* codes, float* scale, uint8_t* zero,
                 RoundedRow& row) {
    const bool is_float8 = how.bits == kFloat8;
    const float least = 0, most = is_float8 ? 448 : (1 << how.bits) - 1, middle = is_float8 ? 0 : 1 << (how.bits - 1);
    const Rounding round = {least, most, is_float8};
    float low = 0, high = 0;
    double squares = 0;
    for (int64_t i = 0; i < count; i++) {
        const float w = group.values[i];
        low = w < low ? w : low, high = w > high ? w : high;
        squares += (double)w * w;
    }
    Trial best;
    const float magnitude = -low > high ? -low : high;
    const float levels = is_float8 ? 448 : middle - 1;
    for (int64_t i = 0; i < how.num_ratios; i++) {
        const float ratio = how.ratios[i];
        try_scale(group, round, how.scale_type, magnitude / levels * ratio, middle, best);
        if (!zero) continue;
        const float wide = (high - low) / most * ratio;
        const float at = wide > 0 ? std::nearbyint(-low * ratio / wide) : middle;
        try_scale(group, round, how.scale_type, wide, at < 0 ? 0 : at > most ? most : at, best);
    }
    if (!std::isfinite(squares)) best.error = NAN;
    *scale = best.scale;
    if (zero) *zero = (uint8_t)best.zero;
    row.error += best.error, row.squares += squares;
    const float per_unit = best.scale != 0 ? 1 / best.scale : 0;
    for (int64_t i = 0; i < count; i += kLanes) {
        float numbers[kLanes];
        store(numbers, round(load(group.values + i) * per_unit, best.zero));
        for (int64_t j = 0; j < kLanes && i + j < count; j++)
            codes[i + j] = is_float8 ? float8_code(numbers[j]) : (uint8_t)(numbers[j] + best.zero);
    }
}

}  // namespace
}  // namespace ingle

extern "C" void ingle_round_rows(const IngleRounding* how, const float* values, int64_t rows, int64_t columns,
                                 uint8_t* codes, float* scales, uint8_t* zeros, double* losses) {
    using namespace ingle;
    const int64_t size = how->group_size, groups = (columns + size - 1) / size;
    parallel_ranges(rows, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> padded(size + kLanes);
        for (int64_t r = begin; r < end; r++) {
            RoundedRow row = {codes + r * columns, scales + r * groups, zeros ? zeros + r * groups : nullptr, 0, 0};
            for (int64_t g = 0; g < groups; g++) {
                const int64_t first = g * size, left = columns - first, count = left < size ? left : size;
                std::fill(padded.begin(), padded.end(), 0.0f);
                memcpy(padded.data(), values + r * columns + first, count * sizeof(float));
                round_group({padded.data(), count}, count, *how, row.codes + first, row.scales + g,
                            row.zeros ? row.zeros + g : nullptr, row);
            }
            losses[2 * r] = row.error, losses[2 * r + 1] = row.squares;
        }
    });
}
