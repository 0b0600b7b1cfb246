//! Linear layers under autodiff.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients as Grads;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;

use crate::backend::gradients::{Gradients, Tracked, UpdateSaved, backward_step, register};
use crate::backend::saved::{SavedActivation, SavedForm, shared};
use crate::backend::traits::{FakeQuantize, Update};
use crate::formats::Matrix;
use crate::settings::Compute;

pub(crate) fn linear_frozen<B: Gradients, C: CheckpointStrategy>(
    x: Tracked<B>,
    w: Arc<Matrix>,
    compute: Compute,
) -> Tracked<B> {
    let y = B::linear_frozen(x.primitive().clone(), Arc::clone(&w), compute);
    match LinearFrozenBackward
        .prepare::<C>([x.node()])
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(op) => op.finish((w, compute), y),
        OpsKind::UnTracked(op) => op.finish(y),
    }
}

backward_step!(
    LinearFrozenBackward,
    1,
    (Arc<Matrix>, Compute),
    |dy, parents, (w, compute), grads| {
        register::<B>(grads, parents, [B::linear_frozen_dx(dy, &w, compute)]);
    }
);

pub(crate) fn linear_trained<B: Gradients, C: CheckpointStrategy>(
    x: Tracked<B>,
    w: Tracked<B>,
    compute: Compute,
    saved_as: Compute,
) -> Tracked<B> {
    let (id, wants_x) = (x.id(), w.is_tracked());
    let (nodes, x, w) = ([x.node(), w.node()], x.into_primitive(), w.into_primitive());
    let y = B::linear_trained(x.clone(), w.clone(), compute, saved_as);
    let op = LinearTrainedBackward.prepare::<C>(nodes).compute_bound();
    match op.stateful() {
        OpsKind::Tracked(op) => {
            let save = || B::save_for_backward(x, saved_as);
            let x = wants_x.then(|| shared(id, saved_as, save));
            op.finish((x, w, compute), y)
        }
        OpsKind::UnTracked(op) => op.finish(y),
    }
}

backward_step!(
    LinearTrainedBackward,
    2,
    (
        Option<Arc<SavedActivation<FloatTensor<B>>>>,
        FloatTensor<B>,
        Compute
    ),
    |dy, parents, (x, w, compute), grads| {
        let [x_node, w_node] = parents;
        if let Some(node) = x_node {
            grads.register::<B>(node, B::linear_trained_dx(dy.clone(), w, compute));
        }
        if let (Some(node), Some(x)) = (w_node, x) {
            grads.register::<B>(node, B::linear_dw(dy, &x, compute));
        }
    }
);

pub(crate) fn linear_updated<B: Gradients, C: CheckpointStrategy>(
    x: Tracked<B>,
    a: Tracked<B>,
    b: Tracked<B>,
    w: Arc<Matrix>,
    update: Update,
) -> (Tracked<B>, FloatTensor<B>) {
    let (id, wants_x) = (x.id(), a.is_tracked() || b.is_tracked());
    let nodes = [x.node(), a.node(), b.node()];
    let (x, a, b) = (x.into_primitive(), a.into_primitive(), b.into_primitive());
    let (y, low) = B::linear_updated(x.clone(), a.clone(), b.clone(), Arc::clone(&w), update);
    let op = LinearUpdatedBackward.prepare::<C>(nodes).compute_bound();
    let y = match op.stateful() {
        OpsKind::Tracked(op) => {
            let save = || B::save_for_backward(x, update.saved_as);
            let x = wants_x.then(|| shared(id, update.saved_as, save));
            let factors = [a, b];
            op.finish((UpdateSaved { x, factors }, low.clone(), w, update), y)
        }
        OpsKind::UnTracked(op) => op.finish(y),
    };
    (y, low)
}

backward_step!(
    LinearUpdatedBackward,
    3,
    (
        UpdateSaved<FloatTensor<B>>,
        FloatTensor<B>,
        Arc<Matrix>,
        Update
    ),
    |dy, parents, (saved, low, w, update), grads| {
        let [x_node, factor_nodes @ ..] = parents;
        let want_x = x_node.is_some();
        let (dx, factors) = B::linear_updated_grads(dy, saved, low, &w, update, want_x);
        register::<B>(grads, [x_node], dx);
        register::<B>(grads, factor_nodes, factors.into_iter().flatten());
    }
);

pub(crate) fn linear_fake_quantized<B: Gradients, C: CheckpointStrategy>(
    x: Tracked<B>,
    a: Tracked<B>,
    b: Tracked<B>,
    w: Arc<Matrix>,
    merge: FakeQuantize,
    compute: Compute,
) -> Tracked<B> {
    let (id, wants_x) = (x.id(), a.is_tracked() || b.is_tracked());
    let nodes = [x.node(), a.node(), b.node()];
    let (x, a, b) = (x.into_primitive(), a.into_primitive(), b.into_primitive());
    let y = B::linear_fake_quantized(
        x.clone(),
        a.clone(),
        b.clone(),
        Arc::clone(&w),
        merge,
        compute,
    );
    let op = LinearFakeQuantizedBackward
        .prepare::<C>(nodes)
        .compute_bound();
    match op.stateful() {
        OpsKind::Tracked(op) => {
            let save = || B::save_for_backward(x, compute);
            let x = wants_x.then(|| shared(id, compute, save));
            let factors = [a, b];
            op.finish((UpdateSaved { x, factors }, w, merge, compute), y)
        }
        OpsKind::UnTracked(op) => op.finish(y),
    }
}

backward_step!(
    LinearFakeQuantizedBackward,
    3,
    (
        UpdateSaved<FloatTensor<B>>,
        Arc<Matrix>,
        FakeQuantize,
        Compute
    ),
    |dy, parents, (saved, w, merge, compute), grads| {
        let [x_node, factor_nodes @ ..] = parents;
        let want_x = x_node.is_some();
        let (dx, factors) = B::linear_fake_quantized_grads(dy, saved, &w, merge, compute, want_x);
        register::<B>(grads, [x_node], dx);
        register::<B>(grads, factor_nodes, factors.into_iter().flatten());
    }
);

pub(crate) fn linear_add<B: Gradients, C: CheckpointStrategy>(
    y: Tracked<B>,
    u: Tracked<B>,
    b: Tracked<B>,
) -> Tracked<B> {
    let nodes = [y.node(), u.node(), b.node()];
    let (y, u, b) = (y.into_primitive(), u.into_primitive(), b.into_primitive());
    let sum = B::linear_add(y, u.clone(), b.clone());
    let op = LinearAddBackward.prepare::<C>(nodes).compute_bound();
    match op.stateful() {
        OpsKind::Tracked(op) => op.finish((u, b), sum),
        OpsKind::UnTracked(op) => op.finish(sum),
    }
}

backward_step!(
    LinearAddBackward,
    3,
    (FloatTensor<B>, FloatTensor<B>),
    |dy, parents, (u, b), grads| {
        let [y_node, u_node, b_node] = parents;
        if let Some(node) = u_node {
            grads.register::<B>(node, B::linear_trained_dx(dy.clone(), b, Compute::F32));
        }
        if let Some(node) = b_node {
            let u = SavedActivation::new(SavedForm::Float(u), 0);
            grads.register::<B>(node, B::linear_dw(dy.clone(), &u, Compute::F32));
        }
        register::<B>(grads, [y_node], [dy]);
    }
);
