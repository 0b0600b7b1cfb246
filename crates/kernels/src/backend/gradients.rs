//! What the backward pass asks of a backend without autodiff, and what it hands over.

use std::sync::Arc;

use burn::backend::autodiff::NodeId;
use burn::backend::tensor::{FloatTensor, IntTensor};

use crate::backend::kept::{Kept, shared};
use crate::backend::ops::{FactorsPrimitive, Kernels, RoutingPrimitive, StacksPrimitive};
use crate::formats::Matrix;
use crate::ops::attention::Segments;
use crate::ops::experts::{ExpertBank, ExpertLora};
use crate::ops::rope::RopeLayout;
use crate::settings::Compute;
use crate::{FakeQuantize, Update};

/// What the operations on experts keep for their gradients.
#[derive(Clone, Debug)]
pub(crate) struct ExpertsSaved<B: Kernels> {
    pub(crate) x: Arc<Kept<FloatTensor<B>>>,
    pub(crate) routing: RoutingPrimitive<B>,
    pub(crate) gate: Arc<Kept<FloatTensor<B>>>,
    pub(crate) up: Arc<Kept<FloatTensor<B>>>,
}

impl<B: Gradients> ExpertsSaved<B> {
    /// Keeps the input, which has a node, and the products of gate and up.
    pub(crate) fn new(
        (node, x): (NodeId, FloatTensor<B>),
        routing: RoutingPrimitive<B>,
        products: [FloatTensor<B>; 2],
        compute: Compute,
    ) -> Self {
        let [gate, up] = products.map(|product| Arc::new(B::keep(product, compute)));
        Self {
            x: shared(node, compute, || B::keep(x, compute)),
            routing,
            gate,
            up,
        }
    }
}

/// What the loss of a batch was made from, for its gradient.
#[derive(Clone, Debug)]
pub(crate) struct LossSaved<F, I> {
    pub(crate) h: F,
    pub(crate) targets: I,
    pub(crate) lse: F,
}

/// The gradients of [`Kernels`], on a backend without autodiff. Argument order: output gradient, saved, settings.
pub(crate) trait Gradients: Kernels {
    fn linear_frozen_dx(dy: FloatTensor<Self>, w: &Matrix, compute: Compute) -> FloatTensor<Self>;
    fn linear_trained_dx(
        dy: FloatTensor<Self>,
        w: FloatTensor<Self>,
        compute: Compute,
    ) -> FloatTensor<Self>;
    fn linear_dw(
        dy: FloatTensor<Self>,
        x: &Kept<FloatTensor<Self>>,
        compute: Compute,
    ) -> FloatTensor<Self>;
    /// Gradients of x if it is wanted, and of `a` and `b` where x was kept for them; `saved` is x and `scale · x · aᵀ`.
    fn linear_updated_grads(
        dy: FloatTensor<Self>,
        saved: (Option<&Kept<FloatTensor<Self>>>, FloatTensor<Self>),
        factors: [FloatTensor<Self>; 2],
        settings: (&Matrix, Update),
        want_x: bool,
    ) -> (Option<FloatTensor<Self>>, Option<[FloatTensor<Self>; 2]>);
    /// Gradients of x if it is wanted, and of `a` and `b` where x was kept for them.
    fn linear_merged_grads(
        dy: FloatTensor<Self>,
        x: Option<&Kept<FloatTensor<Self>>>,
        factors: [FloatTensor<Self>; 2],
        settings: (&Matrix, FakeQuantize, Compute),
        want_x: bool,
    ) -> (Option<FloatTensor<Self>>, Option<[FloatTensor<Self>; 2]>);
    /// `x` in the form in which it waits for the backward pass.
    fn keep(x: FloatTensor<Self>, compute: Compute) -> Kept<FloatTensor<Self>>;
    fn embed_dw(ids: IntTensor<Self>, dy: FloatTensor<Self>, vocab: usize) -> FloatTensor<Self>;
    fn rms_norm_grads(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f32,
    ) -> [FloatTensor<Self>; 2];
    fn rope_dx(
        dy: FloatTensor<Self>,
        angles: [FloatTensor<Self>; 2],
        layout: RopeLayout,
    ) -> FloatTensor<Self>;
    /// `products` are gate and up; what of them is kept for nobody else may be written.
    fn swiglu_grads(
        dy: FloatTensor<Self>,
        products: [Arc<Kept<FloatTensor<Self>>>; 2],
    ) -> [FloatTensor<Self>; 2];
    /// `saved` is q, k, v, the output and the log-sum-exp.
    fn attention_grads(
        dout: FloatTensor<Self>,
        saved: [FloatTensor<Self>; 5],
        scale: f32,
        segments: &Segments,
    ) -> [FloatTensor<Self>; 3];
    /// `saved` is q, the keys and values, the latents, the output and the log-sum-exp.
    fn expanded_attention_grads(
        dout: FloatTensor<Self>,
        saved: [FloatTensor<Self>; 5],
        v_dim: usize,
        scale: f32,
        segments: &Segments,
    ) -> [FloatTensor<Self>; 3];
    /// Gradients of x and the routing weights, and of the six factors if they are wanted.
    fn experts_frozen_grads(
        dy: FloatTensor<Self>,
        saved: ExpertsSaved<Self>,
        factors: &FactorsPrimitive<Self>,
        settings: (&ExpertBank, ExpertLora, Compute),
        wanted: bool,
    ) -> ([FloatTensor<Self>; 2], Option<[FloatTensor<Self>; 6]>);
    /// Gradients of x and the routing weights, and of the three stacks.
    fn experts_trained_grads(
        dy: FloatTensor<Self>,
        saved: ExpertsSaved<Self>,
        stacks: &StacksPrimitive<Self>,
        compute: Compute,
    ) -> ([FloatTensor<Self>; 2], [FloatTensor<Self>; 3]);
    /// Losses and log-sum-exps of a frozen head without a low-rank update, and the losses' gradients by h.
    fn cross_entropy_with_gradients(
        h: FloatTensor<Self>,
        targets: IntTensor<Self>,
        w: &Matrix,
        compute: Compute,
    ) -> [FloatTensor<Self>; 3];
    /// Rows times one factor each.
    fn scaled_rows(x: FloatTensor<Self>, factors: FloatTensor<Self>) -> FloatTensor<Self>;
    /// Gradients of h, u and b.
    fn cross_entropy_frozen_grads(
        dloss: FloatTensor<Self>,
        saved: LossSaved<FloatTensor<Self>, IntTensor<Self>>,
        low_rank: [FloatTensor<Self>; 2],
        settings: (&Matrix, Compute),
        want_b: bool,
    ) -> [FloatTensor<Self>; 3];
    /// Gradients of h and w.
    fn cross_entropy_trained_grads(
        dloss: FloatTensor<Self>,
        saved: LossSaved<FloatTensor<Self>, IntTensor<Self>>,
        w: FloatTensor<Self>,
        compute: Compute,
        want_w: bool,
    ) -> [FloatTensor<Self>; 2];
}
