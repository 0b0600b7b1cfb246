//! What all encoders share: the bytes of scales and codes.

use half::f16;

use super::GGML_BLOCK;

/// A value rounded to f16.
#[inline(always)]
pub(super) fn f16_of(value: f32) -> f32 {
    f16::from_f32(value).to_f32()
}

/// The bytes of a value in f16.
#[inline(always)]
pub(super) fn f16_bytes(value: f32) -> [u8; 2] {
    f16::from_f32(value).to_le_bytes()
}

/// Blocks of `N` values and `BYTES` bytes, one after the other.
#[inline(always)]
pub(super) fn each<const N: usize, const BYTES: usize>(
    values: &[f32],
    out: &mut [u8],
    encode: impl Fn(&[f32; N], &mut [u8; BYTES]),
) {
    let (blocks, _) = values.as_chunks::<N>();
    let (bytes, _) = out.as_chunks_mut::<BYTES>();
    blocks
        .iter()
        .zip(bytes)
        .for_each(|(block, bytes)| encode(block, bytes));
}

/// Packs the low four bits of 32 codes: the first 16 into the low halves of 16 bytes, the others into the high halves.
#[inline(always)]
pub(super) fn pack_nibbles(codes: &[f32; GGML_BLOCK], out: &mut [u8]) {
    let (low, high) = codes.split_at(GGML_BLOCK / 2);
    for (byte, (low, high)) in out.iter_mut().zip(low.iter().zip(high)) {
        *byte = *low as u8 & 15 | (*high as u8 & 15) << 4;
    }
}

/// The fifth bits of 32 codes.
#[inline(always)]
pub(super) fn fifth_bits(codes: &[f32; GGML_BLOCK]) -> [u8; 4] {
    let bits = (0..).zip(codes);
    let bits = bits.fold(0u32, |bits, (i, code)| bits | (*code as u32 >> 4 & 1) << i);
    bits.to_le_bytes()
}
