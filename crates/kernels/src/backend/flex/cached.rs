//! Rows that are held, as the kernels read them.

use std::ops::Range;

use burn::backend::Flex;
use burn::tensor::{Bytes, DType};
use burn_flex::{FlexTensor, Layout};
use rayon::prelude::*;

use super::values::{Floats, floats};
use crate::backend::cached::KvBufferPrimitive;
use crate::formats::{CacheType, decode_q8_rows, encode_q8_rows};
use crate::memory::{Mat, zeros};
use crate::ops::attention::KvRows;
use crate::ops::attention::decode::{self, DecodeQueries};

/// Rows that are worth a task where many are rounded or decoded.
const TASK_ROWS: usize = 64;

/// Rows `[len, heads, width]`.
pub(super) struct RowValues {
    tensor: FlexTensor,
    /// Elements of the storage.
    range: Range<usize>,
    width: usize,
}

impl RowValues {
    pub(super) fn new(rows: &KvBufferPrimitive<Flex>) -> Self {
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

    pub(super) fn rows(&self) -> KvRows<'_> {
        let ([len, heads, _], dtype) = (dims(&self.tensor), self.tensor.dtype());
        let form = match dtype {
            DType::F32 => CacheType::F32,
            DType::F16 => CacheType::F16,
            DType::BF16 => CacheType::Bf16,
            DType::U8 => CacheType::Q8_0,
            other => panic!("a cache holds f32, f16, bf16 or bytes, not {other:?}"),
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

/// x `[len, heads, width]` → bytes of blocks `[len, heads, row_bytes]`.
pub(super) fn encode(x: &Floats) -> FlexTensor {
    let [len, heads, width] = x.dims();
    let row_bytes = CacheType::Q8_0.row_bytes(width);
    let mut bytes = vec![0u8; len * heads * row_bytes];
    if len * heads <= TASK_ROWS {
        encode_q8_rows(x, width, &mut bytes);
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
pub(super) fn decode(rows: &RowValues) -> FlexTensor {
    let rows = rows.rows();
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

/// q `[1, seq, heads, dim]` → `[1, seq, heads, v_dim]`, of a few queries.
pub(super) fn attend(
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
