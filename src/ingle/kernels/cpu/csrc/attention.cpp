// Causal attention of a step's tokens to the cached keys of their own sequences, read where they lie in their pages.
//
// Both kinds of work pass over the keys once, rescaling as larger scores turn up (https://arxiv.org/abs/2205.14135):
// a decoding sequence's few rows take dot products with each key; a prompt's many rows share blocks of 32 keys.
#include <cmath>
#include <vector>

#include "operators.h"
#include "pool.h"
#include "simd.h"

namespace ingle {
namespace {

constexpr int64_t kBlock = 32;        // keys, or dimensions of a head, that a tile of rows meets at once
constexpr int64_t kTileRows = 12;     // rows of a tile: 24 sums fit the registers of AVX-512
constexpr int64_t kQueries = 16;      // prompt tokens of one piece of work
constexpr int64_t kSplitKeys = 256;   // a decoding sequence's keys are shared out in pieces no smaller
constexpr float kNothing = -1e30f;    // below every score

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// A head's numbers as float32, zeros up to a whole number of blocks.
template <typename T>
void read_head(const T* from, int64_t size, int64_t padded, float* to) {
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) store(to + i, load(from + i));
    if (i < size) {
        store(to + i, load_part(from + i, size - i));
        i += 16;
    }
    for (; i < padded; i += 16) store(to + i, Floats{});
}

// Addresses of the keys and values of positions [first, first + count), count <= 32; beyond, those of the last.
template <typename T>
struct Places {
    const T* keys[kBlock];
    const T* values[kBlock];

    Places(const Attention& a, int64_t seq, int64_t kv_head, int64_t first, int64_t count) {
        const int32_t* page = a.page_tables + a.slots[seq] * a.pages_per_slot + first / a.page_size;
        int64_t offset = first % a.page_size, stride = a.num_kv_heads * a.head_dim;
        int64_t at = (*page * a.page_size + offset) * stride + kv_head * a.head_dim;
        for (int64_t j = 0; j < kBlock; j++) {
            keys[j] = (const T*)a.keys + at;
            values[j] = (const T*)a.values + at;
            if (j + 1 >= count) continue;
            at += stride;
            if (++offset == a.page_size) {
                offset = 0;
                at = *++page * a.page_size * stride + kv_head * a.head_dim;
            }
        }
    }

    // The strides are too long, and the pages too short, for the processor to see what comes next.
    void prefetch(int64_t size) const {
        for (int64_t j = 0; j < kBlock; j++)
            for (int64_t i = 0; i < size; i += 64 / (int64_t)sizeof(T)) {
                __builtin_prefetch(keys[j] + i);
                __builtin_prefetch(values[j] + i);
            }
    }
};

// Sums over the keys seen so far, weighted by e^(score - largest).
struct Running {
    float largest = kNothing;
    float total = 0;
};

void rescale(float* out, int64_t size, float factor) {
    for (int64_t i = 0; i < size; i += 16) store(out + i, load(out + i) * factor);
}

// Scores of keys to weights in place; `out` and `running` are rescaled to the new largest score.
void weigh(float* scores, int64_t count, Running& running, float* out, int64_t size) {
    for (int64_t i = count; i < round_up(count, 16); i++) scores[i] = kNothing;
    float largest = running.largest;
    for (int64_t i = 0; i < count; i += 16) {
        float most = maximum(load(scores + i));
        if (most > largest) largest = most;
    }
    if (largest > running.largest) {
        float factor = std::exp(running.largest - largest);
        rescale(out, size, factor);
        running.total *= factor;
        running.largest = largest;
    }
    Floats total = {};
    for (int64_t i = 0; i < count; i += 16) {
        Floats weights = exponential(load(scores + i) - largest);
        store(scores + i, weights);
        total += weights;
    }
    running.total += sum(total);
}

// ---- decoding sequences

constexpr int64_t kGroup = 8;  // heads of a group that pass over the keys together

// Scores, weights and weighted values of a block of keys at a time. q and out: [Heads][padded head_dim].
template <typename T, int Heads>
void attend_few(const Attention& a, int64_t seq, int64_t kv_head, int64_t first, int64_t end, const float* q,
                Running* running, float* out) {
    const int64_t size = a.head_dim, padded = round_up(size, 16), whole = size / 16 * 16;
    Places<T> ahead(a, seq, kv_head, first, end - first < kBlock ? end - first : kBlock);
    for (int64_t at = first; at < end; at += kBlock) {
        const int64_t count = end - at < kBlock ? end - at : kBlock, rounded = round_up(count, 16);
        const Places<T> places = ahead;
        if (at + kBlock < end) {
            const int64_t left = end - at - kBlock;
            ahead = Places<T>(a, seq, kv_head, at + kBlock, left < kBlock ? left : kBlock);
            ahead.prefetch(size);
        }
        Floats products[Heads][kBlock];
        for (int64_t j = 0; j < rounded; j++) {
            Floats dots[Heads] = {};
            for (int64_t i = 0; i < padded; i += 16) {
                Floats key = i < whole ? load(places.keys[j] + i) : load_part(places.keys[j] + i, size - i);
#pragma GCC unroll 8
                for (int h = 0; h < Heads; h++) dots[h] += load(q + h * padded + i) * key;
            }
#pragma GCC unroll 8
            for (int h = 0; h < Heads; h++) products[h][j] = dots[h];
        }
        alignas(64) float weights[Heads][kBlock];
        for (int h = 0; h < Heads; h++) {
            for (int64_t j = 0; j < rounded; j += 16) {
                Floats scores = sums(products[h] + j) * a.scale;
                if (a.softcap > 0) scores = a.softcap * hyperbolic_tangent(scores / a.softcap);
                store(weights[h] + j, scores);
            }
            weigh(weights[h], count, running[h], out + h * padded, padded);
        }
        for (int64_t i = 0; i < padded; i += 16) {
            Floats totals[Heads];
#pragma GCC unroll 8
            for (int h = 0; h < Heads; h++) totals[h] = load(out + h * padded + i);
            for (int64_t j = 0; j < count; j++) {
                Floats value = i < whole ? load(places.values[j] + i) : load_part(places.values[j] + i, size - i);
#pragma GCC unroll 8
                for (int h = 0; h < Heads; h++) totals[h] += value * weights[h][j];
            }
#pragma GCC unroll 8
            for (int h = 0; h < Heads; h++) store(out + h * padded + i, totals[h]);
        }
    }
}

// Keys [first, end) for all heads of a group: out [heads][padded head_dim], sums of weighted values.
template <typename T>
void attend_group(const Attention& a, int64_t seq, int64_t kv_head, int64_t first, int64_t end, Running* running,
                  float* out) {
    const int64_t group = a.num_heads / a.num_kv_heads, padded = round_up(a.head_dim, 16);
    static thread_local std::vector<float> q;
    q.resize(group * padded);
    for (int64_t h = 0; h < group; h++) {
        const float* from = a.q + a.query_starts[seq] * a.q_stride + (kv_head * group + h) * a.head_dim;
        read_head(from, a.head_dim, padded, q.data() + h * padded);
        running[h] = Running();
    }
    memset(out, 0, group * padded * sizeof(float));
    for (int64_t h = 0; h < group; h += kGroup) {
        static constexpr decltype(&attend_few<T, 1>) few[kGroup] = {
            attend_few<T, 1>, attend_few<T, 2>, attend_few<T, 3>, attend_few<T, 4>,
            attend_few<T, 5>, attend_few<T, 6>, attend_few<T, 7>, attend_few<T, 8>};
        int64_t heads = group - h < kGroup ? group - h : kGroup;
        few[heads - 1](a, seq, kv_head, first, end, q.data() + h * padded, running + h, out + h * padded);
    }
}

// Joins the pieces of one sequence and head, and writes the quotient.
void join(const Attention& a, int64_t seq, int64_t kv_head, int64_t num_pieces, const Running* running,
          const float* parts) {
    const int64_t group = a.num_heads / a.num_kv_heads, size = a.head_dim, padded = round_up(size, 16);
    for (int64_t h = 0; h < group; h++) {
        float largest = kNothing, total = 0;
        for (int64_t p = 0; p < num_pieces; p++)
            if (running[p * group + h].largest > largest) largest = running[p * group + h].largest;
        float* out = a.out + (a.query_starts[seq] * a.num_heads + kv_head * group + h) * size;
        for (int64_t i = 0; i < size; i++) out[i] = 0;
        for (int64_t p = 0; p < num_pieces; p++) {
            float factor = std::exp(running[p * group + h].largest - largest);
            total += running[p * group + h].total * factor;
            for (int64_t i = 0; i < size; i++) out[i] += parts[(p * group + h) * padded + i] * factor;
        }
        for (int64_t i = 0; i < size; i++) out[i] /= total;
    }
}

template <typename T>
void attend_decodes(const Attention& a, const std::vector<int64_t>& seqs) {
    const int64_t group = a.num_heads / a.num_kv_heads, padded = round_up(a.head_dim, 16);
    const int64_t num_pairs = (int64_t)seqs.size() * a.num_kv_heads;
    int64_t longest = 0;
    for (int64_t seq : seqs) longest = a.kv_lengths[seq] > longest ? a.kv_lengths[seq] : longest;
    if (a.window && longest > a.window) longest = a.window;
    int64_t num_pieces = (num_threads() * 4 + num_pairs - 1) / num_pairs, most = (longest + kSplitKeys - 1) / kSplitKeys;
    if (num_threads() == 1 || num_pairs >= num_threads() * 4) num_pieces = 1;
    if (num_pieces > most) num_pieces = most;
    std::vector<Running> running(num_pairs * num_pieces * group);
    std::vector<float> parts(num_pairs * num_pieces * group * padded);
    parallel_for(num_pairs * num_pieces, [&](int64_t index) {
        int64_t pair = index / num_pieces, piece = index % num_pieces, seq = seqs[pair / a.num_kv_heads];
        int64_t end = a.kv_lengths[seq], first = a.window && end > a.window ? end - a.window : 0;
        int64_t step = round_up((end - first + num_pieces - 1) / num_pieces, 16);
        int64_t from = first + piece * step, to = from + step < end ? from + step : end;
        attend_group<T>(a, seq, pair % a.num_kv_heads, from, to, &running[index * group], &parts[index * group * padded]);
    });
    for (int64_t pair = 0; pair < num_pairs; pair++)
        join(a, seqs[pair / a.num_kv_heads], pair % a.num_kv_heads, num_pieces, &running[pair * num_pieces * group],
             &parts[pair * num_pieces * group * padded]);
}

// ---- prompts

// c[12][32] += or = a[12][depth] * b[depth][32].
void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c, int64_t c_stride,
                   bool adds) {
#ifdef __AVX512F__
    constexpr int64_t rows = kTileRows;
#else
    constexpr int64_t rows = 2;
#endif
    for (int64_t r = 0; r < kTileRows; r += rows) {
        Floats sums[rows][2];
#pragma GCC unroll 12
        for (int64_t i = 0; i < rows; i++)
            for (int64_t half = 0; half < 2; half++)
                sums[i][half] = adds ? load(c + (r + i) * c_stride + half * 16) : Floats{};
        for (int64_t k = 0; k < depth; k++) {
            Floats b0 = load(b + k * kBlock), b1 = load(b + k * kBlock + 16);
#pragma GCC unroll 12
            for (int64_t i = 0; i < rows; i++) {
                float factor = a[(r + i) * a_stride + k];
                sums[i][0] += b0 * factor;
                sums[i][1] += b1 * factor;
            }
        }
#pragma GCC unroll 12
        for (int64_t i = 0; i < rows; i++)
            for (int64_t half = 0; half < 2; half++) store(c + (r + i) * c_stride + half * 16, sums[i][half]);
    }
}

// Queries [first, first + count) of a sequence's rows, with all heads that share a key head: rows [query][head].
template <typename T>
void attend_many(const Attention& a, int64_t seq, int64_t kv_head, int64_t first, int64_t count) {
    const int64_t group = a.num_heads / a.num_kv_heads, size = a.head_dim, padded = round_up(size, kBlock);
    const int64_t num_rows = count * group, rows = round_up(num_rows, kTileRows);
    const int64_t new_keys = a.query_starts[seq + 1] - a.query_starts[seq];
    const int64_t position = a.kv_lengths[seq] - new_keys + first;  // of the first query
    static thread_local std::vector<float> buffer;
    buffer.resize(rows * (2 * padded + kBlock) + kBlock * padded * 2 + padded);
    float* q = buffer.data();
    float* out = q + rows * padded;
    float* scores = out + rows * padded;
    float* keys = scores + rows * kBlock;      // [dimension][key]
    float* values = keys + kBlock * padded;    // [block of dimensions][key][32]
    float* head = values + kBlock * padded;
    std::vector<Running> running(rows);
    memset(q, 0, rows * padded * sizeof(float));
    memset(out, 0, rows * padded * sizeof(float));
    for (int64_t r = 0; r < num_rows; r++) {
        const float* from = a.q + (a.query_starts[seq] + first + r / group) * a.q_stride;
        read_head(from + (kv_head * group + r % group) * size, size, padded, q + r * padded);
    }
    int64_t begin = a.window && position + 1 > a.window ? position + 1 - a.window : 0, end = position + count;
    for (int64_t at = begin; at < end; at += kBlock) {
        int64_t num_keys = end - at < kBlock ? end - at : kBlock;
        const Places<T> places(a, seq, kv_head, at, num_keys);
        for (int64_t j = 0; j < kBlock; j++) {
            if (j < num_keys) read_head(places.keys[j], size, padded, head);
            else memset(head, 0, padded * sizeof(float));
            for (int64_t i = 0; i < padded; i++) keys[i * kBlock + j] = head[i];
            if (j < num_keys) read_head(places.values[j], size, padded, head);
            for (int64_t i = 0; i < padded; i += kBlock)
                memcpy(values + i * kBlock + j * kBlock, head + i, kBlock * sizeof(float));
        }
        for (int64_t r = 0; r < rows; r += kTileRows)
            multiply_tile(q + r * padded, padded, keys, padded, scores + r * kBlock, kBlock, false);
        for (int64_t r = 0; r < num_rows; r++) {
            int64_t own = position + r / group;  // keys [own - window + 1, own] are seen
            float* row = scores + r * kBlock;
            if (a.softcap > 0)
                for (int64_t i = 0; i < kBlock; i += 16)
                    store(row + i, hyperbolic_tangent(load(row + i) * (a.scale / a.softcap)) * a.softcap);
            else
                rescale(row, kBlock, a.scale);
            int64_t seen = own + 1 - at < kBlock ? own + 1 - at : kBlock, hidden = a.window ? own + 1 - a.window - at : 0;
            for (int64_t j = seen < 0 ? 0 : seen; j < kBlock; j++) row[j] = kNothing;
            for (int64_t j = 0; j < hidden && j < kBlock; j++) row[j] = kNothing;
            if (seen <= 0 || hidden >= kBlock) memset(row, 0, kBlock * sizeof(float));
            else weigh(row, kBlock, running[r], out + r * padded, padded);
        }
        for (int64_t r = 0; r < rows; r += kTileRows)
            for (int64_t i = 0; i < padded; i += kBlock)
                multiply_tile(scores + r * kBlock, kBlock, values + i * kBlock, kBlock, out + r * padded + i, padded, true);
    }
    for (int64_t r = 0; r < num_rows; r++) {
        int64_t row = a.query_starts[seq] + first + r / group;
        float* to = a.out + (row * a.num_heads + kv_head * group + r % group) * size;
        rescale(out + r * padded, padded, 1.0f / running[r].total);
        memcpy(to, out + r * padded, size * sizeof(float));
    }
}

template <typename T>
void attend(const Attention& a) {
    std::vector<int64_t> decodes;
    struct Piece { int64_t seq, first, count; };
    std::vector<Piece> pieces;
    for (int64_t seq = 0; seq < a.num_seqs; seq++) {
        int64_t count = a.query_starts[seq + 1] - a.query_starts[seq];
        if (count == 1) decodes.push_back(seq);
        else
            for (int64_t first = 0; first < count; first += kQueries)
                pieces.push_back({seq, first, count - first < kQueries ? count - first : kQueries});
    }
    if (!decodes.empty()) attend_decodes<T>(a, decodes);
    int64_t num_pieces = pieces.size();
    parallel_for(num_pieces * a.num_kv_heads, [&](int64_t index) {
        // The last queries, which see most keys, come first: short pieces are left for the end.
        const Piece& piece = pieces[num_pieces - 1 - index / a.num_kv_heads];
        attend_many<T>(a, piece.seq, index % a.num_kv_heads, piece.first, piece.count);
    });
}

}  // namespace
}  // namespace ingle

extern "C" void ingle_attention(const ingle::Attention* a) {
    if (a->kv_type == ingle::kHalf) ingle::attend<ingle::Half>(*a);
    else if (a->kv_type == ingle::kBrain) ingle::attend<ingle::Brain>(*a);
    else ingle::attend<float>(*a);
}
