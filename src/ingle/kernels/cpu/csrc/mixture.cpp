// A mixture of experts in place of an MLP: what is computed, and in which order, is `SparseMoe` in ingle/model/moe.py and
// `route` in ingle/kernels/reference.py. A token's experts are added up in the order of their numbers, whatever the batch.
#include <algorithm>
#include <vector>

#include "operators.h"
#include "pool.h"
#include "simd.h"

namespace ingle {
namespace {

constexpr float kExcluded = -1e30f;  // the score of an expert that cannot be chosen

float dot(const float* a, const float* b, int64_t size) {
    Floats total = {};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) total += load(a + i) * load(b + i);
    if (i < size) total += load_part(a + i, size - i) * load_part(b + i, size - i);
    return sum(total);
}

void exponentials(float* x, int64_t size, float minus) {  // x becomes e^(x - minus)
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(x + i, exponential(load(x + i) - minus));
    if (i < size) store_part(x + i, exponential(load_part(x + i, size - i) - minus), size - i);
}

// Logits to scores, in place.
void score(const Mixture& m, float* logits) {
    const int64_t n = m.num_experts;
    if (m.scoring == kSigmoid) {
        for (int64_t i = 0; i < n; i++) logits[i] = -logits[i];
        exponentials(logits, n, 0);
        for (int64_t i = 0; i < n; i++) logits[i] = 1 / (1 + logits[i]);
        return;
    }
    exponentials(logits, n, *std::max_element(logits, logits + n));
    float total = 0;
    for (int64_t i = 0; i < n; i++) total += logits[i];
    for (int64_t i = 0; i < n; i++) logits[i] /= total;
}

// The indices of the `count` largest, the first of equal ones first; what was taken becomes `kExcluded`. Of numbers that
// are not finite any are taken.
void take_largest(float* x, int64_t size, int64_t count, int32_t* indices) {
    for (int64_t k = 0; k < count; k++) {
        int64_t best = 0;
        for (int64_t i = 1; i < size; i++)
            if (x[i] > x[best]) best = i;
        indices[k] = best;
        x[best] = kExcluded;
    }
}

// Excludes the experts of all groups but the best.
void limit_groups(const Mixture& m, float* choice) {
    const int64_t size = m.num_experts / m.num_groups;
    std::vector<float> best(m.num_groups), group(size);
    std::vector<int32_t> taken(std::max(m.num_groups, m.group_experts));
    for (int64_t g = 0; g < m.num_groups; g++) {
        std::copy_n(choice + g * size, size, group.begin());
        take_largest(group.data(), size, m.group_experts, taken.data());
        for (int64_t k = 0; k < m.group_experts; k++) best[g] += choice[g * size + taken[k]];
    }
    take_largest(best.data(), m.num_groups, m.topk_group, taken.data());
    for (int64_t g = 0; g < m.num_groups; g++)
        if (std::find(taken.begin(), taken.begin() + m.topk_group, g) == taken.begin() + m.topk_group)
            std::fill_n(choice + g * size, size, kExcluded);
}

// A token's experts and what each of them weighs: [top_k], of its logits.
void choose(const Mixture& m, float* scores, float* choice, int32_t* expert_ids, float* weights) {
    score(m, scores);
    for (int64_t i = 0; i < m.num_experts; i++) choice[i] = scores[i] + (m.selection_bias ? m.selection_bias[i] : 0.0f);
    if (m.num_groups > 1) limit_groups(m, choice);
    take_largest(choice, m.num_experts, m.top_k, expert_ids);
    float total = 0;
    for (int64_t k = 0; k < m.top_k; k++) total += weights[k] = scores[expert_ids[k]];
    const float divisor = m.normalizes ? total + 1e-20f : 1.0f;  // sigmoids may all be 0
    for (int64_t k = 0; k < m.top_k; k++) weights[k] = weights[k] / divisor * m.scaling;
}

void route(const Mixture& m, const float* x, int64_t num_tokens, int64_t hidden_size, int32_t* expert_ids, float* weights) {
    static thread_local std::vector<float> own;
    own.resize(2 * num_tokens * m.num_experts);
    float* logits = own.data();
    float* choice = logits + num_tokens * m.num_experts;
    parallel_ranges(num_tokens * m.num_experts, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            logits[i] = dot(x + i / m.num_experts * hidden_size, m.router + i % m.num_experts * hidden_size, hidden_size) +
                        (m.router_bias ? m.router_bias[i % m.num_experts] : 0.0f);
    });
    parallel_ranges(num_tokens, 8, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++)
            choose(m, logits + t * m.num_experts, choice + t * m.num_experts, expert_ids + t * m.top_k,
                   weights + t * m.top_k);
    });
}

// The tokens of each expert, and what it weighs for them: expert e has [starts[e], starts[e + 1]).
struct Assigned {
    std::vector<int64_t> starts, tokens;
    std::vector<float> weights;

    Assigned(const Mixture& m, int64_t num_tokens, const int32_t* expert_ids, const float* chosen_weights)
        : starts(m.num_experts + 1), tokens(num_tokens * m.top_k), weights(num_tokens * m.top_k) {
        for (int64_t i = 0; i < num_tokens * m.top_k; i++) starts[expert_ids[i] + 1]++;
        for (int64_t e = 0; e < m.num_experts; e++) starts[e + 1] += starts[e];
        std::vector<int64_t> next(starts.begin(), starts.end() - 1);
        for (int64_t i = 0; i < num_tokens * m.top_k; i++) {
            const int64_t at = next[expert_ids[i]]++;
            tokens[at] = i / m.top_k;
            weights[at] = chosen_weights[i];
        }
    }
};

// out[tokens[i]] += weights[i] * rows[i]; no token comes twice.
void add_rows(const float* rows, const int64_t* tokens, const float* weights, int64_t count, int64_t size, float* out) {
    parallel_ranges(count, 8, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const float* from = rows + i * size;
            float* to = out + tokens[i] * size;
            for (int64_t c = 0; c < size; c++) to[c] += weights[i] * from[c];
        }
    });
}

// The gated MLP of some tokens; `buffer` holds 3 intermediate sizes a token.
void gated_mlp(const Projection& gate_up, const Projection& down, int32_t activation, const float* x, int64_t num_tokens,
               float* buffer, float* out) {
    float* inner = buffer + num_tokens * gate_up.rows;
    project_gated(gate_up, x, num_tokens, activation, buffer, inner);
    project(down, inner, num_tokens, out);
}

}  // namespace

void mix(const Mixture& m, int32_t activation, const float* x, int64_t num_tokens, int64_t hidden_size, float* out) {
    std::vector<int32_t> expert_ids(num_tokens * m.top_k);
    std::vector<float> weights(num_tokens * m.top_k);
    route(m, x, num_tokens, hidden_size, expert_ids.data(), weights.data());
    const Assigned assigned(m, num_tokens, expert_ids.data(), weights.data());
    const int64_t widest = std::max(m.gate_up[0].rows, m.shared_gate_up.rows) * 3 / 2;
    static thread_local std::vector<float> own;
    own.resize(num_tokens * (2 * hidden_size + widest));
    float* rows = own.data();
    float* parts = rows + num_tokens * hidden_size;
    float* buffer = parts + num_tokens * hidden_size;
    memset(out, 0, num_tokens * hidden_size * sizeof(float));
    for (int64_t e = 0; e < m.num_experts; e++) {
        const int64_t first = assigned.starts[e], count = assigned.starts[e + 1] - first;
        if (count == 0) continue;
        const int64_t* tokens = assigned.tokens.data() + first;
        for (int64_t i = 0; i < count; i++)
            memcpy(rows + i * hidden_size, x + tokens[i] * hidden_size, hidden_size * sizeof(float));
        gated_mlp(m.gate_up[e], m.down[e], activation, rows, count, buffer, parts);
        add_rows(parts, tokens, assigned.weights.data() + first, count, hidden_size, out);
    }
    if (m.shared_gate_up.num_parts == 0) return;
    gated_mlp(m.shared_gate_up, m.shared_down, activation, x, num_tokens, buffer, parts);
    std::vector<int64_t> all(num_tokens);
    std::vector<float> shares(num_tokens, 1.0f);
    for (int64_t t = 0; t < num_tokens; t++) {
        all[t] = t;
        if (!m.shared_gate) continue;
        float gate = -dot(x + t * hidden_size, m.shared_gate, hidden_size);
        exponentials(&gate, 1, 0);
        shares[t] = 1 / (1 + gate);
    }
    add_rows(parts, all.data(), shares.data(), num_tokens, hidden_size, out);
}

}  // namespace ingle

extern "C" void ingle_mix(const ingle::Mixture* m, int32_t activation, const float* x, int64_t num_tokens,
                          int64_t hidden_size, float* out) {
    ingle::mix(*m, activation, x, num_tokens, hidden_size, out);
}
