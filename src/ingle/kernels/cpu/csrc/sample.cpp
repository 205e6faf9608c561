// The largest logit of each row, and whether all of a row are finite.
#include <cmath>

#include "operators.h"
#include "pool.h"
#include "simd.h"

using namespace ingle;

extern "C" void ingle_sample_greedy(const float* logits, int64_t num_rows, int64_t vocab_size, int64_t* token_ids,
                                    uint8_t* finite) {
    parallel_for(num_rows, [&](int64_t row) {
        const float* x = logits + row * vocab_size;
        Floats most = splat(x[0]), total = {};
        int64_t i = 0;
        for (; i + kLanes <= vocab_size; i += kLanes) {
            Floats v = load(x + i);
            most = v > most ? v : most;
            total += v * 0.0f;  // NaN if v is infinite or NaN
        }
        float largest = maximum(most), rest = sum(total);
        for (; i < vocab_size; i++) {
            largest = x[i] > largest ? x[i] : largest;
            rest += x[i] * 0.0f;
        }
        finite[row] = rest == 0.0f;
        token_ids[row] = 0;
        for (i = 0; i < vocab_size; i++)
            if (x[i] == largest) {
                token_ids[row] = i;
                break;
            }
    });
}
