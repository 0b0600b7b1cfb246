//! Elementwise operations, norms and embeddings; see [`crate::backend::elementwise`].

use std::sync::Arc;

use burn::backend::tensor::{FloatTensor, IntTensor};

use crate::backend::gradients::Gradients;
use crate::backend::plain::dropout::drop_rows;
use crate::backend::plain::ints::Ints;
use crate::backend::plain::reals::Reals;
use crate::backend::plain::saved_reals::saved_values;
use crate::backend::saved::SavedActivation;
use crate::backend::traits::Kernels;
use crate::formats::Matrix;
use crate::ops::dropout::Dropout;
use crate::ops::rope::{RopeLayout, Rotation};

/// Rows of a stored embedding: `[tokens]` → `[tokens, width]`.
pub(crate) fn embed_frozen<B: Kernels>(ids: IntTensor<B>, w: &Matrix) -> FloatTensor<B> {
    let ids = Ints::<B>::new(ids);
    Reals::decoded(w, &ids.device()).rows(&ids).into_tensor()
}

/// Rows of an embedding: `[vocab, width]`, `[tokens]` → `[tokens, width]`.
pub(crate) fn embed_trained<B: Kernels>(w: FloatTensor<B>, ids: IntTensor<B>) -> FloatTensor<B> {
    Reals::<B>::new(w).rows(&Ints::new(ids)).into_tensor()
}

/// `dw[id] = Σ dy` over the tokens with that id: `[tokens]`, `[tokens, width]` → `[vocab, width]`.
pub(crate) fn embed_dw<B: Gradients>(
    ids: IntTensor<B>,
    dy: FloatTensor<B>,
    vocab: usize,
) -> FloatTensor<B> {
    let dy = Reals::<B>::new(dy);
    let [_, width] = dy.dims();
    let dw = Reals::zeros(&[vocab, width], &dy.device());
    dw.add_rows(&Ints::new(ids), dy).into_tensor()
}

/// `(mean(x²) + eps)^-½` of every row: `[tokens, width]` → `[tokens, 1]`.
fn inverse_rms<B: Kernels>(x: Reals<B>, eps: f32) -> Reals<B> {
    let [rows, width] = x.dims();
    let ones = Reals::ones(&[rows, 1], &x.device());
    ones / (x.square().sum(1) / width as f32 + eps).sqrt()
}

/// `x · (mean(x²) + eps)^-½ · weight` of the first features, `[tokens, width]`, `[normed]` → `[tokens, width]`.
pub(crate) fn rms_norm<B: Kernels>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    eps: f32,
) -> FloatTensor<B> {
    let (x, weight) = (Reals::<B>::new(x), Reals::new(weight));
    let ([_, width], normed) = (x.dims(), weight.len());
    let start = x.clone().narrow(1, 0..normed);
    let rest = x.narrow(1, normed..width);
    let scale = inverse_rms(start.clone(), eps);
    let start = start * scale * weight.reshape(&[1, normed]);
    Reals::cat(vec![start, rest], 1).into_tensor()
}

/// With `n = x · scale` the normalized row: `dx = scale · (dy·w − n · mean(dy·w·n))`, `dw = Σ_rows dy · n`.
pub(crate) fn rms_norm_grads<B: Gradients>(
    dy: FloatTensor<B>,
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    eps: f32,
) -> [FloatTensor<B>; 2] {
    let (dy, x, weight) = (Reals::<B>::new(dy), Reals::new(x), Reals::new(weight));
    let ([_, width], normed) = (x.dims(), weight.len());
    let rest = dy.clone().narrow(1, normed..width);
    let [dy, x] = [dy, x].map(|values| values.narrow(1, 0..normed));
    let scale = inverse_rms(x.clone(), eps);
    let (n, weighted) = (x * scale.clone(), dy.clone() * weight.reshape(&[1, normed]));
    let mean = (weighted.clone() * n.clone()).sum(1) / normed as f32;
    let dx = scale * (weighted - n.clone() * mean);
    let dw = (dy * n).sum(0).reshape(&[normed]);
    [Reals::cat(vec![dx, rest], 1), dw].map(Reals::into_tensor)
}

/// The last `2 · half` features of each head, rotated: `[batch, seq, heads, dim]`, angles `[seq, half]` each.
pub(crate) fn rope<B: Kernels>(
    x: FloatTensor<B>,
    angles: [FloatTensor<B>; 2],
    layout: RopeLayout,
    rotation: Rotation,
) -> FloatTensor<B> {
    let (x, [cos, sin]) = (Reals::<B>::new(x), angles.map(Reals::new));
    let ([batch, seq, heads, dim], [_, half]) = (x.dims(), cos.dims());
    let start = dim - 2 * half;
    let (copied, rotated) = (x.clone().narrow(3, 0..start), x.narrow(3, start..dim));
    // The axis that tells the two features of a pair apart, and the shape of the features.
    let (axis, pairs) = match layout {
        RopeLayout::Interleaved => (4, [half, 2]),
        RopeLayout::HalfSplit => (3, [2, half]),
    };
    let rotated = rotated.reshape(&[batch, seq, heads, pairs[0], pairs[1]]);
    let [a, b] = [0, 1].map(|at| rotated.clone().narrow(axis, at..at + 1));
    let shape = match layout {
        RopeLayout::Interleaved => [1, seq, 1, half, 1],
        RopeLayout::HalfSplit => [1, seq, 1, 1, half],
    };
    let [cos, sin] = [cos, sin].map(|angle| angle.reshape(&shape));
    let sin = match rotation {
        Rotation::Forward => sin,
        Rotation::Backward => -sin,
    };
    let first = a.clone() * cos.clone() - b.clone() * sin.clone();
    let second = a * sin + b * cos;
    let rotated = Reals::cat(vec![first, second], axis);
    let rotated = rotated.reshape(&[batch, seq, heads, 2 * half]);
    Reals::cat(vec![copied, rotated], 3).into_tensor()
}

/// `silu(gate) · up`, of tensors of one shape.
pub(crate) fn swiglu<B: Kernels>(gate: FloatTensor<B>, up: FloatTensor<B>) -> FloatTensor<B> {
    let (gate, up) = (Reals::<B>::new(gate), Reals::new(up));
    (gate.clone() * gate.sigmoid() * up).into_tensor()
}

/// Gradients of gate and up, of tensors of one shape.
pub(crate) fn swiglu_grads<B: Gradients>(
    dy: FloatTensor<B>,
    products: [Arc<SavedActivation<FloatTensor<B>>>; 2],
) -> [FloatTensor<B>; 2] {
    let products = products.each_ref().map(|saved| saved_values::<B>(saved));
    swiglu_backward(Reals::<B>::new(dy), products.map(Reals::new)).map(Reals::into_tensor)
}

/// `dgate = dy · up · σ · (1 + gate · (1 − σ))`, `dup = dy · gate · σ`.
pub(crate) fn swiglu_backward<B: Kernels>(
    dy: Reals<B>,
    [gate, up]: [Reals<B>; 2],
) -> [Reals<B>; 2] {
    let sigma = gate.clone().sigmoid();
    let slope = gate.clone() * (-sigma.clone() + 1.0) + 1.0;
    let dgate = dy.clone() * up * sigma.clone() * slope;
    [dgate, dy * gate * sigma]
}

/// Drops elements of `[tokens, width]`.
pub(crate) fn dropout<B: Kernels>(x: FloatTensor<B>, dropout: Dropout) -> FloatTensor<B> {
    drop_rows(Reals::<B>::new(x), dropout).into_tensor()
}
