// Attention of a prompt's tokens by products of 16-bit integers, at twice the rate of float32: for keys and values that are
// stored in 16 bits or fewer. Included by attention.cpp.
//
// A query, and a key, become integers under a scale of their own by which they are kNorm long: then no sum of products
// leaves 32 bits, whatever the numbers (Cauchy and Schwarz), and what rounding leaves out is as much as binary16 does.
// A block's weights under a scale of each row, and its values under one of each dimension, likewise: weights sum up to
// kWeightSum at most, and values are kLargestValue at most.
#pragma once

namespace ingle {
namespace {

constexpr float kNorm = 32000, kLargestWeight = 32767, kWeightSum = 1 << 18, kLargestValue = 8000;
constexpr int64_t kManyRows = 48;  // as kRows
constexpr int64_t kManyKeys = 2 * kBlock;

typedef int32_t Pair;  // two integers of 16 bits, the first in the lower half

inline Ints pair_up(Ints first, Ints second) { return (first & 0xffff) | second << 16; }

// A vector of a head's numbers from `i` on, zeros beyond its end.
template <typename T>
inline Floats numbers_at(const T* head, int64_t i, int64_t size) {
    if (i + kLanes <= size) return load(head + i);
    return i < size ? load_part(head + i, size - i) : Floats{};
}

// A head's numbers as pairs of integers, zeros up to `padded` numbers. The scale; NaN for what is not finite.
template <typename T>
float put_pairs(const T* head, int64_t size, int64_t padded, Pair* out) {
    Floats squares = {};
    for (int64_t i = 0; i < size; i += kLanes) {
        const Floats x = numbers_at(head, i, size);
        squares += x * x;
    }
    const float norm = std::sqrt(sum(squares)), per_unit = norm > 0 ? kNorm / norm : 0.0f;
    for (int64_t i = 0; i < padded; i += kUnit) {
        Ints integers[kUnitVectors];
        for (int v = 0; v < kUnitVectors; v++) integers[v] = to_nearest(numbers_at(head, i + v * kLanes, size) * per_unit);
        store_pairs(integers, (uint32_t*)out + i / 2);
    }
    return norm < INFINITY ? norm / kNorm : NAN;
}

// sums[r][v] += over k of the pairs a[r * row + k * step] times b[k * b_stride + v * kLanes], for kTileRows rows.
template <int Vectors>
inline __attribute__((always_inline)) void add_pairs(const Pair* a, int64_t row, int64_t step, const Pair* b,
                                                     int64_t b_stride, int64_t depth, Ints (*sums)[Vectors]) {
    for (int64_t k = 0; k < depth; k++) {
        Pairs columns[Vectors];
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; v++) columns[v] = (Pairs)load(b + k * b_stride + v * kLanes);
#pragma GCC unroll 8
        for (int64_t r = 0; r < kTileRows; r++) {
            const Ints both = splat(a[r * row + k * step]);
#pragma GCC unroll 3
            for (int v = 0; v < Vectors; v++) sums[r][v] = add_products(sums[r][v], columns[v], both);
        }
    }
}

// Scores [keys][rows] as integers, of kTileRows keys.
template <int Vectors>
void score_tile(const Pair* keys, const Pair* q, int64_t rows, int64_t depth, int32_t* scores) {
    Ints sums[kTileRows][Vectors] = {};
    add_pairs<Vectors>(keys, depth, 1, q, rows, depth, sums);
    for (int64_t r = 0; r < kTileRows; r++)
        for (int v = 0; v < Vectors; v++) memcpy(scores + r * rows + v * kLanes, &sums[r][v], sizeof sums[r][v]);
}

// What `weigh` leaves for each row.
struct RowFactors {
    float *largest, *total, *before, *now;  // `before` multiplies what was summed before, `now` this block's integers
};

// out[row][dimension] = out * before + weights times values, of kTileRows rows.
template <int Vectors>
void add_tile(const Pair* weights, int64_t rows, const Pair* values, const float* value_scales, int64_t padded,
              int64_t depth, const RowFactors& f, float* out) {
    Ints sums[kTileRows][Vectors] = {};
    add_pairs<Vectors>(weights, 1, rows, values, padded, depth, sums);
    Floats scales[Vectors];
    for (int v = 0; v < Vectors; v++) scales[v] = load(value_scales + v * kLanes);
    for (int64_t r = 0; r < kTileRows; r++)
        for (int v = 0; v < Vectors; v++) {
            float* to = out + r * padded + v * kLanes;
            store(to, load(to) * f.before[r] + to_floats(sums[r][v]) * (scales[v] * f.now[r]));
        }
}

// Calls body(constant number of vectors, first number) for the columns of a tile after the other.
template <typename Body>
void for_each_tile(int64_t columns, const Body& body) {
    for (int64_t i = 0; i < columns;) {
        const int64_t left = (columns - i) / kLanes, vectors = left == 4 ? 2 : std::min(kMostVectors, left);
        if (vectors == 1) body(std::integral_constant<int, 1>(), i);
        else if (vectors == 2) body(std::integral_constant<int, 2>(), i);
        else body(std::integral_constant<int, 3>(), i);
        i += vectors * kLanes;
    }
}

// Scores [keys][rows] to weights [pair of keys][rows], for kLanes rows. Row r sees keys [first[r], last[r]].
void weigh_pairs(const Attention& a, int32_t* scores, const float* key_scales, int64_t num_keys, int64_t rows, Floats scale,
                 Ints first, Ints last, const RowFactors& f, Pair* weights) {
    Floats most = splat(kLeast), sum = {};
    for (int32_t j = 0; j < num_keys; j++) {
        Floats x = to_floats(load(scores + j * rows)) * (scale * key_scales[j]);
        if (a.softcap > 0) x = a.softcap * hyperbolic_tangent(x / a.softcap);
        x = (first <= j) & (last >= j) ? x : splat(kNothing);
        store((float*)scores + j * rows, x);
        most = x > most ? x : most;
    }
    for (int64_t j = 0; j < num_keys; j++) {
        const Floats weight = exponential(load((float*)scores + j * rows) - most);
        store((float*)scores + j * rows, weight);
        sum += weight;
    }
    const Floats least_sum = sum > 1.0f ? sum : splat(1.0f);
    Floats per_unit = kWeightSum / least_sum;
    per_unit = per_unit < kLargestWeight ? per_unit : splat(kLargestWeight);
    for (int64_t j = 0; j < num_keys; j += 2) {
        Ints both[2];
        for (int64_t i = 0; i < 2; i++)
            both[i] = j + i < num_keys ? to_nearest(load((float*)scores + (j + i) * rows) * per_unit) : Ints{};
        const Ints paired = pair_up(both[0], both[1]);
        memcpy(weights + j / 2 * rows, &paired, sizeof paired);
    }
    const Floats largest = load(f.largest), now = most > largest ? most : largest;
    const Floats before = exponential(largest - now), added = exponential(most - now);
    store(f.largest, now);
    store(f.total, load(f.total) * before + sum * added);
    store(f.before, before);
    store(f.now, added / per_unit);
}

// Values of `num_keys` keys as pairs of neighbouring keys, [pair][dimension], and the scale of each dimension.
template <typename T>
void put_values(const Places<T>* places, int64_t num_keys, int64_t size, int64_t padded, Pair* out, float* scales) {
    for (int64_t i = 0; i < padded; i += kLanes) {
        const auto value = [&](int64_t j) {
            if (j >= num_keys) return Floats{};
            const Places<T>& at = places[j / kBlock];
            Floats x = numbers_at(at.values[j % kBlock], i, size);
            if constexpr (kCoded<T>) x *= at.value_scales[j % kBlock];
            return x;
        };
        Ints most = {};
        for (int64_t j = 0; j < num_keys; j++) {
            const Ints bits = (Ints)value(j) & 0x7fffffff;
            most = bits > most ? bits : most;
        }
        const Floats largest = most < 0x7f800000 ? (Floats)most : splat(NAN);
        const Floats per_unit = largest > 0.0f ? kLargestValue / largest : Floats{};
        store(scales + i, largest / kLargestValue);
        for (int64_t j = 0; j < num_keys; j += 2) {
            const Ints both = pair_up(to_nearest(value(j) * per_unit), to_nearest(value(j + 1) * per_unit));
            memcpy(out + j / 2 * padded + i, &both, sizeof both);
        }
    }
}

// Keys and values of kManyKeys neighbouring positions, the first a multiple of that, for one key head.
struct Block {
    Pair* keys;           // [key][pair of dimensions], zeros up to a whole tile of keys
    Pair* values;         // [pair of keys][dimension]
    float* key_scales;    // [key]
    float* value_scales;  // [dimension]

    static int64_t size(int64_t padded) { return kManyKeys * (padded + 1) + padded; }  // in numbers of 32 bits
    Block(int32_t* data, int64_t padded)
        : keys(data), values(keys + kManyKeys * padded / 2), key_scales((float*)(values + kManyKeys * padded / 2)),
          value_scales(key_scales + kManyKeys) {}
};

template <typename T>
void put_block(const Attention& a, int64_t seq, int64_t kv_head, int64_t at, int64_t num_keys, const Block& out) {
    const int64_t size = a.head_dim, padded = round_up(size, kUnit), pairs = padded / 2;
    const Places<T> places[2] = {Places<T>(a, seq, kv_head, at, std::min(num_keys, kBlock)),
                                 Places<T>(a, seq, kv_head, num_keys > kBlock ? at + kBlock : at,
                                           num_keys > kBlock ? num_keys - kBlock : 1)};
    for (int64_t j = 0; j < num_keys; j++) {
        const Places<T>& of = places[j / kBlock];
        out.key_scales[j] = put_pairs(of.keys[j % kBlock], size, padded, out.keys + j * pairs);
        if constexpr (kCoded<T>) out.key_scales[j] *= of.key_scales[j % kBlock];
    }
    memset(out.keys + num_keys * pairs, 0, (round_up(num_keys, kTileRows) - num_keys) * pairs * sizeof(Pair));
    put_values(places, num_keys, size, padded, out.values, out.value_scales);
}

// A sequence's keys for one key head, from `begin` to before `end`, as blocks that lie one after the other; without
// `data` each thread makes those that it needs.
struct Blocks {
    int64_t begin, end;
    int32_t* data;
};

// As attend_many.
template <typename T>
void attend_many_integers(const Attention& a, int64_t seq, int64_t kv_head, int64_t first, int64_t count,
                          const Blocks& blocks) {
    const int64_t group = a.num_heads / a.num_kv_heads, size = a.head_dim, padded = round_up(size, kUnit), pairs = padded / 2;
    const int64_t num_rows = count * group, rows = round_up(num_rows, kRowUnit);
    const int64_t new_keys = a.query_starts[seq + 1] - a.query_starts[seq];
    const int64_t position = a.kv_lengths[seq] - new_keys + first;  // of the first query
    static thread_local std::vector<int32_t> integers;
    integers.resize(rows * (1 + pairs + kManyKeys * 3 / 2) + pairs + Block::size(padded));
    int32_t* own = integers.data();             // position of each row
    Pair* q = own + rows;                       // [pair of dimensions][row]
    int32_t* scores = q + rows * pairs;         // [key][row]
    Pair* weights = scores + rows * kManyKeys;  // [pair of keys][row]
    Pair* head = weights + rows * kManyKeys / 2;
    int32_t* room = head + pairs;
    static thread_local std::vector<float> buffer;
    buffer.resize(rows * (padded + 5));
    float* out = buffer.data();                 // [row][dimension]
    float* q_scales = out + rows * padded;
    const RowFactors f = {q_scales + rows, q_scales + 2 * rows, q_scales + 3 * rows, q_scales + 4 * rows};
    if (num_rows < rows) memset(q, 0, rows * pairs * sizeof(Pair));
    memset(out, 0, rows * (padded + 5) * sizeof(float));
    std::fill(f.largest, f.largest + rows, kLeast);
    for (int64_t r = 0; a.sinks && r < num_rows; r++) f.largest[r] = a.sinks[kv_head * group + r % group], f.total[r] = 1;
    for (int64_t r = 0; r < rows; r++) own[r] = position + r / group;
    for (int64_t r = 0; r < num_rows; r++) {
        const float* from = a.q + (a.query_starts[seq] + first + r / group) * a.q_stride;
        q_scales[r] = put_pairs(from + (kv_head * group + r % group) * size, size, padded, head) * a.scale;
        for (int64_t i = 0; i < pairs; i++) q[i * rows + r] = head[i];
    }
    const int64_t begin = a.window && position + 1 > a.window ? position + 1 - a.window : 0, end = position + count;
    for (int64_t at = begin / kManyKeys * kManyKeys; at < end; at += kManyKeys) {
        const int64_t low = begin > at ? (begin - at) / kTileRows * kTileRows : 0;
        const int64_t high = std::min(end - at, kManyKeys);  // keys [low, high) of the block
        const int64_t index = (at - blocks.begin) / kManyKeys;
        const Block block(blocks.data ? blocks.data + index * Block::size(padded) : room, padded);
        if (!blocks.data) put_block<T>(a, seq, kv_head, at, std::min(blocks.end - at, kManyKeys), block);
        for (int64_t j = low; j < high; j += kTileRows)
            for_each_tile(rows, [&](auto vectors, int64_t r) {
                score_tile<vectors>(block.keys + j * pairs, q + r, rows, pairs, scores + j * rows + r);
            });
        for (int64_t r = 0; r < rows; r += kLanes) {
            const Ints seen_last = load(own + r) - (int32_t)(at + low);
            const Ints seen_first = a.window ? seen_last + 1 - (int32_t)a.window : Ints{};
            weigh_pairs(a, scores + low * rows + r, block.key_scales + low, high - low, rows, load(q_scales + r), seen_first,
                        seen_last, {f.largest + r, f.total + r, f.before + r, f.now + r}, weights + r);
        }
        for (int64_t r = 0; r < rows; r += kTileRows)
            for_each_tile(padded, [&](auto vectors, int64_t i) {
                add_tile<vectors>(weights + r, rows, block.values + low / 2 * padded + i, block.value_scales + i, padded,
                                  (high - low + 1) / 2, {nullptr, nullptr, f.before + r, f.now + r}, out + r * padded + i);
            });
    }
    for (int64_t r = 0; r < num_rows; r++) {
        const int64_t row = a.query_starts[seq] + first + r / group;
        float* to = a.out + (row * a.num_heads + kv_head * group + r % group) * size;
        for (int64_t i = 0; i < size; i++) to[i] = out[r * padded + i] / f.total[r];
    }
}

constexpr int64_t kMostBlockBytes = 64 << 20;  // of keys and values that become integers before any query meets them

// Keys and values of sequences as integers, made by all threads, where they are not too many.
template <typename T>
class PreparedKeys {
public:
    explicit PreparedKeys(const Attention& a) : a_(a) {}

    // Returns which of the sequences it is.
    int64_t add(int64_t seq) {
        const int64_t new_keys = a_.query_starts[seq + 1] - a_.query_starts[seq], first = a_.kv_lengths[seq] - new_keys;
        const int64_t seen = a_.window && first + 1 > a_.window ? first + 1 - a_.window : 0;
        seqs_.push_back({seq, seen / kManyKeys * kManyKeys, a_.kv_lengths[seq], num_blocks_});
        num_blocks_ += blocks_of(seqs_.back()) * a_.num_kv_heads;
        return seqs_.size() - 1;
    }

    void prepare() {
        const int64_t block = Block::size(padded_);
        if (num_blocks_ * block * 4 > kMostBlockBytes) return;
        static thread_local std::vector<int32_t> room;
        if ((int64_t)room.size() < num_blocks_ * block) room.resize(num_blocks_ * block);
        data_ = room.data();
        parallel_for(num_blocks_, [&](int64_t index) {
            int64_t i = 0;
            while (i + 1 < (int64_t)seqs_.size() && seqs_[i + 1].first_block <= index) i++;
            const Seq& of = seqs_[i];
            const int64_t kv_head = (index - of.first_block) / blocks_of(of), at = of.begin + (index - of.first_block) % blocks_of(of) * kManyKeys;
            put_block<T>(a_, of.seq, kv_head, at, std::min(of.end - at, kManyKeys), Block(data_ + index * block, padded_));
        });
    }

    Blocks of(int64_t index, int64_t kv_head) const {
        const Seq& of = seqs_[index];
        const int64_t first = of.first_block + kv_head * blocks_of(of);
        return {of.begin, of.end, data_ ? data_ + first * Block::size(padded_) : nullptr};
    }

private:
    struct Seq {
        int64_t seq, begin, end, first_block;
    };
    static int64_t blocks_of(const Seq& of) { return (of.end - of.begin + kManyKeys - 1) / kManyKeys; }

    const Attention& a_;
    const int64_t padded_ = round_up(a_.head_dim, kUnit);
    std::vector<Seq> seqs_;
    int64_t num_blocks_ = 0;
    int32_t* data_ = nullptr;
};

}  // namespace
}  // namespace ingle
