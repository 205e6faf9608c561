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
constexpr int32_t width(int32_t bits) { return bits < 0 ? -bits : bits; }

// Weight (r, c) is codebook[code] * scale + minimum, with scale and minimum those of row r and group c / group_size.
// Blocks of kBlockRows rows lie one after the other, the groups of a block too. A group holds its scales, then its minima
// if there are any, one a row, then codes in an order that the processor's product likes (`Codes` in codes.h).
// Rows and columns are padded to whole blocks and groups, by zeros.
struct Matrix {
    uint8_t* data;
    int64_t rows, columns;
    int32_t bits;            // of a code: 4; 8, a signed number; kFloat8; 16, a bfloat16 without scale; 32, a float32 without
    int32_t group_size;      // 16, or a multiple of 32 up to 128, columns
    int32_t wide_scales;     // 1: scales and minima are float32; 0: binary16
    int32_t has_minima;
    int8_t codebook[16];     // of 4-bit codes, these or those that float32 is decoded from
    const int32_t* order;    // [columns], which number of x each column is multiplied with; null for the same
    int64_t inputs;          // numbers of x: as many as columns, or fewer where columns that are zero name one again
};

// What products are made of, for people.
const char* instructions();

// What numbers, and codes of so many bits, are multiplied as, for people.
const char* factors(int32_t bits);

int64_t num_groups(const Matrix& m);
int64_t group_bytes(const Matrix& m);
int64_t matrix_bytes(const Matrix& m);

// Packs rows [first, first + count): of codes [count, columns], a byte (or bfloat16, or float32) each, and of scales and
// minima float32 [count, groups].
void pack_rows(const Matrix& m, const void* codes, const float* scales, const float* minima, int64_t first,
               int64_t count);

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
