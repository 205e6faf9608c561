#ifdef __linux__
#include <malloc.h>
#endif

#include "operators.h"
#include "pool.h"

extern "C" const int64_t* ingle_structure_sizes() {
    using namespace ingle;
    static constexpr int64_t sizes[] = {sizeof(Matrix),     sizeof(IngleRounding), sizeof(Rotation),
                                        sizeof(Attention),  sizeof(Projection),    sizeof(Mixture),
                                        sizeof(Latent),     sizeof(Layer),         sizeof(Step)};
    return sizes;
}
extern "C" void ingle_start(int32_t num_threads) { ingle::start_threads(num_threads); }
extern "C" void ingle_settle_memory() {
#ifdef __GLIBC__
    malloc_trim(0);
    // A step's tensors are freed and wanted again by the next. Given back to the system in between, as larger ones are,
    // their pages would be zeroed anew each time.
    mallopt(M_MMAP_THRESHOLD, 64 << 20);
    mallopt(M_TRIM_THRESHOLD, 128 << 20);
#endif
}
extern "C" uint64_t ingle_num_jobs() { return ingle::num_jobs(); }
extern "C" const char* ingle_instructions() { return ingle::instructions(); }
extern "C" const char* ingle_factors(const ingle::Matrix* m) { return ingle::factors(*m); }
extern "C" int64_t ingle_matrix_bytes(const ingle::Matrix* m) { return ingle::matrix_bytes(*m); }
extern "C" void ingle_pack_rows(const ingle::Matrix* m, const void* codes, const float* scales, const float* minima,
                                const float* factors, int64_t first, int64_t count) {
    ingle::pack_rows(*m, codes, scales, minima, factors, first, count);
}
extern "C" void ingle_pack_groups(const ingle::Matrix* m, const uint8_t* codes, int64_t row_bytes, const float* scales,
                                  const float* minima, int64_t first, int64_t count) {
    ingle::pack_groups(*m, codes, row_bytes, scales, minima, first, count);
}
extern "C" void ingle_multiply(const ingle::Matrix* m, const float* x, int64_t num_tokens, float* y, int64_t y_stride) {
    ingle::multiply(*m, x, num_tokens, y, y_stride);
}
extern "C" void ingle_gather_rows(const ingle::Matrix* m, const int64_t* indices, int64_t count, float* out) {
    ingle::gather_rows(*m, indices, count, out);
}
