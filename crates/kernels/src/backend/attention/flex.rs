//! Attention over whole sequences on the CPU backend.

use burn_flex::FlexTensor;

use crate::backend::flex::values::{Floats, floats};
use crate::memory::zeros;
use crate::ops::attention::{
    self, AttentionShape, HeadLayout, KvGrads, KvInputs, SavedAttention, Segments,
};

pub(crate) fn causal_attention(
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    scale: f32,
    segments: Segments,
) -> (FlexTensor, FlexTensor) {
    let (q, k, v) = (Floats::new(&q), Floats::new(&k), Floats::new(&v));
    let context = KvInputs {
        k: &k,
        v: &v,
        shared: &[],
    };
    attend(&q, context, scale, shape_apart(&q, &k, &v), &segments)
}

pub(crate) fn attention_grads(
    dout: FlexTensor,
    saved: [FlexTensor; 5],
    scale: f32,
    segments: &Segments,
) -> [FlexTensor; 3] {
    let dout = Floats::new(&dout);
    let [q, k, v, out, lse] = saved.each_ref().map(Floats::new);
    let context = KvInputs {
        k: &k,
        v: &v,
        shared: &[],
    };
    let saved = SavedAttention {
        q: &q,
        context,
        out: &out,
        lse: &lse,
    };
    let (mut dk, mut dv) = (vec![0.0; k.len()], vec![0.0; v.len()]);
    let grads = KvGrads::Apart {
        dk: &mut dk,
        dv: &mut dv,
    };
    let shape = shape_apart(&q, &k, &v);
    let dq = attention::backward(&dout, saved, scale, (shape, segments), grads);
    [(dq, &q), (dk, &k), (dv, &v)].map(|(grad, of)| floats(grad, of.dims::<4>()))
}

pub(crate) fn expanded_attention(
    q: FlexTensor,
    kv: FlexTensor,
    latents: FlexTensor,
    v_dim: usize,
    scale: f32,
    segments: Segments,
) -> (FlexTensor, FlexTensor) {
    let (q, kv, latents) = (Floats::new(&q), Floats::new(&kv), Floats::new(&latents));
    let context = KvInputs {
        k: &kv,
        v: &kv,
        shared: &latents,
    };
    let shape = shape_together(&q, &kv, &latents, v_dim);
    attend(&q, context, scale, shape, &segments)
}

pub(crate) fn expanded_attention_grads(
    dout: FlexTensor,
    saved: [FlexTensor; 5],
    v_dim: usize,
    scale: f32,
    segments: &Segments,
) -> [FlexTensor; 3] {
    let dout = Floats::new(&dout);
    let [q, kv, latents, out, lse] = saved.each_ref().map(Floats::new);
    let context = KvInputs {
        k: &kv,
        v: &kv,
        shared: &latents,
    };
    let saved = SavedAttention {
        q: &q,
        context,
        out: &out,
        lse: &lse,
    };
    let shape = shape_together(&q, &kv, &latents, v_dim);
    let (mut dkv, mut dlatents) = (zeros(kv.len()), zeros(latents.len()));
    let grads = KvGrads::Together {
        dkv: &mut dkv,
        dshared: &mut dlatents,
    };
    let dq = attention::backward(&dout, saved, scale, (shape, segments), grads);
    [(dq, &q), (dkv, &kv), (dlatents, &latents)].map(|(grad, of)| floats(grad, of.dims::<4>()))
}

/// The shape of attention over keys and values in two tensors.
fn shape_apart(q: &Floats, k: &Floats, v: &Floats) -> AttentionShape {
    let ([batch, seq, heads, dim], [_, kv_seq, kv_heads, _], [.., v_dim]) =
        (q.dims::<4>(), k.dims::<4>(), v.dims::<4>());
    AttentionShape {
        batch,
        seq,
        kv_seq,
        q: HeadLayout::whole(heads, dim),
        k: HeadLayout::whole(kv_heads, dim),
        v: HeadLayout::whole(kv_heads, v_dim),
        shared: HeadLayout::whole(1, 0),
    }
}

/// The shape of attention over keys and values of all heads in one tensor. The end of `latents` is the end of every
/// key.
fn shape_together(q: &Floats, kv: &Floats, latents: &Floats, v_dim: usize) -> AttentionShape {
    let ([batch, seq, heads, dim], [_, kv_seq, _, width], [.., latent]) =
        (q.dims::<4>(), kv.dims::<4>(), latents.dims::<4>());
    let (own, whole) = (width - v_dim, HeadLayout::whole(heads, width));
    let shared = dim - own;
    AttentionShape {
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
fn attend(
    q: &Floats,
    context: KvInputs<'_>,
    scale: f32,
    shape: AttentionShape,
    segments: &Segments,
) -> (FlexTensor, FlexTensor) {
    let (out, lse) = attention::forward(q, context, scale, shape, segments);
    let (batch, seq, heads) = (shape.batch, shape.seq, shape.q.heads);
    (
        floats(out, [batch, seq, heads, shape.v.dim]),
        floats(lse, [batch, heads, seq]),
    )
}
