//! Rounding a weight to the values it has once it is written in fewer bits.

use std::fmt::{Display, Formatter};
use std::str::FromStr;

use super::fp8;
use super::ggml::Ggml;
use crate::error::Error;
use crate::settings::Scales;

/// A number format that weights are rounded to, block by block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantizer {
    /// E4M3 in blocks of 128 × 128, see [`crate::fp8`].
    Fp8(Scales),
    /// A format of GGUF files, in blocks along a row.
    Gguf(Ggml),
}

impl Quantizer {
    /// All quantizers, from many bits to few.
    pub fn all() -> Vec<Self> {
        let mut all: Vec<_> = Ggml::WRITTEN.into_iter().map(Self::Gguf).collect();
        all.insert(2, Self::Fp8(Scales::F32));
        all
    }

    /// The quantizer for a weight of this row length: see [`Ggml::for_width`].
    pub fn for_width(self, width: usize) -> Self {
        match self {
            Self::Fp8(_) => self,
            Self::Gguf(format) => Self::Gguf(format.for_width(width)),
        }
    }

    /// The rows and columns at whose multiples a tile must start.
    pub(crate) fn block(self) -> [usize; 2] {
        match self {
            Self::Fp8(_) => fp8::BLOCK,
            Self::Gguf(format) => [1, format.block()],
        }
    }

    /// Rounds a tile `[rows, width]` of whole blocks; at the matrix's right and lower edge FP8 blocks may be partial.
    ///
    /// # Panics
    /// If the blocks of a GGUF format do not fill the values.
    pub fn round(self, values: &mut [f32], width: usize) {
        match self {
            Self::Fp8(kind) => fp8::round_blocks(values, width, kind),
            Self::Gguf(format) => format.round(values),
        }
    }
}

impl Display for Quantizer {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fp8(_) => f.write_str("fp8"),
            Self::Gguf(format) => write!(f, "gguf:{}", format.name()),
        }
    }
}

impl FromStr for Quantizer {
    type Err = Error;

    /// `fp8`, or `gguf:` and the name of a format.
    fn from_str(text: &str) -> Result<Self, Error> {
        let known = Self::all();
        let found = known.iter().find(|known| known.to_string() == text);
        found.copied().ok_or_else(|| Error::UnknownQuantizer {
            known: known.iter().map(Self::to_string).collect(),
            found: text.chars().filter(|c| !c.is_control()).take(40).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back() {
        for quantizer in Quantizer::all() {
            assert_eq!(
                quantizer.to_string().parse::<Quantizer>().unwrap(),
                quantizer
            );
        }
        let error = "gguf:q9_9".parse::<Quantizer>().unwrap_err().to_string();
        assert!(
            error.contains("gguf:q4_0") && error.contains("gguf:q9_9"),
            "{error}"
        );
    }
}
