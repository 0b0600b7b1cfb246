//! FP8 number formats as DeepSeek publishes them.
//!
//! E4M3 (the `fn` variant): 1 sign, 4 exponent (bias 7) and 3 mantissa bits, largest value 448, no infinity, and
//! exactly two NaN codes, 0x7F and 0xFF. E8M0: an exponent alone, value `2^(byte − 127)`, 0xFF is NaN.
//!
//! Decoding E4M3 needs no table: the seven magnitude bits, moved to the top of an f32's mantissa, are that value
//! scaled by `2^-120`, subnormals included, so one shift and one multiplication by `2^120` decode it.
//!
//! E5M2: 5 exponent (bias 15) and 2 mantissa bits, largest value 57344, with infinities: the upper half of an f16.
//!
//! Encoding rounds to nearest, ties to even. Values beyond the largest become the largest; NaN stays NaN.

mod tiles;

pub(crate) use tiles::{BLOCK, round_blocks, round_columns, round_rows};
pub use tiles::{TILE_GROUP, Tiles, encode_tiles};

pub use crate::settings::Scales;
use crate::simd::multiversion;

/// Decodes one E4M3 code.
#[inline(always)]
pub fn e4m3_to_f32(code: u8) -> f32 {
    const TWO_POW_120: f32 = f32::from_bits((127 + 120) << 23);
    let magnitude = f32::from_bits(u32::from(code & 0x7F) << 20) * TWO_POW_120;
    let magnitude = if code & 0x7F == 0x7F {
        f32::NAN
    } else {
        magnitude
    };
    f32::from_bits(magnitude.to_bits() | u32::from(code & 0x80) << 24)
}

/// Decodes one E5M2 code.
pub fn e5m2_to_f32(code: u8) -> f32 {
    half::f16::from_bits(u16::from(code) << 8).to_f32()
}

/// Encodes as E4M3.
#[inline(always)]
pub fn f32_to_e4m3(value: f32) -> u8 {
    encode::<3, 7>(value, 448.0)
}

/// Encodes as E5M2.
#[inline(always)]
pub fn f32_to_e5m2(value: f32) -> u8 {
    encode::<2, 15>(value, 57344.0)
}

/// Encodes with `MANTISSA` bits and an exponent of bias `BIAS`. Both ways of rounding are computed and one is selected,
/// so that the compiler can vectorize.
#[inline(always)]
fn encode<const MANTISSA: u32, const BIAS: u32>(value: f32, largest: f32) -> u8 {
    let dropped = 23 - MANTISSA;
    let magnitude = value.abs();
    let is_nan = magnitude.to_bits() > f32::INFINITY.to_bits();
    let magnitude = if magnitude < largest {
        magnitude
    } else {
        largest
    };
    let bits = magnitude.to_bits();
    // Rounds by carrying: adds half of the last remaining bit, or a little less if that bit is 0.
    let carried = bits + ((1 << (dropped - 1)) - 1) + (bits >> dropped & 1);
    let normal = (carried >> dropped).wrapping_sub((127 - BIAS) << MANTISSA);
    // Below the smallest normal number, the rounding of the sum leaves the multiple of the smallest step in its
    // mantissa.
    let anchor = f32::from_bits((127 + 24 - BIAS - MANTISSA) << 23);
    let subnormal = (magnitude + anchor).to_bits() - anchor.to_bits();
    let smallest_normal = (128 - BIAS) << 23;
    let code = if bits < smallest_normal {
        subnormal
    } else {
        normal
    };
    let code = if is_nan { 0x7F } else { code };
    (code | value.to_bits() >> 24 & 0x80) as u8
}

/// A value rounded to E4M3: [`f32_to_e4m3`] and [`e4m3_to_f32`] without the code between them.
#[inline(always)]
pub(crate) fn round_to_e4m3(value: f32) -> f32 {
    const LARGEST: f32 = 448.0;
    const SMALLEST_NORMAL: u32 = (127 - 6) << 23;
    /// Its last bit is worth 2⁻⁹, the smallest step.
    const ANCHOR: f32 = 16384.0;
    let magnitude = value.abs();
    let is_nan = magnitude.to_bits() > f32::INFINITY.to_bits();
    let magnitude = if magnitude < LARGEST {
        magnitude
    } else {
        LARGEST
    };
    let bits = magnitude.to_bits();
    let normal = f32::from_bits((bits + 0x7_FFFF + (bits >> 20 & 1)) & !0xF_FFFF);
    let subnormal = (magnitude + ANCHOR) - ANCHOR;
    let rounded = if bits < SMALLEST_NORMAL {
        subnormal
    } else {
        normal
    };
    let rounded = if is_nan { f32::NAN } else { rounded };
    f32::from_bits(rounded.to_bits() | value.to_bits() & (1 << 31))
}

multiversion! {
    /// `codes = e4m3(values / scale)`.
    fn encode_scaled<FMA>(values: &[f32], scale: f32, codes: &mut [u8]) {
        let _ = FMA;
        for (code, value) in codes.iter_mut().zip(values) {
            *code = f32_to_e4m3(*value / scale);
        }
    }
}

multiversion! {
    /// `codes = e4m3(values / scales)`, one scale per value.
    fn encode_scaled_each<FMA>(values: &[f32], scales: &[f32], codes: &mut [u8]) {
        let _ = FMA;
        for (code, (value, scale)) in codes.iter_mut().zip(values.iter().zip(scales)) {
            *code = f32_to_e4m3(*value / scale);
        }
    }
}

/// The power of two that is at least `value`, a positive number in f32's normal range.
pub fn ceil_power_of_two(value: f32) -> f32 {
    f32::from_bits((value.to_bits() + 0x007F_FFFF) & 0xFF80_0000)
}

/// Encodes a power of two as E8M0.
pub fn power_of_two_to_e8m0(value: f32) -> u8 {
    (value.to_bits() >> 23) as u8
}

/// Decodes one E8M0 code, a power of two.
pub fn e8m0_to_f32(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22), // 2^-127, a subnormal f32
        0xFF => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_landmarks_decode() {
        for (code, value) in [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 7.0 * 2f32.powi(-9)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x3C, 1.5),
            (0x7E, 448.0),
            (0xB8, -1.0),
            (0xFE, -448.0),
        ] {
            assert_eq!(e4m3_to_f32(code), value, "code {code:#04x}");
        }
        assert!(e4m3_to_f32(0x7F).is_nan() && e4m3_to_f32(0xFF).is_nan());
        assert!(e4m3_to_f32(0x80).is_sign_negative());
    }

    /// The nearest of all values, ties to the even code: what an encoder has to find.
    fn nearest(value: f32, decode: impl Fn(u8) -> f32, largest: u8) -> u8 {
        let magnitude = f64::from(value.abs());
        let distance = |code: &u8| (f64::from(decode(*code)) - magnitude).abs();
        let (mut best, mut least) = (0, f64::INFINITY);
        for code in 0..=largest {
            let found = distance(&code);
            if found < least || (found == least && code % 2 == 0) {
                (best, least) = (code, found);
            }
        }
        best | if value.is_sign_negative() { 0x80 } else { 0 }
    }

    #[test]
    fn encoding_finds_the_nearest_value_and_the_even_one_of_two() {
        // Every value of the formats, every middle between two, and a little on either side.
        let around = |decode: fn(u8) -> f32, largest: u8| {
            let middles = (0..largest).map(move |code| (decode(code) + decode(code + 1)) / 2.0);
            let values = (0..=largest).map(decode).chain(middles);
            values
                .flat_map(|v| [v, v.next_up(), v.next_down()])
                .flat_map(|v| [v, -v])
                .collect::<Vec<f32>>()
        };
        for value in around(e4m3_to_f32, 0x7E) {
            let expected = nearest(value, e4m3_to_f32, 0x7E);
            assert_eq!(f32_to_e4m3(value), expected, "E4M3 of {value}");
        }
        for value in around(e5m2_to_f32, 0x7B) {
            let expected = nearest(value, e5m2_to_f32, 0x7B);
            assert_eq!(f32_to_e5m2(value), expected, "E5M2 of {value}");
        }
        for value in around(e4m3_to_f32, 0x7E).into_iter().chain([1e9, -1e9]) {
            let expected = e4m3_to_f32(f32_to_e4m3(value));
            assert_eq!(
                round_to_e4m3(value).to_bits(),
                expected.to_bits(),
                "{value}"
            );
        }
        assert!(round_to_e4m3(f32::NAN).is_nan());
        let beyond = [f32::MAX, f32::INFINITY, -449.0, 60_000.0];
        assert_eq!(beyond.map(f32_to_e4m3), [0x7E, 0x7E, 0xFE, 0x7E]);
        assert_eq!(beyond.map(f32_to_e5m2), [0x7B, 0x7B, 0xDF, 0x7B]);
        assert!(e4m3_to_f32(f32_to_e4m3(f32::NAN)).is_nan());
        assert!(e5m2_to_f32(f32_to_e5m2(-f32::NAN)).is_nan());
    }

    #[test]
    fn every_code_reads_back_as_itself() {
        for code in 0..=255u8 {
            if code & 0x7F != 0x7F {
                assert_eq!(f32_to_e4m3(e4m3_to_f32(code)), code);
            }
            if code & 0x7F < 0x7C {
                assert_eq!(f32_to_e5m2(e5m2_to_f32(code)), code);
            }
            if (1..255).contains(&code) {
                assert_eq!(power_of_two_to_e8m0(e8m0_to_f32(code)), code);
            }
        }
    }

    #[test]
    fn e8m0_is_a_power_of_two() {
        for code in 0..=254u8 {
            assert_eq!(
                f64::from(e8m0_to_f32(code)),
                2f64.powi(i32::from(code) - 127)
            );
        }
        assert!(e8m0_to_f32(255).is_nan());
    }
}
