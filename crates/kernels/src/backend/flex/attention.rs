//! The tensors of attention as the kernel reads them.

use burn_flex::FlexTensor;

use super::values::{Floats, floats};
use crate::ops::attention::{self, HeadLayout, Segments};

/// Keys and values in two tensors.
pub(super) fn shape_apart(q: &Floats, k: &Floats, v: &Floats) -> attention::AttentionShape {
    let ([batch, seq, heads, dim], [_, kv_seq, kv_heads, _], [.., v_dim]) =
        (q.dims::<4>(), k.dims::<4>(), v.dims::<4>());
    attention::AttentionShape {
        batch,
        seq,
        kv_seq,
        q: HeadLayout::whole(heads, dim),
        k: HeadLayout::whole(kv_heads, dim),
        v: HeadLayout::whole(kv_heads, v_dim),
        shared: HeadLayout::whole(1, 0),
    }
}

/// Keys and values of all heads in one tensor; the end of `latents` is the end of every key.
pub(super) fn shape_together(
    q: &Floats,
    kv: &Floats,
    latents: &Floats,
    v_dim: usize,
) -> attention::AttentionShape {
    let ([batch, seq, heads, dim], [_, kv_seq, _, width], [.., latent]) =
        (q.dims::<4>(), kv.dims::<4>(), latents.dims::<4>());
    let (own, whole) = (width - v_dim, HeadLayout::whole(heads, width));
    let shared = dim - own;
    attention::AttentionShape {
        batch,
        seq,
        kv_seq,
        q: HeadLayout::whole(heads, dim),
        k: HeadLayout { dim: own, ..whole },
        v: HeadLayout {
            start: own,
            dim: v_dim,
            ..whole
        },
        shared: HeadLayout {
            start: latent - shared,
            dim: shared,
            ..HeadLayout::whole(1, latent)
        },
    }
}

/// Output `[batch, seq, heads, v_dim]` and log-sum-exp `[batch, heads, seq]`.
pub(super) fn attend(
    q: &Floats,
    context: attention::KvInputs<'_>,
    scale: f32,
    shape: attention::AttentionShape,
    segments: &Segments,
) -> (FlexTensor, FlexTensor) {
    let (out, lse) = attention::forward(q, context, scale, shape, segments);
    let (batch, seq, heads) = (shape.batch, shape.seq, shape.q.heads);
    (
        floats(out, [batch, seq, heads, shape.v.dim]),
        floats(lse, [batch, heads, seq]),
    )
}
