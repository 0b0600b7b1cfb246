//! The codebook formats: searching a block's scale.
//!
//! Source: ggml-org/llama.cpp: ggml/src/ggml-quants.c, `quantize_row_iq4_nl_impl`. Sums are in its order.

use super::GGML_BLOCK;
use super::dequantize::IQ4_NL_CODEBOOK;
use super::scale_search::extreme;

/// How many scales are tried: the one that maps the value of the largest magnitude to an end of the codebook, and those
/// that map it up to seven steps further in or out.
const TRIES: usize = 16;

/// The border between each codebook value and the next.
const BORDERS: [f32; 15] = {
    let mut borders = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        borders[i] = (IQ4_NL_CODEBOOK[i] as f32 + IQ4_NL_CODEBOOK[i + 1] as f32) / 2.0;
        i += 1;
    }
    borders
};

/// The scale and the codes of a block, with weighted errors.
#[inline(always)]
pub(super) fn codebook_codes(
    x: &[f32; GGML_BLOCK],
    weights: &[f32; GGML_BLOCK],
) -> (f32, [f32; GGML_BLOCK]) {
    let scale = extreme(x).map_or(0.0, |most| searched(x, weights, most));
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let mut codes = [0.0; GGML_BLOCK];
    for border in BORDERS {
        for (code, x) in codes.iter_mut().zip(x) {
            *code += if inverse * x >= border { 1.0 } else { 0.0 };
        }
    }
    (scale, codes)
}

/// The scale with the smallest error; `most` is the value of the largest magnitude.
#[inline(always)]
fn searched(x: &[f32; GGML_BLOCK], weights: &[f32; GGML_BLOCK], most: f32) -> f32 {
    let end = f32::from(IQ4_NL_CODEBOOK[0]);
    let inverses: [f32; TRIES] = std::array::from_fn(|i| match i {
        0 => 1.0 / (most / -end),
        _ => (end + i as f32 - 8.0) / most,
    });
    let (mut products, mut squares) = ([0.0; TRIES], [0.0; TRIES]);
    for (x, w) in x.iter().zip(weights) {
        // All tries at once, in vectors.
        let scaled = inverses.map(|inverse| inverse * x);
        let mut steps = [end; TRIES];
        for (border, above) in BORDERS.iter().zip(&IQ4_NL_CODEBOOK[1..]) {
            let above = f32::from(*above);
            for (step, scaled) in steps.iter_mut().zip(&scaled) {
                *step = if scaled >= border { above } else { *step };
            }
        }
        for (i, step) in steps.iter().enumerate() {
            products[i] += w * step * x;
            squares[i] += w * step * step;
        }
    }
    let (mut scale, mut best) = (0.0, 0.0);
    for (product, square) in products.iter().zip(&squares) {
        if *square > 0.0 && product * product > best * square {
            scale = product / square;
            best = scale * product;
        }
    }
    scale
}
