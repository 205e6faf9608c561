// Products of codes with x in 8 bits: half as many instructions as with 16 bits take, at the price of what rounding
// leaves out. A token's numbers become integers of 8 bits under a scale for every 32 columns (16 where groups have so
// many), the largest being 127, as llama.cpp does it.
#pragma once

#include "gate.h"
#include "matrix.h"

namespace ingle {

// Whether the matrix asks for it, and this processor gains by it.
bool multiplies_bytes(const Matrix& m);

// `multiply_each` of matrices of which that is so.
void multiply_bytes(const Matrix* const* matrices, int64_t count, PerMatrix<const float> x, int64_t num_tokens,
                    const Output& out);

}  // namespace ingle
