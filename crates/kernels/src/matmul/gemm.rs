//! The serial product of two views: in f32, or with operands rounded to bf16.

use super::block_product::{Right, multiplies_pairs, product, product_bf16};
use crate::memory::{Mat, MatMut, with_scratch};
use crate::settings::Accumulate;
use crate::simd::round_to_bf16;
use crate::threads::tiles;

/// `dst = scale · a · b`, or `dst += scale · a · b`; serial.
///
/// # Panics
/// If the sizes do not fit.
pub(crate) fn gemm(dst: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, scale: f32, accumulate: Accumulate) {
    let (m, n, k) = (dst.rows(), dst.cols(), a.cols());
    assert!(
        a.rows() == m && b.rows() == k && b.cols() == n,
        "[{m}, {n}] = [{}, {k}] · [{}, {}]",
        a.rows(),
        b.rows(),
        b.cols()
    );
    if m == 0 || n == 0 {
        return;
    }
    if k > 0 && n <= NARROW && a.strides()[0] == 1 {
        narrow(dst, a, b, scale, accumulate);
    } else if k > 0 {
        product(&dst, a, b, scale, accumulate);
    } else if accumulate == Accumulate::Replace {
        let mut dst = dst;
        (0..m).for_each(|row| dst.row(row).fill(0.0));
    }
}

/// `dst = a · b`, or `dst += a · b`, with operands rounded to bf16; `is_bf16` says that `b` already is. Serial.
///
/// # Panics
/// If the sizes do not fit.
pub(crate) fn gemm_bf16(
    dst: MatMut<'_>,
    a: Mat<'_>,
    b: Mat<'_>,
    is_bf16: bool,
    accumulate: Accumulate,
) {
    assert_eq!(
        [a.rows(), a.cols(), b.cols()],
        [dst.rows(), b.rows(), dst.cols()]
    );
    if a.cols() == 0 || dst.rows() == 0 || dst.cols() == 0 {
        gemm(dst, a, b, 1.0, accumulate);
    } else if multiplies_pairs() {
        product_bf16(&dst, a, Right::Values(b), accumulate);
    } else {
        gemm_rounded(dst, a, b, is_bf16, accumulate);
    }
}

/// [`gemm_bf16`] without instructions for bf16.
fn gemm_rounded(
    mut dst: MatMut<'_>,
    a: Mat<'_>,
    b: Mat<'_>,
    is_bf16: bool,
    accumulate: Accumulate,
) {
    for depth in tiles(0..a.cols(), ROUNDED_DEPTH) {
        let (rows, cols) = (0..dst.rows(), 0..dst.cols());
        let accumulate = accumulate.after(depth.start == 0);
        let b = b.block(depth.clone(), cols.clone());
        with_rounded(a.block(rows.clone(), depth), |a| {
            let dst = dst.block(rows, cols);
            match is_bf16 {
                true => gemm(dst, a, b, 1.0, accumulate),
                false => with_rounded(b, |b| gemm(dst, a, b, 1.0, accumulate)),
            }
        });
    }
}

/// [`gemm_bf16`] with a `b` whose columns are pairs of bf16, `[sum / 2, cols]`, for CPUs that multiply pairs.
///
/// # Panics
/// If the sizes do not fit, or the CPU has no such instructions.
pub(crate) fn gemm_pairs(dst: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, accumulate: Accumulate) {
    assert_eq!(
        [a.rows(), a.cols(), b.cols()],
        [dst.rows(), 2 * b.rows(), dst.cols()]
    );
    if a.cols() == 0 || dst.rows() == 0 || dst.cols() == 0 {
        let nothing = Mat::dense(&[], 0, b.cols());
        return gemm(dst, a.block(0..a.rows(), 0..0), nothing, 1.0, accumulate);
    }
    product_bf16(&dst, a, Right::Pairs(b), accumulate);
}

/// Values along the sum that are rounded at once, without instructions for bf16.
const ROUNDED_DEPTH: usize = 512;

/// Lends a copy of the values, rounded to bf16, as a view of the same shape.
pub(crate) fn with_rounded<R>(values: Mat<'_>, use_them: impl FnOnce(Mat<'_>) -> R) -> R {
    let is_transposed = values.strides()[1] != 1;
    let lines = if is_transposed { values.t() } else { values };
    with_scratch(lines.rows() * lines.cols(), |copy| {
        for (row, copy) in copy.chunks_exact_mut(lines.cols().max(1)).enumerate() {
            copy.copy_from_slice(lines.row(row));
        }
        round_to_bf16(copy);
        let copy = Mat::dense(copy, lines.rows(), lines.cols());
        use_them(if is_transposed { copy.t() } else { copy })
    })
}

/// The widest outputs that are computed transposed, if that reads the left operand in memory order: gradients of
/// low-rank factors. When added, they are rounded once more than wider ones.
const NARROW: usize = 8;

fn narrow(mut dst: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, scale: f32, accumulate: Accumulate) {
    let (m, n) = (dst.rows(), dst.cols());
    with_scratch(m * n, |transposed| {
        let view = MatMut::dense(transposed, n, m);
        product(&view, b.t(), a.t(), scale, Accumulate::Replace);
        for row in 0..m {
            for (col, dst) in dst.row(row).iter_mut().enumerate() {
                let value = transposed[col * m + row];
                *dst = if accumulate == Accumulate::Add {
                    *dst + value
                } else {
                    value
                };
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    #[test]
    fn bf16_is_the_same_with_instructions_for_it_and_without() {
        let (m, n, k) = (20, 30, 1100);
        let (a, b) = (noise(m * k, 1), noise(k * n, 2));
        for (a, b) in [
            (Mat::dense(&a, m, k), Mat::dense(&b, n, k).t()),
            (Mat::dense(&a, k, m).t(), Mat::dense(&b, k, n)),
        ] {
            for accumulate in [Accumulate::Replace, Accumulate::Add] {
                let product = |gemm: &dyn Fn(MatMut<'_>, Mat<'_>, Mat<'_>, Accumulate)| {
                    let mut dst = vec![1.0; m * n];
                    gemm(MatMut::dense(&mut dst, m, n), a, b, accumulate);
                    dst
                };
                let plain =
                    product(&|dst, a, b, accumulate| gemm_rounded(dst, a, b, false, accumulate));
                let found =
                    product(&|dst, a, b, accumulate| gemm_bf16(dst, a, b, false, accumulate));
                let same = product(&|dst, a, b, accumulate| {
                    with_rounded(b, |b| gemm_rounded(dst, a, b, true, accumulate));
                });
                assert_eq!(same, plain);
                for (found, expected) in found.iter().zip(&plain) {
                    assert!((found - expected).abs() < 2e-4, "{found} {expected}");
                }
                let exact = product(&|dst, a, b, accumulate| gemm(dst, a, b, 1.0, accumulate));
                let parts = exact.iter().zip(&plain);
                assert!(parts.filter(|(a, b)| (**a - **b).abs() > 1e-3).count() > m * n / 2);
            }
        }
    }

    #[test]
    fn blocks_and_transposes_multiply_as_written_out() {
        let (a, b) = (noise(7 * 9, 1), noise(9 * 8, 2));
        let (a_part, b_part) = (
            Mat::dense(&a, 7, 9).block(1..6, 2..8),
            Mat::dense(&b, 9, 8).block(0..6, 3..7),
        );
        for accumulate in [Accumulate::Replace, Accumulate::Add] {
            let mut dst = vec![1.0; 5 * 6];
            gemm(
                MatMut::new(&mut dst, 5, 4, 6),
                a_part,
                b_part,
                2.0,
                accumulate,
            );
            let mut transposed = vec![1.0; 4 * 5];
            gemm(
                MatMut::dense(&mut transposed, 4, 5),
                b_part.t(),
                a_part.t(),
                2.0,
                accumulate,
            );
            for (i, j) in (0..5).flat_map(|i| (0..4).map(move |j| (i, j))) {
                let sum: f32 = (0..6)
                    .map(|l| a[(1 + i) * 9 + 2 + l] * b[l * 8 + 3 + j])
                    .sum();
                let expected = 2.0 * sum
                    + if accumulate == Accumulate::Add {
                        1.0
                    } else {
                        0.0
                    };
                assert!((dst[i * 6 + j] - expected).abs() < 1e-5);
                assert!((transposed[j * 5 + i] - expected).abs() < 1e-5);
            }
            assert_eq!(dst[4], 1.0, "values between the rows of a view stay");
        }
    }
}
