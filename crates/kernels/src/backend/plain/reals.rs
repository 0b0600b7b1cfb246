//! Float tensors of a backend with operators, so that formulas read as formulas.

use std::ops::{Add, Div, Mul, Neg, Range, Sub};

use burn::backend::tensor::{Device, FloatTensor, IndexingUpdateOp};
use burn::backend::{
    Backend, BoolDType, DType, FloatDType, Scalar, Slice, TensorData, TensorMetadata,
    get_or_init_device_settings,
};

use crate::backend::plain::ints::{Ints, Mask};
use crate::backend::plain::primitives::Primitives;
use crate::backend::plain::sums::{LONGEST, parts};
use crate::formats::Matrix;

/// An f32 tensor of any rank. Shapes broadcast as burn's do, and empty tensors never reach the backend.
#[derive(Clone, Debug)]
pub(crate) struct Reals<B: Backend>(FloatTensor<B>);

impl<B: Backend> Reals<B> {
    /// # Panics
    /// If the tensor is not f32.
    pub(crate) fn new(tensor: FloatTensor<B>) -> Self {
        let dtype = tensor.dtype();
        assert_eq!(dtype, DType::F32, "this backend computes in f32 alone");
        Self(tensor)
    }

    pub(crate) fn into_tensor(self) -> FloatTensor<B> {
        self.0
    }

    /// Host values, uploaded.
    pub(crate) fn upload(values: Vec<f32>, shape: &[usize], device: &Device<B>) -> Self {
        let data = TensorData::new(values, shape.to_vec());
        Self(B::float_from_data(data, device))
    }

    /// A stored matrix `[rows, cols]`.
    pub(crate) fn decoded(w: &Matrix, device: &Device<B>) -> Self
    where
        B: Primitives,
    {
        Self(B::decoded(w, device))
    }

    pub(crate) fn zeros(shape: &[usize], device: &Device<B>) -> Self {
        let is_empty = shape.contains(&0);
        let shape = shape.to_vec().into();
        Self(if is_empty {
            B::float_empty(shape, device, FloatDType::F32)
        } else {
            B::float_zeros(shape, device, FloatDType::F32)
        })
    }

    pub(crate) fn ones(shape: &[usize], device: &Device<B>) -> Self {
        Self::zeros(shape, device) + 1.0
    }

    pub(crate) fn device(&self) -> Device<B> {
        self.0.device()
    }

    pub(crate) fn shape(&self) -> Vec<usize> {
        self.0.shape().to_vec()
    }

    /// The sizes of a tensor of known rank.
    pub(crate) fn dims<const D: usize>(&self) -> [usize; D] {
        self.0.shape().dims()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.shape().num_elements()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn bool_dtype(&self) -> BoolDType {
        get_or_init_device_settings::<B>(&self.device()).bool_dtype
    }

    // Shapes.

    pub(crate) fn reshape(self, shape: &[usize]) -> Self {
        if self.is_empty() {
            return Self::zeros(shape, &self.device());
        }
        Self(B::float_reshape(self.0, shape.to_vec().into()))
    }

    pub(crate) fn permute(self, axes: &[usize]) -> Self {
        if self.is_empty() {
            let shape = self.shape();
            let shape: Vec<usize> = axes.iter().map(|axis| shape[*axis]).collect();
            return Self::zeros(&shape, &self.device());
        }
        Self(B::float_permute(self.0, axes))
    }

    /// The last two axes exchanged.
    pub(crate) fn t(self) -> Self {
        let mut axes: Vec<usize> = (0..self.shape().len()).collect();
        let last = axes.len() - 1;
        axes.swap(last - 1, last);
        self.permute(&axes)
    }

    /// A range of one axis.
    pub(crate) fn narrow(self, dim: usize, range: Range<usize>) -> Self {
        let mut shape = self.shape();
        if range == (0..shape[dim]) {
            return self;
        }
        if range.is_empty() || self.is_empty() {
            shape[dim] = range.len();
            return Self::zeros(&shape, &self.device());
        }
        Self(B::float_slice(self.0, &slices(&shape, dim, range)))
    }

    /// The tensor with `part` added to a range of one axis.
    pub(crate) fn add_at(self, dim: usize, range: Range<usize>, part: Self) -> Self {
        if part.is_empty() {
            return self;
        }
        let slices = slices(&self.shape(), dim, range.clone());
        let sum = self.clone().narrow(dim, range) + part;
        Self(B::float_slice_assign(self.0, &slices, sum.0))
    }

    /// Tensors one after the other along an axis.
    ///
    /// # Panics
    /// If there are none.
    pub(crate) fn cat(parts: Vec<Self>, dim: usize) -> Self {
        let whole = |part: &Self| !part.is_empty();
        if !parts.iter().any(whole) {
            let mut shape = parts[0].shape();
            shape[dim] = parts.iter().map(|part| part.shape()[dim]).sum();
            return Self::zeros(&shape, &parts[0].device());
        }
        let mut parts: Vec<_> = parts.into_iter().filter(whole).map(|part| part.0).collect();
        if parts.len() == 1 {
            return Self(parts.remove(0));
        }
        Self(B::float_cat(parts, dim))
    }

    /// Repeated along axes of size 1.
    pub(crate) fn expand(self, shape: &[usize]) -> Self {
        if shape.contains(&0) {
            return Self::zeros(shape, &self.device());
        }
        Self(B::float_expand(self.0, shape.to_vec().into()))
    }

    /// The rows (of axis 0) that `ids [n]` name.
    pub(crate) fn rows(self, ids: &Ints<B>) -> Self {
        let mut shape = self.shape();
        shape[0] = ids.len();
        if shape.contains(&0) {
            return Self::zeros(&shape, &self.device());
        }
        Self(B::float_select(self.0, 0, ids.clone().into_tensor()))
    }

    /// The tensor with `rows` added to the rows (of axis 0) that `ids [n]` name, in order.
    pub(crate) fn add_rows(mut self, ids: &Ints<B>, rows: Self) -> Self {
        if self.is_empty() {
            return self;
        }
        for part in parts(ids.len(), LONGEST) {
            let ids = ids.clone().narrow(0, part.clone()).into_tensor();
            let rows = rows.clone().narrow(0, part).0;
            self.0 = B::float_select_assign(self.0, 0, ids, rows, IndexingUpdateOp::Add);
        }
        self
    }

    /// One element of every row: `[rows, cols]` at `ids [rows]` → `[rows, 1]`.
    pub(crate) fn at(self, ids: Ints<B>) -> Self {
        let rows = ids.len();
        if rows == 0 {
            return Self::zeros(&[0, 1], &self.device());
        }
        Self(B::float_gather(
            1,
            self.0,
            ids.reshape(&[rows, 1]).into_tensor(),
        ))
    }

    // Element by element.

    pub(crate) fn exp(self) -> Self {
        self.map(B::float_exp)
    }

    pub(crate) fn log(self) -> Self {
        self.map(B::float_log)
    }

    pub(crate) fn sqrt(self) -> Self {
        self.map(B::float_sqrt)
    }

    pub(crate) fn square(self) -> Self {
        self.clone() * self
    }

    /// `σ(x)`, from an exponential that cannot overflow.
    pub(crate) fn sigmoid(self) -> Self {
        let small = (-self.clone().map(B::float_abs)).exp();
        let sigma = (small.clone() + 1.0).map(B::float_recip);
        let is_negative = self.lower(0.0);
        sigma.clone().replaced(&is_negative, small * sigma)
    }

    /// The larger of two numbers.
    pub(crate) fn larger(self, other: Self) -> Self {
        let is_larger = other.clone().greater(self.clone());
        self.replaced(&is_larger, other)
    }

    /// `other` where the mask is set; all of the same shape.
    pub(crate) fn replaced(self, mask: &Mask<B>, other: Self) -> Self {
        self.map(|x| B::float_mask_where(x, mask.clone().into_tensor(), other.0))
    }

    /// `value` where the mask is set, which is repeated along its axes of size 1.
    pub(crate) fn filled(self, mask: Mask<B>, value: f32) -> Self {
        let shape = self.shape();
        self.map(|x| B::float_mask_fill(x, mask.expand(&shape).into_tensor(), value.into()))
    }

    pub(crate) fn greater(self, other: Self) -> Mask<B> {
        let dtype = self.bool_dtype();
        Mask::new(B::float_greater(self.0, other.0, dtype))
    }

    pub(crate) fn equal(self, other: Self) -> Mask<B> {
        let dtype = self.bool_dtype();
        Mask::new(B::float_equal(self.0, other.0, dtype))
    }

    pub(crate) fn lower(self, value: f32) -> Mask<B> {
        let dtype = self.bool_dtype();
        Mask::new(B::float_lower_elem(self.0, value.into(), dtype))
    }

    /// Where there is no number.
    pub(crate) fn nan(self) -> Mask<B> {
        let dtype = self.bool_dtype();
        Mask::new(B::float_is_nan(self.0, dtype))
    }

    /// Whole numbers as integers.
    pub(crate) fn into_ints(self) -> Ints<B> {
        Ints::rounded(self.0)
    }

    fn map(self, f: impl FnOnce(FloatTensor<B>) -> FloatTensor<B>) -> Self {
        if self.is_empty() {
            self
        } else {
            Self(f(self.0))
        }
    }

    fn with_scalar(self, value: f32, f: fn(FloatTensor<B>, Scalar) -> FloatTensor<B>) -> Self {
        self.map(|x| f(x, value.into()))
    }

    fn with(self, other: Self, f: fn(FloatTensor<B>, FloatTensor<B>) -> FloatTensor<B>) -> Self {
        if self.is_empty() || other.is_empty() {
            let pairs = self.shape().into_iter().zip(other.shape());
            let of_pair = |(a, b)| if a == 1 { b } else { a };
            let shape: Vec<usize> = pairs.map(of_pair).collect();
            return Self::zeros(&shape, &self.device());
        }
        Self(f(self.0, other.0))
    }
}

/// A range of one axis of a tensor.
pub(crate) fn slices(shape: &[usize], dim: usize, range: Range<usize>) -> Vec<Slice> {
    let mut ranges: Vec<Range<usize>> = shape.iter().map(|size| 0..*size).collect();
    ranges[dim] = range;
    let slice = |range: Range<usize>| Slice::new(range.start as isize, Some(range.end as isize), 1);
    ranges.into_iter().map(slice).collect()
}

/// Operators between tensors, and between a tensor and a number.
macro_rules! operator {
    ($trait:ident, $method:ident, $tensors:ident, $scalar:ident) => {
        impl<B: Backend> $trait for Reals<B> {
            type Output = Self;

            fn $method(self, other: Self) -> Self {
                self.with(other, B::$tensors)
            }
        }

        impl<B: Backend> $trait<f32> for Reals<B> {
            type Output = Self;

            fn $method(self, value: f32) -> Self {
                self.with_scalar(value, B::$scalar)
            }
        }
    };
}

operator!(Add, add, float_add, float_add_scalar);
operator!(Sub, sub, float_sub, float_sub_scalar);
operator!(Mul, mul, float_mul, float_mul_scalar);
operator!(Div, div, float_div, float_div_scalar);

impl<B: Backend> Neg for Reals<B> {
    type Output = Self;

    fn neg(self) -> Self {
        self.map(B::float_neg)
    }
}
