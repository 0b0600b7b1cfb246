//! FP8 number formats as DeepSeek publishes them.
//!
//! E4M3 (the `fn` variant): 1 sign, 4 exponent (bias 7) and 3 mantissa bits, largest value 448, no infinity, and
//! exactly two NaN codes, 0x7F and 0xFF. E8M0: an exponent alone, value `2^(byte − 127)`, 0xFF is NaN.
//!
//! Decoding E4M3 needs no table: the seven magnitude bits, moved to the top of an f32's mantissa, are that value
//! scaled by `2^-120`, subnormals included, so one shift and one multiplication by `2^120` decode it.

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
