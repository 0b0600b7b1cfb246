//! Root-mean-square normalization, `y = x · (mean(x²) + eps)^-½ · weight`, over the last axis.

use rayon::prelude::*;

use crate::memory::zeros;
use crate::simd::{multiversion, sum};

/// Rows per task. The weight's gradient is summed task by task, so the order of its sum is fixed.
const TASK_ROWS: usize = 64;

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let squares = sum([x], |[x]| f64::from(x) * f64::from(x));
    1.0 / ((squares / x.len() as f64) as f32 + eps).sqrt()
}

/// x `[rows, width]`, weight `[normed ≤ width]` → `[rows, width]`: the first `normed` features are normalized, the
/// others copied.
pub(crate) fn forward(x: &[f32], width: usize, weight: &[f32], eps: f32) -> Vec<f32> {
    let normed = weight.len();
    let mut y = zeros(x.len());
    y.par_chunks_mut(width * TASK_ROWS)
        .zip(x.par_chunks(width * TASK_ROWS))
        .for_each(|(y, x)| {
            for (y, x) in y.chunks_mut(width).zip(x.chunks(width)) {
                normalize(&mut y[..normed], &x[..normed], weight, eps);
                y[normed..].copy_from_slice(&x[normed..]);
            }
        });
    y
}

/// Gradients of x `[rows, width]` and of the weight `[normed]`.
///
/// With `n = x · scale` the normalized row: `dx = scale · (dy·w − n · mean(dy·w·n))`, `dw = Σ_rows dy · n`.
pub(crate) fn backward(
    dy: &[f32],
    x: &[f32],
    width: usize,
    weight: &[f32],
    eps: f32,
) -> (Vec<f32>, Vec<f32>) {
    let normed = weight.len();
    let mut dx = zeros(x.len());
    let partial: Vec<Vec<f32>> = dx
        .par_chunks_mut(width * TASK_ROWS)
        .zip(
            dy.par_chunks(width * TASK_ROWS)
                .zip(x.par_chunks(width * TASK_ROWS)),
        )
        .map(|(dx, (dy, x))| {
            let mut dw = vec![0.0; normed];
            for (dx, (dy, x)) in dx
                .chunks_mut(width)
                .zip(dy.chunks(width).zip(x.chunks(width)))
            {
                let (dx, rest) = dx.split_at_mut(normed);
                rest.copy_from_slice(&dy[normed..]);
                let (dy, x) = (&dy[..normed], &x[..normed]);
                backward_row(dx, &mut dw, dy, x, weight, eps);
            }
            dw
        })
        .collect();
    let mut dw = vec![0.0; normed];
    for part in partial {
        dw.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    (dx, dw)
}

multiversion! {
    fn normalize<FMA>(y: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
        let scale = inverse_rms(x, eps);
        for (y, (x, w)) in y.iter_mut().zip(x.iter().zip(weight)) {
            *y = x * scale * w;
        }
    }
}

multiversion! {
    fn backward_row<FMA>(dx: &mut [f32], dw: &mut [f32], dy: &[f32], x: &[f32], weight: &[f32], eps: f32) {
        let n = x.len();
        let (dx, dw, dy, weight) = (&mut dx[..n], &mut dw[..n], &dy[..n], &weight[..n]);
        let scale = inverse_rms(x, eps);
        let along = sum([dy, weight, x], |[dy, w, x]| f64::from(dy * w) * f64::from(x * scale));
        let mean = (along / n as f64) as f32;
        for i in 0..n {
            let normalized = x[i] * scale;
            dx[i] = scale * (dy[i] * weight[i] - normalized * mean);
            dw[i] += dy[i] * normalized;
        }
    }
}
