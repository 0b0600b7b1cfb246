//! The AdamW update, and the sum that gradient clipping needs.
//!
//! Source: Decoupled weight decay regularization, arXiv:1711.05101, algorithm 2, with the order of operations of
//! PyTorch's `torch.optim.AdamW`: decay first, epsilon outside the square root and after its bias correction. Its scalars are
//! f64, and each is rounded to f32 once: `1 - beta` of a beta that is rounded already would be wrong by up to 1e-4.

use half::bf16;
use rayon::prelude::*;

use crate::simd::{multiversion, sum};

/// Elements per task, and per partial sum.
const TASK_ELEMENTS: usize = 1 << 14;

/// The scalars of one update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub rate: f64,
    /// Decay rates of the moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Which update this is, from 1.
    pub number: u64,
    /// Multiplies the gradient: 1, or less where it is clipped or was scaled.
    pub gradient_scale: f64,
    /// The seed for stochastic rounding of bf16 moments; `None` rounds to nearest.
    pub noise: Option<u64>,
    /// The number of the first element, if this is a part of a tensor: random bits depend on an element's number.
    pub first: u64,
}

/// A number format of moments.
pub(crate) trait Moment: Copy + Send + Sync {
    fn to_f32(self) -> f32;
    /// Rounds stochastically with 16 random bits, or to nearest.
    fn from_f32(value: f32, noise: Option<u32>) -> Self;
}

impl Moment for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_f32(value: f32, _: Option<u32>) -> Self {
        value
    }
}

impl Moment for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }

    /// The random bits are added to those that are dropped: how often the sum carries is how near the value is to the
    /// next one.
    #[inline(always)]
    fn from_f32(value: f32, noise: Option<u32>) -> Self {
        match noise {
            Some(noise) if value.is_finite() => {
                Self::from_bits((value.to_bits().wrapping_add(noise & 0xFFFF) >> 16) as u16)
            }
            _ => Self::from_f32(value),
        }
    }
}

/// Random bits for an element: the finalizer of MurmurHash3 over a counter.
#[inline(always)]
fn random_bits(seed: u64, element: u64) -> u32 {
    let mut bits = seed.wrapping_add(element.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ (bits >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    bits = (bits ^ (bits >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    (bits >> 32) as u32
}

/// Updates a parameter and its moments.
pub(crate) fn update<M: Moment>(
    p: &mut [f32],
    g: &[f32],
    m: &mut [M],
    v: &mut [M],
    step: AdamWStep,
) {
    let [beta1, beta2] = step.betas;
    let correction = |beta: f64| 1.0 - beta.powf(step.number as f64);
    let (size, root) = (
        (step.rate / correction(beta1)) as f32,
        correction(beta2).sqrt() as f32,
    );
    let (keep, eps, scale) = (
        (1.0 - step.rate * step.weight_decay) as f32,
        step.eps as f32,
        step.gradient_scale as f32,
    );
    let (first_share, second_keep, second_share) =
        ((1.0 - beta1) as f32, beta2 as f32, (1.0 - beta2) as f32);
    let is_slow = first_share < 0.5;
    let parts = p
        .par_chunks_mut(TASK_ELEMENTS)
        .zip(g.par_chunks(TASK_ELEMENTS))
        .zip(
            m.par_chunks_mut(TASK_ELEMENTS)
                .zip(v.par_chunks_mut(TASK_ELEMENTS)),
        );
    parts.enumerate().for_each(|(part, ((p, g), (m, v)))| {
        let elements = step.first + (part * TASK_ELEMENTS) as u64..;
        for (((p, g), (m, v)), element) in
            p.iter_mut().zip(g).zip(m.iter_mut().zip(v)).zip(elements)
        {
            let g = g * scale;
            let change = g - m.to_f32();
            // PyTorch's `lerp`, which is exact at the end that is nearer.
            let first = match is_slow {
                true => m.to_f32() + first_share * change,
                false => g - (1.0 - first_share) * change,
            };
            let second = second_keep * v.to_f32() + second_share * g * g;
            *p = *p * keep - size * first / (second.sqrt() / root + eps);
            let noise = step.noise.map(|seed| random_bits(seed, element));
            *m = M::from_f32(first, noise);
            *v = M::from_f32(second, noise.map(|bits| bits >> 16));
        }
    });
}

/// The sum of squares in f64, in parts of fixed size.
pub(crate) fn sum_of_squares(x: &[f32]) -> f64 {
    let parts: Vec<f64> = x.par_chunks(TASK_ELEMENTS).map(squares).collect();
    parts.iter().sum()
}

multiversion! {
    fn squares<FMA>(x: &[f32]) -> f64 {
        sum([x], |[x]| f64::from(x) * f64::from(x))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_updates_are_those_written_out() {
        let (mut p, mut m, mut v) = ([1.0f32], [0.0f32], [0.0f32]);
        let step = |number| AdamWStep {
            rate: 0.1,
            betas: [0.9, 0.99],
            eps: 1e-8,
            weight_decay: 0.01,
            number,
            gradient_scale: 0.5,
            noise: None,
            first: 0,
        };
        update(&mut p, &[4.0], &mut m, &mut v, step(1));
        // The first update is the learning rate, whatever the gradient: 1 · (1 − 0.001) − 0.1.
        assert!((p[0] - 0.899).abs() < 1e-6, "{p:?}");
        update(&mut p, &[-2.0], &mut m, &mut v, step(2));
        // m = 0.9·0.2 − 0.1·1 = 0.08, v = 0.99·0.04 + 0.01·1 = 0.0496.
        let expected = 0.899 * 0.999 - 0.1 / 0.19 * 0.08 / ((0.0496f64 / 0.0199).sqrt() + 1e-8);
        assert!(
            (f64::from(p[0]) - expected).abs() < 1e-6,
            "{p:?} {expected}"
        );
    }

    /// 0.999 of a bf16 number lies nearer to the number itself: rounded to the nearest it never falls.
    #[test]
    fn stochastic_rounding_keeps_the_mean_where_the_nearest_number_stands_still() {
        const N: usize = 20_000;
        let mean_after = |noise: Option<u64>| {
            let (mut p, g) = (vec![0.0f32; N], vec![0.0f32; N]);
            let (mut m, mut v) = (vec![bf16::ZERO; N], vec![bf16::ONE; N]);
            for number in 1..=100 {
                let step = AdamWStep {
                    rate: 0.0,
                    betas: [0.9, 0.999],
                    eps: 1e-8,
                    weight_decay: 0.0,
                    number,
                    gradient_scale: 1.0,
                    noise: noise.map(|seed| seed + number),
                    first: 0,
                };
                update(&mut p, &g, &mut m, &mut v, step);
            }
            v.iter().map(|v| f64::from(v.to_f32())).sum::<f64>() / N as f64
        };
        assert_eq!(mean_after(None), 1.0);
        let expected = 0.999f64.powi(100);
        let found = mean_after(Some(7));
        // A hundred roundings of at most 2⁻⁸ each, averaged over 20,000 numbers.
        assert!((found - expected).abs() < 1e-3, "{found} {expected}");
        assert_eq!(found, mean_after(Some(7)));
        assert_ne!(found, mean_after(Some(8)));
    }

    #[test]
    fn random_rounding_finds_one_of_the_two_neighbors() {
        for bits in 0..=0xFFFF {
            let value = 1.0 + 0.3 * 2f32.powi(-7);
            let rounded = <bf16 as Moment>::from_f32(value, Some(bits)).to_f32();
            assert!(
                rounded == 1.0 || rounded == 1.0 + 2f32.powi(-7),
                "{rounded}"
            );
        }
        let exact = <bf16 as Moment>::from_f32(-1.5, Some(0xFFFF));
        assert_eq!(exact.to_f32(), -1.5);
        let infinite = <bf16 as Moment>::from_f32(f32::INFINITY, Some(0xFFFF));
        assert!(infinite.to_f32().is_infinite());
    }
}
