//! The products of a linear layer, over weights in any stored form, on all threads.
//!
//! There are three: `y = x · wᵀ` ([`nt`]), `dx = dy · w` ([`nn`]) and `dw = dyᵀ · x` ([`tn`]). The first two take the
//! weight as a [`WeightOperand`], which is read in place or decoded and rounded tile by tile into scratch of the size
//! of the second-level cache, so no converted copy of a weight ever exists. [`plan`] decides how each is made.
//!
//! Each row of a product over few rows has the bits it has alone, up to [`MAX_GEMV_ROWS`](crate::gemv::MAX_GEMV_ROWS)
//! rows.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::blocked::{for_each_task, nn_serial, nt_serial};
use super::gemm::with_rounded;
use super::operand::{LayerPass, TILE, WeightOperand};
use super::plan::{ProductPlan, plan};
use crate::gemv::{self, GemvInput, GemvProduct, PackedWeight};
use crate::memory::{Mat, MatMut, with_scratch};
use crate::settings::{Accumulate, Compute};
use crate::simd::axpy;
use crate::threads::Pieces;

/// Outputs per task of a product with few rows.
const FEW_ROWS_TASK: usize = 64;

/// A new matrix that a product fills: it is not cleared before.
#[expect(
    unsafe_code,
    reason = "the length of a vector whose values were just written"
)]
fn replaced([rows, cols]: [usize; 2], product: impl FnOnce(MatMut<'_>)) -> Vec<f32> {
    let mut values = Vec::with_capacity(rows * cols);
    let spare = &mut values.spare_capacity_mut()[..rows * cols];
    if cfg!(test) {
        spare.fill(MaybeUninit::new(f32::NAN));
    }
    product(MatMut::unwritten(spare, rows, cols));
    // SAFETY: the products of this file write every value when they replace what is there.
    unsafe { values.set_len(rows * cols) };
    values
}

/// [`nt_sum`] as new values.
pub(crate) fn new_nt(terms: &[Term<'_>]) -> Vec<f32> {
    let size = [terms[0].0.rows(), terms[0].1.out_width()];
    replaced(size, |y| nt_sum(terms, y, Accumulate::Replace))
}

/// Two products of the same rows as new values, in one parallel loop; `None` if a weight's stored bytes are not
/// multiplied.
pub(crate) fn new_nt_pair<'a>(
    x: Mat<'_>,
    weights: [WeightOperand<'a>; 2],
) -> Option<[Vec<f32>; 2]> {
    let packed = |w: WeightOperand<'a>| plan(&w, x.rows(), LayerPass::Forward).packed();
    let packed = [packed(weights[0])?, packed(weights[1])?];
    let (input, rows) = (
        GemvInput::new(x, &packed),
        (0..x.rows()).collect::<Vec<_>>(),
    );
    let mut values = weights.map(|w| vec![0.0; x.rows() * w.out_width()]);
    let outputs = values.each_mut().into_iter().zip(weights);
    let products = packed
        .into_iter()
        .zip(outputs)
        .map(|(weight, (values, w))| GemvProduct {
            weight,
            input: &input,
            rows: &rows,
            y: MatMut::dense(values, x.rows(), w.out_width()),
            accumulate: Accumulate::Replace,
        });
    gemv::multiply_all(&products.collect::<Vec<_>>(), |_, _, _| ());
    Some(values)
}

/// [`nn_sum`] as new values.
pub(crate) fn new_nn(terms: &[Term<'_>]) -> Vec<f32> {
    let size = [terms[0].0.rows(), terms[0].1.in_width()];
    replaced(size, |dx| nn_sum(terms, dx, Accumulate::Replace))
}

/// [`tn`] as new values.
pub(crate) fn new_tn(dy: Mat<'_>, x: Mat<'_>, compute: Compute) -> Vec<f32> {
    replaced([dy.cols(), x.cols()], |dw| tn(dy, x, dw, compute))
}

/// One product of a sum: rows of activations and their weight.
pub(crate) type Term<'a> = (Mat<'a>, WeightOperand<'a>);

/// `y = x · wᵀ`: x `[rows, in]`, w `[out, in]`, y `[rows, out]`.
pub(crate) fn nt(x: Mat<'_>, w: WeightOperand<'_>, y: MatMut<'_>, accumulate: Accumulate) {
    nt_sum(&[(x, w)], y, accumulate);
}

/// `y = Σ x · wᵀ`, each as in [`nt`].
pub(crate) fn nt_sum(terms: &[Term<'_>], y: MatMut<'_>, accumulate: Accumulate) {
    for (x, w) in terms {
        assert_eq!(x.cols(), w.in_width(), "the input width of the weight");
    }
    let is_int8 = |(x, w): &Term<'_>| {
        let plan = plan(w, x.rows(), LayerPass::Forward);
        matches!(plan, ProductPlan::Int8Gemm(_))
    };
    if terms.iter().any(is_int8) {
        return nt_int8(terms, y, accumulate);
    }
    add_up(
        terms,
        LayerPass::Forward,
        y,
        accumulate,
        nt_few_rows,
        nt_serial,
    );
}

/// Computes a sum of products: row by row if every term goes so, else in tasks that compute all terms of a block.
fn add_up(
    terms: &[Term<'_>],
    pass: LayerPass,
    mut sum: MatMut<'_>,
    accumulate: Accumulate,
    few_rows: impl Fn(Mat<'_>, WeightOperand<'_>, MatMut<'_>, Accumulate),
    serial: impl Fn(Mat<'_>, WeightOperand<'_>, Range<usize>, MatMut<'_>, Accumulate) + Sync,
) {
    let size = [sum.rows(), sum.cols()];
    let is_by_rows = |(x, w): &Term<'_>| plan(w, x.rows(), pass).is_by_rows();
    if terms.iter().all(is_by_rows) {
        for (i, (x, w)) in terms.iter().enumerate() {
            let sum = sum.block(0..size[0], 0..size[1]);
            few_rows(*x, *w, sum, accumulate.after(i == 0));
        }
        return;
    }
    let grain = terms.iter().map(|(_, w)| w.grain(pass)).max();
    for_each_task(size, grain.unwrap_or(1), |rows, cols| {
        // SAFETY: tasks write different blocks.
        #[expect(unsafe_code, reason = "disjoint blocks of one output")]
        let mut sum = unsafe { sum.part(rows.clone(), cols.clone()) };
        for (i, (x, w)) in terms.iter().enumerate() {
            let sum = sum.block(0..rows.len(), 0..cols.len());
            let x = x.block(rows.clone(), 0..x.cols());
            serial(x, *w, cols.clone(), sum, accumulate.after(i == 0));
        }
    });
}

/// [`nt_sum`] if some terms have activations in int8. Each term is computed alone, so its activations are quantized
/// once.
fn nt_int8(terms: &[Term<'_>], mut y: MatMut<'_>, accumulate: Accumulate) {
    let size = [y.rows(), y.cols()];
    for (i, (x, w)) in terms.iter().enumerate() {
        let (y, accumulate) = (y.block(0..size[0], 0..size[1]), accumulate.after(i == 0));
        match plan(w, x.rows(), LayerPass::Forward) {
            ProductPlan::Int8Gemm(packed) => multiply_rows(*x, packed, y, accumulate),
            _ => nt(*x, *w, y, accumulate),
        }
    }
}

fn nt_few_rows(x: Mat<'_>, w: WeightOperand<'_>, y: MatMut<'_>, accumulate: Accumulate) {
    match plan(&w, x.rows(), LayerPass::Forward) {
        ProductPlan::Gemv(packed) => multiply_rows(x, packed, y, accumulate),
        ProductPlan::Bf16Rows => with_rounded(x, |x| dot_rows(x, w, &y, accumulate)),
        _ => dot_rows(x, w, &y, accumulate),
    }
}

/// A product as one dot product per output.
fn dot_rows(x: Mat<'_>, w: WeightOperand<'_>, y: &MatMut<'_>, accumulate: Accumulate) {
    Pieces::new(y.cols(), FEW_ROWS_TASK).spin_for(|outs| {
        // SAFETY: tasks write different columns.
        #[expect(unsafe_code, reason = "disjoint columns of one output")]
        let mut y = unsafe { y.part(0..x.rows(), outs.clone()) };
        for (col, out) in outs.enumerate() {
            for row in 0..x.rows() {
                let sum = w.dot(out, x.row(row));
                let y = &mut y.row(row)[col];
                *y = if accumulate == Accumulate::Add {
                    *y + sum
                } else {
                    sum
                };
            }
        }
    });
}

/// [`nt`] with the stored bytes of the weight.
fn multiply_rows(x: Mat<'_>, weight: PackedWeight<'_>, y: MatMut<'_>, accumulate: Accumulate) {
    let (input, rows) = (
        GemvInput::new(x, [&weight]),
        (0..x.rows()).collect::<Vec<_>>(),
    );
    gemv::multiply(GemvProduct {
        weight,
        input: &input,
        rows: &rows,
        y,
        accumulate,
    });
}

/// `dx = dy · w`: dy `[rows, out]`, w `[out, in]`, dx `[rows, in]`.
pub(crate) fn nn(dy: Mat<'_>, w: WeightOperand<'_>, dx: MatMut<'_>, accumulate: Accumulate) {
    nn_sum(&[(dy, w)], dx, accumulate);
}

/// `dx = Σ dy · w`, each as in [`nn`].
pub(crate) fn nn_sum(terms: &[Term<'_>], dx: MatMut<'_>, accumulate: Accumulate) {
    for (dy, w) in terms {
        assert_eq!(dy.cols(), w.out_width(), "the output width of the weight");
    }
    add_up(
        terms,
        LayerPass::Backward,
        dx,
        accumulate,
        nn_few_rows,
        |dy, w, ins, dx, accumulate| {
            nn_serial(dy, w, 0..dy.cols(), ins, dx, accumulate);
        },
    );
}

fn nn_few_rows(dy: Mat<'_>, w: WeightOperand<'_>, dx: MatMut<'_>, accumulate: Accumulate) {
    match plan(&w, dy.rows(), LayerPass::Backward) {
        ProductPlan::Bf16Rows => with_rounded(dy, |dy| add_rows(dy, w, &dx, accumulate)),
        _ => add_rows(dy, w, &dx, accumulate),
    }
}

/// A product that adds up the rows of the weight.
fn add_rows(dy: Mat<'_>, w: WeightOperand<'_>, dx: &MatMut<'_>, accumulate: Accumulate) {
    Pieces::new(dx.cols(), TILE).spin_for(|ins| {
        // SAFETY: tasks write different columns.
        #[expect(unsafe_code, reason = "disjoint columns of one output")]
        let mut dx = unsafe { dx.part(0..dy.rows(), ins.clone()) };
        if accumulate == Accumulate::Replace {
            (0..dy.rows()).for_each(|row| dx.row(row).fill(0.0));
        }
        with_scratch(ins.len(), |line| {
            for out in 0..dy.cols() {
                w.read(out..out + 1, ins.clone(), line);
                (0..dy.rows()).for_each(|row| axpy(dy.row(row)[out], line, dx.row(row)));
            }
        });
    });
}

/// `dw = dyᵀ · x`: dy `[rows, out]`, x `[rows, in]`, dw `[out, in]`.
pub(crate) fn tn(dy: Mat<'_>, x: Mat<'_>, dw: MatMut<'_>, compute: Compute) {
    for_each_task([dy.cols(), x.cols()], 16, |outs, ins| {
        // SAFETY: tasks write different blocks.
        #[expect(unsafe_code, reason = "disjoint blocks of one output")]
        let dw = unsafe { dw.part(outs.clone(), ins.clone()) };
        let (dy, x) = (dy.block(0..dy.rows(), outs).t(), x.block(0..x.rows(), ins));
        compute.multiply(dw, dy, x, Accumulate::Replace);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::{Format, Matrix};
    use crate::gemv::MAX_GEMV_ROWS;
    use crate::simd::round_to_bf16;
    use crate::testing::{every_format, noise};

    /// f32 sums of up to 600 products below 1, in another order.
    const TOLERANCE: f64 = 2e-4;

    fn close(found: &[f32], expected: impl Iterator<Item = f64>, what: &str) {
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert!(
                (f64::from(*found) - expected).abs() < TOLERANCE,
                "{what} at {i}: {found} {expected}"
            );
        }
    }

    /// Sum of `a(l) · b(l)` in f64.
    fn sum(len: usize, a: impl Fn(usize) -> f32, b: impl Fn(usize) -> f32) -> f64 {
        (0..len).map(|l| f64::from(a(l)) * f64::from(b(l))).sum()
    }

    #[test]
    #[expect(
        clippy::too_many_lines,
        reason = "three products over one grid of shapes"
    )]
    fn products_agree_with_sums_written_out_in_every_format() {
        // Rows around `MAX_GEMV_ROWS`, widths around the tile, the task and nothing at all.
        for (rows, out, inner) in [
            (1, 5, 7),
            (8, 70, 33),
            (9, 257, 300),
            (40, 513, 259),
            (3, 300, 520),
            (530, 17, 16),
        ] {
            for w in every_format(out, inner, 7) {
                let what = format!("{rows} × {out} × {inner} {}", w.format().name());
                let (x, dy, dense) = (noise(rows * inner, 1), noise(rows * out, 2), w.to_f32());
                let weights = WeightOperand::frozen(&w, Compute::F32);
                let mut y = vec![0.0; rows * out];
                nt(
                    Mat::dense(&x, rows, inner),
                    weights,
                    MatMut::dense(&mut y, rows, out),
                    Accumulate::Replace,
                );
                close(
                    &y,
                    (0..rows * out).map(|i| {
                        sum(
                            inner,
                            |l| x[i / out * inner + l],
                            |l| dense[i % out * inner + l],
                        )
                    }),
                    &what,
                );
                let mut dx = vec![1.0; rows * inner];
                nn(
                    Mat::dense(&dy, rows, out),
                    weights,
                    MatMut::dense(&mut dx, rows, inner),
                    Accumulate::Add,
                );
                close(
                    &dx,
                    (0..rows * inner).map(|i| {
                        1.0 + sum(
                            out,
                            |l| dy[i / inner * out + l],
                            |l| dense[l * inner + i % inner],
                        )
                    }),
                    &what,
                );
            }
            let (x, dy) = (noise(rows * inner, 1), noise(rows * out, 2));
            let mut dw = vec![0.0; out * inner];
            tn(
                Mat::dense(&dy, rows, out),
                Mat::dense(&x, rows, inner),
                MatMut::dense(&mut dw, out, inner),
                Compute::F32,
            );
            close(
                &dw,
                (0..out * inner).map(|i| {
                    sum(
                        rows,
                        |l| dy[l * out + i / inner],
                        |l| x[l * inner + i % inner],
                    )
                }),
                "dw",
            );
        }
    }

    #[test]
    fn sums_of_products_write_every_value_of_new_memory() {
        // Few rows, an empty sum, more columns than a task has, and more rows.
        for (rows, out, inner, rank) in [(3, 70, 40, 2), (20, 300, 0, 3), (1100, 140, 9, 0)] {
            let (x, u, dy) = (
                noise(rows * inner, 1),
                noise(rows * rank, 2),
                noise(rows * out, 3),
            );
            let (w, b) = (noise(out * inner, 4), noise(out * rank, 5));
            let mats = (Mat::dense(&x, rows, inner), Mat::dense(&u, rows, rank));
            let weights = |values, cols| WeightOperand::trained(values, cols, Compute::F32);
            let found = match (inner, rank) {
                (0, _) => new_nt(&[(mats.1, weights(&b, rank))]),
                (_, 0) => new_nt(&[(mats.0, weights(&w, inner))]),
                _ => new_nt(&[(mats.0, weights(&w, inner)), (mats.1, weights(&b, rank))]),
            };
            let expected = (0..rows * out).map(|i| {
                let (row, col) = (i / out, i % out);
                sum(inner, |l| x[row * inner + l], |l| w[col * inner + l])
                    + sum(rank, |l| u[row * rank + l], |l| b[col * rank + l])
            });
            close(&found, expected, "y");
            let dy = Mat::dense(&dy, rows, out);
            let dw = new_tn(dy, mats.0, Compute::F32);
            let expected = (0..out * inner)
                .map(|i| sum(rows, |l| dy.row(l)[i / inner], |l| x[l * inner + i % inner]));
            close(&dw, expected, "dw");
            if inner > 0 {
                let dx = new_nn(&[(dy, weights(&w, inner))]);
                let expected = (0..rows * inner)
                    .map(|i| sum(out, |l| dy.row(i / inner)[l], |l| w[l * inner + i % inner]));
                close(&dx, expected, "dx");
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_rows_beside_it() {
        for w in every_format(100, 300, 3) {
            let x = noise(MAX_GEMV_ROWS * 300, 4);
            let product = |rows: usize| {
                let mut y = vec![0.0; rows * 100];
                nt(
                    Mat::dense(&x, rows, 300),
                    WeightOperand::frozen(&w, Compute::F32),
                    MatMut::dense(&mut y, rows, 100),
                    Accumulate::Replace,
                );
                y
            };
            let all = product(MAX_GEMV_ROWS);
            (1..MAX_GEMV_ROWS).for_each(|rows| assert_eq!(product(rows), all[..rows * 100]));
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let (rows, out, inner) = (700, 600, 530);
        let (w, x) = (
            every_format(out, inner, 5).remove(1),
            noise(rows * inner, 6),
        );
        let product = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let mut y = vec![0.0; rows * out];
            pool.install(|| {
                nt(
                    Mat::dense(&x, rows, inner),
                    WeightOperand::frozen(&w, Compute::F32),
                    MatMut::dense(&mut y, rows, out),
                    Accumulate::Replace,
                )
            });
            y
        };
        assert_eq!(product(1), product(4));
    }

    #[test]
    fn bf16_products_round_both_operands() {
        let (w, x) = (
            Matrix::from_f32(20, 64, &noise(20 * 64, 1)),
            noise(10 * 64, 2),
        );
        let mut rounded_x = x;
        round_to_bf16(&mut rounded_x);
        let mut rounded_w = w.to_f32();
        round_to_bf16(&mut rounded_w);
        let mut y = vec![0.0; 200];
        nt(
            Mat::dense(&rounded_x, 10, 64),
            WeightOperand::frozen(&w, Compute::Bf16),
            MatMut::dense(&mut y, 10, 20),
            Accumulate::Replace,
        );
        close(
            &y,
            (0..200).map(|i| {
                sum(
                    64,
                    |l| rounded_x[i / 20 * 64 + l],
                    |l| rounded_w[i % 20 * 64 + l],
                )
            }),
            "bf16",
        );
    }

    /// A bf16 weight, its bytes `moved` from where a word could begin.
    fn bf16_weight(rows: usize, cols: usize, moved: usize) -> Matrix {
        let values = noise(rows * cols, 7);
        let mut bytes = vec![0; 4 + moved + 2 * values.len()];
        let start = bytes.as_ptr().align_offset(4) + moved;
        for (to, value) in bytes[start..].chunks_exact_mut(2).zip(&values) {
            to.copy_from_slice(&half::bf16::from_f32(*value).to_le_bytes());
        }
        let bytes = bytes::Bytes::from(bytes).slice(start..start + 2 * values.len());
        Matrix::dense(rows, cols, Format::Bf16, bytes).unwrap()
    }

    #[test]
    fn bf16_weights_are_multiplied_as_they_lie_wherever_that_is() {
        for (rows, inner) in [(9, 64), (40, 1062), (40, 1061)] {
            let out = 300;
            let mut x = noise(rows * inner, 1);
            let product = |w: &Matrix, x: &[f32]| {
                let mut y = vec![f32::NAN; rows * w.rows()];
                nt(
                    Mat::dense(x, rows, inner),
                    WeightOperand::frozen(w, Compute::MatchWeight),
                    MatMut::dense(&mut y, rows, w.rows()),
                    Accumulate::Replace,
                );
                y
            };
            let weights = [0, 2].map(|moved| bf16_weight(out, inner, moved));
            let found = weights.each_ref().map(|w| product(w, &x));
            assert_eq!(found[0], found[1], "{inner}");
            let part = product(&weights[0].row_range(1..270), &x);
            let expected = found[0].chunks(out).flat_map(|row| &row[1..270]);
            assert!(part.iter().eq(expected), "{inner}");

            round_to_bf16(&mut x);
            assert_eq!(product(&weights[0], &x), found[0], "x is rounded");
            let dense = weights[0].to_f32();
            let sums = (0..rows * out).map(|i| {
                let (x, w) = (&x[i / out * inner..], &dense[i % out * inner..]);
                sum(inner, |l| x[l], |l| w[l])
            });
            close(&found[0], sums, "bf16");
        }
    }
}
