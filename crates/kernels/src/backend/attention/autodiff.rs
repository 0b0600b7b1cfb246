//! Attention under autodiff.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients as Grads;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;

use crate::backend::gradients::{Gradients, Tracked, backward_step, register};
use crate::ops::attention::Segments;

pub(crate) fn causal_attention<B: Gradients, C: CheckpointStrategy>(
    q: Tracked<B>,
    k: Tracked<B>,
    v: Tracked<B>,
    scale: f32,
    segments: Segments,
) -> (Tracked<B>, FloatTensor<B>) {
    let nodes = [q.node(), k.node(), v.node()];
    let (q, k, v) = (q.into_primitive(), k.into_primitive(), v.into_primitive());
    let (out, lse) = B::causal_attention(q.clone(), k.clone(), v.clone(), scale, segments.clone());
    let op = AttentionBackward.prepare::<C>(nodes).compute_bound();
    let out = match op.stateful() {
        OpsKind::Tracked(op) => {
            let saved = [q, k, v, out.clone(), lse.clone()];
            op.finish((saved, scale, segments), out)
        }
        OpsKind::UnTracked(op) => op.finish(out),
    };
    (out, lse)
}

backward_step!(
    AttentionBackward,
    3,
    ([FloatTensor<B>; 5], f32, Segments),
    |dy, parents, (saved, scale, segments), grads| {
        let values = B::attention_grads(dy, saved, scale, &segments);
        register::<B>(grads, parents, values);
    }
);

pub(crate) fn expanded_attention<B: Gradients, C: CheckpointStrategy>(
    q: Tracked<B>,
    kv: Tracked<B>,
    latents: Tracked<B>,
    v_dim: usize,
    scale: f32,
    segments: Segments,
) -> (Tracked<B>, FloatTensor<B>) {
    let nodes = [q.node(), kv.node(), latents.node()];
    let (q, kv) = (q.into_primitive(), kv.into_primitive());
    let latents = latents.into_primitive();
    let inputs = (q.clone(), kv.clone(), latents.clone());
    let (out, lse) =
        B::expanded_attention(inputs.0, inputs.1, inputs.2, v_dim, scale, segments.clone());
    let op = ExpandedAttentionBackward
        .prepare::<C>(nodes)
        .compute_bound();
    let out = match op.stateful() {
        OpsKind::Tracked(op) => {
            let saved = [q, kv, latents, out.clone(), lse.clone()];
            op.finish((saved, v_dim, scale, segments), out)
        }
        OpsKind::UnTracked(op) => op.finish(out),
    };
    (out, lse)
}

backward_step!(
    ExpandedAttentionBackward,
    3,
    ([FloatTensor<B>; 5], usize, f32, Segments),
    |dy, parents, (saved, v_dim, scale, segments), grads| {
        let values = B::expanded_attention_grads(dy, saved, v_dim, scale, &segments);
        register::<B>(grads, parents, values);
    }
);
