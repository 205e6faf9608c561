// Where a matrix has its blocks, spans, scales and codes, and how a product reads scales and fetches ahead.
#pragma once

#include "matrix.h"
#include "simd.h"

namespace ingle {

constexpr bool have_scales(int32_t bits) { return bits < 16; }

// Which need not become integers.
constexpr bool are_floats(int32_t bits) { return bits >= 16 || bits == kFloat8; }

inline int64_t span_groups(const Matrix& m) { return m.scales == kSteps ? kSpan / m.group_size : 1; }

inline int64_t num_spans(const Matrix& m) {
    const int64_t columns = span_groups(m) * m.group_size;
    return (m.columns + columns - 1) / columns;
}

inline int64_t factor_bytes(const Matrix& m) { return m.scales == kSteps ? kBlockRows * (m.has_minima ? 4 : 2) : 0; }

inline int64_t scale_bytes(const Matrix& m) {  // of a group's scales
    return have_scales(m.bits) ? kBlockRows * (m.scales == kSteps ? 1 : m.scales == kWide ? 4 : 2) : 0;
}

inline int64_t scales_bytes(const Matrix& m) {  // and of its minima
    return scale_bytes(m) + (!m.has_minima ? 0 : m.has_minima == kInScales ? kBlockRows : scale_bytes(m));
}

inline int64_t code_bytes(const Matrix& m) { return kBlockRows * m.group_size * width(m.bits) / 8; }  // of a group

inline int64_t codes_offset(const Matrix& m) { return factor_bytes(m) + span_groups(m) * scales_bytes(m); }

inline int64_t span_bytes(const Matrix& m) { return codes_offset(m) + span_groups(m) * code_bytes(m); }

inline int64_t num_blocks(const Matrix& m) { return (m.rows + kBlockRows - 1) / kBlockRows; }

inline uint8_t* span_at(const Matrix& m, int64_t block, int64_t span) {
    return m.data + (block * num_spans(m) + span) * span_bytes(m);
}

struct ScaleAndMinimum {
    Floats scale, minimum;
};

// Those of a vector of rows.
inline __attribute__((always_inline)) ScaleAndMinimum load_scales(const Matrix& m, const uint8_t* factors,
                                                                  const uint8_t* at, int vector) {
    const int64_t first = vector * kLanes;
    if (m.scales == kSteps) {
        const Floats scale = to_floats(load((const int8_t*)at + first)) * load((const Half*)factors + first);
        if (!m.has_minima) return {scale, Floats{}};
        const int8_t* minima = (const int8_t*)at + kBlockRows + first;
        return {scale, to_floats(load(minima)) * load((const Half*)factors + kBlockRows + first)};
    }
    const bool wide = m.scales == kWide;
    const uint8_t* minima = at + kBlockRows * (wide ? 4 : 2);
    const Floats scale = wide ? load((const float*)at + first) : load((const Half*)at + first);
    if (!m.has_minima) return {scale, Floats{}};
    if (m.has_minima == kInScales) return {scale, -to_floats(load((const int8_t*)minima + first)) * scale};
    return {scale, wide ? load((const float*)minima + first) : load((const Half*)minima + first)};
}

// Enough ahead of their use for weights to arrive from memory: the processor does not look so far by itself.
constexpr int64_t kAhead = 5120;

// Blocks of which a piece of a product with few tokens is made at most: bytes that take a thread some ten microseconds.
inline int64_t most_blocks(const Matrix& m) {
    const int64_t most = (256 << 10) / (num_spans(m) * span_bytes(m));
    return most > 1 ? most : 1;
}

// Into how many parts the tiles of tokens are divided where blocks alone are too few to share out evenly.
inline int64_t num_segments(int64_t blocks, int64_t tiles, int64_t threads) {
    constexpr int64_t least = 8;  // tiles of a part: a block may be expanded anew for each
    const int64_t wanted = threads > 1 ? threads * 32 / blocks : 1, most = tiles / least, segments = wanted < most ? wanted : most;
    return segments > 1 ? segments : 1;
}

template <int64_t Bytes>
inline void prefetch(const uint8_t* p) {
#pragma GCC unroll 64
    for (int64_t i = 0; i < Bytes; i += 64) __builtin_prefetch(p + i);
}

}  // namespace ingle
