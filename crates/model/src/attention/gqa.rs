//! Grouped-query attention, as in the Qwen and Llama distills.

use burn::module::Module;
use burn::tensor::Tensor;
use kernels::RopeLayout;

use crate::config::GqaConfig;
use crate::context::{ForwardContext, KvSource, per_sequence};
use crate::linear::Linear;

/// Grouped-query attention of one layer.
#[derive(Module, Debug)]
pub struct Gqa {
    /// `[heads · head_dim, hidden_size]`.
    pub q_proj: Linear,
    /// `[kv_heads · head_dim, hidden_size]`.
    pub k_proj: Linear,
    /// `[kv_heads · head_dim, hidden_size]`.
    pub v_proj: Linear,
    /// `[hidden_size, heads · head_dim]`.
    pub o_proj: Linear,
    /// Sizes.
    #[module(skip)]
    pub config: GqaConfig,
    /// Number of query heads.
    #[module(skip)]
    pub heads: usize,
    /// Factor of the scores.
    #[module(skip)]
    pub softmax_scale: f32,
    /// Which rotary features form a pair.
    #[module(skip)]
    pub layout: RopeLayout,
}

impl Gqa {
    /// # Shapes
    /// - `tokens`: `[batch · seq, hidden_size]`
    /// - returns: `[batch · seq, hidden_size]`
    pub fn forward(
        &self,
        tokens: Tensor<2>,
        [batch, seq]: [usize; 2],
        ctx: &mut ForwardContext<'_>,
        layer_idx: usize,
    ) -> Tensor<2> {
        let (dim, kv_heads, heads) = (
            self.config.head_dim,
            self.config.num_key_value_heads,
            self.heads,
        );
        let rotary = ctx.rotary();
        let rotated = |x: Tensor<4>| rotary.rotate(x, self.layout);

        let q = rotated(
            self.q_proj
                .forward(tokens.clone(), ctx)
                .reshape([batch, seq, heads, dim]),
        );
        let [k, v] = Linear::forward_both([&self.k_proj, &self.v_proj], tokens, ctx)
            .map(|y| y.reshape([batch, seq, kv_heads, dim]));
        let (k, scale) = (rotated(k), self.softmax_scale);
        let out = match ctx.append(layer_idx, [k, v]) {
            KvSource::New([k, v]) => kernels::attention(q, k, v, scale, &ctx.segments),
            KvSource::Cached(held) => per_sequence(q, &held, |q, [k, v]| {
                kernels::cached_attention(q, k, v, scale)
            }),
        };
        let out = out.reshape([batch * seq, heads * dim]);
        self.o_proj.forward(out, ctx)
    }
}
