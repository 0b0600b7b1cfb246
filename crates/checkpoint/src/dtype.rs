//! The element types of a model's files, with the names of safetensors, and ggml's blocks.

use std::fmt;

use crate::Error;

/// The type of a tensor's elements. The sub-byte and complex types of safetensors are left out:
/// no DeepSeek checkpoint uses them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 binary64.
    F64,
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    BF16,
    /// 8-bit float, 4 exponent and 3 mantissa bits, no infinities (`e4m3fn`).
    F8E4M3,
    /// 8-bit float, 5 exponent and 2 mantissa bits.
    F8E5M2,
    /// A power of two in one byte: 2^(byte − 127). Used for scales.
    F8E8M0,
    /// Signed 64-bit integer.
    I64,
    /// Signed 32-bit integer.
    I32,
    /// Signed 16-bit integer.
    I16,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned 64-bit integer.
    U64,
    /// Unsigned 32-bit integer.
    U32,
    /// Unsigned 16-bit integer.
    U16,
    /// Unsigned 8-bit integer.
    U8,
    /// One byte, zero or one.
    Bool,
    /// ggml's 32 numbers of 4 bits with a scale.
    Q4_0,
    /// 32 numbers of 4 bits with a scale and a minimum.
    Q4_1,
    /// 32 numbers of 5 bits with a scale.
    Q5_0,
    /// 32 numbers of 5 bits with a scale and a minimum.
    Q5_1,
    /// 32 numbers of 8 bits with a scale.
    Q8_0,
    /// 256 numbers of 2 bits, with scales and minima of 4 bits.
    Q2K,
    /// 256 numbers of 3 bits, with scales of 6 bits.
    Q3K,
    /// 256 numbers of 4 bits, with scales and minima of 6 bits.
    Q4K,
    /// 256 numbers of 5 bits, with scales and minima of 6 bits.
    Q5K,
    /// 256 numbers of 6 bits, with scales of 8 bits.
    Q6K,
    /// 32 codes of 4 bits for the 16 values of a codebook, with a scale.
    Iq4Nl,
    /// 32 4-bit floats, 2 exponent and 1 mantissa bits, with a power of two.
    MxFp4,
}

impl DType {
    /// The dtypes of safetensors files.
    const SAFETENSORS: [Self; 16] = [
        Self::F64,
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::F8E4M3,
        Self::F8E5M2,
        Self::F8E8M0,
        Self::I64,
        Self::I32,
        Self::I16,
        Self::I8,
        Self::U64,
        Self::U32,
        Self::U16,
        Self::U8,
        Self::Bool,
    ];

    /// The dtypes of GGUF files by their numbers.
    const GGML: [(u32, Self); 20] = [
        (0, Self::F32),
        (1, Self::F16),
        (2, Self::Q4_0),
        (3, Self::Q4_1),
        (6, Self::Q5_0),
        (7, Self::Q5_1),
        (8, Self::Q8_0),
        (10, Self::Q2K),
        (11, Self::Q3K),
        (12, Self::Q4K),
        (13, Self::Q5K),
        (14, Self::Q6K),
        (20, Self::Iq4Nl),
        (24, Self::I8),
        (25, Self::I16),
        (26, Self::I32),
        (27, Self::I64),
        (28, Self::F64),
        (30, Self::BF16),
        (39, Self::MxFp4),
    ];

    /// ggml's other types by their numbers, for messages.
    const OTHER_GGML: [(u32, &str); 16] = [
        (9, "Q8_1"),
        (15, "Q8_K"),
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (23, "IQ4_XS"),
        (29, "IQ1_M"),
        (34, "TQ1_0"),
        (35, "TQ2_0"),
        (31, "Q4_0_4_4"),
        (32, "Q4_0_4_8"),
        (33, "Q4_0_8_8"),
        (40, "NVFP4"),
    ];

    /// Elements in a block: 1, except for ggml's blocks.
    // `kernels` has these sizes too, with its decoders. No arrow leads between the two crates; `model`, which sees both, has a
    // test that holds them together: `tests/ggml_blocks.rs`.
    pub fn block(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Iq4Nl | Self::MxFp4 => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K => 256,
            _ => 1,
        }
    }

    /// The size of one element, or of one block, in bytes.
    pub fn size_bytes(self) -> usize {
        match self {
            Self::MxFp4 => 17,
            Self::Q4_0 | Self::Iq4Nl => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::BF16 | Self::I16 | Self::U16 => 2,
            Self::F8E4M3 | Self::F8E5M2 | Self::F8E8M0 | Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    /// The name in a safetensors header; ggml's for its blocks.
    fn name(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E5M2 => "F8_E5M2",
            Self::F8E8M0 => "F8_E8M0",
            Self::I64 => "I64",
            Self::I32 => "I32",
            Self::I16 => "I16",
            Self::I8 => "I8",
            Self::U64 => "U64",
            Self::U32 => "U32",
            Self::U16 => "U16",
            Self::U8 => "U8",
            Self::Bool => "BOOL",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Iq4Nl => "IQ4_NL",
            Self::MxFp4 => "MXFP4",
        }
    }

    /// The dtype of that name in a safetensors header.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::SAFETENSORS
            .into_iter()
            .find(|dtype| dtype.name() == name)
    }

    /// The dtype of that number in a GGUF file.
    pub(crate) fn from_ggml(number: u32) -> Option<Self> {
        let known = Self::GGML.into_iter().find(|known| known.0 == number);
        known.map(|(_, dtype)| dtype)
    }

    /// The name of a type of GGUF files that is no dtype here.
    pub(crate) fn other_ggml(number: u32) -> String {
        let known = Self::OTHER_GGML.iter().find(|known| known.0 == number);
        match known {
            Some((_, name)) => (*name).to_owned(),
            None => format!("ggml type {number}"),
        }
    }

    /// The number in a GGUF file, if such files have it.
    pub(crate) fn to_ggml(self) -> Option<u32> {
        let known = Self::GGML.into_iter().find(|known| known.1 == self);
        known.map(|(number, _)| number)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl TryFrom<::safetensors::Dtype> for DType {
    type Error = Error;

    fn try_from(dtype: ::safetensors::Dtype) -> Result<Self, Error> {
        let found = dtype.to_string();
        Self::from_name(&found).ok_or(Error::UnsupportedDType { found })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_agrees_with_the_safetensors_crate_in_name_and_size() {
        for dtype in DType::SAFETENSORS {
            let name = serde_json::Value::from(dtype.to_string());
            let theirs: ::safetensors::Dtype = serde_json::from_value(name).unwrap();
            assert_eq!(theirs.to_string(), dtype.to_string());
            assert_eq!(theirs.bitsize(), dtype.size_bytes() * 8);
            assert_eq!(DType::try_from(theirs).unwrap(), dtype);
        }
    }

    #[test]
    fn dtypes_without_a_use_are_refused_by_name() {
        let error = DType::try_from(::safetensors::Dtype::C64).unwrap_err();
        assert_eq!(error.to_string(), "unsupported dtype `C64`");
    }
}
