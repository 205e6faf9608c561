// Multi-head latent attention (https://arxiv.org/abs/2405.04434), absorbed: queries are multiplied into the latents' space,
// where all heads attend to the same numbers of a token, of which the first are its value too.
#include <vector>

#include "operators.h"
#include "pool.h"

namespace ingle {

void attend_latents(const Step& s, const Layer& layer, const float* x, void* cache, float* out) {
    const Latent& l = *layer.latent;
    const int64_t tokens = s.num_tokens, width = l.rank + l.rope_dim, q_width = l.nope_dim + l.rope_dim;
    static thread_local std::vector<float> own;
    const int64_t wanted = tokens * (l.q_down.rows + width + l.num_heads * (q_width + 2 * width));
    if ((int64_t)own.size() < wanted) own.resize(wanted);
    float* q_latent = own.data();
    float* down = q_latent + tokens * l.q_down.rows;
    float* q = down + tokens * width;
    float* queries = q + tokens * l.num_heads * q_width;  // [num_tokens, num_heads, width]
    float* attended = queries + tokens * l.num_heads * width;
    const float* q_input = x;
    if (l.q_down.num_parts) {
        project(l.q_down, x, tokens, q_latent);
        ingle_rms_norm(q_latent, l.q_norm, l.eps, tokens, l.q_down.rows, q_latent);
        q_input = q_latent;
    }
    project(l.q_up, q_input, tokens, q);
    project(l.kv_down, x, tokens, down);
    rotate_and_store_latents(s, layer, down, q, cache, queries);
    multiply_each(l.key_up, l.num_heads, {q, l.num_heads * q_width, q_width}, tokens,
                  {queries, l.num_heads * width, width});
    Attention attention = s.attention;
    attention.q = queries;
    attention.q_stride = l.num_heads * width;
    attention.keys = attention.values = cache;
    attention.out = attended;
    attention.window = layer.window;
    attention.scale = layer.scale;
    attention.softcap = layer.softcap;
    ingle_attention(&attention);
    multiply_each(l.value_up, l.num_heads, {attended, l.num_heads * width, width}, tokens,
                  {out, l.num_heads * l.value_dim, l.value_dim});
}

}  // namespace ingle
