//! Linear layers on the CPU backend.

use std::sync::Arc;

use burn::backend::Flex;
use burn_flex::FlexTensor;

use crate::backend::flex::saved_values::saved_values;
use crate::backend::flex::values::{Floats, ROUNDED_ROWS, floats, owned};
use crate::backend::gradients::{UpdateGrads, UpdateSaved};
use crate::backend::plain::linear as plain;
use crate::backend::saved::SavedActivation;
use crate::backend::traits::{FakeQuantize, Update};
use crate::formats::Matrix;
use crate::matmul::{self, Term, WeightFakeQuant, WeightOperand};
use crate::memory::MatMut;
use crate::ops::row_norms;
use crate::settings::{Accumulate, Compute};

pub(crate) fn linear_frozen(x: FlexTensor, w: Arc<Matrix>, compute: Compute) -> FlexTensor {
    let x = Floats::rounded(&x, compute.rounding_before_product());
    nt(&x, WeightOperand::frozen(&w, compute))
}

pub(crate) fn linear_frozen_pair(
    x: FlexTensor,
    first: Arc<Matrix>,
    second: Arc<Matrix>,
    compute: Compute,
) -> (FlexTensor, FlexTensor) {
    let values = Floats::new(&x);
    let weights = [&first, &second].map(|w| WeightOperand::frozen(w, compute));
    nt_pair(&values, weights).unwrap_or_else(|| {
        plain::linear_frozen_pair::<Flex>(x, [first.clone(), second.clone()], compute)
    })
}

pub(crate) fn linear_trained(
    x: FlexTensor,
    w: FlexTensor,
    compute: Compute,
    _: Compute,
) -> FlexTensor {
    let w = Floats::new(&w);
    nt(
        &Floats::rounded(&x, compute.rounding_before_product()),
        trained(&w, compute),
    )
}

pub(crate) fn linear_updated(
    x: FlexTensor,
    a: FlexTensor,
    b: FlexTensor,
    w: Arc<Matrix>,
    update: Update,
) -> (FlexTensor, FlexTensor) {
    let [values, a, b] = [&x, &a, &b].map(Floats::new);
    let low = scaled(&nt(&values, trained(&a, Compute::F32)), update.scale);
    let x = Floats::rounded(&x, update.compute.rounding_before_product());
    let y = nt_sum(&[
        (x.mat(), WeightOperand::frozen(&w, update.compute)),
        (low.mat(), trained(&b, Compute::F32)),
    ]);
    (y, low.tensor().clone())
}

pub(crate) fn linear_fake_quantized(
    x: FlexTensor,
    a: FlexTensor,
    b: FlexTensor,
    w: Arc<Matrix>,
    merge: FakeQuantize,
    compute: Compute,
) -> FlexTensor {
    let factors = [&a, &b].map(Floats::new);
    let w = WeightOperand::frozen(&w, compute).fake_quantized(fake_quantized(&factors, merge));
    nt(
        &Floats::rounded(&x, w.compute().rounding_before_product()),
        w,
    )
}

pub(crate) fn linear_add(mut y: FlexTensor, u: FlexTensor, b: FlexTensor) -> FlexTensor {
    let (u, b) = (Floats::new(&u), Floats::new(&b));
    y = owned(y);
    let [rows, cols] = y.layout().shape().dims();
    matmul::nt(
        u.mat(),
        trained(&b, Compute::F32),
        MatMut::dense(y.storage_mut(), rows, cols),
        Accumulate::Add,
    );
    y
}

pub(crate) fn row_norms(a: FlexTensor, b: FlexTensor, w: Arc<Matrix>, scale: f32) -> FlexTensor {
    let factors = [&a, &b].map(Floats::new);
    let [a, b] = factors.each_ref().map(Floats::mat);
    let update = (a.rows() > 0).then_some((a, b, scale));
    floats(
        row_norms::row_norms(WeightOperand::frozen(&w, Compute::F32), update),
        [w.rows()],
    )
}

pub(crate) fn linear_frozen_dx(dy: FlexTensor, w: &Matrix, compute: Compute) -> FlexTensor {
    nn(
        &Floats::rounded(&dy, compute.rounding_before_product()),
        WeightOperand::frozen(w, compute),
    )
}

pub(crate) fn linear_trained_dx(dy: FlexTensor, w: FlexTensor, compute: Compute) -> FlexTensor {
    let w = Floats::new(&w);
    nn(
        &Floats::rounded(&dy, compute.rounding_before_product()),
        trained(&w, compute),
    )
}

pub(crate) fn linear_dw(
    dy: FlexTensor,
    x: &SavedActivation<FlexTensor>,
    compute: Compute,
) -> FlexTensor {
    let before = compute.rounding_before_product();
    let dy = Floats::new(&dy).rounded_columns(before);
    tn(&dy, &saved_values(x).rounded_columns(before), compute)
}

pub(crate) fn linear_updated_grads(
    dy: FlexTensor,
    saved: UpdateSaved<FlexTensor>,
    low: FlexTensor,
    w: &Matrix,
    update: Update,
    want_x: bool,
) -> UpdateGrads<FlexTensor> {
    let [a, b] = saved.factors.each_ref().map(Floats::new);
    let values = Floats::new(&dy);
    let dlow = scaled(&nn(&values, trained(&b, Compute::F32)), update.scale);
    // The factors' gradients first: they may recompute x, which is dropped before the gradient of x is allocated.
    let grads = saved.x.as_deref().map(|x| {
        [(&dlow, saved_values(x)), (&values, Floats::new(&low))]
            .map(|(dy, x)| tn(dy, &x, Compute::F32))
    });
    let dx = want_x.then(|| {
        let dy = Floats::rounded(&dy, update.compute.rounding_before_product());
        nn_sum(&[
            (dy.mat(), WeightOperand::frozen(w, update.compute)),
            (dlow.mat(), trained(&a, Compute::F32)),
        ])
    });
    (dx, grads)
}

pub(crate) fn linear_fake_quantized_grads(
    dy: FlexTensor,
    saved: UpdateSaved<FlexTensor>,
    w: &Matrix,
    merge: FakeQuantize,
    compute: Compute,
    want_x: bool,
) -> UpdateGrads<FlexTensor> {
    let factors = saved.factors.each_ref().map(Floats::new);
    let weights = WeightOperand::frozen(w, compute).fake_quantized(fake_quantized(&factors, merge));
    let dx = want_x.then(|| {
        nn(
            &Floats::rounded(&dy, compute.rounding_before_product()),
            weights,
        )
    });
    let grads = saved.x.as_deref().map(|x| {
        let ([a, b], x) = (&factors, saved_values(x));
        let dy = Floats::new(&dy);
        let low = scaled(&nt(&x, trained(a, Compute::F32)), merge.scale);
        let dlow = scaled(&nn(&dy, trained(b, Compute::F32)), merge.scale);
        [tn(&dlow, &x, Compute::F32), tn(&dy, &low, Compute::F32)]
    });
    (dx, grads)
}

/// A trained weight `[out, in]` as an operand.
pub(crate) fn trained(w: &Floats, compute: Compute) -> WeightOperand<'_> {
    WeightOperand::trained(w, w.dims::<2>()[1], compute)
}

/// A low-rank update `[a, b]` as a part of its weight, and the rounding of the sum.
fn fake_quantized(factors: &[Floats; 2], merge: FakeQuantize) -> WeightFakeQuant<'_> {
    let [a, b] = factors.each_ref().map(Floats::mat);
    WeightFakeQuant {
        quantizer: merge.quantizer,
        update: (a.rows() > 0).then_some((a, b, merge.scale)),
    }
}

/// `x · wᵀ`.
fn nt(x: &Floats, w: WeightOperand<'_>) -> FlexTensor {
    nt_sum(&[(x.mat(), w)])
}

/// The sum of products with the same rows and outputs.
fn nt_sum(terms: &[Term<'_>]) -> FlexTensor {
    let size = [terms[0].0.rows(), terms[0].1.out_width()];
    floats(matmul::new_nt(terms), size)
}

/// Two products in one parallel part, for few rows or in int8; `None` if there is no fused path for them.
fn nt_pair(x: &Floats, weights: [WeightOperand<'_>; 2]) -> Option<(FlexTensor, FlexTensor)> {
    let [first, second] = matmul::new_nt_pair(x.mat(), weights)?;
    let tensor = |values, w: &WeightOperand<'_>| floats(values, [x.dims::<2>()[0], w.out_width()]);
    Some((tensor(first, &weights[0]), tensor(second, &weights[1])))
}

/// `dy · w`.
fn nn(dy: &Floats, w: WeightOperand<'_>) -> FlexTensor {
    nn_sum(&[(dy.mat(), w)])
}

/// The sum of products with the same rows and inputs.
fn nn_sum(terms: &[Term<'_>]) -> FlexTensor {
    let size = [terms[0].0.rows(), terms[0].1.in_width()];
    floats(matmul::new_nn(terms), size)
}

/// The values times `scale`.
fn scaled(values: &FlexTensor, scale: f32) -> Floats {
    Floats::new(values).mapped(ROUNDED_ROWS, |rows, _| {
        rows.iter_mut().for_each(|v| *v *= scale);
    })
}

/// `dyᵀ · x`, as `[out, in]`.
fn tn(dy: &Floats, x: &Floats, compute: Compute) -> FlexTensor {
    let ([_, out], [_, width]) = (dy.dims::<2>(), x.dims::<2>());
    let dw = matmul::new_tn(dy.mat(), x.mat(), compute);
    floats(dw, [out, width])
}
