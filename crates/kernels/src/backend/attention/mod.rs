//! Attention over whole sequences and over the KV buffers of decoding.

pub(crate) mod autodiff;
pub(crate) mod flex;
pub(crate) mod flex_absorbed;
pub(crate) mod flex_kv;
pub(crate) mod kv_buffer;

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::tensor::Tensor;

use crate::backend::attention::kv_buffer::KvBuffer;
use crate::backend::traits::{Absorbed, Kernels};
use crate::formats::Matrix;
use crate::gemv::MAX_GEMV_ROWS;
use crate::ops::attention::Segments;
use crate::settings::Compute;

/// Causal attention within segments; the queries are the last `seq` of the `kv_seq` positions.
///
/// # Shapes
/// - `q`: `[batch, seq, heads, dim]`, `k`: `[batch, kv_seq, kv_heads, dim]`, `v`: `[batch, kv_seq, kv_heads, v_dim]`
/// - returns: `[batch, seq, heads, v_dim]`
///
/// # Panics
/// If the sizes do not fit, `kv_heads` does not divide `heads`, `kv_seq < seq`, or there are segments and
/// `kv_seq ≠ seq`.
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

/// Expanded latent attention: causal attention over keys and values that were rebuilt from latents, read in place.
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

/// Causal attention of the last positions of one sequence over its KV buffers. Has no gradient.
///
/// Up to 8 queries read the rows tile by tile in their cache type, and the results are bit-identical to one query at a
/// time. For more queries, all rows are decoded first.
///
/// # Shapes
/// - `q`: `[1, seq, heads, dim]`, `k`: `[kv_seq, kv_heads, dim]`, `v`: `[kv_seq, kv_heads, v_dim]`
/// - returns: `[1, seq, heads, v_dim]`
///
/// # Panics
/// If the sizes do not fit, or `kv_heads` does not divide `heads`.
pub fn cached_attention(q: Tensor<4>, k: &KvBuffer, v: &KvBuffer, scale: f32) -> Tensor<4> {
    let ([batch, seq, heads, dim], [kv_seq, kv_heads, _]) = (q.dims(), k.dims());
    k.check(seq, kv_heads, dim);
    v.check(seq, kv_heads, v.dims()[2]);
    assert!(
        batch == 1 && v.len() == kv_seq && heads.is_multiple_of(kv_heads),
        "{batch} sequences, {kv_seq} keys and {} values, {heads} heads over {kv_heads}",
        v.len()
    );
    if seq > MAX_GEMV_ROWS {
        return attention(q, k.floats(), v.floats(), scale, &Segments::whole());
    }
    let (k, v) = (k.primitive(), v.primitive());
    Tensor::from_dispatch(Dispatch::cached_attention(q.into_dispatch(), k, v, scale))
}

/// The attention of absorbed latent attention: [`cached_attention`] of all heads over one shared row per position. The
/// first `v_dim` features of a row are its value.
///
/// # Shapes
/// - `q`: `[1, seq, heads, dim]`, `latents`: `[kv_seq, 1, dim]`
/// - returns: `[1, seq, heads, v_dim]`
///
/// # Panics
/// If the sizes do not fit.
pub fn latent_attention(q: Tensor<4>, latents: &KvBuffer, v_dim: usize, scale: f32) -> Tensor<4> {
    let [batch, seq, _, dim] = q.dims();
    latents.check(seq, 1, dim);
    assert!(
        batch == 1 && v_dim <= dim,
        "{batch} sequences, values of {v_dim} of {dim}"
    );
    if seq > MAX_GEMV_ROWS {
        let keys = latents.floats();
        let values = keys.clone().slice([0..1, 0..latents.len(), 0..1, 0..v_dim]);
        return attention(q, keys, values, scale, &Segments::whole());
    }
    let latents = latents.primitive();
    Tensor::from_dispatch(Dispatch::latent_attention(
        q.into_dispatch(),
        latents,
        v_dim,
        scale,
    ))
}

/// Absorbed latent attention of a few positions of one sequence over its latents. Has no gradient.
///
/// The weight that would rebuild keys and values is multiplied with queries and outputs instead: fuses
/// [`crate::heads_linear`], [`latent_attention`] and [`crate::heads_linear`].
///
/// # Shapes
/// - `q`: `[1, seq, heads, dim]`, `latents`: `[kv_seq, 1, rank + dim − nope]`
/// - `w`: `[heads · (nope + v_dim), rank]`
/// - returns: `[1, seq, heads, v_dim]`
///
/// # Panics
/// If the sizes do not fit.
pub fn absorbed_attention(
    q: Tensor<4>,
    latents: &KvBuffer,
    w: &Arc<Matrix>,
    absorbed: Absorbed,
    compute: Compute,
) -> Tensor<4> {
    let ([_, seq, heads, dim], rank) = (q.dims(), w.cols());
    let Absorbed { nope, v_dim, .. } = absorbed;
    assert!(
        q.dims()[0] == 1 && nope <= dim && w.rows() == heads * (nope + v_dim),
        "queries {:?} and a weight of {} rows for {absorbed:?}",
        q.dims(),
        w.rows()
    );
    latents.check(seq, 1, rank + dim - nope);
    let (q, latents, w) = (q.into_dispatch(), latents.primitive(), Arc::clone(w));
    let out = Dispatch::absorbed_attention(q, latents, w, absorbed, compute);
    Tensor::from_dispatch(out)
}
