//! Tensors of a GPU: contiguous, empty, or as words.

use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::ops::FloatTensorOps;
use burn::backend::{Cube, TensorMetadata};
use burn::cubecl::std::tensor::into_contiguous;
use burn::tensor::{DType, FloatDType, Shape};

use crate::formats::placed::{CubeTensor, tensor_of};

/// A view (transposed, narrowed, broadcast) is copied: kernels take slices and know no strides.
pub(super) fn contiguous(x: CubeTensor) -> CubeTensor {
    if x.is_contiguous() {
        return x;
    }
    let (client, device, shape, dtype) = (x.client.clone(), x.device.clone(), x.shape(), x.dtype);
    let copy = into_contiguous(&client, x.binding(), dtype_to_storage_type(dtype));
    tensor_of((&client, &device), copy.handle, shape, dtype)
}

/// Memory for a tensor on the device of another.
pub(super) fn empty(like: &CubeTensor, shape: impl Into<Shape>, dtype: DType) -> CubeTensor {
    let shape = shape.into();
    // Empty buffers cannot be bound.
    let bytes = shape.num_elements().max(1) * dtype.size();
    let handle = like.client.empty(bytes);
    tensor_of((&like.client, &like.device), handle, shape, dtype)
}

pub(super) fn zeros(like: &CubeTensor, shape: impl Into<Shape>) -> CubeTensor {
    Cube::float_zeros(shape.into(), &like.device, FloatDType::F32)
}

/// A tensor of f32 as words.
pub(super) fn word_plane(x: CubeTensor) -> CubeTensor {
    let n = x.shape().num_elements();
    tensor_of((&x.client, &x.device), x.handle.clone(), [n], DType::U32)
}
