//! The signatures of the operations: one extension trait of burn's backends, and the structs it takes.
//!
//! All methods are synchronous and their output shapes follow from their input shapes, so that a GPU implementation or
//! burn's fusion can stand behind the same signatures.
//!
//! Weights come in two kinds. *Frozen* ones are [`Matrix`] views of a file, passed next to the tensors; they have no
//! gradient. *Trained* ones are f32 tensors `[out, in]`.

use std::sync::Arc;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, ExtensionType, backend_extension};

use crate::backend::plain::primitives::Primitives;
use crate::backend::plain::{
    attention, decoding, elementwise, experts, linear, loss, optimizer, route,
};
use crate::backend::supplied::SuppliedGradients;
use crate::formats::{Matrix, Quantizer};
use crate::ops::adamw::AdamWStep;
use crate::ops::attention::Segments;
use crate::ops::dropout::Dropout;
use crate::ops::experts::{ExpertBank, ExpertLora, SharedExperts, SlotPart};
use crate::ops::rope::{RopeLayout, Rotation};
use crate::ops::route::TopK;
use crate::settings::Compute;

/// Which rows of a weight belong to which head, and in which direction they are multiplied.
///
/// The weight's rows are `heads` equal groups; of each group the rows `start..start + len` take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadRows {
    /// Number of heads.
    pub heads: usize,
    /// First row used within a head's group.
    pub start: usize,
    /// Rows used.
    pub len: usize,
    /// Multiply with the rows as they are, or with their transpose.
    pub direction: Direction,
}

/// Whether a product runs from a weight's input to its output, or back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// `y = x · wᵀ`.
    Forward,
    /// `y = x · w`.
    Transposed,
}

/// A low-rank update that is applied to the activations, and the precision of its layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// Multiplier of the update.
    pub scale: f32,
    /// Rounding of the operands of the product with the weight; products with the factors are f32.
    pub compute: Compute,
    /// Precision in which the input is saved for the backward pass.
    pub saved_as: Compute,
}

/// How a low-rank update becomes part of its weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FakeQuantize {
    /// Multiplier of the update.
    pub scale: f32,
    /// What the sum is rounded to.
    pub quantizer: Quantizer,
}

/// The head sizes and score factor of absorbed latent attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Absorbed {
    /// Features of a query that are multiplied with a rebuilt key; the rest is multiplied with the end of the latents.
    pub nope: usize,
    /// Features of a head's values.
    pub v_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
}

/// The rows of a [`crate::KvBuffer`] on a backend.
#[derive(Clone, Debug, ExtensionType)]
pub enum KvBufferPrimitive<B: Backend> {
    /// Numbers in f32, f16 or bf16, `[len, heads, width]`.
    Numbers(FloatTensor<B>),
    /// Bytes of blocks, `[len, heads, row_bytes]`, and the width of a row.
    Blocks(IntTensor<B>, usize),
}

/// Which expert serves which token, and with what weight.
#[derive(Clone, Debug, ExtensionType)]
pub struct RoutingPrimitive<B: Backend> {
    pub(crate) weights: FloatTensor<B>,
    pub(crate) order: IntTensor<B>,
    pub(crate) offsets: IntTensor<B>,
    pub(crate) part: Option<SlotPart>,
}

/// The stacked low-rank factors of a layer's experts; rank 0 means no update.
#[derive(Clone, Debug, ExtensionType)]
pub struct FactorsPrimitive<B: Backend> {
    pub(crate) gate_a: FloatTensor<B>,
    pub(crate) gate_b: FloatTensor<B>,
    pub(crate) up_a: FloatTensor<B>,
    pub(crate) up_b: FloatTensor<B>,
    pub(crate) down_a: FloatTensor<B>,
    pub(crate) down_b: FloatTensor<B>,
}

/// The stacked trained weights of a layer's experts.
#[derive(Clone, Debug, ExtensionType)]
pub struct StacksPrimitive<B: Backend> {
    pub(crate) gate: FloatTensor<B>,
    pub(crate) up: FloatTensor<B>,
    pub(crate) down: FloatTensor<B>,
}

/// The operations on a backend's own tensors. The public functions of this crate take burn's tensors and call these.
///
/// The bodies here are the plain versions (`backend/plain/`), in f32 alone; a backend overrides what it can do better.
#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "gpu"))]
pub trait Kernels: Backend + Primitives {
    // Linear layers.

    /// See [`crate::linear_frozen`].
    fn linear_frozen(x: FloatTensor<Self>, w: Arc<Matrix>, compute: Compute) -> FloatTensor<Self> {
        linear::linear_frozen::<Self>(x, &w, compute)
    }
    /// See [`crate::linear_frozen_pair`].
    fn linear_frozen_pair(
        x: FloatTensor<Self>,
        first: Arc<Matrix>,
        second: Arc<Matrix>,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        linear::linear_frozen_pair::<Self>(x, [first, second], compute)
    }
    /// See [`crate::linear_trained`].
    fn linear_trained(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        compute: Compute,
        saved_as: Compute,
    ) -> FloatTensor<Self> {
        let _ = saved_as;
        linear::linear_trained::<Self>(x, w, compute)
    }
    /// See [`crate::linear_updated`]; also returns `scale · x · aᵀ`.
    fn linear_updated(
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        w: Arc<Matrix>,
        update: Update,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        linear::linear_updated::<Self>(x, [a, b], w, update)
    }
    /// See [`crate::linear_fake_quantized`].
    fn linear_fake_quantized(
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        w: Arc<Matrix>,
        merge: FakeQuantize,
        compute: Compute,
    ) -> FloatTensor<Self> {
        let _ = (x, a, b, w, merge, compute);
        linear::refuse_fake_quantization()
    }
    /// See [`crate::linear_add`].
    fn linear_add(
        y: FloatTensor<Self>,
        u: FloatTensor<Self>,
        b: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        linear::linear_add::<Self>(y, u, b)
    }
    /// See [`crate::row_norms`].
    fn row_norms(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        w: Arc<Matrix>,
        scale: f32,
    ) -> FloatTensor<Self> {
        linear::row_norms::<Self>([a, b], &w, scale)
    }
    /// See [`crate::heads_linear`].
    fn heads_linear(
        x: FloatTensor<Self>,
        w: Arc<Matrix>,
        heads: HeadRows,
        compute: Compute,
    ) -> FloatTensor<Self> {
        linear::heads_linear::<Self>(x, &w, heads, compute)
    }

    // Elementwise operations, norms and embeddings.

    /// See [`crate::embed_frozen`].
    fn embed_frozen(ids: IntTensor<Self>, w: Arc<Matrix>) -> FloatTensor<Self> {
        elementwise::embed_frozen::<Self>(ids, &w)
    }
    /// See [`crate::embed_trained`].
    fn embed_trained(w: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
        elementwise::embed_trained::<Self>(w, ids)
    }
    /// See [`crate::rms_norm`].
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        elementwise::rms_norm::<Self>(x, weight, eps)
    }
    /// See [`crate::rope`].
    fn rope(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        layout: RopeLayout,
    ) -> FloatTensor<Self> {
        elementwise::rope::<Self>(x, [cos, sin], layout, Rotation::Forward)
    }
    /// See [`crate::swiglu`].
    fn swiglu(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        saved_as: Compute,
    ) -> FloatTensor<Self> {
        let _ = saved_as;
        elementwise::swiglu::<Self>(gate, up)
    }
    /// See [`crate::dropout`].
    fn dropout(x: FloatTensor<Self>, dropout: Dropout) -> FloatTensor<Self> {
        elementwise::dropout::<Self>(x, dropout)
    }

    // Attention.

    /// See [`crate::attention`]; also returns the log-sum-exp of every row of scores.
    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        scale: f32,
        segments: Segments,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        attention::causal_attention::<Self>([q, k, v], scale, &segments)
    }
    /// See [`crate::expanded_attention`]; also returns the log-sum-exp of every row of scores.
    fn expanded_attention(
        q: FloatTensor<Self>,
        kv: FloatTensor<Self>,
        latents: FloatTensor<Self>,
        v_dim: usize,
        scale: f32,
        segments: Segments,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        attention::expanded_attention::<Self>([q, kv, latents], v_dim, scale, segments)
    }
    /// Rows `[len, heads, width]` rounded to blocks; see [`crate::KvBuffer`].
    fn encode_blocks(x: FloatTensor<Self>) -> IntTensor<Self> {
        let _ = x;
        decoding::refuse_blocks()
    }
    /// The numbers of rows in blocks, in f32.
    fn decode_blocks(#[extension_type] rows: KvBufferPrimitive<Self>) -> FloatTensor<Self> {
        let _ = rows;
        decoding::refuse_blocks()
    }
    /// See [`crate::cached_attention`]; for at most 8 queries.
    fn cached_attention(
        q: FloatTensor<Self>,
        #[extension_type] k: KvBufferPrimitive<Self>,
        #[extension_type] v: KvBufferPrimitive<Self>,
        scale: f32,
    ) -> FloatTensor<Self> {
        decoding::cached_attention::<Self>(q, [k, v], scale)
    }
    /// See [`crate::latent_attention`]; for at most 8 queries.
    fn latent_attention(
        q: FloatTensor<Self>,
        #[extension_type] latents: KvBufferPrimitive<Self>,
        v_dim: usize,
        scale: f32,
    ) -> FloatTensor<Self> {
        decoding::latent_attention::<Self>(q, latents, v_dim, scale)
    }
    /// See [`crate::absorbed_attention`].
    fn absorbed_attention(
        q: FloatTensor<Self>,
        #[extension_type] latents: KvBufferPrimitive<Self>,
        w: Arc<Matrix>,
        absorbed: Absorbed,
        compute: Compute,
    ) -> FloatTensor<Self> {
        decoding::absorbed_attention::<Self>(q, latents, w, absorbed, compute)
    }

    // Experts and their routing.

    /// See [`crate::choose_experts`].
    fn choose_experts(scores: FloatTensor<Self>, choice: TopK) -> IntTensor<Self> {
        route::choose_experts::<Self>(scores, choice)
    }
    /// See [`crate::dispatch`].
    fn dispatch_slots(ids: IntTensor<Self>, experts: usize) -> (IntTensor<Self>, IntTensor<Self>) {
        route::dispatch_slots::<Self>(ids, experts)
    }
    /// See [`crate::prefetch_experts`]; returns the ids.
    fn prefetch_experts(ids: IntTensor<Self>, bank: Arc<ExpertBank>) -> IntTensor<Self> {
        // What is prefetched is known on the device alone.
        let _ = bank;
        ids
    }
    /// See [`crate::experts_frozen`]; also returns the products of gate and up.
    fn experts_frozen(
        x: FloatTensor<Self>,
        #[extension_type] routing: RoutingPrimitive<Self>,
        #[extension_type] factors: FactorsPrimitive<Self>,
        bank: Arc<ExpertBank>,
        lora: ExpertLora,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        experts::experts_frozen::<Self>(x, routing, &factors, &bank, (lora, compute))
    }
    /// See [`crate::computed_elsewhere`].
    fn computed_elsewhere(
        x: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        y: FloatTensor<Self>,
        gradients: SuppliedGradients,
    ) -> FloatTensor<Self> {
        let _ = (x, weights, gradients);
        y
    }
    /// See [`crate::moe_frozen`].
    fn moe_frozen(
        x: FloatTensor<Self>,
        #[extension_type] routing: RoutingPrimitive<Self>,
        bank: Arc<ExpertBank>,
        shared: SharedExperts,
        compute: Compute,
    ) -> FloatTensor<Self> {
        experts::moe_frozen::<Self>(x, routing, bank, shared, compute)
    }
    /// See [`crate::experts_trained`]; also returns the products of gate and up.
    fn experts_trained(
        x: FloatTensor<Self>,
        #[extension_type] routing: RoutingPrimitive<Self>,
        #[extension_type] stacks: StacksPrimitive<Self>,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        experts::experts_trained::<Self>(x, routing, &stacks, compute)
    }

    // The loss.

    /// See [`crate::cross_entropy_frozen`]; also returns the log-sum-exp of every row.
    fn cross_entropy_frozen(
        h: FloatTensor<Self>,
        u: FloatTensor<Self>,
        b: FloatTensor<Self>,
        targets: IntTensor<Self>,
        w: Arc<Matrix>,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        loss::cross_entropy_frozen::<Self>(h, [u, b], targets, &w, compute)
    }
    /// See [`crate::cross_entropy_trained`]; also returns the log-sum-exp of every row.
    fn cross_entropy_trained(
        h: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: IntTensor<Self>,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        loss::cross_entropy_trained::<Self>(h, w, targets, compute)
    }
    /// See [`crate::token_scores_frozen`].
    fn token_scores_frozen(
        h: FloatTensor<Self>,
        u: FloatTensor<Self>,
        b: FloatTensor<Self>,
        targets: IntTensor<Self>,
        w: Arc<Matrix>,
        compute: Compute,
    ) -> (FloatTensor<Self>, IntTensor<Self>) {
        loss::token_scores_frozen::<Self>(h, [u, b], targets, &w, compute)
    }
    /// See [`crate::token_scores_trained`].
    fn token_scores_trained(
        h: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: IntTensor<Self>,
        compute: Compute,
    ) -> (FloatTensor<Self>, IntTensor<Self>) {
        loss::token_scores_trained::<Self>(h, w, targets, compute)
    }

    // The optimizer.

    /// See [`crate::adamw`].
    fn adamw_step(
        p: FloatTensor<Self>,
        g: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        optimizer::adamw_step::<Self>([p, g, m, v], step)
    }
    /// See [`crate::sums_of_squares`].
    fn sums_of_squares_f32(x: FloatTensor<Self>, parts: usize) -> FloatTensor<Self> {
        optimizer::sums_of_squares::<Self>(x, parts)
    }
}
