// What Python calls: C functions and the structures they take. `ingle.kernels.cpu.library` declares the same to ctypes.
#pragma once

#include <cstdint>

#include "gate.h"
#include "matrix.h"

namespace ingle {

enum Scoring : int32_t { kSoftmax = 0, kSigmoid = 1 };
enum KvType : int32_t { kFloat = 0, kHalf = 1, kBrain = 2, kInt8 = 3, kE4m3 = 4, kE5m2 = 5 };

struct Rotation {
    float* qkv;              // [num_tokens, num_heads + 2 * num_kv_heads, head_dim], rotated in place
    const float* cos_sin;    // [num_tokens, rotary_dim]
    const float* q_norm;     // [head_dim], or null
    const float* k_norm;
    void* keys;              // pages, as `kv.h` has them
    void* values;
    const int64_t* kv_places; // [num_tokens], each a place
    const float* query_factors;  // [num_tokens], of queries once they are rotated; or null
    int64_t num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim, page_size;
    float eps;
    int32_t kv_type;
};

struct Attention {
    const float* q;              // [num_tokens, num_heads, head_dim], rows q_stride apart
    const void* keys;            // pages, as `kv.h` has them
    const void* values;
    const int32_t* page_tables;  // [slots, pages_per_slot]
    const int64_t* slots;        // [num_seqs]
    const int64_t* kv_lengths;   // [num_seqs], keys of each sequence once this step's are in
    const int64_t* query_starts; // [num_seqs + 1], each sequence's first row of q
    float* out;                  // [num_tokens, num_heads, head_dim]
    int64_t num_seqs, num_heads, num_kv_heads, head_dim, page_size, pages_per_slot, q_stride;
    int64_t window;              // keys that a token sees at most; 0 for all
    float scale;
    float softcap;               // 0 for none
    int32_t kv_type;
    int32_t as_integers;         // prompts may be multiplied as 16-bit integers, which loses what binary16 does; else 0
    const float* sinks;          // [num_heads], each the score of a key whose value is zero; or null
};

struct Projection {
    const Matrix* const* parts;  // one below the other
    const float* bias;           // [rows], or null
    int64_t num_parts, rows;
};

// Experts in place of an MLP.
struct Mixture {
    const float* router;          // [num_experts, hidden_size]
    const float* router_bias;     // [num_experts], or null
    const float* selection_bias;  // [num_experts], or null
    const Projection* gate_up;    // of each expert
    const Projection* down;
    Projection shared_gate_up, shared_down;  // of the expert that all tokens pass; without parts where there is none
    const float* shared_gate;     // [hidden_size], or null
    int64_t num_experts, top_k, num_groups, topk_group, group_experts;
    float scaling;
    int32_t scoring, normalizes;
};

// Latent attention in place of that over keys and values: `ingle.kernels.reference_latent` says what is computed.
struct Latent {
    Projection q_down;                // to the queries' own latent; without parts where they have none
    Projection q_up;                  // from there, or from x: [num_heads, nope_dim + rope_dim]
    Projection kv_down;               // [rank + rope_dim]: the latent, and the key that all heads share
    const Matrix* const* key_up;      // of each head, [rank, nope_dim]: W_UK, transposed
    const Matrix* const* value_up;    // of each head, [value_dim, rank]: W_UV
    const float* q_norm;              // [q_down.rows], or null
    const float* kv_norm;             // [rank]
    int64_t num_heads, rank, nope_dim, rope_dim, value_dim;
    float eps;                        // of both norms
    int32_t interleaved;              // neighbours rotate together, not the two halves
};

struct Layer {
    Projection qkv, out, gate_up, down;
    const Latent* latent;         // in place of qkv, or null
    const Mixture* mixture;       // in place of gate_up and down, or null
    const float* sinks;           // [num_heads], or null
    const float *input_norm, *q_norm, *k_norm, *attention_post_norm, *mlp_norm, *mlp_post_norm;
    int64_t window;
    float scale, softcap, qk_eps;
    int32_t activation, rope;
};

struct Step {
    const Layer* layers;
    float* residual;              // [num_tokens, hidden_size], overwritten
    float* out;                   // [num_tokens, hidden_size], after the last norm; [num_wanted, hidden_size] with `wanted`
    const float* norm;            // the last
    void* kv_cache;               // [places, 2, ...], keys before values; or [places, 1, ...] of latents
    const int64_t* kv_places;      // [groups, num_tokens]
    const float* query_factors;   // [num_tokens], or null
    const float* cos_sin[2];      // of each rotation, [num_tokens, rotary_dim]
    int64_t rotary_dims[2];
    int64_t num_layers, num_tokens, hidden_size, layer_bytes;
    Attention attention;          // of any layer of the first group, but for what `Layer` says
    float eps;
    const int32_t* located;       // [num_layers, 2], each layer's group, and its place in the cache
    int64_t table_size;           // of the page tables of a group, which lie behind each other
    const int64_t* wanted;        // [num_wanted], in order: the tokens of which `out` is, of each sequence its last; null for all
    const int64_t* wanted_starts; // [num_seqs + 1], each sequence's first in `wanted`
    int64_t num_wanted;
};

// y [num_tokens, p.rows] = x times the matrix, plus the bias.
void project(const Projection& p, const float* x, int64_t num_tokens, float* y);

// out [num_tokens, p.rows / 2]: what the activation makes of both halves of the projection, for which `buffer` has room.
void project_gated(const Projection& p, const float* x, int64_t num_tokens, int32_t activation, float* buffer, float* out);

// What is added to the residual stream, and how the sum is normalized.
struct Addition {
    const float* x;
    const float* post_norm;  // x is normalized by it first; or null
    const float* norm;
    float eps;
};

// residual += x, and out is its norm, all [num_rows, size].
void add_and_normalize(const Addition& a, float* residual, int64_t num_rows, int64_t size, float* out);

// What a layer's attention gives for x [num_tokens, hidden_size], before its output projection: [num_tokens, num_heads,
// value_dim]. Writes the tokens' latents into `cache`, the layer's part of the KV cache.
void attend_latents(const Step& s, const Layer& layer, const float* x, void* cache, float* out);

// Norms the latents in down [num_tokens, rank + rope_dim] and rotates the keys after them, and writes both into `cache`.
// Rotates the last rope_dim numbers of each head in q, those of `Latent::q_up`, into the last of `queries`
// [num_tokens, num_heads, rank + rope_dim].
void rotate_and_store_latents(const Step& s, const Layer& layer, float* down, const float* q, void* cache,
                              float* queries);

// What the experts give for x [num_tokens, hidden_size].
void mix(const Mixture& m, int32_t activation, const float* x, int64_t num_tokens, int64_t hidden_size, float* out);

}  // namespace ingle

// How floats become codes: of so many bits (as `Matrix::bits`), with a scale for so many columns that is stored as binary16
// (0), bfloat16 (1) or float32 (2). Shares of a group's largest number that codes are to reach are tried.
struct IngleRounding {
    const float* ratios;
    int64_t num_ratios, group_size;
    int32_t bits, scale_type;
};

// All else is hidden: two libraries in one process, for different processors, must not share what has the same name.
#pragma GCC visibility push(default)
extern "C" {
// Bytes of Matrix, IngleRounding, Rotation, Attention, Projection, Mixture, Latent, Layer and Step, which Python holds its own against.
const int64_t* ingle_structure_sizes();
void ingle_start(int32_t num_threads);
uint64_t ingle_num_jobs();
void ingle_settle_memory();
const char* ingle_instructions();
const char* ingle_factors(const ingle::Matrix* m);
int64_t ingle_matrix_bytes(const ingle::Matrix* m);
void ingle_pack_rows(const ingle::Matrix* m, const void* codes, const float* scales, const float* minima,
                     const float* factors, int64_t first, int64_t count);
void ingle_pack_groups(const ingle::Matrix* m, const uint8_t* codes, int64_t row_bytes, const float* scales,
                       const float* minima, int64_t first, int64_t count);
// The same of rows [first, first + count) as GGUF stores them in blocks of a type (its number): row i is the stored row
// order[i], or i without an order; `grid` is that of types which have one (`ingle.weights.grids`). Returns 0 for a type that
// is not known.
int32_t ingle_pack_blocks(const ingle::Matrix* m, int32_t type, const uint8_t* stored, const uint16_t* grid, const int64_t* order,
                          int64_t first, int64_t count);
void ingle_multiply(const ingle::Matrix* m, const float* x, int64_t num_tokens, float* y, int64_t y_stride);
// Codes [rows, columns], a byte each, and scales and zeros [rows, groups] of values [rows, columns]; without `zeros`, codes'
// zero is the middle. `losses` [rows, 2] are the squared error and the sum of squares of each row; NaN for numbers that are
// not finite.
void ingle_round_rows(const IngleRounding* how, const float* values, int64_t rows, int64_t columns, uint8_t* codes,
                      float* scales, uint8_t* zeros, double* losses);
void ingle_gather_rows(const ingle::Matrix* m, const int64_t* indices, int64_t count, float* out);
void ingle_rms_norm(const float* x, const float* weight, float eps, int64_t num_rows, int64_t size, float* out);
void ingle_add_rms_norm(const float* x, float* residual, const float* weight, float eps, int64_t num_rows, int64_t size,
                        float* out);
void ingle_gated(const float* gate_up, int32_t activation, int64_t num_rows, int64_t size, float* out);
void ingle_rotate_and_store(const ingle::Rotation* r);
void ingle_attention(const ingle::Attention* a);
void ingle_mix(const ingle::Mixture* m, int32_t activation, const float* x, int64_t num_tokens, int64_t hidden_size,
               float* out);
void ingle_layers(const ingle::Step* step);
void ingle_sample_greedy(const float* logits, int64_t num_rows, int64_t vocab_size, int64_t* token_ids, uint8_t* finite);
}
#pragma GCC visibility pop
