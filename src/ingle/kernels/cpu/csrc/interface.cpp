#include "operators.h"
#include "pool.h"

extern "C" void ingle_start(int32_t num_threads, const int32_t* cpus) { ingle::start_threads(num_threads, cpus); }
extern "C" const char* ingle_instructions() { return ingle::instructions(); }
extern "C" int64_t ingle_matrix_bytes(const ingle::Matrix* m) { return ingle::matrix_bytes(*m); }
extern "C" void ingle_pack_rows(const ingle::Matrix* m, const void* codes, const float* scales, const float* minima,
                                int64_t first, int64_t count) {
    ingle::pack_rows(*m, codes, scales, minima, first, count);
}
extern "C" void ingle_multiply(const ingle::Matrix* m, const float* x, int64_t num_tokens, float* y, int64_t y_stride) {
    ingle::multiply(*m, x, num_tokens, y, y_stride);
}
extern "C" void ingle_gather_rows(const ingle::Matrix* m, const int64_t* indices, int64_t count, float* out) {
    ingle::gather_rows(*m, indices, count, out);
}
