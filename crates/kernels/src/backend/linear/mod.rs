//! Linear layers: products of activations with frozen and trained weights, and with low-rank updates.

pub(crate) mod autodiff;
pub(crate) mod flex;
pub(crate) mod flex_heads;

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::tensor::Tensor;

use crate::backend::factors;
use crate::backend::traits::{Direction, FakeQuantize, HeadRows, Kernels, Update};
use crate::formats::Matrix;
use crate::settings::Compute;

/// `y = x · wᵀ` with a frozen weight.
///
/// # Shapes
/// - `x`: `[tokens, in]`, `w`: `[out, in]`
/// - returns: `[tokens, out]`
///
/// # Panics
/// If the widths do not fit.
pub fn linear_frozen(x: Tensor<2>, w: &Arc<Matrix>, compute: Compute) -> Tensor<2> {
    assert_eq!(x.dims()[1], w.cols(), "input width of the weight");
    Tensor::from_dispatch(Dispatch::linear_frozen(
        x.into_dispatch(),
        Arc::clone(w),
        compute,
    ))
}

/// [`linear_frozen`] with two weights; for few rows, both products run in one parallel part.
///
/// # Shapes
/// - `x`: `[tokens, in]`, weights: `[out, in]` each
/// - returns: `[tokens, out]` each
///
/// # Panics
/// If the widths do not fit.
pub fn linear_frozen_pair(
    x: Tensor<2>,
    [first, second]: [&Arc<Matrix>; 2],
    compute: Compute,
) -> [Tensor<2>; 2] {
    let width = x.dims()[1];
    assert_eq!(
        [first.cols(), second.cols()],
        [width; 2],
        "input widths of the weights"
    );
    let (first, second) = (Arc::clone(first), Arc::clone(second));
    let (first, second) = Dispatch::linear_frozen_pair(x.into_dispatch(), first, second, compute);
    [Tensor::from_dispatch(first), Tensor::from_dispatch(second)]
}

/// `y = x · wᵀ` with a trained weight; `x` is saved for the backward pass in the precision of `saved_as`.
///
/// # Shapes
/// - `x`: `[tokens, in]`, `w`: `[out, in]`
/// - returns: `[tokens, out]`
///
/// # Panics
/// If the widths do not fit.
pub fn linear_trained(
    x: Tensor<2>,
    w: Tensor<2>,
    compute: Compute,
    saved_as: Compute,
) -> Tensor<2> {
    assert_eq!(x.dims()[1], w.dims()[1], "input width of the weight");
    Tensor::from_dispatch(Dispatch::linear_trained(
        x.into_dispatch(),
        w.into_dispatch(),
        compute,
        saved_as,
    ))
}

/// `y = x · wᵀ + scale · (x · aᵀ) · bᵀ` with a frozen weight: [`linear_frozen`], [`linear_trained`] and [`linear_add`]
/// fused, so that `y` and the gradient of `x` are written once.
///
/// # Shapes
/// - `x`: `[tokens, in]`, `w`: `[out, in]`, `a`: `[rank, in]`, `b`: `[out, rank]`
/// - returns: `[tokens, out]`
///
/// # Panics
/// If the sizes do not fit.
pub fn linear_updated(
    x: Tensor<2>,
    w: &Arc<Matrix>,
    [a, b]: [Tensor<2>; 2],
    update: Update,
) -> Tensor<2> {
    assert_eq!(x.dims()[1], w.cols(), "input width of the weight");
    check_factors(w, &a, &b);
    let (y, _low) = Dispatch::linear_updated(
        x.into_dispatch(),
        a.into_dispatch(),
        b.into_dispatch(),
        Arc::clone(w),
        update,
    );
    Tensor::from_dispatch(y)
}

/// `y = x · q(w + scale · b · a)ᵀ`: a frozen weight as a merge would write it, summed and rounded tile by tile.
///
/// The factors' gradients treat rounding as the identity, so they are those of an update that is applied to the
/// activations. The gradient of `x` goes through the rounded weight.
///
/// # Shapes
/// - `x`: `[tokens, in]`, `w`: `[out, in]`, factors `a`: `[rank, in]` and `b`: `[out, rank]`
/// - returns: `[tokens, out]`
///
/// # Panics
/// If the sizes do not fit.
pub fn linear_fake_quantized(
    x: Tensor<2>,
    w: &Arc<Matrix>,
    factors: Option<[Tensor<2>; 2]>,
    merge: FakeQuantize,
    compute: Compute,
) -> Tensor<2> {
    assert_eq!(x.dims()[1], w.cols(), "input width of the weight");
    if let Some([a, b]) = &factors {
        check_factors(w, a, b);
    }
    let x = x.into_dispatch();
    let factors = factors.map(|pair| pair.map(Tensor::into_dispatch));
    let shapes = [[0, w.cols()], [w.rows(), 0]];
    let [a, b] = factors::or_rank_zero::<Dispatch, 2>(factors, shapes, &x);
    Tensor::from_dispatch(Dispatch::linear_fake_quantized(
        x,
        a,
        b,
        Arc::clone(w),
        merge,
        compute,
    ))
}

/// `y + u · bᵀ`, the second half of a low-rank update; in place if no one else holds `y`.
///
/// # Shapes
/// - `y`: `[tokens, out]`, `u`: `[tokens, rank]`, `b`: `[out, rank]`
/// - returns: `[tokens, out]`
///
/// # Panics
/// If the sizes do not fit.
pub fn linear_add(y: Tensor<2>, u: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    assert_eq!(
        (y.dims()[1], u.dims()[1]),
        (b.dims()[0], b.dims()[1]),
        "widths of the factor"
    );
    Tensor::from_dispatch(Dispatch::linear_add(
        y.into_dispatch(),
        u.into_dispatch(),
        b.into_dispatch(),
    ))
}

/// Row norms `‖w_i + scale · b_i · a‖` of a frozen weight with its update, computed tile by tile. Has no gradient.
///
/// # Shapes
/// - `w`: `[out, in]`, `a`: `[rank, in]`, `b`: `[out, rank]`
/// - returns: `[out]`
///
/// # Panics
/// If the sizes do not fit.
pub fn row_norms(w: &Arc<Matrix>, [a, b]: [Tensor<2>; 2], scale: f32) -> Tensor<1> {
    check_factors(w, &a, &b);
    Tensor::from_dispatch(Dispatch::row_norms(
        a.into_dispatch(),
        b.into_dispatch(),
        Arc::clone(w),
        scale,
    ))
}

/// Multiplies each head with its own rows of one frozen weight. Has no gradient: decoding uses it.
///
/// `compute` applies if products round their operands themselves; otherwise they are f32.
///
/// # Shapes
/// - `w`: `[heads · rows_per_head, in]`
/// - `x`: `[tokens, heads, in]` (forward) or `[tokens, heads, rows.len]` (transposed)
/// - returns: `[tokens, heads, rows.len]` (forward) or `[tokens, heads, in]` (transposed)
///
/// # Panics
/// If the sizes do not fit.
pub fn heads_linear(x: Tensor<3>, w: &Arc<Matrix>, rows: HeadRows, compute: Compute) -> Tensor<3> {
    let width = if rows.direction == Direction::Forward {
        w.cols()
    } else {
        rows.len
    };
    assert_eq!(x.dims()[1..], [rows.heads, width], "heads and width");
    Tensor::from_dispatch(Dispatch::heads_linear(
        x.into_dispatch(),
        Arc::clone(w),
        rows,
        compute,
    ))
}

/// Panics if the factors `a [rank, in]` and `b [out, rank]` do not fit the weight.
fn check_factors(w: &Matrix, a: &Tensor<2>, b: &Tensor<2>) {
    let rank = a.dims()[0];
    assert_eq!(a.dims(), [rank, w.cols()], "first factor");
    assert_eq!(b.dims(), [w.rows(), rank], "second factor");
}
