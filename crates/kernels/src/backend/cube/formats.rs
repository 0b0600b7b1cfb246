//! The value of a stored number, by how it is coded: what `formats` decodes on the CPU, in integers.
//!
//! Halves are made of their bits: WGSL has no f16 without an extension, and may flush what is subnormal. A value that is a
//! product has the CPU's bits; where a minimum is added, a compiler may join both into one rounding.

use burn::cubecl;
use burn::cubecl::prelude::*;

use crate::formats::Ggml;
use crate::formats::placed::Coding;

/// Where rows of a stack lie: the scalars of [`crate::formats::placed::PlacedStack`] and of one of its shards.
#[derive(CubeLaunch, CubeType, Clone, Copy)]
pub(super) struct StackShape {
    pub(super) rows_each: usize,
    pub(super) cols: usize,
    pub(super) codes_stride: usize,
    pub(super) high_stride: usize,
    pub(super) scales_stride: usize,
    pub(super) grid_rows: usize,
    pub(super) grid_cols: usize,
    pub(super) grid_first: usize,
    /// First row of the shard, and its rows.
    pub(super) first: usize,
    pub(super) rows: usize,
}

/// A byte of a plane whose row starts at word `base`.
#[cube]
fn byte(plane: &[u32], base: usize, at: usize) -> u32 {
    (plane[base + at / 4] >> (8 * (at as u32 % 4))) & 255
}

/// Two bytes of a plane, at an even place.
#[cube]
fn pair(plane: &[u32], base: usize, at: usize) -> u32 {
    (plane[base + at / 4] >> (8 * (at as u32 % 4))) & 0xffff
}

/// A signed byte: flipping its sign bit makes it unsigned plus 128.
#[cube]
fn signed(byte: u32) -> f32 {
    f32::cast_from(byte ^ 128) - 128.0
}

/// An f16 as f32.
#[cube]
fn half(bits: u32) -> f32 {
    let sign = (bits & 0x8000) << 16;
    let exponent = (bits >> 10) & 31;
    let fraction = bits & 0x3ff;
    let normal = ((exponent + 112) << 23) | (fraction << 13);
    // 2⁻²⁴: what is subnormal as f16 is normal as f32.
    let subnormal = u32::reinterpret(f32::cast_from(fraction) * f32::reinterpret(0x3380_0000u32));
    let special = 0x7f80_0000u32 | (fraction << 13);
    let finite = select(exponent == 0, subnormal, normal);
    f32::reinterpret(sign | select(exponent == 31, special, finite))
}

/// An E4M3 code as f32.
#[cube]
fn e4m3(code: u32) -> f32 {
    let sign = (code & 0x80) << 24;
    let exponent = (code >> 3) & 15;
    let fraction = code & 7;
    let normal = ((exponent + 120) << 23) | (fraction << 20);
    // 2⁻⁹.
    let subnormal = u32::reinterpret(f32::cast_from(fraction) * f32::reinterpret(0x3b00_0000u32));
    let finite = select(exponent == 0, subnormal, normal);
    f32::reinterpret(sign | select((code & 0x7f) == 0x7f, 0x7fc0_0000u32, finite))
}

/// 2^(exponent − 128).
#[cube]
fn half_of_power(exponent: u32) -> f32 {
    f32::reinterpret(select(
        exponent < 2,
        0x0020_0000u32 << exponent,
        (max(exponent, 1u32) - 1) << 23,
    ))
}

/// One of sixteen signed bytes in four words.
#[cube]
fn from_codebook(code: u32, #[comptime] words: [u32; 4]) -> f32 {
    let low = select(
        code < 4,
        comptime!(words[0]).runtime(),
        comptime!(words[1]).runtime(),
    );
    let high = select(
        code < 12,
        comptime!(words[2]).runtime(),
        comptime!(words[3]).runtime(),
    );
    let word = select(code < 8, low, high);
    signed((word >> (8 * (code % 4))) & 255)
}

/// Sixteen signed bytes as words.
fn words_of(codebook: &[i8; 16]) -> [u32; 4] {
    std::array::from_fn(|word| {
        (0..4).fold(0, |bits, i| {
            bits | u32::from(codebook[word * 4 + i] as u8) << (8 * i)
        })
    })
}

/// The four-bit code `i` of a block of 32 whose 16 bytes start at `at`: low halves first.
#[cube]
fn nibble(codes: &[u32], base: usize, at: usize, i: usize) -> u32 {
    (byte(codes, base, at + i % 16) >> (4 * (i as u32 / 16))) & 15
}

/// The number at a row of the shard and a column.
#[cube]
pub(super) fn value(
    codes: &[u32],
    high: &[u32],
    scales: &[u32],
    shape: &StackShape,
    row: usize,
    col: usize,
    #[comptime] coding: Coding,
) -> f32 {
    let base = row * shape.codes_stride;
    match comptime!(coding) {
        Coding::F32 => f32::reinterpret(codes[base + col]),
        Coding::F16 | Coding::Ggml(Ggml::F16) => half(pair(codes, base, 2 * col)),
        Coding::Bf16 => f32::reinterpret(pair(codes, base, 2 * col) << 16),
        Coding::Fp8 { block } => {
            let row = shape.first + row;
            let matrix = row / shape.rows_each;
            let grid_row = (row % shape.rows_each + shape.grid_first) / comptime!(block[0]);
            let at = (matrix * shape.grid_rows + grid_row) * shape.grid_cols;
            let scale = f32::reinterpret(scales[at + col / comptime!(block[1])]);
            e4m3(byte(codes, base, col)) * scale
        }
        Coding::Ggml(format) => {
            if comptime!(format.block() == 32) {
                small_block(codes, high, scales, shape, row, col, format)
            } else {
                super_block(codes, high, scales, shape, row, col, format)
            }
        }
    }
}

/// A number of a format with blocks of 32.
#[cube]
fn small_block(
    codes: &[u32],
    high: &[u32],
    scales: &[u32],
    shape: &StackShape,
    row: usize,
    col: usize,
    #[comptime] format: Ggml,
) -> f32 {
    let (block, i) = (col / 32, col % 32);
    let base = row * shape.codes_stride;
    let of_scales = row * shape.scales_stride;
    match comptime!(format) {
        Ggml::Q8_0 => {
            let d = half(pair(scales, of_scales, 2 * block));
            signed(byte(codes, base, 32 * block + i)) * d
        }
        Ggml::Q4_0 => {
            let d = half(pair(scales, of_scales, 2 * block));
            (f32::cast_from(nibble(codes, base, 16 * block, i)) - 8.0) * d
        }
        Ggml::Iq4Nl => {
            let d = half(pair(scales, of_scales, 2 * block));
            let words = comptime!(words_of(&crate::formats::IQ4_NL_CODEBOOK));
            d * from_codebook(nibble(codes, base, 16 * block, i), words)
        }
        Ggml::MxFp4 => {
            let d = half_of_power(byte(scales, of_scales, block));
            let words = comptime!(words_of(&crate::formats::MXFP4_DOUBLED));
            d * from_codebook(nibble(codes, base, 16 * block, i), words)
        }
        Ggml::Q4_1 => {
            let d = half(pair(scales, of_scales, 4 * block));
            let min = half(pair(scales, of_scales, 4 * block + 2));
            f32::cast_from(nibble(codes, base, 16 * block, i)) * d + min
        }
        Ggml::Q5_0 => {
            let d = half(pair(scales, of_scales, 2 * block));
            let fifth = (high[row * shape.high_stride + block] >> (i as u32)) & 1;
            let code = nibble(codes, base, 16 * block, i) | (fifth << 4);
            (f32::cast_from(code) - 16.0) * d
        }
        _ => {
            let d = half(pair(scales, of_scales, 4 * block));
            let min = half(pair(scales, of_scales, 4 * block + 2));
            let fifth = (high[row * shape.high_stride + block] >> (i as u32)) & 1;
            let code = nibble(codes, base, 16 * block, i) | (fifth << 4);
            f32::cast_from(code) * d + min
        }
    }
}

/// The 6-bit scale and minimum of a group of 32 in the 12 bytes from `at`.
#[cube]
fn six_bits(scales: &[u32], base: usize, at: usize, group: usize) -> (f32, f32) {
    let near = byte(scales, base, at + group % 4);
    let middle = byte(scales, base, at + 4 + group % 4);
    let far = byte(scales, base, at + 8 + group % 4);
    let is_first = group < 4;
    let scale = select(is_first, near & 63, (far & 15) | ((near >> 6) << 4));
    let min = select(is_first, middle & 63, (far >> 4) | ((middle >> 6) << 4));
    (f32::cast_from(scale), f32::cast_from(min))
}

/// The byte and the shift of a two-bit code: in each half of a block, four groups of 32 lie above each other.
#[cube]
fn two_bits(codes: &[u32], base: usize, at: usize, i: usize) -> f32 {
    let code = byte(codes, base, at + i / 128 * 32 + i % 32) >> (i as u32 % 128 / 32 * 2);
    f32::cast_from(code & 3)
}

/// A number of a k-quant, which has blocks of 256.
#[cube]
fn super_block(
    codes: &[u32],
    high: &[u32],
    scales: &[u32],
    shape: &StackShape,
    row: usize,
    col: usize,
    #[comptime] format: Ggml,
) -> f32 {
    let (block, i) = (col / 256, col % 256);
    let base = row * shape.codes_stride;
    let of_high = row * shape.high_stride;
    let of_scales = row * shape.scales_stride;
    match comptime!(format) {
        Ggml::Q2K => {
            let at = 20 * block;
            let both = byte(scales, of_scales, at + i / 16);
            let d = half(pair(scales, of_scales, at + 16)) * f32::cast_from(both & 15);
            let min = half(pair(scales, of_scales, at + 18)) * f32::cast_from(both >> 4);
            d * two_bits(codes, base, 64 * block, i) - min
        }
        Ggml::Q3K => {
            let (at, group) = (14 * block, i / 16);
            let low = byte(scales, of_scales, at + group % 8) >> (group as u32 / 8 * 4);
            let top = byte(scales, of_scales, at + 8 + group % 4) >> (group as u32 / 4 * 2);
            let scale = (low & 15) | ((top & 3) << 4);
            let d = half(pair(scales, of_scales, at + 12)) * (f32::cast_from(scale) - 32.0);
            let mask = byte(high, of_high, 32 * block + i % 32) >> (i as u32 / 32);
            d * (two_bits(codes, base, 64 * block, i) - select((mask & 1) == 1, 0.0, 4.0))
        }
        Ggml::Q6K => {
            let (at, half_block) = (18 * block, i / 128);
            let scale = signed(byte(scales, of_scales, at + i / 16));
            let d = half(pair(scales, of_scales, at + 16)) * scale;
            let low = byte(codes, base, 128 * block + half_block * 64 + i % 64);
            let top = byte(high, of_high, 64 * block + half_block * 32 + i % 32);
            let low = (low >> (i as u32 % 128 / 64 * 4)) & 15;
            let top = (top >> (i as u32 % 128 / 32 * 2)) & 3;
            d * (f32::cast_from(low | (top << 4)) - 32.0)
        }
        _ => {
            let (at, group) = (16 * block, i / 32);
            let (scale, least) = six_bits(scales, of_scales, at + 4, group);
            let d = half(pair(scales, of_scales, at)) * scale;
            let min = half(pair(scales, of_scales, at + 2)) * least;
            let code = byte(codes, base, 128 * block + group / 2 * 32 + i % 32);
            let low = (code >> (group as u32 % 2 * 4)) & 15;
            if comptime!(format == Ggml::Q5K) {
                let fifth = (byte(high, of_high, 32 * block + i % 32) >> (group as u32)) & 1;
                d * f32::cast_from(low | (fifth << 4)) - min
            } else {
                d * f32::cast_from(low) - min
            }
        }
    }
}
