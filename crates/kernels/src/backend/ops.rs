//! The operations as burn sees them: one extension trait, and a function on tensors for each of its methods.
//!
//! The trait is implemented for the CPU backend in `flex.rs` and for autodiff in `autodiff.rs`. All methods are
//! synchronous and their output shapes follow from their input shapes, so that a GPU implementation or burn's
//! fusion can stand behind the same signatures.
//!
//! Weights come in two kinds. *Frozen* ones are [`Matrix`] views of a file, passed beside the tensors; they have no
//! gradient. *Trained* ones are f32 tensors `[out, in]`.

use std::sync::Arc;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, ExtensionType, backend_extension};
use burn::tensor::{Int, Tensor};

use crate::backend::cached::KvBufferPrimitive;
use crate::backend::linear::{Absorbed, FakeQuantize, HeadRows, Update};
use crate::backend::plain;
use crate::formats::Matrix;
use crate::ops::adamw::AdamWStep;
use crate::ops::attention::Segments;
use crate::ops::experts::{ExpertBank, ExpertLora, SharedExperts};
use crate::ops::rope::RopeLayout;
use crate::ops::route::TopK;
use crate::settings::Compute;

/// Which expert serves which token, and with what weight.
#[derive(Clone, Debug, ExtensionType)]
pub struct RoutingPrimitive<B: Backend> {
    pub(crate) weights: FloatTensor<B>,
    pub(crate) order: IntTensor<B>,
    pub(crate) offsets: IntTensor<B>,
}

/// The stacked low-rank factors of a layer's experts.
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

/// Our operations on a backend's own tensors. Use the functions of this crate, which take burn's tensors.
#[backend_extension(Autodiff, Flex)]
pub trait Kernels: Backend {
    /// See [`crate::linear_frozen`].
    fn linear_frozen(x: FloatTensor<Self>, w: Arc<Matrix>, compute: Compute) -> FloatTensor<Self>;
    /// See [`crate::linear_frozen_pair`].
    fn linear_frozen_pair(
        x: FloatTensor<Self>,
        first: Arc<Matrix>,
        second: Arc<Matrix>,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        plain::linear_frozen_pair::<Self>(x, [first, second], compute)
    }
    /// See [`crate::linear_trained`].
    fn linear_trained(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        compute: Compute,
        kept: Compute,
    ) -> FloatTensor<Self>;
    /// See [`crate::linear_updated`]; also gives `scale · x · aᵀ`.
    fn linear_updated(
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        w: Arc<Matrix>,
        update: Update,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    /// See [`crate::linear_fake_quantized`].
    fn linear_fake_quantized(
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        w: Arc<Matrix>,
        merge: FakeQuantize,
        compute: Compute,
    ) -> FloatTensor<Self>;
    /// See [`crate::linear_add`].
    fn linear_add(
        y: FloatTensor<Self>,
        u: FloatTensor<Self>,
        b: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
    /// See [`crate::row_norms`].
    fn row_norms(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        w: Arc<Matrix>,
        scale: f32,
    ) -> FloatTensor<Self>;
    /// See [`crate::heads_linear`].
    fn heads_linear(
        x: FloatTensor<Self>,
        w: Arc<Matrix>,
        heads: HeadRows,
        compute: Compute,
    ) -> FloatTensor<Self>;
    /// See [`embed_frozen`].
    fn embed_frozen(ids: IntTensor<Self>, w: Arc<Matrix>) -> FloatTensor<Self>;
    /// See [`embed_trained`].
    fn embed_trained(w: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self>;
    /// See [`rms_norm`].
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self>;
    /// See [`rope`].
    fn rope(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        layout: RopeLayout,
    ) -> FloatTensor<Self>;
    /// See [`swiglu`].
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>, kept: Compute) -> FloatTensor<Self>;
    /// See [`dropout`].
    fn dropout(x: FloatTensor<Self>, dropout: crate::Dropout) -> FloatTensor<Self>;
    /// See [`attention`]; also gives the log-sum-exp of every row of scores.
    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        scale: f32,
        segments: Segments,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    /// See [`expanded_attention`]; also gives the log-sum-exp of every row of scores.
    fn expanded_attention(
        q: FloatTensor<Self>,
        kv: FloatTensor<Self>,
        latents: FloatTensor<Self>,
        v_dim: usize,
        scale: f32,
        segments: Segments,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    /// Rows of numbers `[len, heads, width]` rounded to blocks; see [`crate::KvBuffer`].
    fn encode_blocks(x: FloatTensor<Self>) -> IntTensor<Self>;
    /// The numbers of such rows, in f32.
    fn decode_blocks(#[extension_type] rows: KvBufferPrimitive<Self>) -> FloatTensor<Self>;
    /// See [`crate::cached_attention`]; of a few queries.
    fn cached_attention(
        q: FloatTensor<Self>,
        #[extension_type] k: KvBufferPrimitive<Self>,
        #[extension_type] v: KvBufferPrimitive<Self>,
        scale: f32,
    ) -> FloatTensor<Self>;
    /// See [`crate::latent_attention`]; of a few queries.
    fn latent_attention(
        q: FloatTensor<Self>,
        #[extension_type] latents: KvBufferPrimitive<Self>,
        v_dim: usize,
        scale: f32,
    ) -> FloatTensor<Self>;
    /// See [`crate::absorbed_attention`].
    fn absorbed_attention(
        q: FloatTensor<Self>,
        #[extension_type] latents: KvBufferPrimitive<Self>,
        w: Arc<Matrix>,
        absorbed: Absorbed,
        compute: Compute,
    ) -> FloatTensor<Self>;
    /// See [`choose_experts`].
    fn choose_experts(scores: FloatTensor<Self>, choice: TopK) -> IntTensor<Self>;
    /// See [`dispatch`].
    fn dispatch_slots(ids: IntTensor<Self>, experts: usize) -> (IntTensor<Self>, IntTensor<Self>);
    /// See [`prefetch_experts`]; gives the ids again.
    fn prefetch_experts(ids: IntTensor<Self>, bank: Arc<ExpertBank>) -> IntTensor<Self>;
    /// See [`experts_frozen`]; also gives the products of gate and up.
    fn experts_frozen(
        x: FloatTensor<Self>,
        #[extension_type] routing: RoutingPrimitive<Self>,
        #[extension_type] factors: FactorsPrimitive<Self>,
        bank: Arc<ExpertBank>,
        lora: ExpertLora,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
    /// See [`moe_frozen`].
    fn moe_frozen(
        x: FloatTensor<Self>,
        #[extension_type] routing: RoutingPrimitive<Self>,
        bank: Arc<ExpertBank>,
        shared: SharedExperts,
        compute: Compute,
    ) -> FloatTensor<Self> {
        plain::moe_frozen::<Self>(x, routing, bank, shared, compute)
    }
    /// See [`experts_trained`]; also gives the products of gate and up.
    fn experts_trained(
        x: FloatTensor<Self>,
        #[extension_type] routing: RoutingPrimitive<Self>,
        #[extension_type] stacks: StacksPrimitive<Self>,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
    /// See [`cross_entropy_frozen`]; also gives the log-sum-exp of every row.
    fn cross_entropy_frozen(
        h: FloatTensor<Self>,
        u: FloatTensor<Self>,
        b: FloatTensor<Self>,
        targets: IntTensor<Self>,
        w: Arc<Matrix>,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    /// See [`cross_entropy_trained`]; also gives the log-sum-exp of every row.
    fn cross_entropy_trained(
        h: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: IntTensor<Self>,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    /// See [`adamw`].
    fn adamw_step(
        p: FloatTensor<Self>,
        g: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
    /// See [`sum_of_squares`].
    fn sum_of_squares_f32(x: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// Rows of a frozen embedding.
///
/// # Shapes
/// - `ids`: `[tokens]`, `w`: `[vocab, hidden_size]`
/// - returns: `[tokens, hidden_size]`
///
/// # Panics
/// If an id is not below `vocab`.
pub fn embed_frozen(ids: Tensor<1, Int>, w: &Arc<Matrix>) -> Tensor<2> {
    float(Dispatch::embed_frozen(ids.into_dispatch(), Arc::clone(w)))
}

/// Rows of a trained embedding.
///
/// # Shapes
/// - `ids`: `[tokens]`, `w`: `[vocab, hidden_size]`
/// - returns: `[tokens, hidden_size]`
///
/// # Panics
/// If an id is not below `vocab`.
pub fn embed_trained(ids: Tensor<1, Int>, w: Tensor<2>) -> Tensor<2> {
    float(Dispatch::embed_trained(
        w.into_dispatch(),
        ids.into_dispatch(),
    ))
}

/// `x · (mean(x²) + eps)^-½ · weight` over the last axis, in f32.
///
/// # Shapes
/// - `x`: `[tokens, width]`, `weight`: `[width]`
/// - returns: `[tokens, width]`
///
/// # Panics
/// If the widths do not fit.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f32) -> Tensor<2> {
    assert_eq!(x.dims()[1], weight.dims()[0], "width of the norm");
    rms_norm_start(x, weight, eps)
}

/// [`rms_norm`] of the first features of every row; the others stay as they are.
///
/// # Shapes
/// - `x`: `[tokens, width]`, `weight`: `[normed ≤ width]`
/// - returns: `[tokens, width]`
///
/// # Panics
/// If the rows are narrower than the weight.
pub fn rms_norm_start(x: Tensor<2>, weight: Tensor<1>, eps: f32) -> Tensor<2> {
    assert!(x.dims()[1] >= weight.dims()[0], "width of the norm");
    float(Dispatch::rms_norm(
        x.into_dispatch(),
        weight.into_dispatch(),
        eps,
    ))
}

/// Rotates pairs of features by their position's angles. The angles have no gradient.
///
/// Where a head is wider than the angles reach, its last features are rotated and the first stay as they are.
///
/// # Shapes
/// - `x`: `[batch, seq, heads, dim]`, `cos` and `sin`: `[seq, rotated / 2]` with `rotated ≤ dim`
/// - returns: the shape and layout of `x`
///
/// # Panics
/// If the sizes do not fit.
pub fn rope(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>, layout: RopeLayout) -> Tensor<4> {
    let ([_, seq, _, dim], [positions, half]) = (x.dims(), cos.dims());
    assert!(
        positions == seq && cos.dims() == sin.dims() && 2 * half <= dim,
        "angles {:?} and {:?} of {seq} positions of {dim} features",
        cos.dims(),
        sin.dims()
    );
    Tensor::from_dispatch(Dispatch::rope(
        x.into_dispatch(),
        cos.into_dispatch(),
        sin.into_dispatch(),
        layout,
    ))
}

/// `silu(gate) · up`, element by element; both wait for the backward pass in the form that `kept` asks for.
///
/// # Shapes
/// - `gate`, `up`: `[tokens, width]`
/// - returns: `[tokens, width]`
///
/// # Panics
/// If the shapes differ.
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>, kept: Compute) -> Tensor<2> {
    assert_eq!(gate.dims(), up.dims(), "gate and up");
    float(Dispatch::swiglu(
        gate.into_dispatch(),
        up.into_dispatch(),
        kept,
    ))
}

/// Drops elements at random and scales the rest; the mask follows from the seed alone.
///
/// # Shapes
/// - `x`: `[tokens, width]`
/// - returns: `[tokens, width]`
pub fn dropout(x: Tensor<2>, dropout: crate::Dropout) -> Tensor<2> {
    if dropout.is_off() {
        return x;
    }
    float(Dispatch::dropout(x.into_dispatch(), dropout))
}

/// Causal attention; the queries are the last `seq` of the `kv_seq` positions, and see those of their own segment.
///
/// # Shapes
/// - `q`: `[batch, seq, heads, dim]`, `k`: `[batch, kv_seq, kv_heads, dim]`, `v`: `[batch, kv_seq, kv_heads, v_dim]`
/// - returns: `[batch, seq, heads, v_dim]`
///
/// # Panics
/// If the sizes do not fit, `kv_heads` does not divide `heads`, `kv_seq < seq`, or there are segments and `kv_seq ≠ seq`.
pub fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    scale: f32,
    segments: &Segments,
) -> Tensor<4> {
    let ([batch, seq, heads, dim], [k_batch, kv_seq, kv_heads, k_dim]) = (q.dims(), k.dims());
    assert_eq!(
        (batch, dim),
        (k_batch, k_dim),
        "batch and width of the keys"
    );
    assert_eq!(
        v.dims()[..3],
        [batch, kv_seq, kv_heads],
        "values of the keys"
    );
    assert!(
        kv_seq >= seq && heads % kv_heads == 0 && segments.fit([batch, seq, kv_seq]),
        "{seq} queries of {kv_seq} keys, {heads} heads over {kv_heads}"
    );
    Tensor::from_dispatch(
        Dispatch::causal_attention(
            q.into_dispatch(),
            k.into_dispatch(),
            v.into_dispatch(),
            scale,
            segments.clone(),
        )
        .0,
    )
}

/// Causal attention over keys and values that were rebuilt from latents: latent attention in its expanded form, reading
/// everything where it lies.
///
/// A head's key is the first `width − v_dim` features of its row of `kv`, followed by the last features of the
/// position's `latents`, which all heads share; its value is the rest of the row.
///
/// # Shapes
/// - `q`: `[batch, seq, heads, dim]`, `kv`: `[batch, kv_seq, heads, width]`, `latents`: `[batch, kv_seq, 1, latent]`
/// - returns: `[batch, seq, heads, v_dim]`
///
/// # Panics
/// If the sizes do not fit, `kv_seq < seq`, or there are segments and `kv_seq ≠ seq`.
pub fn expanded_attention(
    q: Tensor<4>,
    kv: Tensor<4>,
    latents: Tensor<4>,
    v_dim: usize,
    scale: f32,
    segments: &Segments,
) -> Tensor<4> {
    let ([batch, seq, heads, dim], [_, kv_seq, _, width]) = (q.dims(), kv.dims());
    assert!(kv_seq >= seq && segments.fit([batch, seq, kv_seq]));
    let [.., latent] = latents.dims();
    assert_eq!(
        kv.dims(),
        [batch, kv_seq, heads, width],
        "rows of the heads"
    );
    assert_eq!(
        latents.dims()[..3],
        [batch, kv_seq, 1],
        "latents of the keys"
    );
    assert!(
        v_dim <= width && dim + v_dim >= width && dim + v_dim - width <= latent,
        "{seq} queries of {dim}, {kv_seq} keys and values of {width} with {v_dim}, latents of {latent}"
    );
    Tensor::from_dispatch(
        Dispatch::expanded_attention(
            q.into_dispatch(),
            kv.into_dispatch(),
            latents.into_dispatch(),
            v_dim,
            scale,
            segments.clone(),
        )
        .0,
    )
}

/// The best experts of every token, best first. Has no gradient.
///
/// # Shapes
/// - `scores`: `[tokens, experts]`
/// - returns: `[tokens, top_k]`
///
/// # Panics
/// If the groups do not divide the experts, or hold fewer than `top_k` open experts.
pub fn choose_experts(scores: Tensor<2>, choice: TopK) -> Tensor<2, Int> {
    let experts = scores.dims()[1];
    let open = if choice.n_group > 1 {
        experts / choice.n_group * choice.topk_group
    } else {
        experts
    };
    assert!(
        experts.is_multiple_of(choice.n_group) && choice.top_k <= open,
        "{choice:?} of {experts} experts"
    );
    Tensor::from_dispatch(Dispatch::choose_experts(scores.into_dispatch(), choice))
}

/// Sorts the (token, expert) slots by expert, stable.
///
/// # Shapes
/// - `ids`: `[tokens, top_k]`
/// - returns: slot order `[slots]` and offsets `[experts + 1]`
///
/// # Panics
/// If an id is not below `experts`.
pub fn dispatch(ids: Tensor<2, Int>, experts: usize) -> (Tensor<1, Int>, Tensor<1, Int>) {
    let (order, offsets) = Dispatch::dispatch_slots(ids.into_dispatch(), experts);
    (Tensor::from_dispatch(order), Tensor::from_dispatch(offsets))
}

/// Has experts read from their file that will probably be chosen in the next pass through a bank, if they are not in its
/// cache. Changes nothing but when they are read.
///
/// # Shapes
/// - `ids`: `[tokens, experts]`, a token's likeliest first
///
/// # Panics
/// If there is no such expert.
pub fn prefetch_experts(ids: Tensor<2, Int>, bank: &Arc<ExpertBank>) {
    Dispatch::prefetch_experts(ids.into_dispatch(), Arc::clone(bank));
}

/// Slots sorted by expert, and the weight of each.
#[derive(Clone, Debug)]
pub struct Routing {
    /// `[tokens, top_k]`.
    pub weights: Tensor<2>,
    /// `[slots]`, see [`dispatch`].
    pub order: Tensor<1, Int>,
    /// `[experts + 1]`; slots behind the last one are served elsewhere and count as zero.
    pub offsets: Tensor<1, Int>,
}

/// Low-rank factors of a layer's experts: `a [experts, rank, in]`, `b [experts, out, rank]`; rank 0 means none.
#[derive(Clone, Debug)]
pub struct ExpertFactors {
    /// Factors of the gate projection.
    pub gate: [Tensor<3>; 2],
    /// Factors of the up projection.
    pub up: [Tensor<3>; 2],
    /// Factors of the down projection.
    pub down: [Tensor<3>; 2],
}

/// The weighted sum of every token's experts, with frozen weights and low-rank updates.
///
/// # Shapes
/// - `x`: `[tokens, hidden_size]`
/// - returns: `[tokens, hidden_size]`
///
/// # Panics
/// If the sizes do not fit.
pub fn experts_frozen(
    x: Tensor<2>,
    routing: Routing,
    bank: &Arc<ExpertBank>,
    factors: ExpertFactors,
    lora: ExpertLora,
    compute: Compute,
) -> Tensor<2> {
    float(
        Dispatch::experts_frozen(
            x.into_dispatch(),
            routing.into(),
            factors.into(),
            Arc::clone(bank),
            lora,
            compute,
        )
        .0,
    )
}

/// [`experts_frozen`] without updates, and the experts that every token has added to it: where tokens are few, all of them
/// together.
///
/// # Shapes
/// - `x`: `[tokens, hidden_size]`
/// - returns: `[tokens, hidden_size]`
///
/// # Panics
/// If the sizes do not fit.
pub fn moe_frozen(
    x: Tensor<2>,
    routing: Routing,
    bank: &Arc<ExpertBank>,
    shared: SharedExperts,
    compute: Compute,
) -> Tensor<2> {
    float(Dispatch::moe_frozen(
        x.into_dispatch(),
        routing.into(),
        Arc::clone(bank),
        shared,
        compute,
    ))
}

/// The weighted sum of every token's experts, with trained weights.
///
/// # Shapes
/// - `x`: `[tokens, hidden_size]`; `gate`, `up`: `[experts, inner, hidden_size]`, `down`: `[experts, hidden_size, inner]`
/// - returns: `[tokens, hidden_size]`
///
/// # Panics
/// If the sizes do not fit.
pub fn experts_trained(
    x: Tensor<2>,
    routing: Routing,
    [gate, up, down]: [Tensor<3>; 3],
    compute: Compute,
) -> Tensor<2> {
    let stacks = StacksPrimitive {
        gate: gate.into_dispatch(),
        up: up.into_dispatch(),
        down: down.into_dispatch(),
    };
    float(Dispatch::experts_trained(x.into_dispatch(), routing.into(), stacks, compute).0)
}

/// The loss of every token against a frozen head with a low-rank update, `logits = h · wᵀ + u · bᵀ`.
///
/// # Shapes
/// - `h`: `[tokens, hidden_size]`, `u`: `[tokens, rank]`, `b`: `[vocab, rank]` (rank 0 means none)
/// - `targets`: `[tokens]`, −100 for none
/// - returns: `[tokens]` in nats, 0 where there is no target
///
/// # Panics
/// If the sizes do not fit or a target is not below `vocab`.
pub fn cross_entropy_frozen(
    h: Tensor<2>,
    [u, b]: [Tensor<2>; 2],
    w: &Arc<Matrix>,
    targets: Tensor<1, Int>,
    compute: Compute,
) -> Tensor<1> {
    assert_eq!(
        h.dims(),
        [targets.dims()[0], w.cols()],
        "tokens and width of the head"
    );
    let (h, u, b) = (h.into_dispatch(), u.into_dispatch(), b.into_dispatch());
    Tensor::from_dispatch(
        Dispatch::cross_entropy_frozen(h, u, b, targets.into_dispatch(), Arc::clone(w), compute).0,
    )
}

/// The loss of every token against a trained head.
///
/// # Shapes
/// - `h`: `[tokens, hidden_size]`, `w`: `[vocab, hidden_size]`, `targets`: `[tokens]`, −100 for none
/// - returns: `[tokens]` in nats, 0 where there is no target
///
/// # Panics
/// If the sizes do not fit or a target is not below `vocab`.
pub fn cross_entropy_trained(
    h: Tensor<2>,
    w: Tensor<2>,
    targets: Tensor<1, Int>,
    compute: Compute,
) -> Tensor<1> {
    assert_eq!(
        h.dims(),
        [targets.dims()[0], w.dims()[1]],
        "tokens and width of the head"
    );
    Tensor::from_dispatch(
        Dispatch::cross_entropy_trained(
            h.into_dispatch(),
            w.into_dispatch(),
            targets.into_dispatch(),
            compute,
        )
        .0,
    )
}

/// One AdamW update of flat tensors, in place where nobody else holds them. The moments may be bf16. Has no gradient.
///
/// # Shapes
/// - all `[n]`: parameter, gradient, first and second moment
/// - returns: parameter, first and second moment
///
/// # Panics
/// If the lengths differ.
pub fn adamw(
    p: Tensor<1>,
    g: Tensor<1>,
    [m, v]: [Tensor<1>; 2],
    step: AdamWStep,
) -> (Tensor<1>, [Tensor<1>; 2]) {
    assert_eq!(
        (p.dims(), p.dims(), p.dims()),
        (g.dims(), m.dims(), v.dims()),
        "parameter, gradient and moments"
    );
    let (p, m, v) = Dispatch::adamw_step(
        p.into_dispatch(),
        g.into_dispatch(),
        m.into_dispatch(),
        v.into_dispatch(),
        step,
    );
    (
        Tensor::from_dispatch(p),
        [Tensor::from_dispatch(m), Tensor::from_dispatch(v)],
    )
}

/// The sum of squares, added up in f64 in an order that depends on the length alone.
///
/// # Shapes
/// - `x`: `[n]`
/// - returns: `[1]`
pub fn sum_of_squares(x: Tensor<1>) -> Tensor<1> {
    Tensor::from_dispatch(Dispatch::sum_of_squares_f32(x.into_dispatch()))
}

pub(super) fn float(tensor: burn::backend::DispatchTensor) -> Tensor<2> {
    Tensor::from_dispatch(tensor)
}

impl From<Routing> for RoutingPrimitive<Dispatch> {
    fn from(routing: Routing) -> Self {
        Self {
            weights: routing.weights.into_dispatch(),
            order: routing.order.into_dispatch(),
            offsets: routing.offsets.into_dispatch(),
        }
    }
}

impl From<ExpertFactors> for FactorsPrimitive<Dispatch> {
    fn from(factors: ExpertFactors) -> Self {
        let [[gate_a, gate_b], [up_a, up_b], [down_a, down_b]] =
            [factors.gate, factors.up, factors.down].map(|pair| pair.map(Tensor::into_dispatch));
        Self {
            gate_a,
            gate_b,
            up_a,
            up_b,
            down_a,
            down_b,
        }
    }
}
