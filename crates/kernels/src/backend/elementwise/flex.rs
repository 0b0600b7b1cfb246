//! Elementwise operations, norms and embeddings on the CPU backend.

use std::sync::Arc;

use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::backend::flex::saved_values::saved_values;
use crate::backend::flex::values::{
    ELEMENTS, Floats, floats, int_values, owned, rms_norm_of, swiglu_of,
};
use crate::backend::saved::SavedActivation;
use crate::formats::Matrix;
use crate::ops::dropout::Dropout;
use crate::ops::rope::{self, RopeLayout};
use crate::ops::{rms_norm, swiglu};
use crate::settings::Compute;

pub(crate) fn embed_frozen(ids: FlexTensor, w: Arc<Matrix>) -> FlexTensor {
    let (ids, width) = (int_values(&ids), w.cols());
    let mut out = vec![0.0; ids.len() * width];
    out.chunks_mut(width)
        .zip(&ids)
        .for_each(|(row, id)| w.decode(*id as usize..*id as usize + 1, 0..width, row));
    floats(out, [ids.len(), width])
}

pub(crate) fn embed_trained(w: FlexTensor, ids: FlexTensor) -> FlexTensor {
    let (w, ids) = (Floats::new(&w), int_values(&ids));
    let [_, width] = w.dims();
    let rows = ids
        .iter()
        .flat_map(|id| &w[*id as usize * width..][..width])
        .copied()
        .collect();
    floats(rows, [ids.len(), width])
}

pub(crate) fn embed_dw(ids: FlexTensor, dy: FlexTensor, vocab: usize) -> FlexTensor {
    let (ids, dy) = (int_values(&ids), Floats::new(&dy));
    let [_, width] = dy.dims();
    let mut dw = vec![0.0; vocab * width];
    for (id, dy) in ids.iter().zip(dy.chunks(width)) {
        dw[*id as usize * width..][..width]
            .iter_mut()
            .zip(dy)
            .for_each(|(dw, dy)| *dw += dy);
    }
    floats(dw, [vocab, width])
}

pub(crate) fn rms_norm(x: FlexTensor, weight: FlexTensor, eps: f32) -> FlexTensor {
    rms_norm_of(&Floats::new(&x), &Floats::new(&weight), eps)
}

pub(crate) fn rms_norm_grads(
    dy: FlexTensor,
    x: FlexTensor,
    weight: FlexTensor,
    eps: f32,
) -> [FlexTensor; 2] {
    let (dy, x, weight) = (Floats::new(&dy), Floats::new(&x), Floats::new(&weight));
    let (dx, dw) = rms_norm::backward(&dy, &x, x.dims::<2>()[1], &weight, eps);
    [floats(dx, x.dims::<2>()), floats(dw, [weight.len()])]
}

pub(crate) fn rope(
    x: FlexTensor,
    cos: FlexTensor,
    sin: FlexTensor,
    layout: RopeLayout,
) -> FlexTensor {
    rotate(&x, [&cos, &sin], layout, rope::Rotation::Forward)
}

pub(crate) fn rope_dx(dy: FlexTensor, angles: [FlexTensor; 2], layout: RopeLayout) -> FlexTensor {
    rotate(&dy, angles.each_ref(), layout, rope::Rotation::Backward)
}

fn rotate(
    x: &FlexTensor,
    [cos, sin]: [&FlexTensor; 2],
    layout: RopeLayout,
    rotation: rope::Rotation,
) -> FlexTensor {
    let (x, cos, sin) = (Floats::new(x), Floats::new(cos), Floats::new(sin));
    floats(
        rope::rotate(&x, &cos, &sin, x.dims(), layout, rotation),
        x.dims::<4>(),
    )
}

pub(crate) fn swiglu(gate: FlexTensor, up: FlexTensor, _: Compute) -> FlexTensor {
    swiglu_of(&Floats::new(&gate), &Floats::new(&up))
}

pub(crate) fn swiglu_grads(
    dy: FlexTensor,
    products: [Arc<SavedActivation<FlexTensor>>; 2],
) -> [FlexTensor; 2] {
    let dy = Floats::new(&dy).tensor().clone();
    let [gate, up] = products.each_ref().map(|saved| saved_values(saved));
    drop(products);
    // Usually no one else holds dy and up: the gradients are then written in their place.
    let [mut dgate, mut dup] = [dy, up.tensor().clone()].map(owned);
    drop(up);
    dgate
        .storage_mut::<f32>()
        .par_chunks_mut(ELEMENTS)
        .zip(dup.storage_mut::<f32>().par_chunks_mut(ELEMENTS))
        .zip(gate.par_chunks(ELEMENTS))
        .for_each(|((dgate, dup), gate)| swiglu::backward(dgate, dup, gate));
    [dgate, dup]
}

pub(crate) fn dropout(x: FlexTensor, dropout: Dropout) -> FlexTensor {
    let x = Floats::new(&x);
    let mut out = x.to_vec();
    out.par_chunks_mut(ELEMENTS)
        .enumerate()
        .for_each(|(i, part)| dropout.apply(part, (i * ELEMENTS) as u64));
    floats(out, x.dims::<2>())
}
