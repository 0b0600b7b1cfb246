//! The AdamW update, and the sum that gradient clipping needs.
//!
//! Source: Decoupled weight decay regularization, arXiv:1711.05101, algorithm 2, with the order of operations of
//! PyTorch's `torch.optim.AdamW`: decay first, epsilon outside the square root and after its bias correction.

use rayon::prelude::*;

/// Elements per task, and per partial sum.
const TASK: usize = 1 << 14;

/// The numbers of one update.
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
    /// Multiplies the gradient: 1, or less where it is clipped.
    pub gradient_scale: f64,
}

/// Updates a parameter and its moments.
pub(crate) fn update(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], step: AdamWStep) {
    let [beta1, beta2] = step.betas;
    let correction = |beta: f64| 1.0 - beta.powi(step.number.min(i32::MAX as u64) as i32);
    let (size, root) = (
        (step.rate / correction(beta1)) as f32,
        correction(beta2).sqrt() as f32,
    );
    let (keep, eps, scale) = (
        (1.0 - step.rate * step.weight_decay) as f32,
        step.eps as f32,
        step.gradient_scale as f32,
    );
    let (beta1, beta2) = (beta1 as f32, beta2 as f32);
    let parts = p
        .par_chunks_mut(TASK)
        .zip(g.par_chunks(TASK))
        .zip(m.par_chunks_mut(TASK).zip(v.par_chunks_mut(TASK)));
    parts.for_each(|((p, g), (m, v))| {
        for ((p, g), (m, v)) in p.iter_mut().zip(g).zip(m.iter_mut().zip(v)) {
            let g = g * scale;
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            *p = *p * keep - size * *m / (v.sqrt() / root + eps);
        }
    });
}

/// The sum of squares in f64, by parts of fixed size.
pub(crate) fn sum_of_squares(x: &[f32]) -> f64 {
    let parts: Vec<f64> = x
        .par_chunks(TASK)
        .map(|part| part.iter().map(|x| f64::from(*x) * f64::from(*x)).sum())
        .collect();
    parts.iter().sum()
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
}
