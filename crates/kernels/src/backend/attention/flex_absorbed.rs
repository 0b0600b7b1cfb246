//! Absorbed latent attention on the CPU backend: the attention of decoding, from the queries to the input of the output
//! projection.

use std::sync::Arc;

use burn::backend::Flex;
use burn_flex::FlexTensor;

use crate::backend::attention::flex_kv::RowValues;
use crate::backend::flex::values::{Floats, floats};
use crate::backend::linear::flex_heads::{HeadInputs, multiply_heads};
use crate::backend::traits::{Absorbed, Direction, HeadRows, KvBufferPrimitive};
use crate::formats::Matrix;
use crate::memory::{Mat, MatMut, with_scratch};
use crate::ops::attention::decode::{self, DecodeQueries};
use crate::settings::Compute;

/// q `[1, seq, heads, dim]` and latents `[kv_seq, 1, rank + rope]` → `[1, seq, heads, v_dim]`.
pub(crate) fn absorbed_attention(
    q: FlexTensor,
    latents: KvBufferPrimitive<Flex>,
    w: Arc<Matrix>,
    absorbed: Absorbed,
    compute: Compute,
) -> FlexTensor {
    let (q, latents) = (Floats::new(&q), RowValues::new(&latents));
    let ([_, seq, heads, dim], rank) = (q.dims(), w.cols());
    let Absorbed { nope, v_dim, scale } = absorbed;
    let width = rank + dim - nope;
    let part = |start, len, direction| HeadRows {
        heads,
        start,
        len,
        direction,
    };
    let context = with_scratch(seq * heads * width, |queries| {
        let rotated = queries.chunks_mut(width).zip(q.chunks(dim));
        rotated.for_each(|(query, q)| query[rank..].copy_from_slice(&q[nope..]));
        let keys = HeadInputs {
            values: &q,
            heads,
            width: nope,
            stride: dim,
        };
        let all = MatMut::dense(queries, seq, heads * width);
        let rows = part(0, nope, Direction::Transposed);
        multiply_heads(keys, &w, rows, compute, &all);

        decode::forward(DecodeQueries {
            queries: Mat::dense(queries, seq * heads, width),
            seq,
            keys: latents.rows(),
            values: None,
            v_dim: rank,
            scale,
        })
    });
    let mut out = vec![0.0; seq * heads * v_dim];
    let values = HeadInputs {
        values: &context,
        heads,
        width: rank,
        stride: rank,
    };
    let all = MatMut::dense(&mut out, seq, heads * v_dim);
    let rows = part(nope, v_dim, Direction::Forward);
    multiply_heads(values, &w, rows, compute, &all);
    floats(out, [1, seq, heads, v_dim])
}
