//! Encoding ggml's blocks of 256: the search for scales.
//!
//! A block is groups of 16 or 32 values. For each group, the search finds the scale (and the minimum, in formats that
//! have one) with the smallest weighted error. Then the scales of all groups are rounded to a few bits with a scale of
//! their own, and every value gets the nearest code under its group's rounded scale.
//!
//! Source: ggml-org/llama.cpp: ggml/src/ggml-quants.c, `quantize_row_q*_K_ref`, `make_qx_quants`, `make_q3_quants`,
//! `make_qkx2_quants`. The order of sums is theirs, so that almost every block has the bytes that llama.cpp would
//! write.

use super::SUPER_BLOCK;
use super::dequantize::six_bits;
use super::pack::{each, f16_bytes, f16_of};
use super::scale_search::{
    NEGLIGIBLE, SCALE_STEP, Search, largest, nearest, scale_and_minimum, scale_of_few,
    scale_of_signed,
};
use crate::simd::multiversion;

/// Values of a group of the formats with 4 and 5 bits; the others have groups of 16.
pub(super) const GROUP: usize = 32;

pub(super) type SuperBlockValues = [f32; SUPER_BLOCK];
pub(super) type SuperBlockCodes = [u8; SUPER_BLOCK];

/// Codes under the rounded scale: `value ≈ d · (code − half) − minimum`. They stay as they are if the scale is 0.
#[inline(always)]
fn recode(x: &[f32], codes: &mut [u8], [d, minimum]: [f32; 2], [half, most]: [f32; 2]) {
    if d == 0.0 {
        return;
    }
    for (code, x) in codes.iter_mut().zip(x) {
        let l = nearest((x + minimum) / d) + half;
        *code = l.clamp(0.0, most) as u8;
    }
}

/// Packs the two-bit codes of 128 values into 32 bytes: four times 32 values, above each other.
#[inline(always)]
fn pack_two_bits(codes: &SuperBlockCodes, out: &mut [u8]) {
    for (half, out) in codes.chunks_exact(128).zip(out.chunks_exact_mut(32)) {
        for (i, byte) in out.iter_mut().enumerate() {
            *byte = half[i] | half[i + 32] << 2 | half[i + 64] << 4 | half[i + 96] << 6;
        }
    }
}

/// The codes of 16 groups of 16, and scale and minimum of each.
#[inline(always)]
fn q2_k_block(x: &SuperBlockValues, out: &mut [u8; 84]) {
    const SEARCH: Search = Search {
        most: 3.0,
        from: -0.5,
        step: SCALE_STEP,
        tries: 15,
        absolute: true,
    };
    const MOST: f32 = 15.0;
    let (mut codes, mut found) = ([0; SUPER_BLOCK], [[0.0; 2]; 16]);
    for (group, found) in found.iter_mut().enumerate() {
        let (x, codes) = (&x[group * 16..][..16], &mut codes[group * 16..][..16]);
        let weights: [f32; 16] = std::array::from_fn(|i| x[i].abs());
        *found = scale_and_minimum(x, &weights, codes, &SEARCH);
    }
    let [most, d] = of_groups(&found, MOST);
    let multiples = found.map(|found| {
        [0, 1].map(|i| {
            if most[i] > 0.0 {
                nearest(MOST / most[i] * found[i]) as u8
            } else {
                0
            }
        })
    });
    write_q2_k(x, &mut codes, (&multiples, d), out);
}

/// Writes a block from the codes of its groups' scales and minima and the factors of both.
#[inline(always)]
pub(super) fn write_q2_k(
    x: &SuperBlockValues,
    codes: &mut SuperBlockCodes,
    (multiples, d): (&[[u8; 2]; 16], [f32; 2]),
    out: &mut [u8; 84],
) {
    for (byte, [scale, minimum]) in out.iter_mut().zip(multiples) {
        *byte = scale | minimum << 4;
    }
    for (group, (x, codes)) in (x.chunks_exact(16).zip(codes.chunks_exact_mut(16))).enumerate() {
        let multiples = [out[group] & 15, out[group] >> 4].map(f32::from);
        recode(
            x,
            codes,
            [0, 1].map(|i| f16_of(d[i]) * multiples[i]),
            [0.0, 3.0],
        );
    }
    pack_two_bits(codes, &mut out[16..80]);
    out[80..82].copy_from_slice(&f16_bytes(d[0]));
    out[82..].copy_from_slice(&f16_bytes(d[1]));
}

/// The factors of a block's scales and minima: the largest of each, divided to become codes up to `codes`.
#[inline(always)]
fn of_groups(found: &[[f32; 2]], codes: f32) -> [[f32; 2]; 2] {
    let most = [0, 1].map(|i| found.iter().fold(0f32, |most, found| most.max(found[i])));
    let d = most.map(|most| if most > 0.0 { most / codes } else { 0.0 });
    [most, d]
}

#[inline(always)]
fn q3_k_block(x: &SuperBlockValues, out: &mut [u8; 110]) {
    const HALF: f32 = 4.0;
    let (mut codes, mut scales) = ([0; SUPER_BLOCK], [0.0; 16]);
    for (group, scale) in scales.iter_mut().enumerate() {
        let (x, codes) = (&x[group * 16..][..16], &mut codes[group * 16..][..16]);
        *scale = scale_of_few(x, HALF, codes);
    }
    let most = largest(&scales);
    let mut multiples = [-32.0; 16];
    let mut d = 0.0;
    if most != 0.0 {
        let inverse = -32.0 / most;
        d = 1.0 / inverse;
        multiples = scales.map(|scale| nearest(inverse * scale).clamp(-32.0, 31.0));
    }
    write_q3_k(x, &mut codes, (&multiples, d), out);
}

/// Writes a block from its groups' scales, from −32 to 31, and their factor.
#[inline(always)]
pub(super) fn write_q3_k(
    x: &SuperBlockValues,
    codes: &mut SuperBlockCodes,
    (multiples, d): (&[f32; 16], f32),
    out: &mut [u8; 110],
) {
    const HALF: f32 = 4.0;
    out.fill(0);
    for (group, multiples) in multiples.iter().enumerate() {
        let bits = (multiples + 32.0) as u8;
        out[96 + group % 8] |= (bits & 15) << (group / 8 * 4);
        out[104 + group % 4] |= bits >> 4 << (group / 4 * 2);
    }
    for (group, (x, codes)) in (x.chunks_exact(16).zip(codes.chunks_exact_mut(16))).enumerate() {
        let d = f16_of(d) * multiples[group];
        recode(x, codes, [d, 0.0], [HALF, 2.0 * HALF - 1.0]);
    }
    for (i, code) in codes.iter_mut().enumerate() {
        out[i % 32] |= (*code >> 2) << (i / 32);
        *code &= 3;
    }
    pack_two_bits(codes, &mut out[32..96]);
    out[108..].copy_from_slice(&f16_bytes(d));
}

/// 8 groups of 32: the codes, the header of the block, and the factors of the scales and the minima.
#[inline(always)]
fn groups_of_32(x: &SuperBlockValues, head: &mut [u8], search: &Search) -> SuperBlockCodes {
    const MOST: f32 = 63.0;
    let (mut codes, mut found) = ([0; SUPER_BLOCK], [[0.0; 2]; SUPER_BLOCK / GROUP]);
    for (group, found) in found.iter_mut().enumerate() {
        let at = group * GROUP;
        let (x, codes) = (&x[at..at + GROUP], &mut codes[at..at + GROUP]);
        let squares: f32 = x.iter().fold(0.0, |sum, x| sum + x * x);
        let mean = (squares / GROUP as f32).sqrt();
        let weights: [f32; GROUP] = std::array::from_fn(|i| mean + x[i].abs());
        *found = scale_and_minimum(x, &weights, codes, search);
    }
    let [most, d] = of_groups(&found, MOST);
    let multiples = found.map(|found| {
        [0, 1].map(|i| {
            let inverse = if most[i] > 0.0 { MOST / most[i] } else { 0.0 };
            nearest(inverse * found[i]).min(MOST) as u8
        })
    });
    write_groups(x, &mut codes, (&multiples, d), search.most, head);
    codes
}

/// The header of a block, from the codes of its groups' scales and minima and the factors of both; and the codes under
/// the rounded scales.
#[inline(always)]
pub(super) fn write_groups(
    x: &SuperBlockValues,
    codes: &mut SuperBlockCodes,
    (multiples, d): (&[[u8; 2]; SUPER_BLOCK / GROUP], [f32; 2]),
    most: f32,
    head: &mut [u8],
) {
    head[..2].copy_from_slice(&f16_bytes(d[0]));
    head[2..4].copy_from_slice(&f16_bytes(d[1]));
    let scales = &mut head[4..16];
    scales.fill(0);
    for (group, [scale, minimum]) in multiples.iter().copied().enumerate() {
        if group < 4 {
            scales[group] |= scale;
            scales[group + 4] |= minimum;
        } else {
            scales[group + 4] |= scale & 15 | minimum << 4;
            scales[group - 4] |= scale >> 4 << 6;
            scales[group] |= minimum >> 4 << 6;
        }
    }
    for (group, (x, codes)) in
        (x.chunks_exact(GROUP).zip(codes.chunks_exact_mut(GROUP))).enumerate()
    {
        let (scale, minimum) = six_bits(scales, group);
        let multiples = [f16_of(d[0]) * scale, f16_of(d[1]) * minimum];
        recode(x, codes, multiples, [0.0, most]);
    }
}

/// The low four bits: of each two groups, one in the low halves of 32 bytes and the next in the high halves.
#[inline(always)]
fn pack_groups(codes: &SuperBlockCodes, out: &mut [u8]) {
    for (pair, out) in codes.chunks_exact(64).zip(out.chunks_exact_mut(32)) {
        for (i, byte) in out.iter_mut().enumerate() {
            *byte = pair[i] & 15 | pair[i + 32] << 4;
        }
    }
}

#[inline(always)]
fn q4_k_block(x: &SuperBlockValues, out: &mut [u8; 144]) {
    const SEARCH: Search = Search {
        most: 15.0,
        from: -1.0,
        step: SCALE_STEP,
        tries: 20,
        absolute: false,
    };
    let codes = groups_of_32(x, out, &SEARCH);
    write_q4_k(&codes, out);
}

/// Writes the codes of a block after its header.
#[inline(always)]
pub(super) fn write_q4_k(codes: &SuperBlockCodes, out: &mut [u8; 144]) {
    pack_groups(codes, &mut out[16..]);
}

#[inline(always)]
fn q5_k_block(x: &SuperBlockValues, out: &mut [u8; 176]) {
    const SEARCH: Search = Search {
        most: 31.0,
        from: -0.5,
        step: SCALE_STEP,
        tries: 15,
        absolute: false,
    };
    let codes = groups_of_32(x, out, &SEARCH);
    write_q5_k(&codes, out);
}

/// The codes of a block, behind what is there already.
#[inline(always)]
pub(super) fn write_q5_k(codes: &SuperBlockCodes, out: &mut [u8; 176]) {
    out[16..48].fill(0);
    for (i, code) in codes.iter().enumerate() {
        out[16 + i % 32] |= code >> 4 << (i / 32);
    }
    pack_groups(codes, &mut out[48..]);
}

/// Encodes a block with weighted errors.
#[inline(always)]
pub(super) fn q6_k_block(x: &SuperBlockValues, weights: &SuperBlockValues, out: &mut [u8; 210]) {
    const HALF: f32 = 32.0;
    let (mut codes, mut scales) = ([0; SUPER_BLOCK], [0.0; 16]);
    for (group, scale) in scales.iter_mut().enumerate() {
        let at = group * 16..(group + 1) * 16;
        let codes = &mut codes[at.clone()];
        *scale = scale_of_signed(&x[at.clone()], &weights[at], HALF, codes);
    }
    let most = largest(&scales);
    if most.abs() < NEGLIGIBLE {
        return out.fill(0);
    }
    let inverse = -128.0 / most;
    let d = 1.0 / inverse;
    for (group, (x, codes)) in (x.chunks_exact(16).zip(codes.chunks_exact_mut(16))).enumerate() {
        let multiples = nearest(inverse * scales[group]).min(127.0);
        out[192 + group] = multiples as i8 as u8;
        recode(
            x,
            codes,
            [f16_of(d) * multiples, 0.0],
            [HALF, 2.0 * HALF - 1.0],
        );
    }
    for (half, codes) in codes.chunks_exact(128).enumerate() {
        for i in 0..64 {
            out[half * 64 + i] = codes[i] & 15 | codes[i + 64] << 4;
        }
        for i in 0..32 {
            let high = |n: usize| codes[i + n * 32] >> 4 << (n * 2);
            out[128 + half * 32 + i] = high(0) | high(1) | high(2) | high(3);
        }
    }
    out[208..].copy_from_slice(&f16_bytes(d));
}

multiversion! {
    fn q2_k<FMA>(values: &[f32], out: &mut [u8]) {
        let _ = FMA;
        each(values, out, q2_k_block);
    }
}
multiversion! {
    fn q3_k<FMA>(values: &[f32], out: &mut [u8]) {
        let _ = FMA;
        each(values, out, q3_k_block);
    }
}
multiversion! {
    fn q4_k<FMA>(values: &[f32], out: &mut [u8]) {
        let _ = FMA;
        each(values, out, q4_k_block);
    }
}
multiversion! {
    fn q5_k<FMA>(values: &[f32], out: &mut [u8]) {
        let _ = FMA;
        each(values, out, q5_k_block);
    }
}
multiversion! {
    fn q6_k<FMA>(values: &[f32], out: &mut [u8]) {
        let _ = FMA;
        each(values, out, |x, out| q6_k_block(x, &x.map(|x| x * x), out));
    }
}
