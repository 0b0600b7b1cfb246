//! Integer and boolean tensors of a backend, as the plain operations use them.

use std::ops::Range;

use burn::backend::tensor::{BoolTensor, Device, FloatTensor, IndexingUpdateOp, IntTensor};
use burn::backend::{
    Backend, BoolDType, DType, FloatDType, IntDType, Scalar, TensorData, TensorMetadata,
    get_or_init_device_settings,
};

use crate::backend::plain::primitives::Primitives;
use crate::backend::plain::reals::{Reals, slices};
use crate::backend::plain::sums::{LONGEST, parts};

/// An i32 tensor of any rank.
#[derive(Clone, Debug)]
pub(crate) struct Ints<B: Backend>(IntTensor<B>);

impl<B: Backend> Ints<B> {
    /// The tensor, as i32.
    pub(crate) fn new(tensor: IntTensor<B>) -> Self {
        Self(if tensor.dtype() == DType::I32 {
            tensor
        } else {
            B::int_cast(tensor, IntDType::I32)
        })
    }

    pub(crate) fn into_tensor(self) -> IntTensor<B> {
        self.0
    }

    /// Floats that are whole numbers, as integers.
    pub(crate) fn rounded(tensor: FloatTensor<B>) -> Self {
        Self(B::float_into_int(tensor, IntDType::I32))
    }

    /// Host values, uploaded.
    pub(crate) fn upload(values: Vec<i32>, shape: &[usize], device: &Device<B>) -> Self {
        let data = TensorData::new(values, shape.to_vec());
        Self(B::int_from_data(data, device))
    }

    /// `0..n`.
    pub(crate) fn count(n: usize, device: &Device<B>) -> Self
    where
        B: Primitives,
    {
        Self(B::count(n, device))
    }

    pub(crate) fn device(&self) -> Device<B> {
        self.0.device()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.shape().num_elements()
    }

    fn bool_dtype(&self) -> BoolDType {
        get_or_init_device_settings::<B>(&self.device()).bool_dtype
    }

    pub(crate) fn reshape(self, shape: &[usize]) -> Self {
        Self(B::int_reshape(self.0, shape.to_vec().into()))
    }

    /// A range, which is not empty, of one axis.
    pub(crate) fn narrow(self, dim: usize, range: Range<usize>) -> Self {
        let shape = self.0.shape().to_vec();
        if range == (0..shape[dim]) {
            return self;
        }
        Self(B::int_slice(self.0, &slices(&shape, dim, range)))
    }

    /// Where each number of a permutation `[n]` is.
    pub(crate) fn inverse(self) -> Self
    where
        B: Primitives,
    {
        let (n, device) = (self.len(), self.device());
        if n == 0 {
            return self;
        }
        let count = Self::count(n, &device);
        let mut places = B::int_zeros([n].into(), &device, IntDType::I32);
        for part in parts(n, LONGEST) {
            let at = self.clone().narrow(0, part.clone()).0;
            let count = count.clone().narrow(0, part).0;
            places = B::int_select_assign(places, 0, at, count, IndexingUpdateOp::Add);
        }
        Self(places)
    }

    pub(crate) fn add(self, other: Self) -> Self {
        Self(B::int_add(self.0, other.0))
    }

    pub(crate) fn plus(self, value: i32) -> Self {
        self.with_scalar(value, B::int_add_scalar)
    }

    pub(crate) fn times(self, value: i32) -> Self {
        self.with_scalar(value, B::int_mul_scalar)
    }

    pub(crate) fn over(self, value: i32) -> Self {
        self.with_scalar(value, B::int_div_scalar)
    }

    pub(crate) fn clamp(self, least: i32, most: i32) -> Self {
        Self(B::int_clamp(self.0, least.into(), most.into()))
    }

    pub(crate) fn xor(self, other: Self) -> Self {
        Self(B::bitwise_xor(self.0, other.0))
    }

    pub(crate) fn and(self, bits: i32) -> Self {
        self.with_scalar(bits, B::bitwise_and_scalar)
    }

    /// Shifted right; of numbers that are not negative.
    pub(crate) fn shifted(self, bits: i32) -> Self {
        self.with_scalar(bits, B::bitwise_right_shift_scalar)
    }

    fn with_scalar(self, value: i32, f: fn(IntTensor<B>, Scalar) -> IntTensor<B>) -> Self {
        Self(f(self.0, value.into()))
    }

    pub(crate) fn equal(self, other: Self) -> Mask<B> {
        let dtype = self.bool_dtype();
        Mask(B::int_equal(self.0, other.0, dtype))
    }

    pub(crate) fn equals(self, value: i32) -> Mask<B> {
        let dtype = self.bool_dtype();
        Mask(B::int_equal_elem(self.0, value.into(), dtype))
    }

    pub(crate) fn lower(self, other: Self) -> Mask<B> {
        let dtype = self.bool_dtype();
        Mask(B::int_lower(self.0, other.0, dtype))
    }

    pub(crate) fn lower_than(self, value: i32) -> Mask<B> {
        let dtype = self.bool_dtype();
        Mask(B::int_lower_elem(self.0, value.into(), dtype))
    }

    /// The numbers in f32; those below 2²⁴ exactly.
    pub(crate) fn into_values(self) -> Reals<B> {
        Reals::new(B::int_into_float(self.0, FloatDType::F32))
    }
}

/// A boolean tensor of any rank.
#[derive(Clone, Debug)]
pub(crate) struct Mask<B: Backend>(BoolTensor<B>);

impl<B: Backend> Mask<B> {
    pub(crate) fn new(tensor: BoolTensor<B>) -> Self {
        Self(tensor)
    }

    pub(crate) fn into_tensor(self) -> BoolTensor<B> {
        self.0
    }

    /// Repeated along axes of size 1.
    pub(crate) fn expand(self, shape: &[usize]) -> Self {
        if self.0.shape().to_vec() == shape {
            return self;
        }
        Self(B::bool_expand(self.0, shape.to_vec().into()))
    }

    pub(crate) fn reshape(self, shape: &[usize]) -> Self {
        Self(B::bool_reshape(self.0, shape.to_vec().into()))
    }

    pub(crate) fn or(self, other: Self) -> Self {
        Self(B::bool_or(self.0, other.0))
    }

    pub(crate) fn and(self, other: Self) -> Self {
        Self(B::bool_and(self.0, other.0))
    }

    pub(crate) fn not(self) -> Self {
        Self(B::bool_not(self.0))
    }

    /// 1 where it is set, 0 elsewhere.
    pub(crate) fn into_values(self) -> Reals<B> {
        Reals::new(B::bool_into_float(self.0, FloatDType::F32))
    }
}
