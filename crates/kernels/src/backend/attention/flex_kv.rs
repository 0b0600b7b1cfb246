//! The rows of a KV buffer on the CPU backend, and attention over them.

use std::ops::Range;

use burn::backend::Flex;
use burn::tensor::{Bytes, DType};
use burn_flex::{FlexTensor, Layout};
use rayon::prelude::*;

use crate::backend::flex::values::{Floats, floats};
use crate::backend::traits::KvBufferPrimitive;
use crate::formats::{CacheType, decode_q8_rows, encode_q8_rows};
use crate::memory::{Mat, zeros};
use crate::ops::attention::KvRows;
use crate::ops::attention::decode::{self, DecodeQueries};

pub(crate) fn cached_attention(
    q: FlexTensor,
    k: KvBufferPrimitive<Flex>,
    v: KvBufferPrimitive<Flex>,
    scale: f32,
) -> FlexTensor {
    let [k, v] = [&k, &v].map(RowValues::new);
    let v_dim = v.rows().width;
    attend(&Floats::new(&q), &k, Some(&v), v_dim, scale)
}

pub(crate) fn latent_attention(
    q: FlexTensor,
    latents: KvBufferPrimitive<Flex>,
    v_dim: usize,
    scale: f32,
) -> FlexTensor {
    let latents = RowValues::new(&latents);
    attend(&Floats::new(&q), &latents, None, v_dim, scale)
}

/// q `[1, seq, heads, dim]` → `[1, seq, heads, v_dim]`, for at most 8 queries.
fn attend(
    q: &Floats,
    keys: &RowValues,
    values: Option<&RowValues>,
    v_dim: usize,
    scale: f32,
) -> FlexTensor {
    let [_, seq, heads, dim] = q.dims();
    let out = decode::forward(DecodeQueries {
        queries: Mat::dense(q, seq * heads, dim),
        seq,
        keys: keys.rows(),
        values: values.map(RowValues::rows),
        v_dim,
        scale,
    });
    floats(out, [1, seq, heads, v_dim])
}

/// x `[len, heads, width]` → bytes of blocks `[len, heads, row_bytes]`.
pub(crate) fn encode_blocks(x: FlexTensor) -> FlexTensor {
    let x = Floats::new(&x);
    let [len, heads, width] = x.dims();
    let row_bytes = CacheType::Q8_0.row_bytes(width);
    let mut bytes = vec![0u8; len * heads * row_bytes];
    if len * heads <= TASK_ROWS {
        encode_q8_rows(&x, width, &mut bytes);
    } else {
        let tasks = bytes.par_chunks_mut((TASK_ROWS * row_bytes).max(1));
        tasks
            .zip(x.par_chunks((TASK_ROWS * width).max(1)))
            .for_each(|(bytes, x)| encode_q8_rows(x, width, bytes));
    }
    let layout = Layout::contiguous([len, heads, row_bytes].into());
    FlexTensor::new(Bytes::from_elems(bytes), layout, DType::U8)
}

/// Bytes of blocks → `[len, heads, width]`.
pub(crate) fn decode_blocks(rows: KvBufferPrimitive<Flex>) -> FlexTensor {
    let values = RowValues::new(&rows);
    let rows = values.rows();
    let KvRows {
        len, heads, width, ..
    } = rows;
    let mut out = zeros(len * heads * width);
    let row_bytes = CacheType::Q8_0.row_bytes(width);
    let tasks = out.par_chunks_mut((TASK_ROWS * width).max(1));
    tasks
        .zip(rows.bytes.par_chunks((TASK_ROWS * row_bytes).max(1)))
        .for_each(|(out, bytes)| decode_q8_rows(bytes, width, out));
    floats(out, [len, heads, width])
}

/// Rows per task when many are rounded or decoded.
const TASK_ROWS: usize = 64;

/// The rows of a KV buffer, `[len, heads, width]`.
pub(crate) struct RowValues {
    tensor: FlexTensor,
    /// Where the rows are in the storage, in elements.
    range: Range<usize>,
    width: usize,
}

impl RowValues {
    pub(crate) fn new(rows: &KvBufferPrimitive<Flex>) -> Self {
        let (tensor, width) = match rows {
            KvBufferPrimitive::Numbers(tensor) => (tensor, None),
            KvBufferPrimitive::Blocks(tensor, width) => (tensor, Some(*width)),
        };
        let tensor = if tensor.is_contiguous() {
            tensor.clone()
        } else {
            tensor.to_contiguous()
        };
        let (start, [_, _, last]) = (tensor.layout().start_offset(), dims(&tensor));
        Self {
            range: start..start + tensor.layout().num_elements(),
            width: width.unwrap_or(last),
            tensor,
        }
    }

    pub(crate) fn rows(&self) -> KvRows<'_> {
        let ([len, heads, _], dtype) = (dims(&self.tensor), self.tensor.dtype());
        let form = match dtype {
            DType::F32 => CacheType::F32,
            DType::F16 => CacheType::F16,
            DType::BF16 => CacheType::Bf16,
            DType::U8 => CacheType::Q8_0,
            other => panic!("a KV buffer holds f32, f16, bf16 or bytes, not {other:?}"),
        };
        let Range { start, end } = self.range;
        KvRows {
            form,
            bytes: &self.tensor.bytes()[start * dtype.size()..end * dtype.size()],
            len,
            heads,
            width: self.width,
        }
    }
}

fn dims(tensor: &FlexTensor) -> [usize; 3] {
    tensor.layout().shape().dims()
}
