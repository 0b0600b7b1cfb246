//! Exponentials of whole rows, as many at a time as the machine has lanes.
//!
//! The library's `expf` takes one value per call, which is too slow for rows of a vocabulary's length. This one is
//! plain arithmetic that the compiler vectorizes: `exp(x) = 2ⁿ · exp(r)` with `n` the integer nearest to `x / ln 2` and
//! a polynomial for `|r| ≤ ln 2 / 2`. Its relative error is below 2e-7; results below 2e-38 are 0.

use super::multiversion::multiversion;

/// e^x. −∞ gives 0, NaN stays NaN.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    /// Adding and subtracting it rounds to an integer: 1.5 · 2²³.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts, the first with few enough bits that its multiples are exact.
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    /// exp(r) − 1 − r over r², for |r| ≤ ln 2 / 2; from Cephes' `expf`.
    const TERMS: [f32; 6] = [
        1.987_569_1e-4,
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ];
    let multiply_add = |a: f32, b: f32, c: f32| if FMA { a.mul_add(b, c) } else { a * b + c };
    let rounded = multiply_add(x, std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = multiply_add(n, -LN2[1], multiply_add(n, -LN2[0], x));
    let sum = TERMS[1..]
        .iter()
        .fold(TERMS[0], |sum, term| multiply_add(sum, r, *term));
    let power = multiply_add(sum, r * r, r) + 1.0;
    // Half of 2ⁿ from its bits: `n` reaches 128, which alone would be infinite.
    let exponent = rounded
        .to_bits()
        .wrapping_sub(ROUND.to_bits())
        .wrapping_add(126);
    let result = power * f32::from_bits(exponent << 23) * 2.0;
    match x {
        x if x < -86.9 => 0.0,
        x if x > 88.8 => f32::INFINITY,
        _ => result,
    }
}

/// Accumulators of a sum or a maximum, so that its order does not depend on the instruction set.
const EXP_LANES: usize = 32;

multiversion! {
    /// The largest value, or −∞.
    fn max<FMA>(values: &[f32]) -> f32 {
        let _ = FMA;
        let larger = |a: f32, b: f32| if a < b { b } else { a };
        let mut lanes = [f32::NEG_INFINITY; EXP_LANES];
        for part in values.chunks(EXP_LANES) {
            lanes.iter_mut().zip(part).for_each(|(lane, v)| *lane = larger(*lane, *v));
        }
        lanes.into_iter().fold(f32::NEG_INFINITY, larger)
    }
}

multiversion! {
    /// `v = exp(v − shift)` in place; returns the sum.
    fn exp_shifted<FMA>(values: &mut [f32], shift: f32) -> f32 {
        let mut lanes = [0f32; EXP_LANES];
        let mut parts = values.chunks_exact_mut(EXP_LANES);
        for part in parts.by_ref() {
            for (lane, v) in lanes.iter_mut().zip(part) {
                *v = exp::<FMA>(*v - shift);
                *lane += *v;
            }
        }
        for (lane, v) in lanes.iter_mut().zip(parts.into_remainder()) {
            *v = exp::<FMA>(*v - shift);
            *lane += *v;
        }
        lanes.iter().sum()
    }
}

multiversion! {
    /// `v = v · factor` in place.
    fn scale<FMA>(values: &mut [f32], factor: f32) {
        let _ = FMA;
        values.iter_mut().for_each(|v| *v *= factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_those_of_f64() {
        for fma in [false, true] {
            let of = |x| if fma { exp::<true>(x) } else { exp::<false>(x) };
            let mut worst = 0f64;
            for i in -86_900..88_700 {
                let x = i as f32 * 1e-3;
                let expected = f64::from(x).exp();
                worst = worst.max((f64::from(of(x)) / expected - 1.0).abs());
            }
            assert!(worst < 2e-7, "relative error {worst}, fma {fma}");
            assert_eq!(
                [f32::NEG_INFINITY, -1e30, 0.0, 89.0, f32::INFINITY].map(of),
                [0.0, 0.0, 1.0, f32::INFINITY, f32::INFINITY]
            );
            assert!(of(f32::NAN).is_nan());
        }
    }

    #[test]
    fn rows_of_any_length_sum_to_one_as_a_softmax() {
        for len in [1, 31, 32, 33, 100] {
            let mut row: Vec<f32> = (0..len).map(|i| ((i * 37) % 11) as f32 - 4.0).collect();
            row[0] = f32::NEG_INFINITY;
            row[len - 1] = 7.0;
            assert_eq!(max(&row), 7.0);
            let expected: f64 = row.iter().map(|v| f64::from(*v - 7.0).exp()).sum();
            let sum = exp_shifted(&mut row, 7.0);
            assert!((f64::from(sum) - expected).abs() < 1e-5);
            scale(&mut row, 1.0 / sum);
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
            assert_eq!(max(&[]), f32::NEG_INFINITY);
        }
    }
}
