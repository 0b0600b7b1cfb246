//! Each head with its own rows of one weight.

use burn_flex::FlexTensor;

use super::values::{Floats, floats};
use crate::backend::linear::{Direction, HeadRows};
use crate::product::gemm::{self, row_tasks, share};
use crate::product::strided::{Mat, MatMut, Write};
use crate::product::team::share_quickly;
use crate::product::weights::Weights;
use crate::rows::{MOST_ROWS, Packed};
use crate::{Compute, Matrix};

/// x `[tokens, heads, width]` → `[tokens, heads, out]`.
pub(super) fn heads_linear(x: &Floats, w: &Matrix, rows: HeadRows, compute: Compute) -> FlexTensor {
    let [tokens, heads, width] = x.dims();
    let out_width = match rows.direction {
        Direction::Forward => rows.len,
        Direction::Transposed => w.cols(),
    };
    let mut out = vec![0.0; tokens * heads * out_width];
    let all = MatMut::dense(&mut out, tokens, heads * out_width);
    let is_few = tokens <= MOST_ROWS;
    let stored: Option<Vec<Matrix>> = is_few
        .then(|| (0..heads).map(|head| stored(w, head, rows)).collect())
        .flatten();
    let packed: Option<Vec<Packed<'_>>> = stored.as_ref().and_then(|stored| {
        let packed = |w| Packed::new(w, compute.over(w));
        stored.iter().map(packed).collect()
    });
    match packed {
        Some(packed) => multiply_rows(x, &packed, &all),
        None => share(heads, |head| {
            let cols = head * out_width..(head + 1) * out_width;
            // SAFETY: tasks write different columns.
            #[expect(unsafe_code, reason = "disjoint columns of one output")]
            let out = unsafe { all.part(0..tokens, cols) };
            let x = Mat::new(&x[head * width..], tokens, width, heads * width);
            multiply(x, w, head, rows, out);
        }),
    }
    floats(out, [tokens, heads, out_width])
}

/// A head's part of the weight, where it is stored the way round that the product reads it.
fn stored(w: &Matrix, head: usize, rows: HeadRows) -> Option<Matrix> {
    let Some(halves) = w.heads() else {
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

/// A few tokens, on the stored bytes.
fn multiply_rows(x: &Floats, packed: &[Packed<'_>], all: &MatMut<'_>) {
    let [tokens, heads, width] = x.dims();
    let Some(first) = packed.first() else { return };
    let input = first.input(Mat::dense(x, tokens * heads, width));
    let out_width = all.cols() / heads;
    let pieces = row_tasks(out_width, first.row_bytes());
    share_quickly(heads * pieces.len(), |task| {
        let (head, outs) = (task / pieces.len(), pieces.get(task % pieces.len()));
        let cols = head * out_width + outs.start..head * out_width + outs.end;
        // SAFETY: tasks write different columns.
        #[expect(unsafe_code, reason = "disjoint columns of one output")]
        let y = unsafe { all.part(0..tokens, cols) };
        let rows: [usize; MOST_ROWS] = std::array::from_fn(|token| token * heads + head);
        packed[head].multiply((&input, &rows[..tokens]), outs, y, Write::Replace);
    });
}

/// One head, in f32.
fn multiply(x: Mat<'_>, w: &Matrix, head: usize, rows: HeadRows, out: MatMut<'_>) {
    if let Some(stored) = stored(w, head, rows) {
        return gemm::nt(
            x,
            Weights::frozen(&stored, Compute::F32),
            out,
            Write::Replace,
        );
    }
    let start = head * (w.rows() / rows.heads) + rows.start;
    let part = w.row_range(start..start + rows.len);
    let part = Weights::frozen(&part, Compute::F32);
    match rows.direction {
        Direction::Forward => gemm::nt(x, part, out, Write::Replace),
        Direction::Transposed => gemm::nn(x, part, out, Write::Replace),
    }
}
