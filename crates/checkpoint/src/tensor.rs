//! A named tensor of a file: dtype, shape and bytes, without any arithmetic.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use half::{bf16, f16};

use crate::{DType, Error, Result};

/// A tensor in a mapped file, or one made in memory. A clone shares the bytes.
///
/// The bytes are little-endian, row-major, and may start at any address: a safetensors file
/// need not align its tensors.
#[derive(Clone)]
pub struct Tensor {
    /// The key in the file.
    pub name: Arc<str>,
    /// Its file, for messages. `(memory)` if it has none.
    pub file: Arc<Path>,
    /// The type of its elements.
    pub dtype: DType,
    /// Its shape. Empty for a scalar.
    pub shape: Vec<usize>,
    /// Its elements.
    pub bytes: Bytes,
}

/// A tensor in a file's header: everything except its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// The key in the file.
    pub name: Arc<str>,
    /// The type of its elements.
    pub dtype: DType,
    /// Its shape. Empty for a scalar.
    pub shape: Vec<usize>,
}

impl Tensor {
    /// A tensor made in memory.
    ///
    /// # Errors
    /// If `bytes` has another length than `dtype` and `shape` need.
    pub fn new(name: &str, dtype: DType, shape: &[usize], bytes: Bytes) -> Result<Self> {
        let tensor = Self {
            name: name.into(),
            file: Path::new("(memory)").into(),
            dtype,
            shape: shape.to_vec(),
            bytes,
        };
        let expected = tensor.spec().n_bytes(&tensor.file)?;
        if tensor.bytes.len() != expected {
            return Err(Error::TensorLength {
                file: tensor.path(),
                tensor: tensor.name.to_string(),
                expected,
                found: tensor.bytes.len(),
            });
        }
        Ok(tensor)
    }

    /// Name, dtype and shape, without the bytes.
    pub fn spec(&self) -> TensorSpec {
        TensorSpec {
            name: Arc::clone(&self.name),
            dtype: self.dtype,
            shape: self.shape.clone(),
        }
    }

    /// The values as f32. F64 is rounded to nearest; the narrower types are exact.
    ///
    /// # Errors
    /// If the dtype is none of F64, F32, F16, BF16. The 8-bit floats are left out because they
    /// mean nothing without their scales.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let values = match self.dtype {
            DType::F64 => decode(&self.bytes, |b| f64::from_le_bytes(b) as f32),
            DType::F32 => decode(&self.bytes, f32::from_le_bytes),
            DType::F16 => decode(&self.bytes, |b| f16::from_le_bytes(b).to_f32()),
            DType::BF16 => decode(&self.bytes, |b| bf16::from_le_bytes(b).to_f32()),
            found => {
                return Err(Error::NotFloat {
                    file: self.path(),
                    tensor: self.name.to_string(),
                    found,
                });
            }
        };
        Ok(values)
    }

    /// Checks the shape.
    ///
    /// # Errors
    /// If the shape is not `expected`.
    pub fn expect_shape(&self, expected: &[usize]) -> Result<()> {
        if self.shape == expected {
            return Ok(());
        }
        Err(Error::Shape {
            file: self.path(),
            tensor: self.name.to_string(),
            expected: expected.to_vec(),
            found: self.shape.clone(),
        })
    }

    fn path(&self) -> PathBuf {
        self.file.to_path_buf()
    }
}

impl fmt::Debug for Tensor {
    // The bytes may be gigabytes: only their number is shown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tensor")
            .field("name", &self.name)
            .field("file", &self.file)
            .field("dtype", &self.dtype)
            .field("shape", &self.shape)
            .field("n_bytes", &self.bytes.len())
            .finish()
    }
}

impl TensorSpec {
    /// The size of the whole tensor, in bytes. `file` is named in the error.
    pub(crate) fn n_bytes(&self, file: &Path) -> Result<usize> {
        let elements = self
            .shape
            .iter()
            .try_fold(1usize, |n, &size| n.checked_mul(size));
        let block = self.dtype.block();
        // Blocks do not cross rows.
        let width = self.shape.last().copied().unwrap_or(1);
        let elements = elements.filter(|_| width.is_multiple_of(block));
        let size = elements.and_then(|n| (n / block).checked_mul(self.dtype.size_bytes()));
        size.ok_or_else(|| Error::ShapeOverflow {
            file: file.to_owned(),
            tensor: self.name.to_string(),
            dtype: self.dtype,
            found: self.shape.clone(),
        })
    }
}

/// Decodes elements of `N` bytes each, from any address.
fn decode<const N: usize>(bytes: &[u8], element: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    let (elements, _) = bytes.as_chunks::<N>();
    elements.iter().map(|&bytes| element(bytes)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn misaligned(bytes: &[u8]) -> Bytes {
        let mut padded = vec![0; 1];
        padded.extend_from_slice(bytes);
        Bytes::from(padded).slice(1..)
    }

    #[test]
    fn floats_decode_to_f32_from_any_address() {
        let check = |dtype, bytes: &[u8], expected: &[f32]| {
            let tensor = Tensor::new("x", dtype, &[expected.len()], misaligned(bytes)).unwrap();
            assert_eq!(tensor.to_f32().unwrap(), expected, "{dtype}");
        };
        check(DType::BF16, &[0x80, 0x3f, 0x00, 0xc0], &[1.0, -2.0]);
        check(
            DType::F16,
            &[0x00, 0x3c, 0x01, 0x00],
            &[1.0, 5.960_464_5e-8],
        );
        check(DType::F32, &1.5f32.to_le_bytes(), &[1.5]);
        check(DType::F64, &0.1f64.to_le_bytes(), &[0.1]);
        check(DType::F32, &[], &[]);
    }

    #[test]
    fn bad_tensors_are_refused_with_expected_and_found() {
        let check = |error: Error, expected: &str| assert_eq!(error.to_string(), expected);
        let new =
            |dtype, shape: &[usize]| Tensor::new("x", dtype, shape, Bytes::from_static(&[0; 4]));
        check(
            new(DType::BF16, &[3]).unwrap_err(),
            "`(memory)`: tensor `x`: expected 6 bytes, found 4",
        );
        check(
            new(DType::F32, &[usize::MAX, 2]).unwrap_err(),
            "`(memory)`: tensor `x`: F32 of an impossible shape [18446744073709551615, 2]",
        );
        check(
            new(DType::F8E4M3, &[2, 2]).unwrap().to_f32().unwrap_err(),
            "`(memory)`: tensor `x`: expected dtype F64, F32, F16 or BF16, found F8_E4M3",
        );
        check(
            new(DType::F32, &[1])
                .unwrap()
                .expect_shape(&[1, 1])
                .unwrap_err(),
            "`(memory)`: tensor `x`: expected shape [1, 1], found [1]",
        );
    }

    #[test]
    fn a_shape_with_a_zero_has_no_bytes_and_a_scalar_has_one_element() {
        let empty = Tensor::new("x", DType::F32, &[0, 7], Bytes::new()).unwrap();
        assert_eq!(empty.to_f32().unwrap(), [0f32; 0]);
        let scalar = Tensor::new("x", DType::F32, &[], Bytes::from_static(&[0; 4])).unwrap();
        assert_eq!(scalar.to_f32().unwrap(), [0.0]);
    }
}
