//! Conversion between f32 and the 16-bit formats.

#![expect(
    unsafe_code,
    reason = "vector instructions on slices whose lengths are checked"
)]

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::instructions::{Instructions, SimdWork};
use super::isa::{Isa, LANES};
use super::multiversion::multiversion;

/// Values per step of a conversion.
const AT_ONCE: usize = 256;

/// The bits of the nearest bf16, ties to even: the same as the `half` crate's, in a form that compiles to vectors.
#[inline(always)]
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let nearest = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    (if value.is_nan() { quiet } else { nearest }) as u16
}

multiversion! {
    /// Rounds f32 values to bf16 and back.
    fn round_to_bf16<FMA>(values: &mut [f32]) {
        let _ = FMA;
        for value in values {
            *value = f32::from_bits(u32::from(bf16_bits(*value)) << 16);
        }
    }
}
multiversion! {
    /// Rounds f32 values to bf16.
    fn narrow_to_bf16<FMA>(values: &[f32], out: &mut [bf16]) {
        let _ = FMA;
        for (value, out) in values.iter().zip(out) {
            *out = bf16::from_bits(bf16_bits(*value));
        }
    }
}
multiversion! {
    /// Widens bf16 values to f32.
    fn widen_bf16<FMA>(values: &[bf16], out: &mut [f32]) {
        let _ = FMA;
        for (value, out) in values.iter().zip(out) {
            *out = f32::from_bits(u32::from(value.to_bits()) << 16);
        }
    }
}

/// Rounds f32 values to f16 and back; values beyond the range become infinite.
pub(crate) fn round_to_f16(values: &mut [f32]) {
    let mut halves = [f16::ZERO; AT_ONCE];
    for values in values.chunks_mut(AT_ONCE) {
        let halves = &mut halves[..values.len()];
        halves.convert_from_f32_slice(values);
        halves.convert_to_f32_slice(values);
    }
}

/// Decodes f16 values.
pub(crate) fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    Instructions::best().run(Decoding { bytes, out });
}

/// Decodes f16 values with the instructions of an [`Isa`].
#[derive(Debug)]
struct Decoding<'a> {
    bytes: &'a [u8],
    out: &'a mut [f32],
}

impl SimdWork for Decoding<'_> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let bytes = self.bytes.chunks(2 * LANES);
        for (bytes, out) in bytes.zip(self.out.chunks_mut(LANES)) {
            // SAFETY: whole steps lie in both, and what is left is copied to where a whole step can be read and
            // written.
            unsafe {
                if bytes.len() == 2 * LANES && out.len() == LANES {
                    I::store(I::load_f16(bytes.as_ptr()), out.as_mut_ptr());
                } else {
                    let (mut last, mut values) = ([0; 2 * LANES], [0.0; LANES]);
                    last[..bytes.len()].copy_from_slice(bytes);
                    I::store(I::load_f16(last.as_ptr()), values.as_mut_ptr());
                    out.copy_from_slice(&values[..out.len()]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    #[test]
    fn rounding_to_bf16_is_the_librarys() {
        let special = [
            0.0,
            -0.0,
            f32::NAN,
            f32::INFINITY,
            f32::MAX,
            1e-40,
            f32::from_bits(0x7F80_0001),
        ];
        let halfway = (0..99).map(|i| f32::from_bits(0x3F80_8000 + (i << 15)));
        let values: Vec<f32> = special
            .into_iter()
            .chain(halfway)
            .chain(noise(99, 1))
            .collect();
        let mut narrow = vec![bf16::ZERO; values.len()];
        narrow_to_bf16(&values, &mut narrow);
        let expected: Vec<u16> = values
            .iter()
            .map(|v| bf16::from_f32(*v).to_bits())
            .collect();
        assert_eq!(
            narrow.iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
            expected
        );
        let (mut rounded, mut widened) = (values, vec![0.0; narrow.len()]);
        round_to_bf16(&mut rounded);
        widen_bf16(&narrow, &mut widened);
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits() >> 16).collect::<Vec<_>>();
        assert_eq!(bits(&rounded), bits(&widened));
        assert_eq!(
            bits(&rounded),
            expected.into_iter().map(u32::from).collect::<Vec<_>>()
        );
    }
}
