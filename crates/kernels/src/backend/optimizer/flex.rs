//! The optimizer on the CPU backend.

use burn::tensor::DType;
use burn_flex::FlexTensor;
use half::bf16;
use rayon::prelude::*;

use crate::backend::flex::values::{Floats, floats, owned};
use crate::ops::adamw::{self, AdamWStep};

pub(crate) fn adamw_step(
    p: FlexTensor,
    g: FlexTensor,
    m: FlexTensor,
    v: FlexTensor,
    step: AdamWStep,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let (mut p, mut m, mut v) = (owned(p), owned(m), owned(v));
    let (values, g) = (p.storage_mut(), Floats::new(&g));
    match m.dtype() {
        DType::BF16 => {
            let (m, v) = (m.storage_mut::<bf16>(), v.storage_mut());
            adamw::update(values, &g, m, v, step);
        }
        _ => adamw::update::<f32>(values, &g, m.storage_mut(), v.storage_mut(), step),
    }
    (p, m, v)
}

pub(crate) fn sums_of_squares_f32(x: FlexTensor, parts: usize) -> FlexTensor {
    let x = Floats::new(&x);
    let n = x.len() / parts.max(1);
    let sums = (0..parts).into_par_iter();
    let sums = sums.map(|part| adamw::sum_of_squares(&x[part * n..][..n]) as f32);
    floats(sums.collect(), [parts])
}
