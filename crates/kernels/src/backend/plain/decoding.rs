//! Attention of the last positions of a sequence over its cached rows; see [`crate::backend::attention`].

use std::sync::Arc;

use burn::backend::tensor::FloatTensor;

use crate::backend::plain::reals::Reals;
use crate::backend::traits::{Absorbed, Direction, HeadRows, Kernels, KvBufferPrimitive};
use crate::formats::Matrix;
use crate::ops::attention::Segments;
use crate::settings::Compute;

/// Never: rows are cached as they are.
pub(crate) fn refuse_blocks() -> ! {
    panic!("this backend caches keys and values in f32 alone")
}

/// Rows `[len, heads, width]` as a sequence, `[1, len, heads, width]`.
fn sequence<B: Kernels>(rows: KvBufferPrimitive<B>) -> Reals<B> {
    match rows {
        KvBufferPrimitive::Numbers(rows) => {
            let rows = Reals::<B>::new(rows);
            let [len, heads, width] = rows.dims();
            rows.reshape(&[1, len, heads, width])
        }
        KvBufferPrimitive::Blocks(..) => refuse_blocks(),
    }
}

/// q `[1, seq, heads, dim]` → `[1, seq, heads, v_dim]`.
pub(crate) fn cached_attention<B: Kernels>(
    q: FloatTensor<B>,
    [k, v]: [KvBufferPrimitive<B>; 2],
    scale: f32,
) -> FloatTensor<B> {
    let [k, v] = [k, v].map(|rows| sequence(rows).into_tensor());
    B::causal_attention(q, k, v, scale, Segments::whole()).0
}

/// [`cached_attention`] of all heads over one row per position, whose first `v_dim` features are its value.
pub(crate) fn latent_attention<B: Kernels>(
    q: FloatTensor<B>,
    latents: KvBufferPrimitive<B>,
    v_dim: usize,
    scale: f32,
) -> FloatTensor<B> {
    let keys = sequence(latents);
    let values = keys.clone().narrow(3, 0..v_dim).into_tensor();
    B::causal_attention(q, keys.into_tensor(), values, scale, Segments::whole()).0
}

/// [`latent_attention`] between the products with a weight's rows for keys and for values: q `[1, seq, heads, dim]`,
/// latents `[kv_seq, 1, rank + dim − nope]`, w `[heads · (nope + v_dim), rank]` → `[1, seq, heads, v_dim]`.
pub(crate) fn absorbed_attention<B: Kernels>(
    q: FloatTensor<B>,
    latents: KvBufferPrimitive<B>,
    w: Arc<Matrix>,
    absorbed: Absorbed,
    compute: Compute,
) -> FloatTensor<B> {
    let Absorbed { nope, v_dim, scale } = absorbed;
    let (q, rank) = (Reals::<B>::new(q), w.cols());
    let [_, seq, heads, dim] = q.dims();
    let q = q.reshape(&[seq, heads, dim]);
    let part = |start, len, direction| HeadRows {
        heads,
        start,
        len,
        direction,
    };
    let (own, rotated) = (q.clone().narrow(2, 0..nope), q.narrow(2, nope..dim));
    let keys = part(0, nope, Direction::Transposed);
    let own = B::heads_linear(own.into_tensor(), Arc::clone(&w), keys, compute);
    let queries = Reals::cat(vec![Reals::new(own), rotated], 2);
    let queries = queries.reshape(&[1, seq, heads, rank + dim - nope]);
    let context = B::latent_attention(queries.into_tensor(), latents, rank, scale);
    let context = Reals::<B>::new(context).reshape(&[seq, heads, rank]);
    let values = part(nope, v_dim, Direction::Forward);
    let out = B::heads_linear(context.into_tensor(), w, values, compute);
    Reals::<B>::new(out)
        .reshape(&[1, seq, heads, v_dim])
        .into_tensor()
}
