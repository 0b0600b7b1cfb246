//! The model: embedding, decoder layers, norm, output head.

pub(crate) mod checkpointing;
pub(crate) mod cost;
mod fake_quantize;
pub(crate) mod mtp;
pub(crate) mod parameters;
pub(crate) mod stack_shards;
pub(crate) mod visit;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use kernels::TokenScores;

use crate::config::ModelConfig;
use crate::forward::context::ForwardContext;
use crate::modules::attention::Attention;
use crate::modules::linear::{Linear, Weight};
use crate::modules::lora::Lora;
use crate::modules::mlp::Mlp;
use crate::modules::moe::{Moe, MoeRun};
use crate::modules::norm::Norm;
use crate::precision::PrecisionClass;
use crate::rope::RotaryTable;

/// A causal language model. Field names are the checkpoint's keys.
#[derive(Module, Debug)]
pub struct Model {
    /// Everything below the output head.
    pub model: Decoder,
    /// `[vocab, hidden_size]`; none if the embedding serves.
    pub lm_head: Option<Linear>,
    /// The architecture.
    #[module(skip)]
    pub config: ModelConfig,
    /// What an adapter has put in the place of the model's own weights.
    #[module(skip)]
    pub replaced: ReplacedWeights,
}

/// Weights that are an adapter's and not the model's own, besides low-rank updates.
#[derive(Clone, Debug, Default)]
pub struct ReplacedWeights {
    /// Keys of whole weights.
    pub keys: Vec<String>,
    /// Tokens with a new row of the embedding.
    pub tokens: Vec<usize>,
}

/// The layers between token ids and the last hidden state.
#[derive(Module, Debug)]
pub struct Decoder {
    /// Token embedding.
    pub embed_tokens: Embedding,
    /// The layers.
    pub layers: Vec<DecoderLayer>,
    /// The last norm.
    pub norm: Norm,
}

/// A table with one row per token.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[vocab, hidden_size]`.
    pub weight: Weight,
    /// The update. A tied output head goes without it.
    pub lora: Option<Lora>,
}

/// One layer: attention and feed-forward, each after a norm and added to the residual stream.
#[derive(Module, Debug)]
pub struct DecoderLayer {
    /// Norm before attention.
    pub input_layernorm: Norm,
    /// Attention.
    pub self_attn: Attention,
    /// Norm before the feed-forward part.
    pub post_attention_layernorm: Norm,
    /// The feed-forward part.
    pub mlp: FeedForward,
}

/// The forms of the feed-forward part.
#[expect(
    clippy::large_enum_variant,
    reason = "tensor handles; there are as many as layers, and burn derives no boxed variants"
)]
#[derive(Module, Debug)]
pub enum FeedForward {
    /// One MLP.
    Dense(Mlp),
    /// A mixture of experts.
    Moe(Moe),
}

impl Model {
    /// The hidden states after the last norm.
    ///
    /// # Shapes
    /// - `input_ids`: `[batch, seq]`, continuing the sequences of the pass's caches if it has any
    /// - returns: `[batch, seq, hidden_size]`
    ///
    /// # Panics
    /// If an id is not below the vocabulary's size, or the pass has caches and not one per row.
    pub fn hidden(&self, input_ids: Tensor<2, Int>, ctx: &mut ForwardContext<'_>) -> Tensor<3> {
        let dims = input_ids.dims();
        let mut x = self.enter(input_ids, ctx);
        for (layer_idx, layer) in self.model.layers.iter().enumerate() {
            x = layer.forward(x, dims, ctx, layer_idx);
        }
        ctx.advance(dims[1]);
        self.leave(x, dims)
    }

    /// The input of the first layer, `[batch · seq, hidden_size]`. Gives the pass its rotary tables.
    fn enter(&self, input_ids: Tensor<2, Int>, ctx: &mut ForwardContext<'_>) -> Tensor<2> {
        let [batch, seq] = input_ids.dims();
        ctx.rotary = Some(self.rotary(seq, ctx, &input_ids.device()));
        let ids = input_ids.reshape([batch * seq]);
        let x = self.model.embed_tokens.forward(ids);
        ctx.record_residual(&x, || "model.embed_tokens".into());
        x
    }

    /// The rotary tables of an input of length `seq`.
    fn rotary(&self, seq: usize, ctx: &ForwardContext<'_>, device: &Device) -> RotaryTable {
        let positions = ctx.positions(seq).into_iter();
        RotaryTable::new(&self.config.rope, positions, self.config.rope_dim(), device)
    }

    /// The hidden states, `[batch, seq, hidden_size]`, from the output of the last layer.
    fn leave(&self, x: Tensor<2>, [batch, seq]: [usize; 2]) -> Tensor<3> {
        let hidden = self.model.norm.forward(x);
        hidden.reshape([batch, seq, self.config.hidden_size])
    }

    /// The logits of hidden states.
    ///
    /// # Shapes
    /// - `hidden`: `[tokens, hidden_size]`
    /// - returns: `[tokens, vocab]`, f32
    pub fn logits(&self, hidden: Tensor<2>, ctx: &ForwardContext<'_>) -> Tensor<2> {
        self.head().forward_as(PrecisionClass::Head, hidden, ctx)
    }

    /// Records hidden states `[tokens, hidden_size]` as the output head's input, if inputs are recorded, without any product.
    pub(crate) fn record_head(&self, hidden: &Tensor<2>, ctx: &ForwardContext<'_>) {
        ctx.record_input(self.head().weight.frozen(), hidden);
    }

    /// The loss of every position; the logits never exist all at the same time.
    ///
    /// # Shapes
    /// - `hidden`: `[batch, seq, hidden_size]`, `targets`: `[batch, seq]`, −100 for none
    /// - returns: `[batch · seq]`, in nats; 0 without a target
    pub fn loss(
        &self,
        hidden: Tensor<3>,
        targets: Tensor<2, Int>,
        ctx: &ForwardContext<'_>,
    ) -> Tensor<1> {
        let [batch, seq, hidden_size] = hidden.dims();
        self.head().cross_entropy(
            hidden.reshape([batch * seq, hidden_size]),
            targets.reshape([batch * seq]),
            ctx,
        )
    }

    /// The losses of positions and their most likely tokens, without gradients; the logits never exist all at the same time.
    ///
    /// # Shapes
    /// - `hidden`: `[tokens, hidden_size]`, `targets`: `[tokens]`, −100 for none
    pub fn token_scores(
        &self,
        hidden: Tensor<2>,
        targets: Tensor<1, Int>,
        ctx: &ForwardContext<'_>,
    ) -> TokenScores {
        self.head().token_scores(hidden, targets, ctx)
    }

    /// The output head, which may be the embedding.
    fn head(&self) -> Linear {
        let tied = || Linear::new(self.model.embed_tokens.weight.clone());
        self.lm_head.clone().unwrap_or_else(tied)
    }
}

impl Embedding {
    /// The rows of some tokens.
    ///
    /// # Shapes
    /// - `ids`: `[tokens]`
    /// - returns: `[tokens, hidden_size]`
    pub fn forward(&self, ids: Tensor<1, Int>) -> Tensor<2> {
        self.weight.embed(ids, self.lora.as_ref())
    }
}

/// A layer that runs in turns, because other ranks have some of its experts.
#[derive(Debug)]
pub(crate) struct LayerRun {
    /// The residual stream after attention.
    residual: Tensor<2>,
    mlp: MoeRun,
}

impl DecoderLayer {
    /// # Shapes
    /// - `x`: `[batch · seq, hidden_size]`
    /// - returns: `[batch · seq, hidden_size]`
    pub fn forward(
        &self,
        x: Tensor<2>,
        dims: [usize; 2],
        ctx: &mut ForwardContext<'_>,
        layer_idx: usize,
    ) -> Tensor<2> {
        let mut run = self.send(x, dims, ctx, layer_idx);
        self.serve(&mut run, ctx);
        self.finish(run, ctx, layer_idx)
    }

    /// Attention, and what comes before rows go to experts of other ranks; all of the layer if there are none.
    pub(crate) fn send(
        &self,
        x: Tensor<2>,
        dims: [usize; 2],
        ctx: &mut ForwardContext<'_>,
        layer_idx: usize,
    ) -> LayerRun {
        if let FeedForward::Moe(moe) = &self.mlp {
            moe.experts.prefetch(ctx, |n| {
                // Attention changes little of the residual stream, so this is close to the router's later input.
                let likely = self.post_attention_layernorm.forward(x.clone());
                moe.likely_experts(likely, n, ctx)
            });
        }
        let normed = self.input_layernorm.forward(x.clone());
        let residual = x + match &self.self_attn {
            Attention::Mla(mla) => mla.forward(normed, dims, ctx, layer_idx),
            Attention::Gqa(gqa) => gqa.forward(normed, dims, ctx, layer_idx),
        };
        ctx.record_residual(&residual, || format!("model.layers.{layer_idx}.self_attn"));
        let normed = self.post_attention_layernorm.forward(residual.clone());
        let mlp = match &self.mlp {
            FeedForward::Dense(mlp) => MoeRun::Done(mlp.forward(normed, ctx)),
            FeedForward::Moe(moe) => moe.send(normed, ctx, layer_idx),
        };
        LayerRun { residual, mlp }
    }

    /// Serves the rows of other ranks.
    pub(crate) fn serve(&self, run: &mut LayerRun, ctx: &ForwardContext<'_>) {
        if let FeedForward::Moe(moe) = &self.mlp {
            moe.serve(&mut run.mlp, ctx);
        }
    }

    /// The output of the layer, `[batch · seq, hidden_size]`.
    pub(crate) fn finish(
        &self,
        run: LayerRun,
        ctx: &mut ForwardContext<'_>,
        layer_idx: usize,
    ) -> Tensor<2> {
        let LayerRun { residual, mlp } = run;
        let y = residual
            + match (&self.mlp, mlp) {
                (FeedForward::Moe(moe), run) => moe.finish(run, ctx),
                (FeedForward::Dense(_), MoeRun::Done(y)) => y,
                (FeedForward::Dense(_), MoeRun::Running(..)) => {
                    unreachable!("an MLP has no experts")
                }
            };
        ctx.record_residual(&y, || format!("model.layers.{layer_idx}.mlp"));
        y
    }
}
