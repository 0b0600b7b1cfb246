//! The gradients of the operations: their signatures, what is saved for them, and how autodiff registers them.

use std::sync::Arc;

use burn::backend::Autodiff;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::grads::Gradients as Grads;
use burn::backend::tensor::{FloatTensor, IntTensor};

use crate::backend::plain::{
    attention, elementwise, experts, linear, loss, saved_reals as plain_saved,
};
use crate::backend::saved::{SavedActivation, shared};
use crate::backend::traits::{
    FactorsPrimitive, FakeQuantize, Kernels, RoutingPrimitive, StacksPrimitive, Update,
};
use crate::formats::Matrix;
use crate::ops::attention::Segments;
use crate::ops::experts::{ExpertBank, ExpertLora};
use crate::ops::rope::{RopeLayout, Rotation};
use crate::settings::Compute;

/// A tensor of a backend under autodiff, whatever the checkpointing strategy.
pub(crate) type Tracked<B> = FloatTensor<Autodiff<B>>;

/// The input of a linear layer with a low-rank update, saved if the factors need it, and the factors.
#[derive(Clone, Debug)]
pub(crate) struct UpdateSaved<F> {
    pub(crate) x: Option<Arc<SavedActivation<F>>>,
    pub(crate) factors: [F; 2],
}

/// What the operations on experts save.
#[derive(Clone, Debug)]
pub(crate) struct ExpertsSaved<B: Kernels> {
    pub(crate) x: Arc<SavedActivation<FloatTensor<B>>>,
    pub(crate) routing: RoutingPrimitive<B>,
    pub(crate) gate: Arc<SavedActivation<FloatTensor<B>>>,
    pub(crate) up: Arc<SavedActivation<FloatTensor<B>>>,
    /// Of the products and of the saved activations.
    pub(crate) compute: Compute,
}

impl<B: Gradients> ExpertsSaved<B> {
    /// Saves the input, the tensor of `node`, and the products of gate and up.
    pub(crate) fn new(
        node: NodeId,
        x: FloatTensor<B>,
        routing: RoutingPrimitive<B>,
        products: [FloatTensor<B>; 2],
        compute: Compute,
    ) -> Self {
        let [gate, up] = products.map(|product| Arc::new(B::save_for_backward(product, compute)));
        // Rows of another rank come from a norm that is not here to be recomputed: they stay as they would be recomputed.
        let of_x = match routing.part {
            Some(part) if part.is_recomputed => Compute::F32,
            _ => compute,
        };
        Self {
            x: shared(node, of_x, || B::save_for_backward(x, of_x)),
            routing,
            gate,
            up,
            compute,
        }
    }
}

/// What the loss saves.
#[derive(Clone, Debug)]
pub(crate) struct LossSaved<F, I> {
    pub(crate) h: F,
    pub(crate) targets: I,
    pub(crate) lse: F,
}

/// Gradients of `x` and of the two factors, each only if it is needed.
pub(crate) type UpdateGrads<F> = (Option<F>, Option<[F; 2]>);

/// The gradients of [`Kernels`], on a backend without autodiff. Argument order: output gradient, saved, settings. The
/// bodies here are the plain versions.
pub(crate) trait Gradients: Kernels {
    /// Saves `x` for the backward pass in the precision of `compute`.
    fn save_for_backward(
        x: FloatTensor<Self>,
        compute: Compute,
    ) -> SavedActivation<FloatTensor<Self>> {
        plain_saved::save_for_backward::<Self>(x, compute)
    }

    // Linear layers.

    fn linear_frozen_dx(dy: FloatTensor<Self>, w: &Matrix, compute: Compute) -> FloatTensor<Self> {
        linear::linear_frozen_dx::<Self>(dy, w, compute)
    }
    fn linear_trained_dx(
        dy: FloatTensor<Self>,
        w: FloatTensor<Self>,
        compute: Compute,
    ) -> FloatTensor<Self> {
        linear::linear_trained_dx::<Self>(dy, w, compute)
    }
    fn linear_dw(
        dy: FloatTensor<Self>,
        x: &SavedActivation<FloatTensor<Self>>,
        compute: Compute,
    ) -> FloatTensor<Self> {
        linear::linear_dw::<Self>(dy, x, compute)
    }
    /// `low` is `scale · x · aᵀ`. The factors have gradients if x was saved.
    fn linear_updated_grads(
        dy: FloatTensor<Self>,
        saved: UpdateSaved<FloatTensor<Self>>,
        low: FloatTensor<Self>,
        w: &Matrix,
        update: Update,
        want_x: bool,
    ) -> UpdateGrads<FloatTensor<Self>> {
        linear::linear_updated_grads::<Self>(dy, saved, low, (w, update), want_x)
    }
    /// The factors have gradients if x was saved.
    fn linear_fake_quantized_grads(
        dy: FloatTensor<Self>,
        saved: UpdateSaved<FloatTensor<Self>>,
        w: &Matrix,
        merge: FakeQuantize,
        compute: Compute,
        want_x: bool,
    ) -> UpdateGrads<FloatTensor<Self>> {
        let _ = (dy, saved, w, merge, compute, want_x);
        linear::refuse_fake_quantization()
    }

    // Elementwise operations, norms and embeddings.

    fn embed_dw(ids: IntTensor<Self>, dy: FloatTensor<Self>, vocab: usize) -> FloatTensor<Self> {
        elementwise::embed_dw::<Self>(ids, dy, vocab)
    }
    fn rms_norm_grads(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f32,
    ) -> [FloatTensor<Self>; 2] {
        elementwise::rms_norm_grads::<Self>(dy, x, weight, eps)
    }
    fn rope_dx(
        dy: FloatTensor<Self>,
        angles: [FloatTensor<Self>; 2],
        layout: RopeLayout,
    ) -> FloatTensor<Self> {
        elementwise::rope::<Self>(dy, angles, layout, Rotation::Backward)
    }
    /// `products` are gate and up. They may be overwritten if no one else holds them.
    fn swiglu_grads(
        dy: FloatTensor<Self>,
        products: [Arc<SavedActivation<FloatTensor<Self>>>; 2],
    ) -> [FloatTensor<Self>; 2] {
        elementwise::swiglu_grads::<Self>(dy, products)
    }

    // Attention.

    /// `saved` is q, k, v, the output and the log-sum-exp.
    fn attention_grads(
        dout: FloatTensor<Self>,
        saved: [FloatTensor<Self>; 5],
        scale: f32,
        segments: &Segments,
    ) -> [FloatTensor<Self>; 3] {
        attention::attention_grads::<Self>(dout, saved, scale, segments)
    }
    /// `saved` is q, the keys and values, the latents, the output and the log-sum-exp.
    fn expanded_attention_grads(
        dout: FloatTensor<Self>,
        saved: [FloatTensor<Self>; 5],
        v_dim: usize,
        scale: f32,
        segments: &Segments,
    ) -> [FloatTensor<Self>; 3] {
        attention::expanded_attention_grads::<Self>(dout, saved, v_dim, scale, segments)
    }

    // Experts.

    /// Gradients of x and the routing weights, and of the six factors if `want_factors`.
    fn experts_frozen_grads(
        dy: FloatTensor<Self>,
        saved: ExpertsSaved<Self>,
        factors: &FactorsPrimitive<Self>,
        bank: &ExpertBank,
        lora: ExpertLora,
        want_factors: bool,
    ) -> ([FloatTensor<Self>; 2], Option<[FloatTensor<Self>; 6]>) {
        experts::experts_frozen_grads::<Self>(dy, saved, factors, (bank, lora), want_factors)
    }
    /// Gradients of x and the routing weights, and of the three stacks.
    fn experts_trained_grads(
        dy: FloatTensor<Self>,
        saved: ExpertsSaved<Self>,
        stacks: &StacksPrimitive<Self>,
    ) -> ([FloatTensor<Self>; 2], [FloatTensor<Self>; 3]) {
        experts::experts_trained_grads::<Self>(dy, saved, stacks)
    }

    // The loss.

    /// Losses and log-sum-exps of a frozen head without a low-rank update, and the losses' gradients by h.
    fn cross_entropy_with_gradients(
        h: FloatTensor<Self>,
        targets: IntTensor<Self>,
        w: &Matrix,
        compute: Compute,
    ) -> [FloatTensor<Self>; 3] {
        loss::cross_entropy_with_gradients::<Self>(h, targets, w, compute)
    }
    /// Rows times one factor each.
    fn scaled_rows(x: FloatTensor<Self>, factors: FloatTensor<Self>) -> FloatTensor<Self> {
        loss::scaled_rows::<Self>(x, factors)
    }
    /// Gradients of h, u and b.
    fn cross_entropy_frozen_grads(
        dloss: FloatTensor<Self>,
        saved: LossSaved<FloatTensor<Self>, IntTensor<Self>>,
        low_rank: [FloatTensor<Self>; 2],
        w: &Matrix,
        compute: Compute,
        want_b: bool,
    ) -> [FloatTensor<Self>; 3] {
        loss::cross_entropy_frozen_grads::<Self>(dloss, saved, low_rank, (w, compute), want_b)
    }
    /// Gradients of h and w.
    fn cross_entropy_trained_grads(
        dloss: FloatTensor<Self>,
        saved: LossSaved<FloatTensor<Self>, IntTensor<Self>>,
        w: FloatTensor<Self>,
        compute: Compute,
        want_w: bool,
    ) -> [FloatTensor<Self>; 2] {
        loss::cross_entropy_trained_grads::<Self>(dloss, saved, w, compute, want_w)
    }
}

/// Registers the gradient of each tracked parent.
pub(crate) fn register<B: Gradients>(
    grads: &mut Grads,
    parents: impl IntoIterator<Item = Option<NodeId>>,
    values: impl IntoIterator<Item = FloatTensor<B>>,
) {
    for (parent, value) in parents.into_iter().zip(values) {
        if let Some(parent) = parent {
            grads.register::<B>(parent, value);
        }
    }
}

/// Declares a backward step: its name, number of inputs and saved state, and its body, a function of
/// `(output gradient, input nodes, state, gradients)` on a backend `B`.
macro_rules! backward_step {
    ($name:ident, $n:literal, $state:ty, |$dy:ident, $parents:ident, $saved:pat_param, $grads:ident| $body:block) => {
        #[derive(Debug)]
        struct $name;

        impl<B: Gradients> Backward<B, $n> for $name {
            type State = $state;

            fn backward(self, ops: Ops<Self::State, $n>, $grads: &mut Grads, _: &mut Checkpointer) {
                let $dy = $grads.consume::<B>(&ops.node);
                let ($parents, $saved) = (
                    ops.parents.map(|parent| parent.map(|node| node.id)),
                    ops.state,
                );
                $body
            }
        }
    };
}

pub(crate) use backward_step;
