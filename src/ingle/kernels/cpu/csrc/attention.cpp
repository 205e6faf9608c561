// Causal attention of a step's tokens to the cached keys of their own sequences, read where they lie in their pages.
//
// Both kinds of work pass over the keys once, rescaling as larger scores turn up (https://arxiv.org/abs/2205.14135):
// a decoding sequence's few rows take dot products with each key; a prompt's many rows share blocks of 32 keys, whose
// scores lie row beside row, so that a vector of rows is weighed at once.
#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "codes.h"
#include "kv.h"
#include "operators.h"
#include "pool.h"
#include "simd.h"

namespace ingle {
namespace {

constexpr int64_t kBlock = 32;        // keys that rows meet at once
constexpr int64_t kRows = 48;         // prompt tokens, times heads that share a key head, of one piece of work
constexpr int64_t kSplitKeys = 256;   // a decoding sequence's keys are shared out in pieces no smaller
constexpr int64_t kMostKeys = 8192;   // in pieces no larger: one sum of too many float32 numbers loses digits
constexpr float kNothing = -1e30f;    // the score of a key that is not seen
constexpr float kLeast = -1e29f;      // above it, and below every other score

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// A head's numbers as float32, zeros up to a whole number of blocks.
template <typename T>
void read_head(const T* from, int64_t size, int64_t padded, float* to) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(to + i, load(from + i));
    if (i < size) {
        store(to + i, load_part(from + i, size - i));
        i += kLanes;
    }
    for (; i < padded; i += kLanes) store(to + i, Floats{});
}

void scale_head(float* head, int64_t padded, float scale) {
    for (int64_t i = 0; i < padded; i += kLanes) store(head + i, load(head + i) * scale);
}

// Addresses of the keys and values, and scales if they have some, of positions [first, first + count), count <= 32; beyond, those of the last.
template <typename T>
struct Places {
    const T* keys[kBlock];
    const T* values[kBlock];
    alignas(64) float key_scales[kCoded<T> ? kBlock : 1];
    alignas(64) float value_scales[kCoded<T> ? kBlock : 1];

    Places(const Attention& a, int64_t seq, int64_t kv_head, int64_t first, int64_t count) {
        const Pages<T> own_keys = {(uint8_t*)a.keys, a.page_size, a.num_kv_heads, a.head_dim, kv_head};
        const Pages<T> own_values = {(uint8_t*)a.values, a.page_size, a.num_kv_heads, a.head_dim, kv_head};
        const int32_t* page = a.page_tables + a.slots[seq] * a.pages_per_slot + first / a.page_size;
        int64_t offset = first % a.page_size;
        const T *key = own_keys.numbers(*page, offset), *value = own_values.numbers(*page, offset);
        for (int64_t j = 0; j < kBlock; j++) {
            keys[j] = key;
            values[j] = value;
            if constexpr (kCoded<T>) {
                key_scales[j] = *own_keys.scales(*page, offset);
                value_scales[j] = *own_values.scales(*page, offset);
            }
            if (j + 1 >= count) continue;
            key += own_keys.stride();
            value += own_keys.stride();
            if (++offset == a.page_size) {
                offset = 0;
                page++;
                key = own_keys.numbers(*page, 0);
                value = own_values.numbers(*page, 0);
            }
        }
    }
};

// The strides are too long, and the pages too short, for the processor to see what comes next. Called for a vector
// after the other, amid arithmetic: many requests at once would have to wait for each other.
template <typename T>
void prefetch(const T* head, int64_t i) {
    if (i * sizeof(T) % 64 == 0) __builtin_prefetch(head + i);
}

// Sums over the keys seen so far, weighted by e^(score - largest).
struct Running {
    float largest = kNothing;
    float total = 0;
};

// ---- decoding sequences

constexpr int64_t kGroup = kLanes < 8 ? kLanes : 8;  // heads of a group that pass over the keys together
constexpr int64_t kSums = kRegisters * 3 / 4;        // vectors that registers hold beside what is added to them
constexpr int64_t kKeyVectors = kBlock / kLanes;

// products[h][j] of q[h] and key j, over vectors [at, at + Vectors) of dimensions, all of them whole; added if at > 0.
template <typename T, int Heads, int Vectors>
void multiply_keys(const Places<T>& places, const Places<T>& ahead, int64_t count, const float* q, int64_t at,
                   int64_t padded, Floats (*products)[kBlock]) {
    Floats queries[Heads][Vectors];
#pragma GCC unroll 8
    for (int h = 0; h < Heads; h++)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) queries[h][v] = load(q + h * padded + (at + v) * kLanes);
    for (int64_t j = 0; j < count; j++) {
        Floats dots[Heads];
#pragma GCC unroll 8
        for (int h = 0; h < Heads; h++) dots[h] = at > 0 ? products[h][j] : Floats{};
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) {
            prefetch(ahead.keys[j], (at + v) * kLanes);
            Floats key = load(places.keys[j] + (at + v) * kLanes);
#pragma GCC unroll 8
            for (int h = 0; h < Heads; h++) dots[h] += queries[h][v] * key;
        }
#pragma GCC unroll 8
        for (int h = 0; h < Heads; h++) products[h][j] = dots[h];
    }
}

// Scores of a block of keys to weights in place, of all heads at once, so that none waits for another's exponentials.
// The factors to which what was summed before shrinks, one a head.
template <int Heads>
Floats weigh_few(float (*scores)[kBlock], int64_t count, Running* running) {
    Floats before = {}, largest = {};
#pragma GCC unroll 8
    for (int h = 0; h < Heads; h++) {
        for (int64_t i = count; i < kBlock; i++) scores[h][i] = kNothing;
        Floats largest_of = load(scores[h]);
#pragma GCC unroll 8
        for (int v = 1; v < kKeyVectors; v++) {
            const Floats x = load(scores[h] + v * kLanes);
            largest_of = x > largest_of ? x : largest_of;
        }
        const float most = maximum(largest_of);
        before[h] = running[h].largest;
        running[h].largest = largest[h] = most > before[h] ? most : before[h];
    }
    const Floats factors = exponential(before - largest);
#pragma GCC unroll 8
    for (int h = 0; h < Heads; h++) {
        Floats total = {};
#pragma GCC unroll 8
        for (int v = 0; v < kKeyVectors; v++) {
            const Floats weights = exponential(load(scores[h] + v * kLanes) - largest[h]);
            store(scores[h] + v * kLanes, weights);
            total += weights;
        }
        running[h].total = running[h].total * factors[h] + sum(total);
    }
    return factors;
}

// out[h] = out[h] * factors[h] + sum of weights[h][j] * value j, over the same dimensions.
template <typename T, int Heads, int Vectors>
void add_values(const Places<T>& places, const Places<T>& ahead, int64_t count, const float (*weights)[kBlock],
                Floats factors, int64_t at, int64_t padded, float* out) {
    Floats totals[Heads][Vectors];
#pragma GCC unroll 8
    for (int h = 0; h < Heads; h++)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) totals[h][v] = load(out + h * padded + (at + v) * kLanes) * factors[h];
    for (int64_t j = 0; j < count; j++)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) {
            prefetch(ahead.values[j], (at + v) * kLanes);
            Floats value = load(places.values[j] + (at + v) * kLanes);
#pragma GCC unroll 8
            for (int h = 0; h < Heads; h++) totals[h][v] += value * weights[h][j];
        }
#pragma GCC unroll 8
    for (int h = 0; h < Heads; h++)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) store(out + h * padded + (at + v) * kLanes, totals[h][v]);
}

// Keys [first, end) of a sequence and one of its key heads.
struct KeyRange {
    int64_t seq, kv_head, first, end;
};

template <typename T>
Places<T> block_at(const Attention& a, const KeyRange& keys, int64_t at) {
    return Places<T>(a, keys.seq, keys.kv_head, at, keys.end - at < kBlock ? keys.end - at : kBlock);
}

// Scores, weights and weighted values of a block of keys at a time. q and out: [Heads][padded head_dim].
// `next` is what this thread will probably do next.
template <typename T, int Heads>
void attend_few(const Attention& a, const KeyRange& keys, const KeyRange& next, const float* q, Running* running,
                float* out) {
    const int64_t size = a.head_dim, padded = round_up(size, kLanes), whole = size / kLanes;
    constexpr int64_t together = kSums / Heads < 1 ? 1 : kSums / Heads < 4 ? kSums / Heads : 4;
    Places<T> ahead = block_at<T>(a, keys, keys.first);
    for (int64_t at = keys.first; at < keys.end; at += kBlock) {
        const int64_t count = keys.end - at < kBlock ? keys.end - at : kBlock, rounded = round_up(count, kLanes);
        const Places<T> places = ahead;
        if (at + kBlock < keys.end) ahead = block_at<T>(a, keys, at + kBlock);
        else if (next.first < next.end) ahead = block_at<T>(a, next, next.first);
        Floats products[Heads][kBlock];
        int64_t vector = 0;
        for (; vector + together <= whole; vector += together)
            multiply_keys<T, Heads, together>(places, ahead, rounded, q, vector, padded, products);
        for (; vector < whole; vector++) multiply_keys<T, Heads, 1>(places, ahead, rounded, q, vector, padded, products);
        for (int64_t j = 0; j < rounded && whole * kLanes < size; j++) {
            const Floats key = load_part(places.keys[j] + whole * kLanes, size - whole * kLanes);
            for (int h = 0; h < Heads; h++) {
                const Floats dots = load(q + h * padded + whole * kLanes) * key;
                products[h][j] = whole > 0 ? products[h][j] + dots : dots;
            }
        }
        alignas(64) float weights[Heads][kBlock];
        for (int h = 0; h < Heads; h++) {
            for (int64_t j = 0; j < rounded; j += kLanes) {
                Floats scores = sums(products[h] + j) * a.scale;
                if constexpr (kCoded<T>) scores *= load(places.key_scales + j);
                if (a.softcap > 0) scores = a.softcap * hyperbolic_tangent(scores / a.softcap);
                store(weights[h] + j, scores);
            }
        }
        const Floats factors = weigh_few<Heads>(weights, count, running);
        if constexpr (kCoded<T>) {
            for (int h = 0; h < Heads; h++)
                for (int64_t j = 0; j < kBlock; j += kLanes)
                    store(weights[h] + j, load(weights[h] + j) * load(places.value_scales + j));
        }
        for (vector = 0; vector + together <= whole; vector += together)
            add_values<T, Heads, together>(places, ahead, count, weights, factors, vector, padded, out);
        for (; vector < whole; vector++)
            add_values<T, Heads, 1>(places, ahead, count, weights, factors, vector, padded, out);
        for (int64_t j = 0; j < count && whole * kLanes < size; j++) {
            const Floats value = load_part(places.values[j] + whole * kLanes, size - whole * kLanes);
            for (int h = 0; h < Heads; h++) {
                float* to = out + h * padded + whole * kLanes;
                store(to, (j > 0 ? load(to) : load(to) * factors[h]) + value * weights[h][j]);
            }
        }
    }
}

// The functions for 1 to kGroup heads.
template <typename T, int... Fewer>
constexpr auto attends_few(std::integer_sequence<int, Fewer...>) {
    return std::array{attend_few<T, Fewer + 1>...};
}

// A range of keys for all heads of its group: out [heads][padded head_dim], sums of weighted values.
template <typename T>
void attend_group(const Attention& a, const KeyRange& keys, const KeyRange& next, Running* running, float* out) {
    const int64_t group = a.num_heads / a.num_kv_heads, padded = round_up(a.head_dim, kLanes);
    static thread_local std::vector<float> q;
    q.resize(group * padded);
    for (int64_t h = 0; h < group; h++) {
        const float* from = a.q + a.query_starts[keys.seq] * a.q_stride + (keys.kv_head * group + h) * a.head_dim;
        read_head(from, a.head_dim, padded, q.data() + h * padded);
        running[h] = Running();
    }
    memset(out, 0, group * padded * sizeof(float));
    for (int64_t h = 0; h < group; h += kGroup) {
        static constexpr auto few = attends_few<T>(std::make_integer_sequence<int, kGroup>());
        int64_t heads = group - h < kGroup ? group - h : kGroup;
        few[heads - 1](a, keys, next, q.data() + h * padded, running + h, out + h * padded);
    }
}

// Joins the pieces of one sequence and head, and writes the quotient.
void join(const Attention& a, int64_t seq, int64_t kv_head, int64_t num_pieces, const Running* running,
          const float* parts) {
    const int64_t group = a.num_heads / a.num_kv_heads, size = a.head_dim, padded = round_up(size, kLanes);
    for (int64_t h = 0; h < group; h++) {
        const float* sink = a.sinks ? a.sinks + kv_head * group + h : nullptr;
        float largest = sink ? *sink : kNothing;
        for (int64_t p = 0; p < num_pieces; p++)
            if (running[p * group + h].largest > largest) largest = running[p * group + h].largest;
        float total = sink ? std::exp(*sink - largest) : 0;
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
    const int64_t group = a.num_heads / a.num_kv_heads, padded = round_up(a.head_dim, kLanes);
    const int64_t num_pairs = (int64_t)seqs.size() * a.num_kv_heads;
    int64_t longest = 0;
    for (int64_t seq : seqs) longest = a.kv_lengths[seq] > longest ? a.kv_lengths[seq] : longest;
    if (a.window && longest > a.window) longest = a.window;
    int64_t num_pieces = (num_threads() * 4 + num_pairs - 1) / num_pairs, most = (longest + kSplitKeys - 1) / kSplitKeys;
    if (num_threads() == 1 || num_pairs >= num_threads() * 4) num_pieces = 1;
    if (num_pieces > most) num_pieces = most;
    if (num_pieces * kMostKeys < longest) num_pieces = (longest + kMostKeys - 1) / kMostKeys;
    std::vector<Running> running(num_pairs * num_pieces * group);
    std::vector<float> parts(num_pairs * num_pieces * group * padded);
    const auto range_of = [&](int64_t index) -> KeyRange {
        int64_t pair = index / num_pieces, piece = index % num_pieces, seq = seqs[pair / a.num_kv_heads];
        int64_t end = a.kv_lengths[seq], first = a.window && end > a.window ? end - a.window : 0;
        int64_t step = round_up((end - first + num_pieces - 1) / num_pieces, kBlock / 2);
        int64_t from = first + piece * step < end ? first + piece * step : end;
        return {seq, pair % a.num_kv_heads, from, from + step < end ? from + step : end};
    };
    parallel_for(num_pairs * num_pieces, [&](int64_t index) {
        const int64_t next = index + 1 < num_pairs * num_pieces ? index + 1 : index;
        attend_group<T>(a, range_of(index), range_of(next), &running[index * group], &parts[index * group * padded]);
    });
    for (int64_t pair = 0; pair < num_pairs; pair++)
        join(a, seqs[pair / a.num_kv_heads], pair % a.num_kv_heads, num_pieces, &running[pair * num_pieces * group],
             &parts[pair * num_pieces * group * padded]);
}

// ---- prompts

constexpr int64_t kMostVectors = 3, kTileRows = kRegisters / 4;  // three quarters of the registers are sums
constexpr int64_t kRowUnit = kLanes > kTileRows ? kLanes : kTileRows;

// A factor of a product: number (r, k) is at data[r * row + k * step].
struct Factor {
    const float* data;
    int64_t row, step;
};

// c[rows][kLanes * Vectors] = sum over k of a[r][k] * b[k], to which c * factors[r] is added unless that is null.
template <int Vectors>
void multiply_tile(const Factor& a, const float* b, int64_t b_stride, int64_t depth, const float* factors, float* c,
                   int64_t c_stride) {
    Floats sums[kTileRows][Vectors];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kTileRows; r++)
#pragma GCC unroll 3
        for (int64_t v = 0; v < Vectors; v++)
            sums[r][v] = factors ? load(c + r * c_stride + v * kLanes) * factors[r] : Floats{};
    for (int64_t k = 0; k < depth; k++) {
        Floats columns[Vectors];
#pragma GCC unroll 3
        for (int64_t v = 0; v < Vectors; v++) columns[v] = load(b + k * b_stride + v * kLanes);
#pragma GCC unroll 8
        for (int64_t r = 0; r < kTileRows; r++)
#pragma GCC unroll 3
            for (int64_t v = 0; v < Vectors; v++) sums[r][v] += columns[v] * a.data[r * a.row + k * a.step];
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < kTileRows; r++)
#pragma GCC unroll 3
        for (int64_t v = 0; v < Vectors; v++) store(c + r * c_stride + v * kLanes, sums[r][v]);
}

// The same for any multiple of kTileRows rows and of kLanes columns.
void multiply(Factor a, int64_t rows, const float* b, int64_t columns, int64_t depth, const float* factors, float* c) {
    for (int64_t r = 0; r < rows; r += kTileRows, a.data += kTileRows * a.row)
        for (int64_t i = 0; i < columns;) {
            const int64_t left = (columns - i) / kLanes, vectors = left == 4 ? 2 : std::min(kMostVectors, left);
            const auto tile = vectors == 1 ? multiply_tile<1> : vectors == 2 ? multiply_tile<2> : multiply_tile<3>;
            tile(a, b + i, columns, depth, factors ? factors + r : nullptr, c + r * columns + i, columns);
            i += vectors * kLanes;
        }
}

// Scores [32 keys][rows], before their scale, to weights in place, for kLanes rows. Row r sees keys [first[r], last[r]].
// `factors`: what was summed before shrinks to.
void weigh(const Attention& a, float* scores, int64_t rows, Ints first, Ints last, float* largest, float* total,
           float* factors) {
    Floats most = load(largest);
    for (int32_t j = 0; j < kBlock; j++) {
        Floats x = load(scores + j * rows) * a.scale;
        if (a.softcap > 0) x = a.softcap * hyperbolic_tangent(x / a.softcap);
        x = (first <= j) & (last >= j) ? x : splat(kNothing);
        store(scores + j * rows, x);
        most = x > most ? x : most;
    }
    const Floats factor = exponential(load(largest) - most);
    Floats sum = {};
    for (int64_t j = 0; j < kBlock; j++) {
        const Floats weights = exponential(load(scores + j * rows) - most);
        store(scores + j * rows, weights);
        sum += weights;
    }
    store(largest, most);
    store(total, load(total) * factor + sum);
    store(factors, factor);
}

// Queries [first, first + count) of a sequence's rows, with all heads that share a key head: rows [query][head].
template <typename T>
void attend_many(const Attention& a, int64_t seq, int64_t kv_head, int64_t first, int64_t count) {
    const int64_t group = a.num_heads / a.num_kv_heads, size = a.head_dim, padded = round_up(size, kLanes);
    const int64_t num_rows = count * group, rows = round_up(num_rows, kRowUnit);
    const int64_t new_keys = a.query_starts[seq + 1] - a.query_starts[seq];
    const int64_t position = a.kv_lengths[seq] - new_keys + first;  // of the first query
    static thread_local std::vector<int32_t> own;  // position of each row
    own.resize(rows);
    for (int64_t r = 0; r < rows; r++) own[r] = position + r / group;
    static thread_local std::vector<float> buffer;
    buffer.resize(2 * rows * padded + rows * (kBlock + 3) + kBlock * padded * 2 + padded);
    float* q = buffer.data();               // [dimension][row]
    float* out = q + rows * padded;         // [row][dimension]
    float* scores = out + rows * padded;    // [key][row]
    float* largest = scores + rows * kBlock;
    float* total = largest + rows;
    float* factors = total + rows;
    float* keys = factors + rows;           // [key][dimension]
    float* values = keys + kBlock * padded;
    float* head = values + kBlock * padded;
    memset(q, 0, 2 * rows * padded * sizeof(float));
    memset(total, 0, rows * sizeof(float));
    std::fill(largest, largest + rows, kLeast);
    for (int64_t r = 0; a.sinks && r < num_rows; r++) {
        largest[r] = a.sinks[kv_head * group + r % group];
        total[r] = 1;
    }
    for (int64_t r = 0; r < num_rows; r++) {
        const float* from = a.q + (a.query_starts[seq] + first + r / group) * a.q_stride;
        read_head(from + (kv_head * group + r % group) * size, size, padded, head);
        for (int64_t i = 0; i < padded; i++) q[i * rows + r] = head[i];
    }
    int64_t begin = a.window && position + 1 > a.window ? position + 1 - a.window : 0, end = position + count;
    for (int64_t at = begin; at < end; at += kBlock) {
        const int64_t num_keys = end - at < kBlock ? end - at : kBlock;
        const Places<T> places(a, seq, kv_head, at, num_keys);
        for (int64_t j = 0; j < num_keys; j++) {
            read_head(places.keys[j], size, padded, keys + j * padded);
            read_head(places.values[j], size, padded, values + j * padded);
            if constexpr (kCoded<T>) {
                scale_head(keys + j * padded, padded, places.key_scales[j]);
                scale_head(values + j * padded, padded, places.value_scales[j]);
            }
        }
        memset(keys + num_keys * padded, 0, (kBlock - num_keys) * padded * sizeof(float));
        memset(values + num_keys * padded, 0, (kBlock - num_keys) * padded * sizeof(float));
        multiply({keys, padded, 1}, kBlock, q, rows, padded, nullptr, scores);
        for (int64_t r = 0; r < rows; r += kLanes) {
            const Ints seen_last = load(own.data() + r) - (int32_t)at;
            const Ints seen_first = a.window ? seen_last + 1 - (int32_t)a.window : Ints{};
            weigh(a, scores + r, rows, seen_first, seen_last, largest + r, total + r, factors + r);
        }
        multiply({scores, 1, rows}, rows, values, padded, kBlock, factors, out);
    }
    for (int64_t r = 0; r < num_rows; r++) {
        const int64_t row = a.query_starts[seq] + first + r / group;
        float* to = a.out + (row * a.num_heads + kv_head * group + r % group) * size;
        for (int64_t i = 0; i < size; i++) to[i] = out[r * padded + i] / total[r];
    }
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
}  // namespace
}  // namespace ingle
#include "attention_x86.h"
namespace ingle {
namespace {
// Elsewhere a product of two integers takes as long as two of float32.
template <typename T>
constexpr bool kAsIntegers = !std::is_same_v<T, float>;
#else
template <typename T>
constexpr bool kAsIntegers = false;
#endif
// Of a sequence: fewer are computed as a decode is, in float32, such as drafts that may stand for what decodes would draw.
constexpr int64_t kLeastAsIntegers = 32;

template <typename T>
void attend(const Attention& a) {
    const int64_t group = a.num_heads / a.num_kv_heads;
    std::vector<int64_t> decodes;
    struct Piece {
        int64_t seq, first, count;
        bool as_integers;
        int64_t prepared;  // which of those whose keys are prepared, if as integers
    };
    std::vector<Piece> pieces;
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
    PreparedKeys<T> prepared(a);
#endif
    for (int64_t seq = 0; seq < a.num_seqs; seq++) {
        int64_t count = a.query_starts[seq + 1] - a.query_starts[seq];
        if (count == 1) {
            decodes.push_back(seq);
            continue;
        }
        const bool as_integers = kAsIntegers<T> && a.as_integers && count >= kLeastAsIntegers;
        int64_t rows = kRows, most = kBlock, index = 0;
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
        if (as_integers) rows = kManyRows, most = kRows, index = prepared.add(seq);
#endif
        const int64_t queries = std::min(most, std::max<int64_t>(1, rows / group));
        for (int64_t first = 0; first < count; first += queries)
            pieces.push_back({seq, first, std::min(count - first, queries), as_integers, index});
    }
    if (!decodes.empty()) attend_decodes<T>(a, decodes);
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
    if constexpr (kAsIntegers<T>) prepared.prepare();
#endif
    int64_t num_pieces = pieces.size();
    parallel_for(num_pieces * a.num_kv_heads, [&](int64_t index) {
        // The last queries, which see most keys, come first: short pieces are left for the end.
        const Piece& piece = pieces[num_pieces - 1 - index / a.num_kv_heads];
        const int64_t kv_head = index % a.num_kv_heads;
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
        if constexpr (kAsIntegers<T>)
            if (piece.as_integers)
                return attend_many_integers<T>(a, piece.seq, kv_head, piece.first, piece.count,
                                               prepared.of(piece.prepared, kv_head));
#endif
        attend_many<T>(a, piece.seq, kv_head, piece.first, piece.count);
    });
}

}  // namespace
}  // namespace ingle

extern "C" void ingle_attention(const ingle::Attention* a) {
    ingle::with_kv_type(a->kv_type, [&](auto number) { ingle::attend<decltype(number)>(*a); });
}
