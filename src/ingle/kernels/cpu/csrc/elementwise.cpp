// Norms, gated activations, and the rotation of queries and keys: `ingle.kernels.reference` says what each computes.
#include <cmath>
#include <vector>

#include "kv.h"
#include "operators.h"
#include "pool.h"
#include "simd.h"

namespace ingle {
namespace {

// Tokens that are worth waking other threads for.
constexpr int64_t kLeastRows = 8;

template <typename Body>
void for_each_vector(int64_t size, const Body& body) {  // body(offset, how many of kLanes)
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) body(i, kLanes);
    if (i < size) body(i, size - i);
}

Floats read(const float* p, int64_t count) { return count == kLanes ? load(p) : load_part(p, count); }

template <typename T>
void write(T* p, Floats v, int64_t count) {
    count == kLanes ? store(p, v) : store_part(p, v, count);
}

// x / rms(x) * weight, in place or not.
void normalize(const float* x, const float* weight, float eps, int64_t size, float* out) {
    Floats squares = {};
    for_each_vector(size, [&](int64_t i, int64_t n) {
        Floats v = read(x + i, n);
        squares += v * v;
    });
    float factor = 1.0f / std::sqrt(sum(squares) / size + eps);
    for_each_vector(size, [&](int64_t i, int64_t n) {
        write(out + i, read(x + i, n) * factor * read(weight + i, n), n);
    });
}

// The first 2 * half dimensions of a head, turned by cos_sin [2 * half].
void rotate(float* head, const float* cos_sin, int64_t half) {
    for_each_vector(half, [&](int64_t i, int64_t n) {
        Floats cosine = read(cos_sin + i, n), sine = read(cos_sin + half + i, n);
        Floats first = read(head + i, n), second = read(head + half + i, n);
        write(head + i, first * cosine - second * sine, n);
        write(head + half + i, second * cosine + first * sine, n);
    });
}

void scale(float* x, float factor, int64_t size) {
    for_each_vector(size, [&](int64_t i, int64_t n) { write(x + i, read(x + i, n) * factor, n); });
}

template <typename T>
void copy_head(const float* head, int64_t size, T* out) {
    for_each_vector(size, [&](int64_t i, int64_t n) { write(out + i, read(head + i, n), n); });
}

// A key or value on its way to a token's place, an index over pages.
template <typename T>
void put_head(const Rotation& r, const float* head, void* side, int64_t kv_head, int64_t place) {
    const Pages<T> pages = {(uint8_t*)side, r.page_size, r.num_kv_heads, r.head_dim, kv_head};
    const int64_t page = place / r.page_size, offset = place % r.page_size;
    if constexpr (kCoded<T>) *pages.scales(page, offset) = encode(head, r.head_dim, pages.numbers(page, offset));
    else copy_head(head, r.head_dim, pages.numbers(page, offset));
}

template <typename T>
void rotate_and_store(const Rotation& r) {
    int64_t num_kv_heads = r.num_kv_heads, num_heads = r.num_heads, size = r.head_dim;
    parallel_ranges(r.num_tokens, kLeastRows, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) {
            float* head = r.qkv + t * (num_heads + 2 * num_kv_heads) * size;
            const float* cos_sin = r.cos_sin + t * r.rotary_dim;
            for (int64_t h = 0; h < num_heads + num_kv_heads; h++, head += size) {
                const float* weight = h < num_heads ? r.q_norm : r.k_norm;
                if (weight) normalize(head, weight, r.eps, size, head);
                rotate(head, cos_sin, r.rotary_dim / 2);
                if (h < num_heads && r.query_factors) scale(head, r.query_factors[t], size);
                if (h >= num_heads) put_head<T>(r, head, r.keys, h - num_heads, r.kv_places[t]);
            }
            for (int64_t h = 0; h < num_kv_heads; h++, head += size)
                put_head<T>(r, head, r.values, h, r.kv_places[t]);
        }
    });
}

// Pairs that rotate together, from neighbours to the same place in each half, or as they are; then turned.
void rotate_pairs(const float* from, const float* cos_sin, int64_t half, bool interleaved, float* to) {
    for (int64_t i = 0; i < half; i++) {
        to[i] = from[interleaved ? 2 * i : i];
        to[half + i] = from[interleaved ? 2 * i + 1 : half + i];
    }
    rotate(to, cos_sin, half);
}

template <typename T>
void rotate_and_store_latents(const Step& s, const Layer& layer, float* down, const float* q, T* cache, float* queries) {
    const Latent& l = *layer.latent;
    const int64_t width = l.rank + l.rope_dim, q_width = l.nope_dim + l.rope_dim, half = l.rope_dim / 2;
    parallel_ranges(s.num_tokens, kLeastRows, [&](int64_t begin, int64_t end) {
        std::vector<float> key(l.rope_dim);
        for (int64_t t = begin; t < end; t++) {
            const float* cos_sin = s.cos_sin[layer.rope] + t * l.rope_dim;
            float* latent = down + t * width;
            T* place = cache + s.kv_places[t] * width;
            normalize(latent, l.kv_norm, l.eps, l.rank, latent);
            copy_head(latent, l.rank, place);
            rotate_pairs(latent + l.rank, cos_sin, half, l.interleaved, key.data());
            copy_head(key.data(), l.rope_dim, place + l.rank);
            for (int64_t h = t * l.num_heads; h < (t + 1) * l.num_heads; h++)
                rotate_pairs(q + h * q_width + l.nope_dim, cos_sin, half, l.interleaved, queries + h * width + l.rank);
        }
    });
}

}  // namespace

void add_and_normalize(const Addition& a, float* residual, int64_t num_rows, int64_t size, float* out) {
    parallel_ranges(num_rows, kLeastRows, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const float* from = a.x + row * size;
            float *to = residual + row * size, *normed = out + row * size;
            if (a.post_norm) {  // `out` has it meanwhile
                normalize(from, a.post_norm, a.eps, size, normed);
                from = normed;
            }
            for_each_vector(size, [&](int64_t i, int64_t n) { write(to + i, read(to + i, n) + read(from + i, n), n); });
            normalize(to, a.norm, a.eps, size, normed);
        }
    });
}

void rotate_and_store_latents(const Step& s, const Layer& layer, float* down, const float* q, void* cache,
                              float* queries) {
    const int32_t kv_type = s.attention.kv_type;
    if (kv_type == kHalf) return rotate_and_store_latents(s, layer, down, q, (Half*)cache, queries);
    if (kv_type == kBrain) return rotate_and_store_latents(s, layer, down, q, (Brain*)cache, queries);
    rotate_and_store_latents(s, layer, down, q, (float*)cache, queries);
}

}  // namespace ingle

using namespace ingle;

extern "C" void ingle_rms_norm(const float* x, const float* weight, float eps, int64_t num_rows, int64_t size,
                               float* out) {
    parallel_ranges(num_rows, kLeastRows, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++)
            normalize(x + row * size, weight, eps, size, out + row * size);
    });
}

extern "C" void ingle_add_rms_norm(const float* x, float* residual, const float* weight, float eps, int64_t num_rows,
                                   int64_t size, float* out) {
    add_and_normalize({x, nullptr, weight, eps}, residual, num_rows, size, out);
}

extern "C" void ingle_gated(const float* gate_up, int32_t activation, int64_t num_rows, int64_t size, float* out) {
    parallel_ranges(num_rows, kLeastRows, [&](int64_t begin, int64_t end) {
        with_activation(activation, [&](auto kind) {
            for (int64_t row = begin; row < end; row++) {
                const float* gate = gate_up + row * 2 * size;
                for_each_vector(size, [&](int64_t i, int64_t n) {
                    write(out + row * size + i, gated<kind>(read(gate + i, n), read(gate + size + i, n)), n);
                });
            }
        });
    });
}

extern "C" void ingle_rotate_and_store(const Rotation* r) {
    with_kv_type(r->kv_type, [&](auto number) { rotate_and_store<decltype(number)>(*r); });
}
