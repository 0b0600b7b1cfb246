//! The loss under autodiff.

use std::sync::Arc;

use burn::backend::TensorMetadata;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients as Grads;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};

use crate::backend::gradients::{Gradients, LossSaved, Tracked, backward_step, register};
use crate::formats::Matrix;
use crate::settings::Compute;

pub(crate) fn cross_entropy_frozen<B: Gradients, C: CheckpointStrategy>(
    h: Tracked<B>,
    u: Tracked<B>,
    b: Tracked<B>,
    targets: IntTensor<B>,
    w: Arc<Matrix>,
    compute: Compute,
) -> (Tracked<B>, FloatTensor<B>) {
    let nodes = [h.node(), u.node(), b.node()];
    let (u, b) = (u.into_primitive(), b.into_primitive());
    if u.shape()[1] == 0 {
        return cross_entropy_without_update::<B, C>(h, [u, b], targets, w, compute);
    }
    let h = h.into_primitive();
    let (loss, lse) = B::cross_entropy_frozen(
        h.clone(),
        u.clone(),
        b.clone(),
        targets.clone(),
        Arc::clone(&w),
        compute,
    );
    let op = CrossEntropyFrozenBackward
        .prepare::<C>(nodes)
        .compute_bound();
    let loss = match op.stateful() {
        OpsKind::Tracked(op) => {
            let saved = LossSaved {
                h,
                targets,
                lse: lse.clone(),
            };
            op.finish((saved, [u, b], w, compute), loss)
        }
        OpsKind::UnTracked(op) => op.finish(loss),
    };
    (loss, lse)
}

backward_step!(
    CrossEntropyFrozenBackward,
    3,
    (
        LossSaved<FloatTensor<B>, IntTensor<B>>,
        [FloatTensor<B>; 2],
        Arc<Matrix>,
        Compute
    ),
    |dloss, parents, (saved, low_rank, w, compute), grads| {
        let want_b = parents[2].is_some();
        register::<B>(
            grads,
            parents,
            B::cross_entropy_frozen_grads(dloss, saved, low_rank, &w, compute, want_b),
        );
    }
);

/// The loss against a frozen head without a low-rank update: its gradient is computed in the forward pass.
fn cross_entropy_without_update<B: Gradients, C: CheckpointStrategy>(
    h: Tracked<B>,
    [u, b]: [FloatTensor<B>; 2],
    targets: IntTensor<B>,
    w: Arc<Matrix>,
    compute: Compute,
) -> (Tracked<B>, FloatTensor<B>) {
    let (node, h) = (h.node(), h.into_primitive());
    let op = CrossEntropyWithoutUpdateBackward
        .prepare::<C>([node])
        .compute_bound();
    match op.stateful() {
        OpsKind::Tracked(op) => {
            let [loss, lse, dh] = B::cross_entropy_with_gradients(h, targets, &w, compute);
            (op.finish(dh, loss), lse)
        }
        OpsKind::UnTracked(op) => {
            let (loss, lse) = B::cross_entropy_frozen(h, u, b, targets, w, compute);
            (op.finish(loss), lse)
        }
    }
}

backward_step!(
    CrossEntropyWithoutUpdateBackward,
    1,
    FloatTensor<B>,
    |dloss, parents, dh, grads| {
        register::<B>(grads, parents, [B::scaled_rows(dh, dloss)]);
    }
);

pub(crate) fn cross_entropy_trained<B: Gradients, C: CheckpointStrategy>(
    h: Tracked<B>,
    w: Tracked<B>,
    targets: IntTensor<B>,
    compute: Compute,
) -> (Tracked<B>, FloatTensor<B>) {
    let (nodes, h, w) = ([h.node(), w.node()], h.into_primitive(), w.into_primitive());
    let (loss, lse) = B::cross_entropy_trained(h.clone(), w.clone(), targets.clone(), compute);
    let op = CrossEntropyTrainedBackward
        .prepare::<C>(nodes)
        .compute_bound();
    let loss = match op.stateful() {
        OpsKind::Tracked(op) => {
            let saved = LossSaved {
                h,
                targets,
                lse: lse.clone(),
            };
            op.finish((saved, w, compute), loss)
        }
        OpsKind::UnTracked(op) => op.finish(loss),
    };
    (loss, lse)
}

backward_step!(
    CrossEntropyTrainedBackward,
    2,
    (
        LossSaved<FloatTensor<B>, IntTensor<B>>,
        FloatTensor<B>,
        Compute
    ),
    |dloss, parents, (saved, w, compute), grads| {
        let want_w = parents[1].is_some();
        register::<B>(
            grads,
            parents,
            B::cross_entropy_trained_grads(dloss, saved, w, compute, want_w),
        );
    }
);
