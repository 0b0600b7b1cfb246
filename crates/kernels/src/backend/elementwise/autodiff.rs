//! Elementwise operations, norms and embeddings under autodiff.

use std::sync::Arc;

use burn::backend::TensorMetadata;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients as Grads;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};

use crate::backend::gradients::{Gradients, Tracked, backward_step, register};
use crate::backend::saved::{SavedActivation, SavedForm, remember, shared};
use crate::ops::dropout::Dropout;
use crate::ops::rope::RopeLayout;
use crate::settings::Compute;

pub(crate) fn embed_trained<B: Gradients, C: CheckpointStrategy>(
    w: Tracked<B>,
    ids: IntTensor<B>,
) -> Tracked<B> {
    let (node, w) = (w.node(), w.into_primitive());
    let vocab = w.shape().as_slice()[0];
    let y = B::embed_trained(w, ids.clone());
    let op = EmbedTrainedBackward.prepare::<C>([node]).compute_bound();
    match op.stateful() {
        OpsKind::Tracked(op) => op.finish((ids, vocab), y),
        OpsKind::UnTracked(op) => op.finish(y),
    }
}

backward_step!(
    EmbedTrainedBackward,
    1,
    (IntTensor<B>, usize),
    |dy, parents, (ids, vocab), grads| {
        register::<B>(grads, parents, [B::embed_dw(ids, dy, vocab)]);
    }
);

pub(crate) fn rms_norm<B: Gradients, C: CheckpointStrategy>(
    x: Tracked<B>,
    weight: Tracked<B>,
    eps: f32,
) -> Tracked<B> {
    let nodes = [x.node(), weight.node()];
    let (x, weight) = (x.into_primitive(), weight.into_primitive());
    let y = B::rms_norm(x.clone(), weight.clone(), eps);
    let op = RmsNormBackward.prepare::<C>(nodes).compute_bound();
    match op.stateful() {
        OpsKind::Tracked(op) => {
            let saved = Arc::new(SavedActivation::new(SavedForm::Norm(x, weight, eps), 0));
            let y = op.finish(Arc::clone(&saved), y);
            remember(y.id(), &saved);
            y
        }
        OpsKind::UnTracked(op) => op.finish(y),
    }
}

backward_step!(
    RmsNormBackward,
    2,
    Arc<SavedActivation<FloatTensor<B>>>,
    |dy, parents, saved, grads| {
        if let SavedForm::Norm(x, weight, eps) = saved.form() {
            let values = B::rms_norm_grads(dy, x.clone(), weight.clone(), *eps);
            register::<B>(grads, parents, values);
        }
    }
);

pub(crate) fn rope<B: Gradients, C: CheckpointStrategy>(
    x: Tracked<B>,
    cos: Tracked<B>,
    sin: Tracked<B>,
    layout: RopeLayout,
) -> Tracked<B> {
    let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
    let (node, x) = (x.node(), x.into_primitive());
    let y = B::rope(x, cos.clone(), sin.clone(), layout);
    let op = RopeBackward.prepare::<C>([node]).compute_bound();
    match op.stateful() {
        OpsKind::Tracked(op) => op.finish((cos, sin, layout), y),
        OpsKind::UnTracked(op) => op.finish(y),
    }
}

backward_step!(
    RopeBackward,
    1,
    (FloatTensor<B>, FloatTensor<B>, RopeLayout),
    |dy, parents, (cos, sin, layout), grads| {
        register::<B>(grads, parents, [B::rope_dx(dy, [cos, sin], layout)]);
    }
);

pub(crate) fn swiglu<B: Gradients, C: CheckpointStrategy>(
    gate: Tracked<B>,
    up: Tracked<B>,
    saved_as: Compute,
) -> Tracked<B> {
    let (nodes, ids) = ([gate.node(), up.node()], [gate.id(), up.id()]);
    let (gate, up) = (gate.into_primitive(), up.into_primitive());
    let y = B::swiglu(gate.clone(), up.clone(), saved_as);
    let op = SwigluBackward.prepare::<C>(nodes).compute_bound();
    match op.stateful() {
        OpsKind::Tracked(op) => {
            let gate = shared(ids[0], saved_as, || B::save_for_backward(gate, saved_as));
            let up = shared(ids[1], saved_as, || B::save_for_backward(up, saved_as));
            let saved = Arc::new(SavedActivation::new(SavedForm::Swiglu([gate, up]), 0));
            let y = op.finish(Arc::clone(&saved), y);
            remember(y.id(), &saved);
            y
        }
        OpsKind::UnTracked(op) => op.finish(y),
    }
}

backward_step!(
    SwigluBackward,
    2,
    Arc<SavedActivation<FloatTensor<B>>>,
    |dy, parents, saved, grads| {
        if let SavedForm::Swiglu(products) = saved.form() {
            let products = products.clone();
            drop(saved);
            register::<B>(grads, parents, B::swiglu_grads(dy, products));
        }
    }
);

pub(crate) fn dropout<B: Gradients, C: CheckpointStrategy>(
    x: Tracked<B>,
    dropout: Dropout,
) -> Tracked<B> {
    let (node, x) = (x.node(), x.into_primitive());
    let y = B::dropout(x, dropout);
    let op = DropoutBackward.prepare::<C>([node]).compute_bound();
    match op.stateful() {
        OpsKind::Tracked(op) => op.finish(dropout, y),
        OpsKind::UnTracked(op) => op.finish(y),
    }
}

backward_step!(
    DropoutBackward,
    1,
    Dropout,
    |dy, parents, dropout, grads| {
        register::<B>(grads, parents, [B::dropout(dy, dropout)]);
    }
);
