//! Decoding ggml's blocks.
//!
//! Source: ggml-org/llama.cpp: ggml/src/ggml-common.h (the layouts) and ggml/src/ggml-quants.c, `dequantize_row_*`.

use half::f16;

use super::{GGML_BLOCK, Ggml, SUPER_BLOCK};
use crate::simd::{decode_f16, multiversion};

/// Values of half a super-block. The k-quants of 2, 3 and 6 bits store each half separately.
const HALF: usize = SUPER_BLOCK / 2;

impl Ggml {
    /// Decodes whole blocks.
    ///
    /// # Panics
    /// If `bytes` are not the blocks of `out`.
    pub(crate) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        let blocks = bytes.len() / self.block_bytes();
        assert!(
            blocks * self.block_bytes() == bytes.len() && blocks * self.block() == out.len(),
            "{} bytes for {} values of {}",
            bytes.len(),
            out.len(),
            self.name()
        );
        match self {
            Self::F16 => decode_f16(bytes, out),
            Self::Q8_0 => q8_0(bytes, out),
            Self::Q4_0 => q4_0(bytes, out),
            Self::Q4_1 => q4_1(bytes, out),
            Self::Q5_0 => q5_0(bytes, out),
            Self::Q5_1 => q5_1(bytes, out),
            Self::Q2K => q2_k(bytes, out),
            Self::Q3K => q3_k(bytes, out),
            Self::Q4K => q4_k(bytes, out),
            Self::Q5K => q5_k(bytes, out),
            Self::Q6K => q6_k(bytes, out),
            Self::Iq4Nl => iq4_nl(bytes, out),
            Self::MxFp4 => mxfp4(bytes, out),
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F16 => 2,
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
        }
    }
}

#[inline(always)]
fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32_const()
}

/// Blocks of `BYTES` bytes and `N` values, one after the other.
#[inline(always)]
fn each<const BYTES: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; N]),
) {
    let (blocks, _) = bytes.as_chunks::<BYTES>();
    let (values, _) = out.as_chunks_mut::<N>();
    blocks
        .iter()
        .zip(values)
        .for_each(|(block, values)| decode(block, values));
}

/// The low halves of 16 bytes are the first 16 values, the high halves the others.
#[inline(always)]
fn nibbles(codes: &[u8], values: &mut [f32; GGML_BLOCK], value: impl Fn(usize, u8) -> f32) {
    let (low, high) = values.split_at_mut(GGML_BLOCK / 2);
    for (i, (code, (low, high))) in codes.iter().zip(low.iter_mut().zip(high)).enumerate() {
        *low = value(i, code & 15);
        *high = value(i + GGML_BLOCK / 2, code >> 4);
    }
}

multiversion! {
    /// Scale; 32 signed codes.
    fn q8_0<FMA>(bytes: &[u8], out: &mut [f32]) {
        let _ = FMA;
        each::<34, GGML_BLOCK>(bytes, out, |block, values| {
            let d = half_at(block, 0);
            for (value, code) in values.iter_mut().zip(&block[2..]) {
                *value = f32::from(*code as i8) * d;
            }
        });
    }
}

multiversion! {
    /// Scale; codes that are 8 too large.
    fn q4_0<FMA>(bytes: &[u8], out: &mut [f32]) {
        let _ = FMA;
        each::<18, GGML_BLOCK>(bytes, out, |block, values| {
            let d = half_at(block, 0);
            nibbles(&block[2..], values, |_, code| (f32::from(code) - 8.0) * d);
        });
    }
}

multiversion! {
    /// Scale, minimum; codes.
    fn q4_1<FMA>(bytes: &[u8], out: &mut [f32]) {
        let _ = FMA;
        each::<20, GGML_BLOCK>(bytes, out, |block, values| {
            let (d, min) = (half_at(block, 0), half_at(block, 2));
            nibbles(&block[4..], values, |_, code| f32::from(code) * d + min);
        });
    }
}

/// The fifth bits of 32 codes.
#[inline(always)]
fn fifth_bits(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

#[inline(always)]
fn fifth_bit(bits: u32, i: usize) -> f32 {
    if bits >> i & 1 == 1 { 16.0 } else { 0.0 }
}

multiversion! {
    /// Scale; fifth bits; codes that are 16 too large.
    fn q5_0<FMA>(bytes: &[u8], out: &mut [f32]) {
        let _ = FMA;
        each::<22, GGML_BLOCK>(bytes, out, |block, values| {
            let (d, bits) = (half_at(block, 0), fifth_bits(block, 2));
            nibbles(&block[6..], values, |i, code| (f32::from(code) + fifth_bit(bits, i) - 16.0) * d);
        });
    }
}

multiversion! {
    /// Scale, minimum; fifth bits; codes.
    fn q5_1<FMA>(bytes: &[u8], out: &mut [f32]) {
        let _ = FMA;
        each::<24, GGML_BLOCK>(bytes, out, |block, values| {
            let (d, min, bits) = (half_at(block, 0), half_at(block, 2), fifth_bits(block, 4));
            nibbles(&block[8..], values, |i, code| (f32::from(code) + fifth_bit(bits, i)) * d + min);
        });
    }
}

multiversion! {
    /// Scales and minima per 16 values, 4 bits each; codes; the scale of the scales and that of the minima.
    fn q2_k<FMA>(bytes: &[u8], out: &mut [f32]) {
        let _ = FMA;
        each::<84, SUPER_BLOCK>(bytes, out, |block, values| {
            let (d, min) = (half_at(block, 80), half_at(block, 82));
            for (group, values) in values.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let scales = block[group];
                let (d, min) = (d * f32::from(scales & 15), min * f32::from(scales >> 4));
                let (codes, shift) = two_bits(group);
                for (value, code) in values.iter_mut().zip(&block[16 + codes..]) {
                    *value = d * f32::from(code >> shift & 3) - min;
                }
            }
        });
    }
}

/// The first byte and the shift of a group's 16 two-bit codes: in each half, the four groups with the same 16 bytes lie
/// above each other.
#[inline(always)]
fn two_bits(group: usize) -> (usize, usize) {
    let (half, in_half) = (group / 8, group % 8);
    (half * 32 + in_half % 2 * 16, in_half / 2 * 2)
}

multiversion! {
    /// Third bits, set if nothing is subtracted; codes; sixteen scales of 6 bits that are 32 too large; their scale.
    fn q3_k<FMA>(bytes: &[u8], out: &mut [f32]) {
        let _ = FMA;
        each::<110, SUPER_BLOCK>(bytes, out, |block, values| {
            let (d, scales) = (half_at(block, 108), &block[96..108]);
            for (group, values) in values.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let low = if group < 8 { scales[group] & 15 } else { scales[group - 8] >> 4 };
                let high = scales[8 + group % 4] >> (group / 4 * 2) & 3;
                let d = d * (f32::from(low | high << 4) - 32.0);
                let (codes, shift) = two_bits(group);
                let (masks, bit) = (&block[group % 2 * 16..], group / 2);
                for (value, (code, mask)) in values.iter_mut().zip(block[32 + codes..].iter().zip(masks)) {
                    let taken = if mask >> bit & 1 == 1 { 0.0 } else { 4.0 };
                    *value = d * (f32::from(code >> shift & 3) - taken);
                }
            }
        });
    }
}

/// The 6-bit scale and minimum of a group of 32. Those of the first four groups have a byte each; those of the others
/// are in the bits that these leave free.
#[inline(always)]
pub(super) fn six_bits(scales: &[u8], group: usize) -> (f32, f32) {
    let (scale, min) = if group < 4 {
        (scales[group] & 63, scales[group + 4] & 63)
    } else {
        (
            scales[group + 4] & 15 | scales[group - 4] >> 6 << 4,
            scales[group + 4] >> 4 | scales[group] >> 6 << 4,
        )
    };
    (f32::from(scale), f32::from(min))
}

multiversion! {
    /// The scale of the scales and that of the minima; scales and minima per 32 values; codes.
    fn q4_k<FMA>(bytes: &[u8], out: &mut [f32]) {
        let _ = FMA;
        each::<144, SUPER_BLOCK>(bytes, out, |block, values| {
            let (d, min) = (half_at(block, 0), half_at(block, 2));
            for (group, values) in values.as_chunks_mut::<GGML_BLOCK>().0.iter_mut().enumerate() {
                let (scale, least) = six_bits(&block[4..16], group);
                let (d, min, shift) = (d * scale, min * least, group % 2 * 4);
                for (value, code) in values.iter_mut().zip(&block[16 + group / 2 * 32..]) {
                    *value = d * f32::from(code >> shift & 15) - min;
                }
            }
        });
    }
}

multiversion! {
    /// As with 4 bits; before the codes the fifth bits, one bit per byte and group.
    fn q5_k<FMA>(bytes: &[u8], out: &mut [f32]) {
        let _ = FMA;
        each::<176, SUPER_BLOCK>(bytes, out, |block, values| {
            let (d, min) = (half_at(block, 0), half_at(block, 2));
            for (group, values) in values.as_chunks_mut::<GGML_BLOCK>().0.iter_mut().enumerate() {
                let (scale, least) = six_bits(&block[4..16], group);
                let (d, min, shift) = (d * scale, min * least, group % 2 * 4);
                let codes = block[48 + group / 2 * 32..].iter().zip(&block[16..48]);
                for (value, (code, bits)) in values.iter_mut().zip(codes) {
                    *value = d * f32::from(code >> shift & 15 | (bits >> group & 1) << 4) - min;
                }
            }
        });
    }
}

multiversion! {
    /// Low four bits; high two bits; signed scales per 16 values; their scale. Codes are 32 too large.
    fn q6_k<FMA>(bytes: &[u8], out: &mut [f32]) {
        let _ = FMA;
        each::<210, SUPER_BLOCK>(bytes, out, |block, values| {
            let d = half_at(block, 208);
            for (group, values) in values.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let d = d * f32::from(block[192 + group] as i8);
                let (half, at) = (group * 16 / HALF, group * 16 % HALF);
                // The 128 values of a half are four times 32: the low bits of the first two are in the low halves of 64
                // bytes.
                let (low, shift) = (half * 64 + at % 64, at / 64 * 4);
                let (high, pair) = (128 + half * 32 + at % 32, at / 32 * 2);
                for (i, value) in values.iter_mut().enumerate() {
                    let code = block[low + i] >> shift & 15 | (block[high + i] >> pair & 3) << 4;
                    *value = d * (f32::from(code) - 32.0);
                }
            }
        });
    }
}

/// The codebook of [`Ggml::Iq4Nl`], whose steps grow away from zero.
pub(crate) const IQ4_NL_CODEBOOK: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];
/// The codebook of [`Ggml::MxFp4`], doubled.
pub(crate) const MXFP4_DOUBLED: [i8; 16] =
    [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

multiversion! {
    /// Scale; codes.
    fn iq4_nl<FMA>(bytes: &[u8], out: &mut [f32]) {
        let _ = FMA;
        each::<18, GGML_BLOCK>(bytes, out, |block, values| {
            let d = half_at(block, 0);
            nibbles(&block[2..], values, |_, code| d * f32::from(IQ4_NL_CODEBOOK[usize::from(code)]));
        });
    }
}

multiversion! {
    /// Exponent; codes.
    fn mxfp4<FMA>(bytes: &[u8], out: &mut [f32]) {
        let _ = FMA;
        each::<17, GGML_BLOCK>(bytes, out, |block, values| {
            let d = half_of_power(block[0]);
            nibbles(&block[1..], values, |_, code| d * f32::from(MXFP4_DOUBLED[usize::from(code)]));
        });
    }
}

/// 2^(exponent − 128), the smallest two as subnormal numbers.
#[inline(always)]
pub(crate) fn half_of_power(exponent: u8) -> f32 {
    f32::from_bits(match exponent {
        0 | 1 => 0x0020_0000 << exponent,
        _ => (u32::from(exponent) - 1) << 23,
    })
}
