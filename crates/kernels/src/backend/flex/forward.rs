//! The operations on the CPU backend, each handed to its family.

use std::sync::Arc;

use burn::backend::Flex;
use burn_flex::FlexTensor;

use crate::backend::attention::{flex as attention, flex_absorbed, flex_kv};
use crate::backend::elementwise::flex as elementwise;
use crate::backend::experts::flex as experts;
use crate::backend::linear::{flex as linear, flex_heads};
use crate::backend::loss::flex as loss;
use crate::backend::optimizer::flex as optimizer;
use crate::backend::plain::primitives::Primitives;
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

impl Primitives for Flex {}

impl Kernels for Flex {
    fn linear_frozen(x: FlexTensor, w: Arc<Matrix>, compute: Compute) -> FlexTensor {
        linear::linear_frozen(x, w, compute)
    }

    fn linear_frozen_pair(
        x: FlexTensor,
        first: Arc<Matrix>,
        second: Arc<Matrix>,
        compute: Compute,
    ) -> (FlexTensor, FlexTensor) {
        linear::linear_frozen_pair(x, first, second, compute)
    }

    fn linear_trained(
        x: FlexTensor,
        w: FlexTensor,
        compute: Compute,
        saved_as: Compute,
    ) -> FlexTensor {
        linear::linear_trained(x, w, compute, saved_as)
    }

    fn linear_updated(
        x: FlexTensor,
        a: FlexTensor,
        b: FlexTensor,
        w: Arc<Matrix>,
        update: Update,
    ) -> (FlexTensor, FlexTensor) {
        linear::linear_updated(x, a, b, w, update)
    }

    fn linear_fake_quantized(
        x: FlexTensor,
        a: FlexTensor,
        b: FlexTensor,
        w: Arc<Matrix>,
        merge: FakeQuantize,
        compute: Compute,
    ) -> FlexTensor {
        linear::linear_fake_quantized(x, a, b, w, merge, compute)
    }

    fn linear_add(y: FlexTensor, u: FlexTensor, b: FlexTensor) -> FlexTensor {
        linear::linear_add(y, u, b)
    }

    fn row_norms(a: FlexTensor, b: FlexTensor, w: Arc<Matrix>, scale: f32) -> FlexTensor {
        linear::row_norms(a, b, w, scale)
    }

    fn heads_linear(
        x: FlexTensor,
        w: Arc<Matrix>,
        heads: HeadRows,
        compute: Compute,
    ) -> FlexTensor {
        flex_heads::heads_linear(x, w, heads, compute)
    }

    fn embed_frozen(ids: FlexTensor, w: Arc<Matrix>) -> FlexTensor {
        elementwise::embed_frozen(ids, w)
    }

    fn embed_trained(w: FlexTensor, ids: FlexTensor) -> FlexTensor {
        elementwise::embed_trained(w, ids)
    }

    fn rms_norm(x: FlexTensor, weight: FlexTensor, eps: f32) -> FlexTensor {
        elementwise::rms_norm(x, weight, eps)
    }

    fn rope(x: FlexTensor, cos: FlexTensor, sin: FlexTensor, layout: RopeLayout) -> FlexTensor {
        elementwise::rope(x, cos, sin, layout)
    }

    fn swiglu(gate: FlexTensor, up: FlexTensor, saved_as: Compute) -> FlexTensor {
        elementwise::swiglu(gate, up, saved_as)
    }

    fn dropout(x: FlexTensor, dropout: Dropout) -> FlexTensor {
        elementwise::dropout(x, dropout)
    }

    fn causal_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        scale: f32,
        segments: Segments,
    ) -> (FlexTensor, FlexTensor) {
        attention::causal_attention(q, k, v, scale, segments)
    }

    fn expanded_attention(
        q: FlexTensor,
        kv: FlexTensor,
        latents: FlexTensor,
        v_dim: usize,
        scale: f32,
        segments: Segments,
    ) -> (FlexTensor, FlexTensor) {
        attention::expanded_attention(q, kv, latents, v_dim, scale, segments)
    }

    fn encode_blocks(x: FlexTensor) -> FlexTensor {
        flex_kv::encode_blocks(x)
    }

    fn decode_blocks(rows: KvBufferPrimitive<Self>) -> FlexTensor {
        flex_kv::decode_blocks(rows)
    }

    fn cached_attention(
        q: FlexTensor,
        k: KvBufferPrimitive<Self>,
        v: KvBufferPrimitive<Self>,
        scale: f32,
    ) -> FlexTensor {
        flex_kv::cached_attention(q, k, v, scale)
    }

    fn latent_attention(
        q: FlexTensor,
        latents: KvBufferPrimitive<Self>,
        v_dim: usize,
        scale: f32,
    ) -> FlexTensor {
        flex_kv::latent_attention(q, latents, v_dim, scale)
    }

    fn absorbed_attention(
        q: FlexTensor,
        latents: KvBufferPrimitive<Self>,
        w: Arc<Matrix>,
        absorbed: Absorbed,
        compute: Compute,
    ) -> FlexTensor {
        flex_absorbed::absorbed_attention(q, latents, w, absorbed, compute)
    }

    fn choose_experts(scores: FlexTensor, choice: TopK) -> FlexTensor {
        experts::choose_experts(scores, choice)
    }

    fn dispatch_slots(ids: FlexTensor, experts: usize) -> (FlexTensor, FlexTensor) {
        experts::dispatch_slots(ids, experts)
    }

    fn prefetch_experts(ids: FlexTensor, bank: Arc<ExpertBank>) -> FlexTensor {
        experts::prefetch_experts(ids, bank)
    }

    fn experts_frozen(
        x: FlexTensor,
        routing: RoutingPrimitive<Self>,
        factors: FactorsPrimitive<Self>,
        bank: Arc<ExpertBank>,
        lora: ExpertLora,
        compute: Compute,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        experts::experts_frozen(x, routing, factors, bank, lora, compute)
    }

    fn moe_frozen(
        x: FlexTensor,
        routing: RoutingPrimitive<Self>,
        bank: Arc<ExpertBank>,
        shared: SharedExperts,
        compute: Compute,
    ) -> FlexTensor {
        experts::moe_frozen(x, routing, bank, shared, compute)
    }

    fn experts_trained(
        x: FlexTensor,
        routing: RoutingPrimitive<Self>,
        stacks: StacksPrimitive<Self>,
        compute: Compute,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        experts::experts_trained(x, routing, stacks, compute)
    }

    fn cross_entropy_frozen(
        h: FlexTensor,
        u: FlexTensor,
        b: FlexTensor,
        targets: FlexTensor,
        w: Arc<Matrix>,
        compute: Compute,
    ) -> (FlexTensor, FlexTensor) {
        let [loss, lse, _] = loss::cross_entropy_frozen(h, u, b, targets, w, compute);
        (loss, lse)
    }

    fn cross_entropy_trained(
        h: FlexTensor,
        w: FlexTensor,
        targets: FlexTensor,
        compute: Compute,
    ) -> (FlexTensor, FlexTensor) {
        let [loss, lse, _] = loss::cross_entropy_trained(h, w, targets, compute);
        (loss, lse)
    }

    fn token_scores_frozen(
        h: FlexTensor,
        u: FlexTensor,
        b: FlexTensor,
        targets: FlexTensor,
        w: Arc<Matrix>,
        compute: Compute,
    ) -> (FlexTensor, FlexTensor) {
        let [loss, _, greedy] = loss::cross_entropy_frozen(h, u, b, targets, w, compute);
        (loss, greedy)
    }

    fn token_scores_trained(
        h: FlexTensor,
        w: FlexTensor,
        targets: FlexTensor,
        compute: Compute,
    ) -> (FlexTensor, FlexTensor) {
        let [loss, _, greedy] = loss::cross_entropy_trained(h, w, targets, compute);
        (loss, greedy)
    }

    fn adamw_step(
        p: FlexTensor,
        g: FlexTensor,
        m: FlexTensor,
        v: FlexTensor,
        step: AdamWStep,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        optimizer::adamw_step(p, g, m, v, step)
    }

    fn sums_of_squares_f32(x: FlexTensor, parts: usize) -> FlexTensor {
        optimizer::sums_of_squares_f32(x, parts)
    }
}
