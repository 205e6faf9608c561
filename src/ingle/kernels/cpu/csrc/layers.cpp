// All layers of a decoder in one call: between the operators of a small model, Python takes longer than they do.
// What happens, and in which order, is `Decoder.forward` in ingle/model/decoder.py; the operators are the same.
#include <algorithm>
#include <vector>

#include "operators.h"
#include "pool.h"
#include "simd.h"

namespace ingle {

void project(const Projection& p, const float* x, int64_t num_tokens, float* y) {
    float* columns = y;
    for (int64_t i = 0; i < p.num_parts; i++) {
        multiply(*p.parts[i], x, num_tokens, columns, p.rows);
        columns += p.parts[i]->rows;
    }
    if (!p.bias) return;
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t r = 0; r < p.rows; r++) y[t * p.rows + r] += p.bias[r];
}

void project_gated(const Projection& p, const float* x, int64_t num_tokens, int32_t activation, float* buffer, float* out) {
    // Both ways give the same numbers. Of few tokens, what takes the time is to read weights, and those one after the other.
    constexpr int64_t many = 32;
    if (num_tokens >= many && p.num_parts == 1 && !p.bias && can_gate(*p.parts[0]))
        return multiply_gated(*p.parts[0], x, num_tokens, activation, out, p.rows / 2);
    project(p, x, num_tokens, buffer);
    ingle_gated(buffer, activation, num_tokens, p.rows / 2, out);
}

namespace {

// Moves the rows of wanted tokens to the beginning: the first `size` numbers of each, rows `stride` apart.
void gather_wanted(const Step& s, float* rows, int64_t size, int64_t stride) {
    for (int64_t i = 0; i < s.num_wanted; i++)
        memmove(rows + i * stride, rows + s.wanted[i] * stride, size * sizeof(float));
}

// What a layer's attention gives, before its output projection, of all tokens or of those that are wanted; `qkv` is room
// for its inputs.
void attend(const Step& s, const Layer& layer, int64_t index, bool wanted_alone, const float* x, float* qkv,
            float* attended) {
    const int64_t group = s.located[2 * index], place = s.located[2 * index + 1];
    uint8_t* keys = (uint8_t*)s.kv_cache + place * s.layer_bytes;
    if (layer.latent) {
        attend_latents(s, layer, x, keys, attended);
        const int64_t size = layer.latent->num_heads * layer.latent->value_dim;
        if (wanted_alone) gather_wanted(s, attended, size, size);
        return;
    }
    uint8_t* values = keys + s.layer_bytes / 2;
    project(layer.qkv, x, s.num_tokens, qkv);
    const Rotation rotation = {.qkv = qkv,
                               .cos_sin = s.cos_sin[layer.rope],
                               .q_norm = layer.q_norm,
                               .k_norm = layer.k_norm,
                               .keys = keys,
                               .values = values,
                               .kv_places = s.kv_places + group * s.num_tokens,
                               .query_factors = s.query_factors,
                               .num_tokens = s.num_tokens,
                               .num_heads = s.attention.num_heads,
                               .num_kv_heads = s.attention.num_kv_heads,
                               .head_dim = s.attention.head_dim,
                               .rotary_dim = s.rotary_dims[layer.rope],
                               .page_size = s.attention.page_size,
                               .eps = layer.qk_eps,
                               .kv_type = s.attention.kv_type};
    ingle_rotate_and_store(&rotation);
    Attention attention = s.attention;
    attention.q = qkv;
    attention.q_stride = layer.qkv.rows;
    attention.keys = keys;
    attention.values = values;
    attention.page_tables += group * s.table_size;
    attention.out = attended;
    attention.window = layer.window;
    attention.scale = layer.scale;
    attention.softcap = layer.softcap;
    attention.sinks = layer.sinks;
    if (wanted_alone) {
        gather_wanted(s, qkv, attention.num_heads * attention.head_dim, layer.qkv.rows);
        attention.query_starts = s.wanted_starts;
    }
    ingle_attention(&attention);
}

}  // namespace
}  // namespace ingle

using namespace ingle;

extern "C" void ingle_layers(const Step* step) {
    const Step& s = *step;
    int64_t widest = 0;
    for (int64_t i = 0; i < s.num_layers; i++) {
        const Layer& layer = s.layers[i];
        const int64_t attended = layer.latent ? layer.latent->num_heads * layer.latent->value_dim : 0;
        widest = std::max({widest, layer.qkv.rows, attended, layer.gate_up.rows});
    }
    static thread_local std::vector<float> buffer;  // of normed x, an operator's input and output, the layer's output
    const int64_t wanted = s.num_tokens * (2 * s.hidden_size + 2 * widest);
    if ((int64_t)buffer.size() < wanted) buffer.resize(wanted);
    float* normed = buffer.data();
    float* output = normed + s.num_tokens * s.hidden_size;
    float* wide = output + s.num_tokens * s.hidden_size;
    float* inner = wide + s.num_tokens * widest;
    ingle_rms_norm(s.residual, s.layers[0].input_norm, s.eps, s.num_tokens, s.hidden_size, normed);
    int64_t num_tokens = s.num_tokens;
    for (int64_t i = 0; i < s.num_layers; i++) {
        const Layer& layer = s.layers[i];
        const bool last = i + 1 == s.num_layers, wanted_alone = last && s.wanted;
        attend(s, layer, i, wanted_alone, normed, wide, inner);
        if (wanted_alone) {  // the others' keys and values are all that anybody will read of them
            gather_wanted(s, s.residual, s.hidden_size, s.hidden_size);
            num_tokens = s.num_wanted;
            if (num_tokens == 0) return;
        }
        project(layer.out, inner, num_tokens, output);
        add_and_normalize({output, layer.attention_post_norm, layer.mlp_norm, s.eps}, s.residual, num_tokens, s.hidden_size, normed);
        if (layer.mixture) {
            mix(*layer.mixture, layer.activation, normed, num_tokens, s.hidden_size, output);
        } else {
            project_gated(layer.gate_up, normed, num_tokens, layer.activation, wide, inner);
            project(layer.down, inner, num_tokens, output);
        }
        add_and_normalize({output, layer.mlp_post_norm, last ? s.norm : s.layers[i + 1].input_norm, s.eps}, s.residual,
                          num_tokens, s.hidden_size, last ? s.out : normed);
    }
}
