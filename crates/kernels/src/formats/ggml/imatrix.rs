//! Encoding with an importance matrix: the errors of some columns weigh more than those of others.
//!
//! The error of a weight enters a product multiplied by the input of its column, so it is weighted by that input's mean
//! square, the column's importance. It is also weighted by the weight's own magnitude, because the few large weights of
//! a row matter more than their squared errors say. The search over scales is that of `scale_search.rs` with these
//! weights, also for the formats with blocks of 32; if groups share a scale of scales, that one is searched as well.
//!
//! Source: ggml-org/llama.cpp: ggml/src/ggml-quants.c, `quantize_row_*_impl`, `make_qkx3_quants`, `make_qp_quants`.

use super::codebook::codebook_codes;
use super::k_quants::{
    GROUP, SuperBlockCodes, SuperBlockValues, q6_k_block, write_groups, write_q2_k, write_q3_k,
    write_q4_k, write_q5_k,
};
use super::pack::{f16_bytes, fifth_bits, pack_nibbles};
use super::scale_search::{
    NEGLIGIBLE, ROUNDS, SCALE_STEP, Search, nearest, scale_and_minimum, scale_of_signed,
};
use super::{GGML_BLOCK, Ggml, SUPER_BLOCK};
use crate::simd::multiversion;

impl Ggml {
    /// Encodes a row with an importance per column, positive and of any scale. Formats of 8 bits and more ignore the
    /// importance: their scales need no search.
    ///
    /// # Panics
    /// If `out` are not the bytes of the blocks of the row, there is not one importance per value, or the format is
    /// only read.
    pub fn encode_weighted(self, row: &[f32], importance: &[f32], out: &mut [u8]) {
        assert_eq!(row.len(), importance.len(), "an importance for each column");
        let blocks = row.len() / self.block();
        assert!(
            blocks * self.block() == row.len() && blocks * self.block_bytes() == out.len(),
            "{} values of {} for {} bytes",
            row.len(),
            self.name(),
            out.len()
        );
        match self {
            Self::F16 | Self::Q8_0 => self.encode(row, out),
            Self::Q4_0 => q4_0(row, importance, out),
            Self::Q4_1 => q4_1(row, importance, out),
            Self::Q5_0 => q5_0(row, importance, out),
            Self::Q5_1 => q5_1(row, importance, out),
            Self::Q2K => q2_k(row, importance, out),
            Self::Q3K => q3_k(row, importance, out),
            Self::Q4K => q4_k(row, importance, out),
            Self::Q5K => q5_k(row, importance, out),
            Self::Q6K => q6_k(row, importance, out),
            Self::Iq4Nl => iq4_nl(row, importance, out),
            Self::MxFp4 => panic!("{} is only read", self.name()),
        }
    }
}

/// Blocks of `N` values with their importance, and their `BYTES` bytes, one after the other.
#[inline(always)]
fn each<const N: usize, const BYTES: usize>(
    row: &[f32],
    importance: &[f32],
    out: &mut [u8],
    encode: impl Fn(&[f32; N], &[f32; N], &mut [u8; BYTES]),
) {
    let (blocks, _) = row.as_chunks::<N>();
    let (importance, _) = importance.as_chunks::<N>();
    let (bytes, _) = out.as_chunks_mut::<BYTES>();
    for ((block, importance), bytes) in blocks.iter().zip(importance).zip(bytes) {
        encode(block, importance, bytes);
    }
}

#[inline(always)]
fn mean_square(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |sum, x| sum + x * x) / x.len() as f32
}

/// The weights of errors: the importance, times the magnitude if that is above the usual one, whose square is `usual`.
#[inline(always)]
fn weights<const N: usize>(x: &[f32], importance: &[f32], usual: f32) -> [f32; N] {
    std::array::from_fn(|i| importance[i] * (usual + x[i] * x[i]).sqrt())
}

/// The search of a scale and a minimum for codes up to `most`.
#[inline(always)]
fn search(most: f32) -> Search {
    Search {
        most,
        from: -0.9,
        step: SCALE_STEP / 2.0,
        tries: 36,
        absolute: false,
    }
}

/// The scale of a block whose code `half` is 0, and its codes.
#[inline(always)]
fn scaled_codes(
    x: &[f32; GGML_BLOCK],
    weights: &[f32; GGML_BLOCK],
    half: f32,
) -> (f32, [f32; GGML_BLOCK]) {
    let mut codes = [0; GGML_BLOCK];
    let d = scale_of_signed(x, weights, half, &mut codes);
    (d, codes.map(f32::from))
}

/// The scale and the smallest value of a block, and its codes.
#[inline(always)]
fn codes_between(
    x: &[f32; GGML_BLOCK],
    weights: &[f32; GGML_BLOCK],
    most: f32,
) -> ([f32; 2], [f32; GGML_BLOCK]) {
    let mut codes = [0; GGML_BLOCK];
    let [d, minimum] = scale_and_minimum(x, weights, &mut codes, &search(most));
    ([d, -minimum], codes.map(f32::from))
}

/// `G` groups of `N` values: their codes, and the scale, minimum and total weight of each group.
struct ScaleGroups<const G: usize> {
    codes: SuperBlockCodes,
    scales: [f32; G],
    minima: [f32; G],
    weights: [f32; G],
}

impl<const G: usize> ScaleGroups<G> {
    #[inline(always)]
    fn none() -> Self {
        Self {
            codes: [0; SUPER_BLOCK],
            scales: [0.0; G],
            minima: [0.0; G],
            weights: [0.0; G],
        }
    }

    /// With a minimum.
    #[inline(always)]
    fn between<const N: usize>(
        x: &SuperBlockValues,
        importance: &SuperBlockValues,
        usual: f32,
        most: f32,
    ) -> Self {
        let mut groups = Self::none();
        for group in 0..G {
            let at = group * N..(group + 1) * N;
            let weights: [f32; N] = weights(&x[at.clone()], &importance[at.clone()], usual);
            groups.weights[group] = weights.iter().fold(0.0, |sum, w| sum + w);
            let codes = &mut groups.codes[at.clone()];
            [groups.scales[group], groups.minima[group]] =
                scale_and_minimum(&x[at], &weights, codes, &search(most));
        }
        groups
    }

    /// The codes of all scales and minima, up to `most`, and the factors of both.
    #[inline(always)]
    fn scales(&self, most: f32) -> ([[u8; 2]; G], [f32; 2]) {
        let (d, scales) = common_scale(&self.scales, &self.weights, most);
        let (d_minimum, minima) = common_scale(&self.minima, &self.weights, most);
        let multiples = std::array::from_fn(|group| [scales[group], minima[group]]);
        (multiples, [d, d_minimum])
    }
}

/// The factor of non-negative values and their multiples of it, up to `most`: first the best of some factors, then
/// single multiples move to where the error is smaller.
#[inline(always)]
fn common_scale<const G: usize>(
    values: &[f32; G],
    weights: &[f32; G],
    most: f32,
) -> (f32, [u8; G]) {
    let largest = values.iter().fold(0f32, |most, value| most.max(*value));
    if largest < NEGLIGIBLE {
        return (0.0, [0; G]);
    }
    let codes = |inverse: f32| values.map(|value| nearest(inverse * value).min(most));
    let error = |inverse: f32| {
        let (scale, codes) = (1.0 / inverse, codes(inverse));
        let terms = codes.iter().zip(values).zip(weights);
        terms.fold(0.0, |sum, ((code, value), w)| {
            let miss = value - scale * code;
            sum + w * miss * miss
        })
    };
    let mut chosen = most / largest;
    let mut least = error(chosen);
    for step in (-4..=4).filter(|step| *step != 0) {
        let tried = (SCALE_STEP * step as f32 + most) / largest;
        let found = error(tried);
        if found < least {
            (least, chosen) = (found, tried);
        }
    }
    let mut codes = codes(chosen);
    let (mut products, mut squares) = (0.0, 0.0);
    for ((code, value), w) in codes.iter().zip(values).zip(weights) {
        products += w * value * code;
        squares += w * code * code;
    }
    for _ in 0..ROUNDS {
        let mut changed = false;
        for ((code, value), w) in codes.iter_mut().zip(values).zip(weights) {
            let others = [products - w * value * *code, squares - w * *code * *code];
            if others[0] <= 0.0 || others[1] <= 0.0 {
                continue;
            }
            let other = nearest(value * others[1] / others[0]).min(most);
            if other == *code {
                continue;
            }
            let with = [others[0] + w * value * other, others[1] + w * other * other];
            if with[0] * with[0] * squares > products * products * with[1] {
                ([products, squares], *code, changed) = (with, other, true);
            }
        }
        if !changed {
            break;
        }
    }
    let scale = if squares > 0.0 {
        products / squares
    } else {
        0.0
    };
    (scale, codes.map(|code| code as u8))
}

#[inline(always)]
fn q2_k_block(x: &SuperBlockValues, importance: &SuperBlockValues, out: &mut [u8; 84]) {
    let mut groups = ScaleGroups::<16>::between::<16>(x, importance, mean_square(x), 3.0);
    let (multiples, d) = groups.scales(15.0);
    write_q2_k(x, &mut groups.codes, (&multiples, d), out);
}

#[inline(always)]
fn q3_k_block(x: &SuperBlockValues, importance: &SuperBlockValues, out: &mut [u8; 110]) {
    let (mut groups, usual) = (ScaleGroups::<16>::none(), 2.0 * mean_square(x));
    for group in 0..16 {
        let at = group * 16..(group + 1) * 16;
        let weights: [f32; 16] = weights(&x[at.clone()], &importance[at.clone()], usual);
        groups.weights[group] = weights.iter().fold(0.0, |sum, w| sum + w);
        let codes = &mut groups.codes[at.clone()];
        groups.scales[group] = scale_of_signed(&x[at], &weights, 4.0, codes);
    }
    let mut multiples = [0; 16];
    let d = scale_of_signed(&groups.scales, &groups.weights, 32.0, &mut multiples);
    let multiples = multiples.map(|code| f32::from(code) - 32.0);
    write_q3_k(x, &mut groups.codes, (&multiples, d), out);
}

/// Groups of 32: the codes, and the header of the block.
#[inline(always)]
fn groups_of_32(
    x: &SuperBlockValues,
    importance: &SuperBlockValues,
    most: f32,
    head: &mut [u8],
) -> SuperBlockCodes {
    const GROUPS: usize = SUPER_BLOCK / GROUP;
    let usual = 2.0 * mean_square(x);
    let mut groups = ScaleGroups::<GROUPS>::between::<GROUP>(x, importance, usual, most);
    let (multiples, d) = groups.scales(63.0);
    write_groups(x, &mut groups.codes, (&multiples, d), most, head);
    groups.codes
}

multiversion! {
    fn q4_0<FMA>(row: &[f32], importance: &[f32], out: &mut [u8]) {
        let _ = FMA;
        let usual = mean_square(row);
        each::<GGML_BLOCK, 18>(row, importance, out, |x, importance, bytes| {
            let (d, codes) = scaled_codes(x, &weights(x, importance, usual), 8.0);
            bytes[..2].copy_from_slice(&f16_bytes(d));
            pack_nibbles(&codes, &mut bytes[2..]);
        });
    }
}

multiversion! {
    fn q5_0<FMA>(row: &[f32], importance: &[f32], out: &mut [u8]) {
        let _ = FMA;
        let usual = mean_square(row);
        each::<GGML_BLOCK, 22>(row, importance, out, |x, importance, bytes| {
            let (d, codes) = scaled_codes(x, &weights(x, importance, usual), 16.0);
            bytes[..2].copy_from_slice(&f16_bytes(d));
            bytes[2..6].copy_from_slice(&fifth_bits(&codes));
            pack_nibbles(&codes, &mut bytes[6..]);
        });
    }
}

multiversion! {
    fn q4_1<FMA>(row: &[f32], importance: &[f32], out: &mut [u8]) {
        let _ = FMA;
        let usual = mean_square(row);
        each::<GGML_BLOCK, 20>(row, importance, out, |x, importance, bytes| {
            let ([d, least], codes) = codes_between(x, &weights(x, importance, usual), 15.0);
            bytes[..2].copy_from_slice(&f16_bytes(d));
            bytes[2..4].copy_from_slice(&f16_bytes(least));
            pack_nibbles(&codes, &mut bytes[4..]);
        });
    }
}

multiversion! {
    fn q5_1<FMA>(row: &[f32], importance: &[f32], out: &mut [u8]) {
        let _ = FMA;
        let usual = mean_square(row);
        each::<GGML_BLOCK, 24>(row, importance, out, |x, importance, bytes| {
            let ([d, least], codes) = codes_between(x, &weights(x, importance, usual), 31.0);
            bytes[..2].copy_from_slice(&f16_bytes(d));
            bytes[2..4].copy_from_slice(&f16_bytes(least));
            bytes[4..8].copy_from_slice(&fifth_bits(&codes));
            pack_nibbles(&codes, &mut bytes[8..]);
        });
    }
}

multiversion! {
    fn iq4_nl<FMA>(row: &[f32], importance: &[f32], out: &mut [u8]) {
        let _ = FMA;
        each::<GGML_BLOCK, 18>(row, importance, out, |x, importance, bytes| {
            let (d, codes) = codebook_codes(x, &weights(x, importance, 2.0 * mean_square(x)));
            bytes[..2].copy_from_slice(&f16_bytes(d));
            pack_nibbles(&codes, &mut bytes[2..]);
        });
    }
}

multiversion! {
    fn q2_k<FMA>(row: &[f32], importance: &[f32], out: &mut [u8]) {
        let _ = FMA;
        each(row, importance, out, q2_k_block);
    }
}

multiversion! {
    fn q3_k<FMA>(row: &[f32], importance: &[f32], out: &mut [u8]) {
        let _ = FMA;
        each(row, importance, out, q3_k_block);
    }
}

multiversion! {
    fn q4_k<FMA>(row: &[f32], importance: &[f32], out: &mut [u8]) {
        let _ = FMA;
        each::<SUPER_BLOCK, 144>(row, importance, out, |x, importance, bytes| {
            let codes = groups_of_32(x, importance, 15.0, bytes);
            write_q4_k(&codes, bytes);
        });
    }
}

multiversion! {
    fn q5_k<FMA>(row: &[f32], importance: &[f32], out: &mut [u8]) {
        let _ = FMA;
        each::<SUPER_BLOCK, 176>(row, importance, out, |x, importance, bytes| {
            let codes = groups_of_32(x, importance, 31.0, bytes);
            write_q5_k(&codes, bytes);
        });
    }
}

multiversion! {
    /// Its groups are so many and its steps so small that magnitudes do not count.
    fn q6_k<FMA>(row: &[f32], importance: &[f32], out: &mut [u8]) {
        let _ = FMA;
        each(row, importance, out, q6_k_block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    const COLS: usize = 3 * SUPER_BLOCK;

    /// What comes back from a format's bytes.
    fn through(format: Ggml, row: &[f32], importance: Option<&[f32]>) -> Vec<f32> {
        let mut bytes = vec![0; row.len() / format.block() * format.block_bytes()];
        match importance {
            Some(importance) => format.encode_weighted(row, importance, &mut bytes),
            None => format.encode(row, &mut bytes),
        }
        let mut decoded = vec![0.0; row.len()];
        format.decode(&bytes, &mut decoded);
        decoded
    }

    fn error(row: &[f32], decoded: &[f32], importance: &[f32]) -> f32 {
        let terms = row.iter().zip(decoded).zip(importance);
        terms.map(|((x, y), w)| w * (x - y) * (x - y)).sum()
    }

    /// Columns of very unequal importance: a tenth have most of it.
    fn importance() -> Vec<f32> {
        let noise = noise(COLS, 5);
        let of = |(i, v): (usize, &f32)| v * v + if i % 10 == 3 { 30.0 } else { 0.01 };
        noise.iter().enumerate().map(of).collect()
    }

    const SEARCHED: [Ggml; 10] = [
        Ggml::Q6K,
        Ggml::Q5_1,
        Ggml::Q5_0,
        Ggml::Q5K,
        Ggml::Q4_1,
        Ggml::Q4_0,
        Ggml::Iq4Nl,
        Ggml::Q4K,
        Ggml::Q3K,
        Ggml::Q2K,
    ];

    #[test]
    fn errors_go_to_columns_that_count_less() {
        let importance = importance();
        for format in SEARCHED {
            let (mut plain, mut weighted) = (0.0, 0.0);
            for seed in 0..8 {
                let row = noise(COLS, 100 + seed);
                plain += error(&row, &through(format, &row, None), &importance);
                let decoded = through(format, &row, Some(&importance));
                weighted += error(&row, &decoded, &importance);
            }
            // With a tenth of the columns to fit, at least a tenth of the error goes.
            assert!(
                weighted < 0.9 * plain,
                "{}: {weighted} of {plain}",
                format.name()
            );
        }
    }

    #[test]
    fn importance_has_no_unit_and_blocks_without_values_stay() {
        let (mut row, importance) = (noise(COLS, 9), importance());
        row[..SUPER_BLOCK].fill(0.0);
        row[SUPER_BLOCK..SUPER_BLOCK + GGML_BLOCK].fill(1e-30);
        let scaled: Vec<f32> = importance.iter().map(|w| w * 1024.0).collect();
        for format in Ggml::WRITTEN {
            let decoded = through(format, &row, Some(&importance));
            assert_eq!(
                decoded,
                through(format, &row, Some(&scaled)),
                "{}",
                format.name()
            );
            assert!(decoded.iter().all(|v| v.is_finite()), "{}", format.name());
            assert_eq!(
                decoded[..SUPER_BLOCK],
                [0.0; SUPER_BLOCK],
                "{}",
                format.name()
            );
        }
    }

    #[test]
    fn eight_bits_need_no_importance() {
        let (row, importance) = (noise(COLS, 11), importance());
        for format in [Ggml::F16, Ggml::Q8_0] {
            assert_eq!(
                through(format, &row, Some(&importance)),
                through(format, &row, None)
            );
        }
    }
}
