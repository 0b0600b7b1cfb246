//! The tensors of attention as the kernel reads them.

use burn_flex::FlexTensor;

use super::values::{Floats, floats};
use crate::attention::{self, Place, Segments};

/// Keys and values in two tensors.
pub(super) fn shape_apart(q: &Floats, k: &Floats, v: &Floats) -> attention::Shape {
    let ([batch, seq, heads, dim], [_, kv_seq, kv_heads, _], [.., v_dim]) =
        (q.dims::<4>(), k.dims::<4>(), v.dims::<4>());
    attention::Shape {
        batch,
        seq,
        kv_seq,
        q: Place::whole(heads, dim),
        k: Place::whole(kv_heads, dim),
        v: Place::whole(kv_heads, v_dim),
        shared: Place::whole(1, 0),
    }
}

/// Keys and values of all heads in one tensor; the end of `latents` is the end of every key.
pub(super) fn shape_together(
    q: &Floats,
    kv: &Floats,
    latents: &Floats,
    v_dim: usize,
) -> attention::Shape {
    let ([batch, seq, heads, dim], [_, kv_seq, _, width], [.., latent]) =
        (q.dims::<4>(), kv.dims::<4>(), latents.dims::<4>());
    let (own, whole) = (width - v_dim, Place::whole(heads, width));
    let shared = dim - own;
    attention::Shape {
        batch,
        seq,
        kv_seq,
        q: Place::whole(heads, dim),
        k: Place { dim: own, ..whole },
        v: Place {
            start: own,
            dim: v_dim,
            ..whole
        },
        shared: Place {
            start: latent - shared,
            dim: shared,
            ..Place::whole(1, latent)
        },
    }
}

/// Output `[batch, seq, heads, v_dim]` and log-sum-exp `[batch, heads, seq]`.
pub(super) fn attend(
    q: &Floats,
    context: attention::Context<'_>,
    scale: f32,
    shape: attention::Shape,
    segments: &Segments,
) -> (FlexTensor, FlexTensor) {
    let (out, lse) = attention::forward(q, context, scale, shape, segments);
    let (batch, seq, heads) = (shape.batch, shape.seq, shape.q.heads);
    (
        floats(out, [batch, seq, heads, shape.v.dim]),
        floats(lse, [batch, heads, seq]),
    )
}
