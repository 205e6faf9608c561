// Matrices of weights as they are stored: codes of 4 or 8 bits with a scale for each group of columns, or floats.
#pragma once

#include <cstdint>

#include "simd.h"

namespace ingle {

constexpr int64_t kBlockRows = kLanes < 8 ? 16 : 2 * kLanes;  // of weights (outputs), which a product computes together
constexpr int64_t kUnit = 16;                                 // columns of weights (inputs) that are unpacked together

// What `Matrix::bits` says of codes of 8 bits that are floats (E4M3) with scales.
constexpr int32_t kFloat8 = -8;

// The bits that a code takes.
constexpr int32_t width(int32_t bits) {
#if defined(__x86_64__)
    return bits < 0 ? -bits : bits;
#else
    return bits == 5 || bits == 6 ? 8 : bits < 0 ? -bits : bits;
#endif
}

// What `Matrix::scales` says.
constexpr int32_t kHalves = 0;  // scales and minima are binary16
constexpr int32_t kWide = 1;    // float32
constexpr int32_t kSteps = 2;   // signed integers of 8 bits, which are multiplied with factors, binary16, of kSpan columns

// What `Matrix::has_minima` says beside 0 and 1: minima are whole numbers from -127 to 128 times the scale, and lie as what
// these are less than 0, 8 bits.
constexpr int32_t kInScales = 2;

constexpr int64_t kSpan = 256;

// Weight (r, c) is unit * (codebook[code] * scale + minimum), with scale and minimum those of row r and group c / group_size.
// Blocks of kBlockRows rows lie one after the other, the spans of a block too: kSpan columns where scales are steps, else
// one group. A span holds its factors if it has any, those of scales and then those of minima; then of each group the
// scales and the minima, if there are any; then the groups' codes in an order that the processor's product likes (`Codes`
// in codes.h). All but codes are one a row. Rows and columns are padded to whole blocks and spans, by zeros.
struct Matrix {
    uint8_t* data;
    int64_t rows, columns;
    int32_t bits;            // of a code: 4, 5, 6; 8, a signed number; kFloat8; 16, a bfloat16 without scale; 32, a float32
    int32_t group_size;      // 16, or a multiple of 32 up to 128, columns
    int32_t scales;
    int32_t has_minima;
    int16_t codebook[16];    // of 4-bit codes, these or those that float32 is decoded from; of 5 and 6 bits the least number
    const int32_t* order;    // [columns], which number of x each column is multiplied with; null for the same
    float unit;              // what all weights are multiplied with; of codes alone
    int64_t inputs;          // numbers of x: as many as columns, or fewer where columns that are zero name one again
    int32_t operand_bits;    // 8: x may be rounded to so many bits for the product of codes (bytes.h); else 16
};

// What products are made of, for people.
const char* instructions();

// What the matrix and x are multiplied as, for people.
const char* factors(const Matrix& m);

int64_t num_groups(const Matrix& m);
int64_t matrix_bytes(const Matrix& m);

// Packs rows [first, first + count): of codes [count, columns], a byte (or bfloat16, or float32) each, those of 5 and more
// bits signed, and of scales and minima, or their steps, float32 [count, groups]. `factors` of steps are float32
// [count, spans, 2], the scales' and the minima's; else null.
void pack_rows(const Matrix& m, const void* codes, const float* scales, const float* minima, const float* factors,
               int64_t first, int64_t count);

// The same of rows that lie row_bytes apart, by several threads: two codes of 4 bits to a byte, the first in its lower
// half; others a byte each, of which those of 8 bits are 128 more than the numbers that they stand for.
void pack_groups(const Matrix& m, const uint8_t* codes, int64_t row_bytes, const float* scales, const float* minima,
                 int64_t first, int64_t count);

// y[t, r] = sum of x[t, c] * weight (r, c): float32 x [num_tokens, columns], y [num_tokens, y_stride] from its start.
void multiply(const Matrix& m, const float* x, int64_t num_tokens, float* y, int64_t y_stride);

// The numbers of each token for each of several matrices: those of matrix i begin at data + t * token + i * matrix.
template <typename T>
struct PerMatrix {
    T* data;
    int64_t token, matrix;
};

// The same with matrices of one shape and kind, each of which multiplies numbers of its own.
void multiply_each(const Matrix* const* matrices, int64_t count, PerMatrix<const float> x, int64_t num_tokens,
                   PerMatrix<float> y);

// Rows of the matrix as float32 [count, columns].
void gather_rows(const Matrix& m, const int64_t* indices, int64_t count, float* out);

}  // namespace ingle
