//! Multi-head latent attention.
//!
//! Keys and values of all heads are rebuilt from one latent vector per token. *Expanded*, they are rebuilt in full:
//! for training and prefill. *Absorbed*, `kv_b_proj` is folded into the query and the output instead, and attention
//! runs over the latents themselves: for decoding, where rebuilding every earlier token at every step would be most
//! of the work. Both read the same cache and agree to rounding.
//!
//! Source: DeepSeek-V2, arXiv:2405.04434, section 2.1; deepseek-ai/DeepSeek-V3: inference/model.py, `MLA`.

use burn::module::Module;
use burn::tensor::Tensor;
use kernels::{Absorbed, Direction, HeadRows, KvBuffer, RopeLayout};

use crate::config::MlaConfig;
use crate::context::{ForwardContext, KvSource, Observe, per_sequence};
use crate::linear::Linear;
use crate::norm::Norm;

/// Most new positions of a sequence that attend to the latents themselves. Each then has the bits it has in a pass of its
/// own.
const FEW_POSITIONS: usize = 8;

/// Latent attention of one layer.
#[derive(Module, Debug)]
pub struct Mla {
    /// `[heads · qk_head_dim, hidden_size]`, where there is no query bottleneck.
    pub q_proj: Option<Linear>,
    /// `[q_lora_rank, hidden_size]`.
    pub q_a_proj: Option<Linear>,
    /// `[q_lora_rank]`.
    pub q_a_layernorm: Option<Norm>,
    /// `[heads · qk_head_dim, q_lora_rank]`.
    pub q_b_proj: Option<Linear>,
    /// `[kv_lora_rank + qk_rope_head_dim, hidden_size]`.
    pub kv_a_proj_with_mqa: Linear,
    /// `[kv_lora_rank]`.
    pub kv_a_layernorm: Norm,
    /// `[heads · (qk_nope_head_dim + v_head_dim), kv_lora_rank]`.
    pub kv_b_proj: Linear,
    /// `[hidden_size, heads · v_head_dim]`.
    pub o_proj: Linear,
    /// Sizes.
    #[module(skip)]
    pub config: MlaConfig,
    /// Number of heads.
    #[module(skip)]
    pub heads: usize,
    /// Factor of the scores.
    #[module(skip)]
    pub softmax_scale: f32,
    /// Which rotary features form a pair.
    #[module(skip)]
    pub layout: RopeLayout,
}

impl Mla {
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
        let (q, kv) = self.projections(tokens, ctx);
        let q = self.queries(q, [batch, seq], ctx);
        let latents = self.latents(kv, [batch, seq], ctx);

        let absorbs = self.kv_b_proj.quantizer.is_none();
        let is_observed = ctx.observe == Observe::Inputs;
        let out = match ctx.append(layer_idx, [latents]) {
            KvSource::New([latents]) if absorbs && is_observed => {
                let values = self.values(&latents);
                let (scale, segments) = (self.softmax_scale, &ctx.segments);
                self.folded(q, ctx, |q| {
                    kernels::attention(q, latents, values, scale, segments)
                })
            }
            KvSource::New([latents]) => self.expanded(q, latents, ctx),
            KvSource::Cached(held) if absorbs && (seq <= FEW_POSITIONS || is_observed) => {
                self.absorbed(q, &held, ctx)
            }
            KvSource::Cached(held) => per_sequence(q, &held, |q, [latents]| {
                self.expanded(q, latents.floats(), ctx)
            }),
        };
        let out = out.reshape([batch * seq, self.heads * self.config.v_head_dim]);
        self.o_proj.forward(out, ctx)
    }

    /// Queries `[tokens, heads · qk_head_dim]`, and latents with the shared key `[tokens, kv_lora_rank + rope]`.
    fn projections(&self, tokens: Tensor<2>, ctx: &ForwardContext<'_>) -> (Tensor<2>, Tensor<2>) {
        let kv_proj = &self.kv_a_proj_with_mqa;
        match (
            &self.q_proj,
            &self.q_a_proj,
            &self.q_a_layernorm,
            &self.q_b_proj,
        ) {
            (Some(q_proj), ..) => {
                let [kv, q] = Linear::forward_both([kv_proj, q_proj], tokens, ctx);
                (q, kv)
            }
            (None, Some(q_a_proj), Some(norm), Some(q_b_proj)) => {
                let [kv, q] = Linear::forward_both([kv_proj, q_a_proj], tokens, ctx);
                (q_b_proj.forward(norm.forward(q), ctx), kv)
            }
            _ => unreachable!("the loader builds q_proj, or the three parts of the bottleneck"),
        }
    }

    /// Queries of all heads, the end of each rotated: `[batch, seq, heads, qk_head_dim]`.
    fn queries(
        &self,
        q: Tensor<2>,
        [batch, seq]: [usize; 2],
        ctx: &ForwardContext<'_>,
    ) -> Tensor<4> {
        let q = q.reshape([batch, seq, self.heads, self.config.qk_head_dim()]);
        ctx.rotary().rotate(q, self.layout)
    }

    /// What the cache stores: normalized latent and rotated shared key, `[batch, seq, 1, kv_lora_rank + rope]`.
    fn latents(
        &self,
        kv: Tensor<2>,
        [batch, seq]: [usize; 2],
        ctx: &ForwardContext<'_>,
    ) -> Tensor<4> {
        let [_, width] = kv.dims(); // [tokens, rank + rope]
        let kv = self.kv_a_layernorm.forward_start(kv);
        ctx.rotary()
            .rotate(kv.reshape([batch, seq, 1, width]), self.layout)
    }

    /// Attention over rebuilt keys and values; returns `[batch, seq, heads, v_head_dim]`.
    fn expanded(&self, q: Tensor<4>, latents: Tensor<4>, ctx: &ForwardContext<'_>) -> Tensor<4> {
        let ([batch, kv_seq, ..], heads) = (latents.dims(), self.heads);
        let (nope, v_dim) = (self.config.qk_nope_head_dim, self.config.v_head_dim);
        let latent = self.values(&latents);
        let latent = latent.reshape([batch * kv_seq, self.config.kv_lora_rank]);
        let kv = self
            .kv_b_proj
            .forward(latent, ctx)
            .reshape([batch, kv_seq, heads, nope + v_dim]);
        let scale = self.softmax_scale;
        kernels::expanded_attention(q, kv, latents, v_dim, scale, &ctx.segments)
    }

    /// What values are made of: latents without the shared key.
    fn values(&self, latents: &Tensor<4>) -> Tensor<4> {
        let [batch, kv_seq, ..] = latents.dims();
        let rank = self.config.kv_lora_rank;
        latents.clone().slice([0..batch, 0..kv_seq, 0..1, 0..rank])
    }

    /// Attention over the latents of each sequence themselves; returns `[batch, seq, heads, v_head_dim]`. Without gradient.
    /// `kv_b_proj` is read once for all sequences.
    fn absorbed(
        &self,
        q: Tensor<4>,
        held: &[[KvBuffer; 1]],
        ctx: &ForwardContext<'_>,
    ) -> Tensor<4> {
        let absorbed = Absorbed {
            nope: self.config.qk_nope_head_dim,
            v_dim: self.config.v_head_dim,
            scale: self.softmax_scale,
        };
        let at_once = match held {
            [[latents]] => self.kv_b_proj.attend_latents(&q, latents, absorbed, ctx),
            _ => None,
        };
        at_once.unwrap_or_else(|| {
            let rank = self.config.kv_lora_rank;
            self.folded(q, ctx, |q| {
                per_sequence(q, held, |q, [latents]| {
                    kernels::latent_attention(q, latents, rank, self.softmax_scale)
                })
            })
        })
    }

    /// Attention over latents, `[batch, seq, heads, kv_lora_rank + rope]` → `[batch, seq, heads, kv_lora_rank]`, with
    /// `kv_b_proj` folded into queries and outputs; returns `[batch, seq, heads, v_head_dim]`.
    fn folded(
        &self,
        q: Tensor<4>,
        ctx: &ForwardContext<'_>,
        attend: impl FnOnce(Tensor<4>) -> Tensor<4>,
    ) -> Tensor<4> {
        let ([batch, seq, heads, dim], rank) = (q.dims(), self.config.kv_lora_rank);
        let (nope, v_dim) = (self.config.qk_nope_head_dim, self.config.v_head_dim);
        let rows = |start, len, direction| HeadRows {
            heads,
            start,
            len,
            direction,
        };

        let part = |range| q.clone().slice([0..batch, 0..seq, 0..heads, range]);
        let q_nope = part(0..nope).reshape([batch * seq, heads, nope]);
        let q_latent = self
            .kv_b_proj
            .per_head(q_nope, rows(0, nope, Direction::Transposed), ctx)
            .reshape([batch, seq, heads, rank]);
        let out = attend(Tensor::cat(vec![q_latent, part(nope..dim)], 3));
        let out = out.reshape([batch * seq, heads, rank]);
        self.kv_b_proj
            .per_head(out, rows(nope, v_dim, Direction::Forward), ctx)
            .reshape([batch, seq, heads, v_dim])
    }
}
