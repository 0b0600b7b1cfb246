//! Matrix products of tensors.

use burn_flex::FlexTensor;

use super::values::{Floats, ROUNDED_ROWS, floats};
use crate::backend::linear::FakeQuantize;
use crate::matmul::{self, Term, WeightFakeQuant, WeightOperand};
use crate::settings::Compute;

pub(super) fn trained(w: &Floats, compute: Compute) -> WeightOperand<'_> {
    WeightOperand::trained(w, w.dims::<2>()[1], compute)
}

/// A low-rank update `[a, b]` as a part of its weight.
pub(super) fn fake_quantized(factors: &[Floats; 2], merge: FakeQuantize) -> WeightFakeQuant<'_> {
    let [a, b] = factors.each_ref().map(Floats::mat);
    WeightFakeQuant {
        quantizer: merge.quantizer,
        update: (a.rows() > 0).then_some((a, b, merge.scale)),
    }
}

pub(super) fn nt(x: &Floats, w: WeightOperand<'_>) -> FlexTensor {
    nt_sum(&[(x.mat(), w)])
}

/// The sum of products with the same rows and outputs.
pub(super) fn nt_sum(terms: &[Term<'_>]) -> FlexTensor {
    let size = [terms[0].0.rows(), terms[0].1.out_width()];
    floats(matmul::new_nt(terms), size)
}

/// Two products of few rows, or in int8, in one parallel part; none where they are made otherwise.
pub(super) fn nt_pair(
    x: &Floats,
    weights: [WeightOperand<'_>; 2],
) -> Option<(FlexTensor, FlexTensor)> {
    let [first, second] = matmul::new_nt_pair(x.mat(), weights)?;
    let tensor = |values, w: &WeightOperand<'_>| floats(values, [x.dims::<2>()[0], w.out_width()]);
    Some((tensor(first, &weights[0]), tensor(second, &weights[1])))
}

pub(super) fn nn(dy: &Floats, w: WeightOperand<'_>) -> FlexTensor {
    nn_sum(&[(dy.mat(), w)])
}

/// The sum of products with the same rows and inputs.
pub(super) fn nn_sum(terms: &[Term<'_>]) -> FlexTensor {
    let size = [terms[0].0.rows(), terms[0].1.in_width()];
    floats(matmul::new_nn(terms), size)
}

/// The values times a number.
pub(super) fn scaled(values: &FlexTensor, scale: f32) -> Floats {
    Floats::new(values).mapped(ROUNDED_ROWS, |rows, _| {
        rows.iter_mut().for_each(|v| *v *= scale);
    })
}
