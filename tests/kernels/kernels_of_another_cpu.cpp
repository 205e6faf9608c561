// Calls every CPU kernel on numbers that are the same on any processor and prints what comes out: a name and values a line.
#include <cstdio>
#include <vector>

#include "operators.h"

using namespace ingle;
using std::vector;

static uint32_t state = 1;

static vector<float> numbers(int64_t count, float largest = 1) {
    vector<float> out(count);
    for (float& x : out) {
        state = state * 1664525 + 1013904223;
        x = ((int32_t)state >> 8) / 8388608.0f * largest;  // exact, so nowhere rounded
    }
    return out;
}

static void print(const char* name, const vector<float>& values) {
    printf("%s", name);
    for (float x : values) printf(" %.9g", x);
    printf("\n");
}

struct Weights {
    Matrix matrix;
    vector<uint8_t> data;

    Weights(int32_t bits, int32_t group_size, int32_t kind, int32_t minima, int64_t rows, int64_t columns, int step = 3)
        : matrix{nullptr, rows, columns, bits, group_size, kind, minima, {}, nullptr, 1, columns} {
        const bool upper = bits == 5 || bits == 6;
        for (int i = 0; i < 16; i++) matrix.codebook[i] = upper ? -(1 << (bits - 1)) : i * step - 20;
        data.resize(ingle_matrix_bytes(&matrix));
        matrix.data = data.data();
        const bool steps = kind == kSteps;
        vector<float> scales = numbers(rows * num_groups(matrix), steps ? 60 : 0.02f);
        vector<float> lowest = numbers(scales.size(), steps || minima == kInScales ? 60 : 0.1f);
        const int64_t spans = (columns + kSpan - 1) / kSpan;
        vector<float> factors = numbers(rows * spans * 2, 0.001f);
        vector<uint8_t> codes;
        for (float x : numbers(rows * columns, bits == 4 ? 7.9f : 127)) {
            const uint8_t code = bits == 4 ? x + 8 : x + 128;
            const uint16_t brain = (code + (bits == 4 ? 120 : 0)) << 3 | 0x3c00;  // a bfloat16 around 0.01
            const float wide = x / 4096;
            const int8_t number = code - 128;
            if (bits <= 8) codes.push_back(bits == 4 ? code : upper ? number >> (8 - bits) : number);
            else if (bits == 16) codes.insert(codes.end(), (const uint8_t*)&brain, (const uint8_t*)(&brain + 1));
            else codes.insert(codes.end(), (const uint8_t*)&wide, (const uint8_t*)(&wide + 1));
        }
        const int64_t groups = num_groups(matrix), half = rows / 2, second = codes.size() / rows * half;
        ingle_pack_rows(&matrix, codes.data(), scales.data(), lowest.data(), factors.data(), 0, half);
        ingle_pack_rows(&matrix, &codes[second], &scales[half * groups], &lowest[half * groups],
                        &factors[half * spans * 2], half, rows - half);
    }
};

static void matrices() {
    const struct { int32_t bits, group_size, scales, minima, step = 3; } kinds[] = {
        {4, 32, kHalves, 0}, {4, 32, kHalves, 1}, {4, 16, kWide, 1},  {4, 32, kSteps, 1},  {4, 128, kHalves, kInScales},
        {5, 32, kHalves, 0}, {6, 16, kSteps, 0},  {8, 32, kHalves, 0}, {8, 16, kWide, 1},  {16, 32, kHalves, 0},
        {32, 32, kHalves, 0}, {4, 32, kHalves, 0, 61}, {4, 64, kWide, 0, 67}, {4, 16, kWide, 0, 61}};
    for (auto kind : kinds) {
        const int64_t rows = 50, columns = 72;
        Weights w(kind.bits, kind.group_size, kind.scales, kind.minima, rows, columns, kind.step);
        vector<float> out(rows * columns);
        vector<int64_t> all;
        for (int64_t r = 0; r < rows; r++) all.push_back(r);
        ingle_gather_rows(&w.matrix, all.data(), rows, out.data());
        print("rows", out);
        for (int64_t tokens : {1, 2, 3, 4, 5, 13}) {
            vector<float> y(tokens * rows);
            ingle_multiply(&w.matrix, numbers(tokens * columns).data(), tokens, y.data(), rows);
            print("product", y);
        }
    }
}

// Rows as GGUF stores them, one of each way to take its blocks apart.
static void blocks() {
    const struct { int32_t type, bits, group_size, scales, minima, least; int64_t bytes, elements; } kinds[] = {
        {1, 16, 32, kHalves, 0, 0, 2, 1},     {3, 4, 32, kHalves, 1, 0, 20, 32},   {6, 5, 32, kHalves, 0, -16, 22, 32},
        {8, 8, 32, kHalves, 0, 0, 34, 32},    {10, 4, 16, kSteps, 1, 0, 84, 256},  {11, 4, 16, kSteps, 0, 0, 110, 256},
        {13, 5, 32, kSteps, 1, 0, 176, 256},  {14, 6, 16, kSteps, 0, -32, 210, 256},
        {23, 4, 32, kSteps, 0, 0, 136, 256},  {34, 4, 32, kHalves, 0, 0, 54, 256}, {35, 4, 32, kHalves, 0, 0, 66, 256},
        {39, 4, 32, kWide, 0, 0, 17, 32},     {1, 32, 32, kHalves, 0, 0, 2, 1},    {12, 32, 32, kHalves, 0, 0, 144, 256},
        {8, 32, 32, kHalves, 0, 0, 34, 32},   {16, 4, 32, kSteps, 0, 0, 66, 256},  {17, 4, 16, kSteps, 0, 0, 74, 256},
        {18, 4, 32, kSteps, 0, 0, 98, 256},   {19, 4, 32, kSteps, 0, 0, 50, 256},  {21, 4, 32, kSteps, 0, 0, 110, 256},
        {22, 4, 16, kSteps, 0, 0, 82, 256},   {29, 4, 16, kSteps, 0, 0, 56, 256}};
    const int64_t rows = 35, columns = 256;
    vector<uint16_t> grid;
    for (float x : numbers(2048, 2047)) grid.push_back((int)x & 0xfff);
    vector<int64_t> order, all;
    for (int64_t r = 0; r < rows; r++) order.push_back(r * 4 % rows), all.push_back(r);
    for (auto kind : kinds) {
        Matrix matrix = {nullptr, rows, columns, kind.bits, kind.group_size, kind.scales, kind.minima, {}, nullptr, 1, columns};
        const bool upper = kind.bits == 5 || kind.bits == 6;
        for (int i = 0; i < 16; i++) matrix.codebook[i] = upper ? kind.least : i * 3 - 20;
        vector<uint8_t> data(ingle_matrix_bytes(&matrix)), stored;
        matrix.data = data.data();
        for (float x : numbers(rows * columns / kind.elements * kind.bytes, 29)) stored.push_back(x + 30);
        const int32_t known = ingle_pack_blocks(&matrix, kind.type, stored.data(), grid.data(), order.data(), 0, rows);
        vector<float> out(rows * columns);
        ingle_gather_rows(&matrix, all.data(), rows, out.data());
        out.push_back(known);
        print("blocks", out);
    }
}

// How wide layers are, and how their KV cache lies.
struct Shape {
    int64_t hidden, heads, kv_heads, size, rotary, page_size, layer_bytes;
    int32_t kv_type;
};

// Two layers over paged caches, in steps of prompts and decodes.
static void run_layers(const char* name, const vector<Layer>& described, const Shape& s, const vector<float>& norm) {
    const int32_t located[] = {0, 0, 0, 1};
    vector<uint8_t> cache(2 * s.layer_bytes);
    vector<int32_t> tables(2 * 9);
    for (int i = 0; i < 18; i++) tables[i] = 1 + i * 7 % 19;  // all unlike
    vector<int64_t> slots = {1, 0}, lengths = {0, 0};
    for (vector<int64_t> counts : {vector<int64_t>{1, 40}, {1, 1}, {30, 1}, {1, 7}}) {
        const int64_t tokens = counts[0] + counts[1];
        vector<int64_t> starts = {0, counts[0], tokens}, places;
        for (int i = 0; i < 2; i++)
            for (int64_t t = 0; t < counts[i]; t++, lengths[i]++)
                places.push_back(tables[slots[i] * 9 + lengths[i] / s.page_size] * s.page_size + lengths[i] % s.page_size);
        vector<float> x = numbers(tokens * s.hidden), cos_sin = numbers(tokens * s.rotary), out(tokens * s.hidden);
        vector<float> factors = numbers(tokens);
        const Attention attention = {.page_tables = tables.data(), .slots = slots.data(), .kv_lengths = lengths.data(),
                                     .query_starts = starts.data(), .num_seqs = 2, .num_heads = s.heads,
                                     .num_kv_heads = s.kv_heads, .head_dim = s.size, .page_size = s.page_size,
                                     .pages_per_slot = 9, .kv_type = s.kv_type};
        const Step step = {.layers = described.data(), .residual = x.data(), .out = out.data(), .norm = norm.data(),
                           .kv_cache = cache.data(), .kv_places = places.data(), .query_factors = factors.data(),
                           .cos_sin = {cos_sin.data()}, .rotary_dims = {s.rotary}, .num_layers = 2, .num_tokens = tokens,
                           .hidden_size = s.hidden, .layer_bytes = s.layer_bytes, .attention = attention, .eps = 1e-5f,
                           .located = located};
        ingle_layers(&step);
        print(name, out);
    }
}

// Every operator of a plain decoder but sampling, in `ingle_layers`.
static void layers(int32_t kv_type, int32_t activation, int64_t window, float softcap) {
    const int64_t hidden = 72, inner = 40, heads = 6, kv_heads = 2, size = 24, page_size = 8, pages = 20;
    const int64_t qkv_rows = (heads + 2 * kv_heads) * size;
    vector<Weights> w;
    for (int i = 0; i < 2; i++) {
        w.emplace_back(4, 32, false, true, qkv_rows, hidden);
        w.emplace_back(8, 32, false, false, hidden, heads * size);
        w.emplace_back(4, 16, true, true, 2 * inner, hidden);
        w.emplace_back(16, 32, false, false, hidden, inner);
    }
    const Matrix* parts[8];
    for (int i = 0; i < 8; i++) parts[i] = &w[i].matrix;
    vector<float> norm = numbers(hidden), head_norm = numbers(size), bias = numbers(qkv_rows);
    auto projection = [&](int i) { return Projection{parts + i, i % 4 ? nullptr : bias.data(), 1, parts[i]->rows}; };
    vector<Layer> described;
    for (int i = 0; i < 8; i += 4)
        described.push_back({.qkv = projection(i), .out = projection(i + 1), .gate_up = projection(i + 2),
                             .down = projection(i + 3), .input_norm = norm.data(), .q_norm = head_norm.data(),
                             .k_norm = head_norm.data(), .attention_post_norm = i ? norm.data() : nullptr,
                             .mlp_norm = norm.data(), .window = window, .scale = 0.3f, .softcap = softcap,
                             .qk_eps = 1e-5f, .activation = activation});
    const int64_t layer_bytes = 2 * pages * page_size * kv_heads * size * (kv_type == kFloat ? 4 : 2);
    const Shape shape = {hidden, heads, kv_heads, size, size, page_size, layer_bytes, kv_type};
    run_layers(kv_type == kFloat ? "layers" : "layers-16-bit", described, shape, norm);
}

// The same with latent attention, whose queries have a latent of their own in the first layer.
static void latent_layers(int32_t kv_type, int32_t interleaved) {
    const int64_t hidden = 72, inner = 40, heads = 6, rank = 40, nope = 24, rope = 8, value = 20, q_rank = 48;
    vector<Weights> w;
    w.reserve(100);
    vector<const Matrix*> at;
    const auto add = [&](int32_t bits, int64_t rows, int64_t columns) {
        w.emplace_back(bits, 32, false, false, rows, columns);
        at.push_back(&w.back().matrix);
        return at.size() - 1;
    };
    at.reserve(100);
    vector<float> norm = numbers(hidden), bias = numbers(q_rank);
    const auto projection = [&](size_t i, const float* added = nullptr) { return Projection{&at[i], added, 1, at[i]->rows}; };
    const auto heads_of = [&](int64_t rows, int64_t columns) {
        const size_t first = at.size();
        for (int64_t h = 0; h < heads; h++) add(16, rows, columns);
        return &at[first];
    };
    vector<Latent> latents(2);
    vector<Layer> described;
    for (int i = 0; i < 2; i++) {
        Latent& l = latents[i];
        l = {.q_up = projection(add(8, heads * (nope + rope), i ? hidden : q_rank)),
             .kv_down = projection(add(8, rank + rope, hidden)), .key_up = heads_of(rank, nope),
             .value_up = heads_of(value, rank), .kv_norm = norm.data(), .num_heads = heads, .rank = rank, .nope_dim = nope,
             .rope_dim = rope, .value_dim = value, .eps = 1e-6f, .interleaved = interleaved};
        if (i == 0) l.q_down = projection(add(8, q_rank, hidden), bias.data()), l.q_norm = norm.data();
        described.push_back({.out = projection(add(8, hidden, heads * value)), .gate_up = projection(add(4, 2 * inner, hidden)),
                             .down = projection(add(16, hidden, inner)), .latent = &l, .input_norm = norm.data(),
                             .mlp_norm = norm.data(), .scale = 0.2f, .activation = kSilu});
    }
    const int64_t page_size = 8, pages = 20, layer_bytes = pages * page_size * (rank + rope) * (kv_type == kFloat ? 4 : 2);
    const Shape shape = {hidden, heads, 1, rank + rope, rope, page_size, layer_bytes, kv_type};
    run_layers(kv_type == kFloat ? "layers" : "layers-16-bit", described, shape, norm);
}

int main() {
    ingle_start(3);
    printf("instructions %s\n", ingle_instructions());
    matrices();
    blocks();
    for (int32_t kv_type : {kFloat, kHalf, kBrain}) {
        layers(kv_type, kSilu, 0, 0);
        layers(kv_type, kGeluTanh, 20, 5);
        latent_layers(kv_type, kv_type == kFloat);
    }
    const vector<float> logits = numbers(4 * 1003);
    int64_t token_ids[4];
    uint8_t finite[4];
    ingle_sample_greedy(logits.data(), 4, 1003, token_ids, finite);
    for (int i = 0; i < 4; i++) print("greedy", {(float)token_ids[i], (float)finite[i]});
}
