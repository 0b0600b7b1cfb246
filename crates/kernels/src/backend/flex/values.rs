//! Tensors of the CPU backend as slices, and slices as tensors.

use std::ops::Range;

use burn::tensor::{Bytes, DType, Shape};
use burn_flex::{FlexTensor, Layout};
use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use crate::memory::{Mat, zeros};
use crate::ops::{rms_norm, swiglu};
use crate::settings::OperandRounding;
use crate::simd::widen_bf16;

/// A tensor's f32 values in row-major order: in place if they are stored so, otherwise a copy.
pub(crate) struct Floats {
    tensor: FlexTensor,
    range: Range<usize>,
}

impl Floats {
    pub(crate) fn new(tensor: &FlexTensor) -> Self {
        match tensor.dtype() {
            DType::F32 => Self::in_place(if tensor.is_contiguous() {
                tensor.clone()
            } else {
                tensor.to_contiguous()
            }),
            DType::BF16 => Self::widened(tensor, FlexTensor::storage, widen_bf16),
            DType::F16 => Self::widened(tensor, FlexTensor::storage, <[f16]>::convert_to_f32_slice),
            other => panic!("our kernels take f32, f16 and bf16 tensors, not {other:?}"),
        }
    }

    /// Widens bf16 or f16 values.
    fn widened<T: Sync>(
        tensor: &FlexTensor,
        storage: fn(&FlexTensor) -> &[T],
        widen: fn(&[T], &mut [f32]),
    ) -> Self {
        let tensor = tensor.to_contiguous();
        let numbers = storage(&tensor);
        let mut values = zeros(numbers.len());
        values
            .par_chunks_mut(ELEMENTS)
            .zip(numbers.par_chunks(ELEMENTS))
            .for_each(|(values, numbers)| widen(numbers, values));
        Self::in_place(floats(values, tensor.layout().shape().clone()))
    }

    /// A contiguous tensor may be a part of a larger buffer.
    pub(crate) fn in_place(tensor: FlexTensor) -> Self {
        let start = tensor.layout().start_offset();
        Self {
            range: start..start + tensor.layout().num_elements(),
            tensor,
        }
    }

    /// The values, rounded for a product that sums over the last axis.
    pub(crate) fn rounded(tensor: &FlexTensor, rounding: OperandRounding) -> Self {
        let values = Self::new(tensor);
        let are_rounded = match rounding {
            OperandRounding::F32 => true,
            OperandRounding::Bf16 => tensor.dtype() == DType::BF16,
            OperandRounding::F16 => tensor.dtype() == DType::F16,
            OperandRounding::Fp8(_) => false,
        };
        if are_rounded {
            return values;
        }
        values.mapped(ROUNDED_ROWS, |rows, width| rounding.round_rows(rows, width))
    }

    /// The values, rounded for a product that sums over the first of two axes.
    pub(crate) fn rounded_columns(self, rounding: OperandRounding) -> Self {
        if rounding == OperandRounding::F32 {
            return self;
        }
        self.mapped(ROUNDED_ROWS, |rows, width| {
            rounding.round_columns(rows, width)
        })
    }

    /// A copy, changed in groups of `rows` rows.
    pub(crate) fn mapped(&self, rows: usize, change: impl Fn(&mut [f32], usize) + Sync) -> Self {
        let shape = self.shape();
        let width = shape.as_slice().last().copied().unwrap_or(1).max(1);
        let mut values = vec![0.0; self.len()];
        values
            .par_chunks_mut(rows * width)
            .zip(self.par_chunks(rows * width))
            .for_each(|(copy, values)| {
                copy.copy_from_slice(values);
                change(copy, width);
            });
        Self::in_place(floats(values, shape))
    }

    pub(crate) fn tensor(&self) -> &FlexTensor {
        &self.tensor
    }

    pub(crate) fn shape(&self) -> Shape {
        self.tensor.layout().shape().clone()
    }

    pub(crate) fn dims<const D: usize>(&self) -> [usize; D] {
        self.tensor.layout().shape().dims()
    }

    /// A matrix whose rows are along the last axis.
    pub(crate) fn mat(&self) -> Mat<'_> {
        let [rows, cols] = self.dims();
        Mat::dense(self, rows, cols)
    }
}

impl std::ops::Deref for Floats {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.tensor.storage::<f32>()[self.range.clone()]
    }
}

/// Rows per task when activations are rounded: whole tiles of FP8.
pub(crate) const ROUNDED_ROWS: usize = 128;

/// A tensor whose storage holds only its values, so that it can be written.
pub(crate) fn owned(x: FlexTensor) -> FlexTensor {
    let size = x.layout().num_elements() * x.dtype().size();
    let whole = x.is_contiguous() && x.bytes().len() == size;
    if whole { x } else { x.to_contiguous() }
}

pub(crate) fn floats(values: Vec<f32>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::new(
        Bytes::from_elems(values),
        Layout::contiguous(shape.into()),
        DType::F32,
    )
}

pub(crate) fn ints(values: Vec<i32>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::new(
        Bytes::from_elems(values),
        Layout::contiguous(shape.into()),
        DType::I32,
    )
}

/// Integer values of either width; burn's default is i32 here, user data may come as i64.
pub(crate) fn int_values(tensor: &FlexTensor) -> Vec<i32> {
    let tensor = tensor.to_contiguous();
    match tensor.dtype() {
        DType::I32 => tensor.storage::<i32>().to_vec(),
        DType::I64 => tensor.storage::<i64>().iter().map(|v| *v as i32).collect(),
        other => panic!("our kernels take i32 and i64 ids, not {other:?}"),
    }
}

/// Elements per task of a cheap elementwise operation.
pub(crate) const ELEMENTS: usize = 1 << 14;

/// SwiGLU of gate and up; see [`crate::swiglu`].
pub(crate) fn swiglu_of(gate: &Floats, up: &Floats) -> FlexTensor {
    let mut out = zeros(gate.len());
    out.par_chunks_mut(ELEMENTS)
        .zip(gate.par_chunks(ELEMENTS).zip(up.par_chunks(ELEMENTS)))
        .for_each(|(out, (gate, up))| swiglu::forward(gate, up, out));
    floats(out, gate.dims::<2>())
}

/// RMS norm of the rows of `x`; see [`crate::rms_norm`].
pub(crate) fn rms_norm_of(x: &Floats, weight: &Floats, eps: f32) -> FlexTensor {
    let [rows, width] = x.dims();
    floats(rms_norm::forward(x, width, weight, eps), [rows, width])
}
