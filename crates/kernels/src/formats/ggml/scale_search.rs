//! The search for the scale, or the scale and the minimum, of a group of values.
//!
//! Source: ggml-org/llama.cpp: ggml/src/ggml-quants.c, `make_qx_quants`, `make_q3_quants`, `make_qkx2_quants`. The
//! order of sums is theirs.

/// Values below this are zeros.
pub(super) const NEGLIGIBLE: f32 = 1e-15;

/// The nearest integer, ties to even.
#[inline(always)]
pub(super) fn nearest(value: f32) -> f32 {
    value.round_ties_even()
}

/// How the scale and the minimum of a group are searched.
pub(super) struct Search {
    /// The largest code.
    pub(super) most: f32,
    /// The first scale that is tried maps the range to `most + from` steps, each further one to `step` more steps.
    pub(super) from: f32,
    pub(super) step: f32,
    pub(super) tries: usize,
    /// Whether absolute errors are summed instead of squares.
    pub(super) absolute: bool,
}

pub(super) const SCALE_STEP: f32 = 0.1;

/// The scale and minimum of a group with `value ≈ scale · code − minimum`; fills its codes.
#[inline(always)]
pub(super) fn scale_and_minimum<const N: usize>(
    x: &[f32],
    weights: &[f32; N],
    codes: &mut [u8],
    search: &Search,
) -> [f32; 2] {
    let (mut min, mut max) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (weights[0], weights[0] * x[0]);
    for (x, w) in x.iter().zip(weights).skip(1) {
        min = if *x < min { *x } else { min };
        max = if *x > max { *x } else { max };
        sum_w += w;
        sum_x += w * x;
    }
    min = min.min(0.0);
    if max == min {
        codes.fill(0);
        return [0.0, -min];
    }
    let code =
        |x: f32, min: f32, inverse: f32| nearest(inverse * (x - min)).clamp(0.0, search.most);
    let error = |tried: &[f32; N], scale: f32, min: f32| {
        let terms = tried.iter().zip(x).zip(weights);
        terms.fold(0.0, |sum, ((code, x), w)| {
            let miss = scale * code + min - x;
            let miss = if search.absolute {
                miss.abs()
            } else {
                miss * miss
            };
            sum + w * miss
        })
    };
    let inverse = search.most / (max - min);
    let mut scale = 1.0 / inverse;
    let mut best: [f32; N] = std::array::from_fn(|i| code(x[i], min, inverse));
    let mut least = error(&best, scale, min);
    for step in 0..=search.tries {
        // Starting from the best minimum so far.
        let inverse = (search.from + search.step * step as f32 + search.most) / (max - min);
        let tried: [f32; N] = std::array::from_fn(|i| code(x[i], min, inverse));
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0.0, 0.0, 0.0);
        for ((l, x), w) in tried.iter().zip(x).zip(weights) {
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * x;
        }
        // The scale and the minimum that fit these codes best.
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant > 0.0 {
            let mut fit = (sum_w * sum_xl - sum_x * sum_l) / determinant;
            let mut fit_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
            if fit_min > 0.0 {
                (fit, fit_min) = (sum_xl / sum_l2, 0.0);
            }
            let found = error(&tried, fit, fit_min);
            if found < least {
                (best, least, scale, min) = (tried, found, fit, fit_min);
            }
        }
    }
    codes.iter_mut().zip(best).for_each(|(c, l)| *c = l as u8);
    [scale, -min]
}

/// The value of the largest magnitude of a group; `None` if all are zero.
#[inline(always)]
pub(super) fn extreme(x: &[f32]) -> Option<f32> {
    let most = x
        .iter()
        .fold(0f32, |most, x| if x.abs() > most.abs() { *x } else { most });
    (most.abs() >= NEGLIGIBLE).then_some(most)
}

/// The scale of a group with `value ≈ scale · (code − half)` under weighted errors; fills its codes.
#[inline(always)]
pub(super) fn scale_of_signed(x: &[f32], weights: &[f32], half: f32, codes: &mut [u8]) -> f32 {
    let Some(most) = extreme(x) else {
        codes.fill(0);
        return 0.0;
    };
    let sums = |inverse: f32| {
        x.iter()
            .zip(weights)
            .fold((0.0, 0.0), |(sum_lx, sum_l2), (x, w)| {
                let l = nearest(inverse * x).clamp(-half, half - 1.0);
                (sum_lx + w * x * l, sum_l2 + w * l * l)
            })
    };
    let mut chosen = -half / most;
    let (sum_lx, sum_l2) = sums(chosen);
    let mut scale = if sum_l2 == 0.0 { 0.0 } else { sum_lx / sum_l2 };
    let mut best = scale * sum_lx;
    for step in (-9..=9).filter(|step| *step != 0) {
        let inverse = -(half + SCALE_STEP * step as f32) / most;
        let (sum_lx, sum_l2) = sums(inverse);
        if sum_l2 > 0.0 && sum_lx * sum_lx > best * sum_l2 {
            scale = sum_lx / sum_l2;
            (best, chosen) = (scale * sum_lx, inverse);
        }
    }
    for (code, x) in codes.iter_mut().zip(x) {
        *code = (nearest(chosen * x).clamp(-half, half - 1.0) + half) as u8;
    }
    scale
}

/// Rounds of improving single codes of 3 bits.
pub(super) const ROUNDS: usize = 5;

/// Like [`scale_of_signed`], for so few codes that each is worth a search: one after another moves to where the error
/// is smaller.
#[inline(always)]
pub(super) fn scale_of_few(x: &[f32], half: f32, codes: &mut [u8]) -> f32 {
    let Some(most) = extreme(x) else {
        codes.fill(0);
        return 0.0;
    };
    let inverse = -half / most;
    let mut chosen = [0f32; 16];
    let (mut sum_lx, mut sum_l2) = (0.0, 0.0);
    for (l, x) in chosen.iter_mut().zip(x) {
        *l = nearest(inverse * x).clamp(-half, half - 1.0);
        let w = x * x;
        sum_lx += w * x * *l;
        sum_l2 += w * *l * *l;
    }
    for _ in 0..ROUNDS {
        let mut changed = false;
        for (l, x) in chosen.iter_mut().zip(x) {
            let w = x * x;
            let mut others_lx = sum_lx - w * x * *l;
            if others_lx <= 0.0 {
                continue;
            }
            let mut others_l2 = sum_l2 - w * *l * *l;
            let other = nearest(x * others_l2 / others_lx).clamp(-half, half - 1.0);
            if other == *l {
                continue;
            }
            others_lx += w * x * other;
            others_l2 += w * other * other;
            if others_l2 > 0.0 && others_lx * others_lx * sum_l2 > sum_lx * sum_lx * others_l2 {
                (*l, sum_lx, sum_l2, changed) = (other, others_lx, others_l2, true);
            }
        }
        if !changed {
            break;
        }
    }
    for (code, l) in codes.iter_mut().zip(chosen) {
        *code = (l + half) as u8;
    }
    if sum_l2 > 0.0 { sum_lx / sum_l2 } else { 0.0 }
}

/// The scale of the largest magnitude.
#[inline(always)]
pub(super) fn largest(scales: &[f32]) -> f32 {
    scales
        .iter()
        .fold(0f32, |most, s| if s.abs() > most.abs() { *s } else { most })
}
