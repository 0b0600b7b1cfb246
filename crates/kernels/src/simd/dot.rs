//! Sums of f32 values in a fixed order of lanes, so that the width of the vectors changes no bit.

use super::multiversion::multiversion;

multiversion! {
    /// The sum of products, in a fixed order of 32 lanes.
    fn dot<FMA>(a: &[f32], b: &[f32]) -> f32 {
        let mut lanes = [0f32; 32];
        let (mut a, mut b) = (a.chunks_exact(32), b.chunks_exact(32));
        for (a, b) in a.by_ref().zip(b.by_ref()) {
            for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
                *lane = if FMA { a.mul_add(*b, *lane) } else { a * b + *lane };
            }
        }
        for (lane, (a, b)) in lanes.iter_mut().zip(a.remainder().iter().zip(b.remainder())) {
            *lane = if FMA { a.mul_add(*b, *lane) } else { a * b + *lane };
        }
        lanes.iter().sum()
    }
}

multiversion! {
    /// `y += a · x`.
    fn axpy<FMA>(a: f32, x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = if FMA { x.mul_add(a, *y) } else { x * a + *y };
        }
    }
}

/// Partial sums of [`sum`].
const LANES: usize = 16;

/// Sums `value` over the columns of rows of equal length, in f64 and in a fixed order of lanes: a single running sum
/// would wait for each addition.
#[inline(always)]
pub(crate) fn sum<const N: usize>(rows: [&[f32]; N], value: impl Fn([f32; N]) -> f64) -> f64 {
    let mut lanes = [0f64; LANES];
    let rows = rows.map(|row| row.as_chunks::<LANES>());
    for at in 0..rows[0].0.len() {
        let parts = rows.map(|(parts, _)| &parts[at]);
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane += value(parts.map(|part| part[i]));
        }
    }
    let rests = rows.map(|(_, rest)| rest);
    for (i, lane) in lanes.iter_mut().enumerate().take(rests[0].len()) {
        *lane += value(rests.map(|rest| rest[i]));
    }
    lanes.iter().sum()
}
