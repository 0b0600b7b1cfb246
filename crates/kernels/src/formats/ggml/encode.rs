//! Encoding ggml's blocks of 32, and rounding to them.
//!
//! A block's values become codes in place, which are packed into bytes or multiplied back at once. So rounding a weight
//! for a product needs no bytes and cannot differ from what a file would hold.
//!
//! Source: ggml-org/llama.cpp: ggml/src/ggml-quants.c, `quantize_row_*_ref`.

use super::codebook::codebook_codes;
use super::pack::{each, f16_bytes, f16_of, fifth_bits, pack_nibbles};
use super::{GGML_BLOCK, Ggml, k_quants};
use crate::simd::{multiversion, round_to_f16};

impl Ggml {
    /// Encodes whole blocks.
    ///
    /// # Panics
    /// If `out` are not the bytes of the blocks of `values`, or the format is only read.
    pub fn encode(self, values: &[f32], out: &mut [u8]) {
        let blocks = values.len() / self.block();
        assert!(
            blocks * self.block() == values.len() && blocks * self.block_bytes() == out.len(),
            "{} values of {} for {} bytes",
            values.len(),
            self.name(),
            out.len()
        );
        match self {
            Self::F16 => f16s(values, out),
            Self::Q8_0 => q8_0(values, out),
            Self::Q4_0 => q4_0(values, out),
            Self::Q4_1 => q4_1(values, out),
            Self::Q5_0 => q5_0(values, out),
            Self::Q5_1 => q5_1(values, out),
            Self::Q2K => k_quants::q2_k(values, out),
            Self::Q3K => k_quants::q3_k(values, out),
            Self::Q4K => k_quants::q4_k(values, out),
            Self::Q5K => k_quants::q5_k(values, out),
            Self::Q6K => k_quants::q6_k(values, out),
            Self::Iq4Nl => iq4_nl(values, out),
            Self::MxFp4 => panic!("{} is only read", self.name()),
        }
    }

    /// Rounds whole blocks to the values that the format can hold.
    ///
    /// # Panics
    /// If the last block is not whole, or the format is only read.
    pub(crate) fn round(self, values: &mut [f32]) {
        assert!(
            values.len().is_multiple_of(self.block()),
            "whole blocks of {}",
            self.name()
        );
        match self {
            Self::F16 => round_to_f16(values),
            Self::Q8_0 => round_q8_0(values),
            Self::Q5_0 => round_scaled(values, 16.0),
            Self::Q4_0 => round_scaled(values, 8.0),
            Self::Q5_1 => round_between(values, 31.0),
            Self::Q4_1 => round_between(values, 15.0),
            _ => self.through(values),
        }
    }

    /// Encodes and decodes, some blocks at a time.
    fn through(self, values: &mut [f32]) {
        let mut bytes = [0; 256];
        let bytes = &mut bytes[..self.block_bytes()];
        for block in values.chunks_exact_mut(self.block()) {
            self.encode(block, bytes);
            self.decode(bytes, block);
        }
    }
}

/// 1 / d, or 0 if that would be infinite: for blocks of zeros or of tiny values.
#[inline(always)]
fn inverse(d: f32) -> f32 {
    let inverse = 1.0 / d;
    if inverse.is_infinite() { 0.0 } else { inverse }
}

/// The largest magnitude becomes ±127. Returns the scale.
#[inline(always)]
fn signed_codes(block: &mut [f32; GGML_BLOCK]) -> f32 {
    let largest = block
        .iter()
        .fold(0f32, |a, v| if v.abs() > a { v.abs() } else { a });
    let d = largest / 127.0;
    let inverse = inverse(d);
    block.iter_mut().for_each(|v| *v = (*v * inverse).round());
    d
}

/// The value of the largest magnitude becomes code 0, and 0 becomes code `half`. Returns the scale.
#[inline(always)]
fn scaled_codes(block: &mut [f32; GGML_BLOCK], half: f32) -> f32 {
    let most = block
        .iter()
        .fold(0f32, |a, v| if v.abs() > a { v.abs() } else { a });
    // If two values have the largest magnitude, the first counts.
    let most = block.iter().find(|v| v.abs() == most);
    let d = most.copied().unwrap_or(0.0) / -half;
    let inverse = inverse(d);
    for v in block {
        let code = (*v * inverse + (half + 0.5)).trunc();
        *v = if code > 2.0 * half - 1.0 {
            2.0 * half - 1.0
        } else {
            code
        };
    }
    d
}

/// The smallest value becomes code 0, the largest code `steps`. Returns the scale and the smallest value.
#[inline(always)]
fn codes_between(block: &mut [f32; GGML_BLOCK], steps: f32) -> (f32, f32) {
    let least = block
        .iter()
        .fold(f32::INFINITY, |a, v| if *v < a { *v } else { a });
    let most = block
        .iter()
        .fold(f32::NEG_INFINITY, |a, v| if *v > a { *v } else { a });
    let d = (most - least) / steps;
    let inverse = inverse(d);
    for v in block {
        let code = ((*v - least) * inverse + 0.5).trunc();
        *v = if code > steps { steps } else { code };
    }
    (d, least)
}

multiversion! {
    fn round_q8_0<FMA>(values: &mut [f32]) {
        let _ = FMA;
        for block in values.as_chunks_mut().0 {
            let d = f16_of(signed_codes(block));
            block.iter_mut().for_each(|v| *v *= d);
        }
    }
}

multiversion! {
    fn round_scaled<FMA>(values: &mut [f32], half: f32) {
        let _ = FMA;
        for block in values.as_chunks_mut().0 {
            let d = f16_of(scaled_codes(block, half));
            block.iter_mut().for_each(|v| *v = (*v - half) * d);
        }
    }
}

multiversion! {
    fn round_between<FMA>(values: &mut [f32], steps: f32) {
        let _ = FMA;
        for block in values.as_chunks_mut().0 {
            let (d, least) = codes_between(block, steps);
            let (d, least) = (f16_of(d), f16_of(least));
            block.iter_mut().for_each(|v| *v = *v * d + least);
        }
    }
}

multiversion! {
    fn f16s<FMA>(values: &[f32], out: &mut [u8]) {
        let _ = FMA;
        each::<1, 2>(values, out, |value, bytes| *bytes = f16_bytes(value[0]));
    }
}

multiversion! {
    fn q8_0<FMA>(values: &[f32], out: &mut [u8]) {
        let _ = FMA;
        each::<GGML_BLOCK, 34>(values, out, |block, bytes| {
            let mut codes = *block;
            let d = signed_codes(&mut codes);
            bytes[..2].copy_from_slice(&f16_bytes(d));
            bytes[2..].iter_mut().zip(codes).for_each(|(byte, code)| *byte = code as i8 as u8);
        });
    }
}

multiversion! {
    fn q4_0<FMA>(values: &[f32], out: &mut [u8]) {
        let _ = FMA;
        each::<GGML_BLOCK, 18>(values, out, |block, bytes| {
            let mut codes = *block;
            let d = scaled_codes(&mut codes, 8.0);
            bytes[..2].copy_from_slice(&f16_bytes(d));
            pack_nibbles(&codes, &mut bytes[2..]);
        });
    }
}

multiversion! {
    fn q5_0<FMA>(values: &[f32], out: &mut [u8]) {
        let _ = FMA;
        each::<GGML_BLOCK, 22>(values, out, |block, bytes| {
            let mut codes = *block;
            let d = scaled_codes(&mut codes, 16.0);
            bytes[..2].copy_from_slice(&f16_bytes(d));
            bytes[2..6].copy_from_slice(&fifth_bits(&codes));
            pack_nibbles(&codes, &mut bytes[6..]);
        });
    }
}

multiversion! {
    fn q4_1<FMA>(values: &[f32], out: &mut [u8]) {
        let _ = FMA;
        each::<GGML_BLOCK, 20>(values, out, |block, bytes| {
            let mut codes = *block;
            let (d, least) = codes_between(&mut codes, 15.0);
            bytes[..2].copy_from_slice(&f16_bytes(d));
            bytes[2..4].copy_from_slice(&f16_bytes(least));
            pack_nibbles(&codes, &mut bytes[4..]);
        });
    }
}

multiversion! {
    fn q5_1<FMA>(values: &[f32], out: &mut [u8]) {
        let _ = FMA;
        each::<GGML_BLOCK, 24>(values, out, |block, bytes| {
            let mut codes = *block;
            let (d, least) = codes_between(&mut codes, 31.0);
            bytes[..2].copy_from_slice(&f16_bytes(d));
            bytes[2..4].copy_from_slice(&f16_bytes(least));
            bytes[4..8].copy_from_slice(&fifth_bits(&codes));
            pack_nibbles(&codes, &mut bytes[8..]);
        });
    }
}

multiversion! {
    /// Errors of large values weigh more.
    fn iq4_nl<FMA>(values: &[f32], out: &mut [u8]) {
        let _ = FMA;
        each::<GGML_BLOCK, 18>(values, out, |block, bytes| {
            let (d, codes) = codebook_codes(block, &block.map(|v| v * v));
            bytes[..2].copy_from_slice(&f16_bytes(d));
            pack_nibbles(&codes, &mut bytes[2..]);
        });
    }
}
