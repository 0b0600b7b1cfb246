//! Matrix products of tensors.

use burn_flex::FlexTensor;

use super::values::{Floats, floats};
use crate::Compute;
use crate::backend::ops::Merge;
use crate::product::gemm;
use crate::product::strided::{MatMut, Write};
use crate::product::weights::{Folded, Weights};

pub(super) fn trained(w: &Floats, compute: Compute) -> Weights<'_> {
    Weights::trained(w, w.dims::<2>()[1], compute)
}

/// A low-rank update `[a, b]` as a part of its weight.
pub(super) fn folded(factors: &[Floats; 2], merge: Merge) -> Folded<'_> {
    let [a, b] = factors.each_ref().map(Floats::mat);
    Folded {
        quantizer: merge.quantizer,
        update: (a.rows() > 0).then_some((a, b, merge.scale)),
    }
}

pub(super) fn nt(x: &Floats, w: Weights<'_>) -> FlexTensor {
    let (rows, cols) = (x.mat().rows(), w.out_width());
    let mut y = gemm::zeros(rows * cols);
    gemm::nt(
        x.mat(),
        w,
        MatMut::dense(&mut y, rows, cols),
        Write::Replace,
    );
    floats(y, [rows, cols])
}

pub(super) fn nn(dy: &Floats, w: Weights<'_>) -> FlexTensor {
    let (rows, cols) = (dy.mat().rows(), w.in_width());
    let mut dx = gemm::zeros(rows * cols);
    gemm::nn(
        dy.mat(),
        w,
        MatMut::dense(&mut dx, rows, cols),
        Write::Replace,
    );
    floats(dx, [rows, cols])
}
