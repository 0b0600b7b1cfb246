//! Saved activations on the CPU backend: narrowed, and as values again.

use burn::tensor::{Bytes, DType, Element};
use burn_flex::{FlexTensor, Layout};
use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use crate::backend::flex::values::{
    ELEMENTS, Floats, ROUNDED_ROWS, floats, rms_norm_of, swiglu_of,
};
use crate::backend::saved::{SavedActivation, SavedForm};
use crate::formats::fp8::{Tiles, encode_tiles};
use crate::settings::Compute;
use crate::simd::narrow_to_bf16;

/// Saves `x` in the precision of `compute`.
pub(crate) fn save_for_backward(x: FlexTensor, compute: Compute) -> SavedActivation<FlexTensor> {
    let values = Floats::new(&x);
    let (form, bytes) = match compute {
        Compute::F32 | Compute::MatchWeight => (SavedForm::Float(x), 4 * values.len()),
        Compute::Bf16 => (
            SavedForm::Float(narrowed(&values, narrow_to_bf16, DType::BF16)),
            2 * values.len(),
        ),
        Compute::F16 => (
            // Gate and up were not rounded to f16 for a product and may exceed its range, but must not become infinite.
            SavedForm::Float(narrowed(&values, saturated, DType::F16)),
            2 * values.len(),
        ),
        Compute::Fp8(kind) => {
            let tiles = encode_tiles(&values, values.dims(), [1, 128], kind);
            let bytes = tiles.size_bytes();
            (SavedForm::Fp8(tiles), bytes)
        }
    };
    SavedActivation::new(form, bytes)
}

/// The values of a saved activation, recomputed if it was saved so.
pub(crate) fn saved_values(saved: &SavedActivation<FlexTensor>) -> Floats {
    match saved.form() {
        SavedForm::Float(tensor) => Floats::new(tensor),
        SavedForm::Fp8(tiles) => decoded(tiles),
        SavedForm::Norm(x, weight, eps) => {
            Floats::in_place(rms_norm_of(&Floats::new(x), &Floats::new(weight), *eps))
        }
        SavedForm::Swiglu(products) => {
            let [gate, up] = products.each_ref().map(|saved| saved_values(saved));
            Floats::in_place(swiglu_of(&gate, &up))
        }
    }
}

fn decoded(tiles: &Tiles) -> Floats {
    let [rows, cols] = tiles.dims();
    let mut values = vec![0.0; rows * cols];
    values
        .par_chunks_mut((ROUNDED_ROWS * cols).max(1))
        .enumerate()
        .for_each(|(i, out)| {
            let start = i * ROUNDED_ROWS;
            tiles.decode(start..rows.min(start + ROUNDED_ROWS), out);
        });
    Floats::in_place(floats(values, [rows, cols]))
}

/// f16 values, with those beyond its range at the ends of it.
fn saturated(values: &[f32], out: &mut [f16]) {
    let largest = f16::MAX.to_f32();
    let clamped: Vec<f32> = values.iter().map(|v| v.clamp(-largest, largest)).collect();
    out.convert_from_f32_slice(&clamped);
}

/// The values in a narrower type.
fn narrowed<T: Element + Default + Send>(
    values: &Floats,
    narrow: fn(&[f32], &mut [T]),
    dtype: DType,
) -> FlexTensor {
    let mut all = vec![T::default(); values.len()];
    all.par_chunks_mut(ELEMENTS)
        .zip(values.par_chunks(ELEMENTS))
        .for_each(|(out, values)| narrow(values, out));
    FlexTensor::new(
        Bytes::from_elems(all),
        Layout::contiguous(values.shape()),
        dtype,
    )
}
