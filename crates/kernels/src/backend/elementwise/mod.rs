//! Elementwise operations, norms and embeddings.

pub(crate) mod autodiff;
pub(crate) mod flex;

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::tensor::{Int, Tensor};

use crate::backend::traits::Kernels;
use crate::formats::Matrix;
use crate::ops::dropout::Dropout;
use crate::ops::rope::RopeLayout;
use crate::settings::Compute;

/// Rows of a frozen embedding.
///
/// # Shapes
/// - `ids`: `[tokens]`, `w`: `[vocab, hidden_size]`
/// - returns: `[tokens, hidden_size]`
///
/// # Panics
/// If an id is not below `vocab`.
pub fn embed_frozen(ids: Tensor<1, Int>, w: &Arc<Matrix>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::embed_frozen(ids.into_dispatch(), Arc::clone(w)))
}

/// Rows of a trained embedding.
///
/// # Shapes
/// - `ids`: `[tokens]`, `w`: `[vocab, hidden_size]`
/// - returns: `[tokens, hidden_size]`
///
/// # Panics
/// If an id is not below `vocab`.
pub fn embed_trained(ids: Tensor<1, Int>, w: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::embed_trained(
        w.into_dispatch(),
        ids.into_dispatch(),
    ))
}

/// `x · (mean(x²) + eps)^-½ · weight` over the last axis, in f32.
///
/// # Shapes
/// - `x`: `[tokens, width]`, `weight`: `[width]`
/// - returns: `[tokens, width]`
///
/// # Panics
/// If the widths do not fit.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f32) -> Tensor<2> {
    assert_eq!(x.dims()[1], weight.dims()[0], "width of the norm");
    rms_norm_start(x, weight, eps)
}

/// [`rms_norm`] of the first features of every row; the others are copied.
///
/// # Shapes
/// - `x`: `[tokens, width]`, `weight`: `[normed ≤ width]`
/// - returns: `[tokens, width]`
///
/// # Panics
/// If the rows are narrower than the weight.
pub fn rms_norm_start(x: Tensor<2>, weight: Tensor<1>, eps: f32) -> Tensor<2> {
    assert!(x.dims()[1] >= weight.dims()[0], "width of the norm");
    Tensor::from_dispatch(Dispatch::rms_norm(
        x.into_dispatch(),
        weight.into_dispatch(),
        eps,
    ))
}

/// Rotary position embedding: rotates pairs of features by the angles of their position. The angles have no gradient.
///
/// If a head is wider than the rotated part, its last features are rotated and the first are copied.
///
/// # Shapes
/// - `x`: `[batch, seq, heads, dim]`, `cos` and `sin`: `[seq, rotated / 2]` with `rotated ≤ dim`
/// - returns: the shape and layout of `x`
///
/// # Panics
/// If the sizes do not fit.
pub fn rope(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>, layout: RopeLayout) -> Tensor<4> {
    let ([_, seq, _, dim], [positions, half]) = (x.dims(), cos.dims());
    assert!(
        positions == seq && cos.dims() == sin.dims() && 2 * half <= dim,
        "angles {:?} and {:?} of {seq} positions of {dim} features",
        cos.dims(),
        sin.dims()
    );
    Tensor::from_dispatch(Dispatch::rope(
        x.into_dispatch(),
        cos.into_dispatch(),
        sin.into_dispatch(),
        layout,
    ))
}

/// `silu(gate) · up`, element by element; both are saved for the backward pass in the precision of `saved_as`.
///
/// # Shapes
/// - `gate`, `up`: `[tokens, width]`
/// - returns: `[tokens, width]`
///
/// # Panics
/// If the shapes differ.
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>, saved_as: Compute) -> Tensor<2> {
    assert_eq!(gate.dims(), up.dims(), "gate and up");
    Tensor::from_dispatch(Dispatch::swiglu(
        gate.into_dispatch(),
        up.into_dispatch(),
        saved_as,
    ))
}

/// Drops elements at random and scales the rest; the mask depends on the seed alone.
///
/// # Shapes
/// - `x`: `[tokens, width]`
/// - returns: `[tokens, width]`
pub fn dropout(x: Tensor<2>, dropout: Dropout) -> Tensor<2> {
    if dropout.is_off() {
        return x;
    }
    Tensor::from_dispatch(Dispatch::dropout(x.into_dispatch(), dropout))
}
