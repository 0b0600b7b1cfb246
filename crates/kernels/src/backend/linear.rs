//! Linear layers as burn sees them: products of activations with frozen and trained weights, and with low-rank updates.

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::tensor::Tensor;

use crate::KvBuffer;
use crate::backend::ops::{Kernels, float};
use crate::formats::{Matrix, Quantizer};
use crate::settings::Compute;

/// Which rows of a weight belong to which head, and in which direction they are multiplied.
///
/// The weight's rows are `heads` equal groups; of each group the rows `start..start + len` take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadRows {
    /// Number of heads.
    pub heads: usize,
    /// First row used within a head's group.
    pub start: usize,
    /// Rows used.
    pub len: usize,
    /// Multiply with the rows as they are, or with their transpose.
    pub direction: Direction,
}

/// Whether a product runs from a weight's input to its output, or back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// `y = x · wᵀ`.
    Forward,
    /// `y = x · w`.
    Transposed,
}

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
    float(Dispatch::linear_frozen(
        x.into_dispatch(),
        Arc::clone(w),
        compute,
    ))
}

/// [`linear_frozen`] with two weights: of few rows both products are made in one parallel part.
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
    [float(first), float(second)]
}

/// `y = x · wᵀ` with a trained weight; `x` waits for the backward pass in the form that `kept` asks for.
///
/// # Shapes
/// - `x`: `[tokens, in]`, `w`: `[out, in]`
/// - returns: `[tokens, out]`
///
/// # Panics
/// If the widths do not fit.
pub fn linear_trained(x: Tensor<2>, w: Tensor<2>, compute: Compute, kept: Compute) -> Tensor<2> {
    assert_eq!(x.dims()[1], w.dims()[1], "input width of the weight");
    float(Dispatch::linear_trained(
        x.into_dispatch(),
        w.into_dispatch(),
        compute,
        kept,
    ))
}

/// A low-rank update that is applied to the activations, and how its layer multiplies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// Multiplier of the update.
    pub scale: f32,
    /// What the product with the weight rounds its operands to; those with the factors are f32.
    pub compute: Compute,
    /// In what form the input waits for the backward pass.
    pub kept: Compute,
}

/// `y = x · wᵀ + scale · (x · aᵀ) · bᵀ` with a frozen weight: what [`linear_frozen`], [`linear_trained`] and
/// [`linear_add`] make together, in one visit of `y` and of the gradient of `x`.
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
    float(y)
}

/// How a low-rank update becomes part of its weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FakeQuantize {
    /// Multiplier of the update.
    pub scale: f32,
    /// What the sum is rounded to.
    pub quantizer: Quantizer,
}

/// `y = x · q(w + scale · b · a)ᵀ`: a frozen weight as a merge would write it, formed and rounded tile by tile.
///
/// Rounding counts as the identity in the gradients of the factors, which are those of a low-rank update that is applied
/// to the activations; the gradient of `x` goes through the rounded weight.
///
/// # Shapes
/// - `x`: `[tokens, in]`, `w`: `[out, in]`, `a`: `[rank, in]`, `b`: `[out, rank]` (rank 0 means no update)
/// - returns: `[tokens, out]`
///
/// # Panics
/// If the sizes do not fit.
pub fn linear_fake_quantized(
    x: Tensor<2>,
    w: &Arc<Matrix>,
    [a, b]: [Tensor<2>; 2],
    merge: FakeQuantize,
    compute: Compute,
) -> Tensor<2> {
    assert_eq!(x.dims()[1], w.cols(), "input width of the weight");
    check_factors(w, &a, &b);
    float(Dispatch::linear_fake_quantized(
        x.into_dispatch(),
        a.into_dispatch(),
        b.into_dispatch(),
        Arc::clone(w),
        merge,
        compute,
    ))
}

/// `y + u · bᵀ`, in place where nobody else holds `y`; the second half of a low-rank update.
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
    float(Dispatch::linear_add(
        y.into_dispatch(),
        u.into_dispatch(),
        b.into_dispatch(),
    ))
}

/// How the heads of latent attention are cut, where it runs over the latents themselves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Absorbed {
    /// Features of a query that meet a rebuilt key; the rest meets the end of the latents.
    pub nope: usize,
    /// Features of a head's values.
    pub v_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
}

/// Attention of a few positions of one sequence over its latents, with the weight that would rebuild keys and values folded
/// into queries and outputs: [`heads_linear`], [`crate::latent_attention`] and [`heads_linear`] again. Has no gradient.
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

/// `‖w_i + scale · b_i · a‖` of every row `i` of a frozen weight, formed tile by tile. Has no gradient.
///
/// # Shapes
/// - `w`: `[out, in]`, `a`: `[rank, in]`, `b`: `[out, rank]` (rank 0 means no update)
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

/// Multiplies each head with its own rows of one frozen weight, in what is asked for if products round to it themselves, else
/// in f32. Has no gradient: decoding uses it.
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

/// Stops where the factors `a [rank, in]` and `b [out, rank]` are of another weight.
fn check_factors(w: &Matrix, a: &Tensor<2>, b: &Tensor<2>) {
    let rank = a.dims()[0];
    assert_eq!(a.dims(), [rank, w.cols()], "first factor");
    assert_eq!(b.dims(), [w.rows(), rank], "second factor");
}
