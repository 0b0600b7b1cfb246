//! Products of each head with its own rows of one weight, on the CPU backend.

use std::ops::Range;
use std::sync::Arc;

use burn_flex::FlexTensor;

use crate::backend::flex::values::{Floats, floats};
use crate::backend::traits::{Direction, HeadRows};
use crate::formats::Matrix;
use crate::gemv::{GemvInput, GemvProduct, MAX_GEMV_ROWS, PackedWeight, multiply_all};
use crate::matmul::{self, WeightOperand};
use crate::memory::{Mat, MatMut};
use crate::settings::{Accumulate, Compute, OperandRounding};
use crate::threads::parallel_for;

/// Rows of every token's heads, `[tokens · heads, width]`, `stride` values apart.
#[derive(Clone, Copy)]
pub(crate) struct HeadInputs<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) heads: usize,
    pub(crate) width: usize,
    pub(crate) stride: usize,
}

impl<'a> HeadInputs<'a> {
    /// The rows of one head, `[tokens, width]`.
    fn of_head(&self, head: usize, tokens: usize) -> Mat<'a> {
        let values = &self.values[head * self.stride..];
        Mat::new(values, tokens, self.width, self.heads * self.stride)
    }
}

/// x `[tokens, heads, width]` → `[tokens, heads, out]`.
pub(crate) fn heads_linear(
    x: FlexTensor,
    w: Arc<Matrix>,
    rows: HeadRows,
    compute: Compute,
) -> FlexTensor {
    let x = Floats::new(&x);
    let [tokens, heads, width] = x.dims();
    let out_width = out_width(&w, rows);
    let mut out = vec![0.0; tokens * heads * out_width];
    let x = HeadInputs {
        values: &x,
        heads,
        width,
        stride: width,
    };
    let all = MatMut::dense(&mut out, tokens, heads * out_width);
    multiply_heads(x, &w, rows, compute, &all);
    floats(out, [tokens, heads, out_width])
}

/// Output width of a head.
fn out_width(w: &Matrix, rows: HeadRows) -> usize {
    match rows.direction {
        Direction::Forward => rows.len,
        Direction::Transposed => w.cols(),
    }
}

/// Writes each head's product to the start of its columns of `all`, `[tokens, heads · any width]`.
pub(crate) fn multiply_heads(
    x: HeadInputs<'_>,
    w: &Matrix,
    rows: HeadRows,
    compute: Compute,
    all: &MatMut<'_>,
) {
    let (tokens, heads, out_width) = (all.rows(), x.heads, out_width(w, rows));
    let stride = all.cols() / heads.max(1);
    let cols = |head: usize| head * stride..head * stride + out_width;
    let is_few = tokens <= MAX_GEMV_ROWS;
    let stored: Option<Vec<Matrix>> = is_few
        .then(|| (0..heads).map(|head| stored_part(w, head, rows)).collect())
        .flatten();
    let packed: Option<Vec<PackedWeight<'_>>> = stored.as_ref().and_then(|stored| {
        let packed = |w| PackedWeight::new(w, compute.for_weight(w));
        stored.iter().map(packed).collect()
    });
    match packed {
        Some(packed) => multiply_rows(x, &packed, all, cols),
        None => parallel_for(heads, |head| {
            // SAFETY: tasks write different columns.
            #[expect(unsafe_code, reason = "disjoint columns of one output")]
            let out = unsafe { all.part(0..tokens, cols(head)) };
            multiply(x.of_head(head, tokens), w, rows, compute, head, out);
        }),
    }
}

/// A head's part of the weight, if it is stored in the direction in which the product reads it.
fn stored_part(w: &Matrix, head: usize, rows: HeadRows) -> Option<Matrix> {
    let Some(halves) = w.split_kv_b() else {
        let start = head * (w.rows() / rows.heads) + rows.start;
        let is_forward = rows.direction == Direction::Forward;
        return is_forward.then(|| w.row_range(start..start + rows.len));
    };
    let [nope, v] = halves.widths();
    match (rows.start, rows.len, rows.direction) {
        (0, len, Direction::Transposed) if len == nope => Some(halves.keys(head)),
        (start, len, Direction::Forward) if (start, len) == (nope, v) => Some(halves.values(head)),
        _ => None,
    }
}

/// The product of all heads for a few tokens, which reads the stored bytes.
fn multiply_rows(
    x: HeadInputs<'_>,
    packed: &[PackedWeight<'_>],
    all: &MatMut<'_>,
    cols: impl Fn(usize) -> Range<usize>,
) {
    let (tokens, heads) = (all.rows(), x.heads);
    let values = Mat::new(x.values, tokens * heads, x.width, x.stride);
    let input = GemvInput::new(values, packed);
    let rows_of = |head: usize| (0..tokens).map(move |token| token * heads + head);
    let rows: Vec<Vec<usize>> = (0..heads).map(|head| rows_of(head).collect()).collect();
    let products = packed.iter().zip(&rows).enumerate();
    let products = products.map(|(head, (weight, rows))| GemvProduct {
        weight: *weight,
        input: &input,
        rows,
        // SAFETY: heads are different columns.
        #[expect(unsafe_code, reason = "disjoint columns of one output")]
        y: unsafe { all.part(0..tokens, cols(head)) },
        accumulate: Accumulate::Replace,
    });
    multiply_all(&products.collect::<Vec<_>>(), |_, _, _| ());
}

/// The product of one head.
fn multiply(
    x: Mat<'_>,
    w: &Matrix,
    rows: HeadRows,
    compute: Compute,
    head: usize,
    out: MatMut<'_>,
) {
    // `x` is not rounded here, so only products that round their operands themselves keep `compute`.
    let compute = match compute.rounding_before_product() {
        OperandRounding::F32 => compute,
        _ => Compute::F32,
    };
    if let Some(stored) = stored_part(w, head, rows) {
        let weights = WeightOperand::frozen(&stored, compute);
        return matmul::nt(x, weights, out, Accumulate::Replace);
    }
    let start = head * (w.rows() / rows.heads) + rows.start;
    let part = w.row_range(start..start + rows.len);
    let part = WeightOperand::frozen(&part, compute);
    match rows.direction {
        Direction::Forward => matmul::nt(x, part, out, Accumulate::Replace),
        Direction::Transposed => matmul::nn(x, part, out, Accumulate::Replace),
    }
}
