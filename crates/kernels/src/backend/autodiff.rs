//! The operations under autodiff: each is handed to its family, or runs without a gradient.
//!
//! An operation none of whose inputs is tracked saves nothing and costs the same as without autodiff.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend};

use crate::backend::attention::autodiff as attention;
use crate::backend::elementwise::autodiff as elementwise;
use crate::backend::experts::autodiff as experts;
use crate::backend::gradients::Gradients;
use crate::backend::linear::autodiff as linear;
use crate::backend::loss::autodiff as loss;
use crate::backend::plain::primitives::Primitives;
use crate::backend::plain::{experts as plain_experts, linear as plain_linear};
use crate::backend::supplied::SuppliedGradients;
use crate::backend::traits::{
    Absorbed, FactorsPrimitive, FakeQuantize, HeadRows, Kernels, KvBufferPrimitive,
    RoutingPrimitive, StacksPrimitive, Update,
};
use crate::formats::Matrix;
use crate::ops::adamw::AdamWStep;
use crate::ops::attention::Segments;
use crate::ops::dropout::Dropout;
use crate::ops::experts::{ExpertBank, ExpertLora, SharedExperts};
use crate::ops::rope::RopeLayout;
use crate::ops::route::TopK;
use crate::settings::Compute;

impl<B: Gradients, C: CheckpointStrategy> Primitives for Autodiff<B, C> {}

impl<B: Gradients, C: CheckpointStrategy> Kernels for Autodiff<B, C> {
    fn linear_frozen(x: FloatTensor<Self>, w: Arc<Matrix>, compute: Compute) -> FloatTensor<Self> {
        linear::linear_frozen::<B, C>(x, w, compute)
    }

    fn linear_frozen_pair(
        x: FloatTensor<Self>,
        first: Arc<Matrix>,
        second: Arc<Matrix>,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        plain_linear::linear_frozen_pair::<Self>(x, [first, second], compute)
    }

    fn linear_trained(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        compute: Compute,
        saved_as: Compute,
    ) -> FloatTensor<Self> {
        linear::linear_trained::<B, C>(x, w, compute, saved_as)
    }

    fn linear_updated(
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        w: Arc<Matrix>,
        update: Update,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (y, low) = linear::linear_updated::<B, C>(x, a, b, w, update);
        (y, Self::from_inner(low))
    }

    fn linear_fake_quantized(
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        w: Arc<Matrix>,
        merge: FakeQuantize,
        compute: Compute,
    ) -> FloatTensor<Self> {
        linear::linear_fake_quantized::<B, C>(x, a, b, w, merge, compute)
    }

    fn linear_add(
        y: FloatTensor<Self>,
        u: FloatTensor<Self>,
        b: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        linear::linear_add::<B, C>(y, u, b)
    }

    fn row_norms(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        w: Arc<Matrix>,
        scale: f32,
    ) -> FloatTensor<Self> {
        Self::from_inner(B::row_norms(
            a.into_primitive(),
            b.into_primitive(),
            w,
            scale,
        ))
    }

    fn heads_linear(
        x: FloatTensor<Self>,
        w: Arc<Matrix>,
        heads: HeadRows,
        compute: Compute,
    ) -> FloatTensor<Self> {
        Self::from_inner(B::heads_linear(x.into_primitive(), w, heads, compute))
    }

    fn embed_frozen(ids: IntTensor<Self>, w: Arc<Matrix>) -> FloatTensor<Self> {
        Self::from_inner(B::embed_frozen(ids, w))
    }

    fn embed_trained(w: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
        elementwise::embed_trained::<B, C>(w, ids)
    }

    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        elementwise::rms_norm::<B, C>(x, weight, eps)
    }

    fn rope(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        layout: RopeLayout,
    ) -> FloatTensor<Self> {
        elementwise::rope::<B, C>(x, cos, sin, layout)
    }

    fn swiglu(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        saved_as: Compute,
    ) -> FloatTensor<Self> {
        elementwise::swiglu::<B, C>(gate, up, saved_as)
    }

    fn dropout(x: FloatTensor<Self>, dropout: Dropout) -> FloatTensor<Self> {
        elementwise::dropout::<B, C>(x, dropout)
    }

    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        scale: f32,
        segments: Segments,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (out, lse) = attention::causal_attention::<B, C>(q, k, v, scale, segments);
        (out, Self::from_inner(lse))
    }

    fn expanded_attention(
        q: FloatTensor<Self>,
        kv: FloatTensor<Self>,
        latents: FloatTensor<Self>,
        v_dim: usize,
        scale: f32,
        segments: Segments,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (out, lse) =
            attention::expanded_attention::<B, C>(q, kv, latents, v_dim, scale, segments);
        (out, Self::from_inner(lse))
    }

    fn encode_blocks(x: FloatTensor<Self>) -> IntTensor<Self> {
        B::encode_blocks(x.into_primitive())
    }

    fn decode_blocks(rows: KvBufferPrimitive<Self>) -> FloatTensor<Self> {
        Self::from_inner(B::decode_blocks(inner(rows)))
    }

    fn cached_attention(
        q: FloatTensor<Self>,
        k: KvBufferPrimitive<Self>,
        v: KvBufferPrimitive<Self>,
        scale: f32,
    ) -> FloatTensor<Self> {
        Self::from_inner(B::cached_attention(
            q.into_primitive(),
            inner(k),
            inner(v),
            scale,
        ))
    }

    fn latent_attention(
        q: FloatTensor<Self>,
        latents: KvBufferPrimitive<Self>,
        v_dim: usize,
        scale: f32,
    ) -> FloatTensor<Self> {
        Self::from_inner(B::latent_attention(
            q.into_primitive(),
            inner(latents),
            v_dim,
            scale,
        ))
    }

    fn absorbed_attention(
        q: FloatTensor<Self>,
        latents: KvBufferPrimitive<Self>,
        w: Arc<Matrix>,
        absorbed: Absorbed,
        compute: Compute,
    ) -> FloatTensor<Self> {
        Self::from_inner(B::absorbed_attention(
            q.into_primitive(),
            inner(latents),
            w,
            absorbed,
            compute,
        ))
    }

    fn choose_experts(scores: FloatTensor<Self>, choice: TopK) -> IntTensor<Self> {
        B::choose_experts(scores.into_primitive(), choice)
    }

    fn dispatch_slots(ids: IntTensor<Self>, experts: usize) -> (IntTensor<Self>, IntTensor<Self>) {
        B::dispatch_slots(ids, experts)
    }

    fn prefetch_experts(ids: IntTensor<Self>, bank: Arc<ExpertBank>) -> IntTensor<Self> {
        B::prefetch_experts(ids, bank)
    }

    fn experts_frozen(
        x: FloatTensor<Self>,
        routing: RoutingPrimitive<Self>,
        factors: FactorsPrimitive<Self>,
        bank: Arc<ExpertBank>,
        lora: ExpertLora,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (y, gate, up) =
            experts::experts_frozen::<B, C>(x, routing, factors, bank, lora, compute);
        (y, Self::from_inner(gate), Self::from_inner(up))
    }

    fn computed_elsewhere(
        x: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        y: FloatTensor<Self>,
        gradients: SuppliedGradients,
    ) -> FloatTensor<Self> {
        experts::computed_elsewhere::<B, C>(x, weights, y, gradients)
    }

    fn moe_frozen(
        x: FloatTensor<Self>,
        routing: RoutingPrimitive<Self>,
        bank: Arc<ExpertBank>,
        shared: SharedExperts,
        compute: Compute,
    ) -> FloatTensor<Self> {
        plain_experts::moe_frozen::<Self>(x, routing, bank, shared, compute)
    }

    fn experts_trained(
        x: FloatTensor<Self>,
        routing: RoutingPrimitive<Self>,
        stacks: StacksPrimitive<Self>,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (y, gate, up) = experts::experts_trained::<B, C>(x, routing, stacks, compute);
        (y, Self::from_inner(gate), Self::from_inner(up))
    }

    fn cross_entropy_frozen(
        h: FloatTensor<Self>,
        u: FloatTensor<Self>,
        b: FloatTensor<Self>,
        targets: IntTensor<Self>,
        w: Arc<Matrix>,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (loss, lse) = loss::cross_entropy_frozen::<B, C>(h, u, b, targets, w, compute);
        (loss, Self::from_inner(lse))
    }

    fn cross_entropy_trained(
        h: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: IntTensor<Self>,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (loss, lse) = loss::cross_entropy_trained::<B, C>(h, w, targets, compute);
        (loss, Self::from_inner(lse))
    }

    fn token_scores_frozen(
        h: FloatTensor<Self>,
        u: FloatTensor<Self>,
        b: FloatTensor<Self>,
        targets: IntTensor<Self>,
        w: Arc<Matrix>,
        compute: Compute,
    ) -> (FloatTensor<Self>, IntTensor<Self>) {
        let [h, u, b] = [h, u, b].map(|values| values.into_primitive());
        let (loss, greedy) = B::token_scores_frozen(h, u, b, targets, w, compute);
        (Self::from_inner(loss), greedy)
    }

    fn token_scores_trained(
        h: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: IntTensor<Self>,
        compute: Compute,
    ) -> (FloatTensor<Self>, IntTensor<Self>) {
        let [h, w] = [h, w].map(|values| values.into_primitive());
        let (loss, greedy) = B::token_scores_trained(h, w, targets, compute);
        (Self::from_inner(loss), greedy)
    }

    fn adamw_step(
        p: FloatTensor<Self>,
        g: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (p, m, v) = B::adamw_step(
            p.into_primitive(),
            g.into_primitive(),
            m.into_primitive(),
            v.into_primitive(),
            step,
        );
        (
            Self::from_inner(p),
            Self::from_inner(m),
            Self::from_inner(v),
        )
    }

    fn sums_of_squares_f32(x: FloatTensor<Self>, parts: usize) -> FloatTensor<Self> {
        Self::from_inner(B::sums_of_squares_f32(x.into_primitive(), parts))
    }
}

/// Rows of a KV buffer without their autodiff node: they have no gradient.
fn inner<B: Gradients, C: CheckpointStrategy>(
    rows: KvBufferPrimitive<Autodiff<B, C>>,
) -> KvBufferPrimitive<B> {
    match rows {
        KvBufferPrimitive::Numbers(numbers) => KvBufferPrimitive::Numbers(numbers.into_primitive()),
        KvBufferPrimitive::Blocks(bytes, width) => KvBufferPrimitive::Blocks(bytes, width),
    }
}
