//! The block formats of ggml: decoding, encoding and rounding.
//!
//! A block is 32 consecutive values of a row, or 256 in the k-quants, with a scale of its own; f16 has no blocks.
//! Rounding is encoding and decoding in one, so a product sees a rounded weight exactly as a file of the format would
//! hold it.
//!
//! Source: ggml-org/llama.cpp: ggml/src/ggml-quants.c, `quantize_row_*_ref` and `dequantize_row_*`; its fallbacks for
//! odd widths: src/llama-quant.cpp.

mod codebook;
mod dequantize;
mod encode;
mod imatrix;
mod k_quants;
mod pack;
mod scale_search;

pub(crate) use self::dequantize::{IQ4_NL_CODEBOOK, MXFP4_DOUBLED, half_of_power};

/// Values of a block of the older formats.
const GGML_BLOCK: usize = 32;
/// Values of a block of the k-quants.
const SUPER_BLOCK: usize = 256;

/// A number format of GGUF files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ggml {
    /// Half precision.
    F16,
    /// 8 bits and a scale.
    Q8_0,
    /// 5 bits and a scale.
    Q5_0,
    /// 5 bits, a scale and a minimum.
    Q5_1,
    /// 4 bits and a scale.
    Q4_0,
    /// 4 bits, a scale and a minimum.
    Q4_1,
    /// 6 bits, scales of 8 bits.
    Q6K,
    /// 5 bits, scales and minima of 6 bits.
    Q5K,
    /// 4 bits, scales and minima of 6 bits.
    Q4K,
    /// 3 bits, scales of 6 bits.
    Q3K,
    /// 2 bits, scales and minima of 4 bits.
    Q2K,
    /// 4 bits that index a codebook of 16 values, and a scale.
    Iq4Nl,
    /// 4-bit floats with 2 exponent bits, and a power of two. Read only.
    MxFp4,
}

impl Ggml {
    /// All formats that can be written, from many bits to few.
    pub const WRITTEN: [Self; 12] = [
        Self::F16,
        Self::Q8_0,
        Self::Q6K,
        Self::Q5_1,
        Self::Q5_0,
        Self::Q5K,
        Self::Q4_1,
        Self::Q4_0,
        Self::Iq4Nl,
        Self::Q4K,
        Self::Q3K,
        Self::Q2K,
    ];
    /// Formats that can only be read.
    pub const READ_ONLY: [Self; 1] = [Self::MxFp4];

    /// Its name, such as `q4_0`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q6K => "q6_k",
            Self::Q5K => "q5_k",
            Self::Q4K => "q4_k",
            Self::Q3K => "q3_k",
            Self::Q2K => "q2_k",
            Self::Iq4Nl => "iq4_nl",
            Self::MxFp4 => "mxfp4",
        }
    }

    /// Values of a block.
    pub fn block(self) -> usize {
        match self {
            Self::F16 => 1,
            Self::Q8_0 | Self::Q5_0 | Self::Q5_1 | Self::Q4_0 | Self::Q4_1 => GGML_BLOCK,
            Self::Iq4Nl | Self::MxFp4 => GGML_BLOCK,
            Self::Q6K | Self::Q5K | Self::Q4K | Self::Q3K | Self::Q2K => SUPER_BLOCK,
        }
    }

    /// Whether values are stored in blocks with a scale. Products multiply such weights with activations in int8.
    pub(crate) fn has_blocks(self) -> bool {
        self.block() > 1
    }

    /// The format for rows of this width: this one, a similar one with smaller blocks if its own do not fill the rows,
    /// or f16 if none does.
    pub fn for_width(self, width: usize) -> Self {
        if width.is_multiple_of(self.block()) {
            return self;
        }
        match self {
            Self::Q6K => Self::Q8_0.for_width(width),
            Self::Q5K => Self::Q5_1.for_width(width),
            Self::Q4K => Self::Q5_0.for_width(width),
            Self::Q3K | Self::Q2K => Self::Q4_0.for_width(width),
            _ => Self::F16,
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::k_quants::{
        BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0, GgmlType,
    };

    use super::*;
    use crate::testing::noise;

    /// Encodes and decodes as another program does.
    fn through<B: GgmlType>(values: &mut [f32]) {
        let mut blocks = vec![B::zeros(); values.len() / B::BLCK_SIZE];
        B::from_float(values, &mut blocks);
        B::to_float(&blocks, values);
    }

    fn squares(before: &[f32], after: &[f32]) -> f32 {
        let squares = before.iter().zip(after).map(|(b, a)| (b - a) * (b - a));
        squares.sum::<f32>().sqrt()
    }

    fn sample() -> Vec<f32> {
        let mut values = noise(8 * SUPER_BLOCK, 3);
        values
            .iter_mut()
            .enumerate()
            .for_each(|(i, v)| *v *= 0.01 * (i % 7) as f32 * (i / 64 + 1) as f32);
        // A block of zeros, one of a constant, one with two values of the largest magnitude.
        values[..32].fill(0.0);
        values[32..64].fill(-0.3);
        (values[70], values[80]) = (1.0, -1.0);
        // Too small for the inverse of a scale.
        values[96..128].fill(1e-39);
        values
    }

    #[test]
    fn rounding_is_what_another_program_decodes_from_its_own_codes() {
        let check = |ours: Ggml, theirs: fn(&mut [f32])| {
            let (mut found, mut expected) = (sample(), sample());
            ours.round(&mut found);
            theirs(&mut expected);
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert_eq!(found, expected, "{} at {i}", ours.name());
            }
        };
        check(Ggml::Q8_0, through::<BlockQ8_0>);
        check(Ggml::Q5_0, through::<BlockQ5_0>);
        check(Ggml::Q5_1, through::<BlockQ5_1>);
        check(Ggml::Q4_0, through::<BlockQ4_0>);
        check(Ggml::Q4_1, through::<BlockQ4_1>);
    }

    /// What rounding leaves is what the written bytes mean.
    #[test]
    fn bytes_mean_what_rounding_leaves() {
        for format in Ggml::WRITTEN {
            let (values, mut rounded) = (sample(), sample());
            format.round(&mut rounded);
            let mut bytes = vec![0; values.len() / format.block() * format.block_bytes()];
            format.encode(&values, &mut bytes);
            let mut decoded = values.clone();
            format.decode(&bytes, &mut decoded);
            assert_eq!(decoded, rounded, "{}", format.name());
        }
    }

    #[test]
    fn more_bits_keep_more() {
        let error = |format: Ggml| {
            let (before, mut after) = (sample(), sample());
            format.round(&mut after);
            squares(&before, &after)
        };
        let errors = Ggml::WRITTEN.map(error);
        let limits = [
            (Ggml::F16, Ggml::Q8_0),
            (Ggml::Q8_0, Ggml::Q6K),
            (Ggml::Q6K, Ggml::Q5_0),
            (Ggml::Q5K, Ggml::Q4K),
            (Ggml::Q5_0, Ggml::Iq4Nl),
            (Ggml::Q5_0, Ggml::Q4_0),
            (Ggml::Q4K, Ggml::Q3K),
            (Ggml::Q3K, Ggml::Q2K),
        ];
        for (more, fewer) in limits {
            let of = |format| errors[Ggml::WRITTEN.iter().position(|f| *f == format).unwrap()];
            assert!(of(more) < of(fewer), "{more:?} {fewer:?} {errors:?}");
        }
    }

    #[test]
    fn widths_that_no_block_fills_take_the_next_wider_format() {
        assert_eq!(Ggml::Q4K.for_width(512), Ggml::Q4K);
        assert_eq!(Ggml::Q4K.for_width(96), Ggml::Q5_0);
        assert_eq!(Ggml::Q6K.for_width(96), Ggml::Q8_0);
        assert_eq!(Ggml::Q2K.for_width(96), Ggml::Q4_0);
        assert_eq!(Ggml::Q5K.for_width(50), Ggml::F16);
        assert_eq!(Ggml::Q8_0.for_width(50), Ggml::F16);
    }
}
