//! How products read each block format from a unit of a strip.
//!
//! A value is `scale · (code − bias) + offset`. The bias is a power of two and the same for all codes of a format; it
//! is multiplied with the sums of the activations in integers, before the scale. Formats with minima have offsets.
//!
//! Source: ggml-org/llama.cpp: ggml/src/ggml-common.h (the layouts). `formats/ggml/dequantize.rs` decodes them one by one,
//! and `formats/interleaved.rs` describes a unit.

#![expect(
    unsafe_code,
    reason = "vector instructions on pointers; `gemv` checks sizes and features"
)]

use crate::formats::{IQ4_NL_CODEBOOK, MXFP4_DOUBLED, ROWS, half_of_power};
use crate::simd::{FOUR, Isa};

/// No bias: a shift by this much leaves nothing of a number.
const NONE: u32 = 32;
/// Bytes of a word of codes of all rows.
const WORD: usize = ROWS * FOUR;
/// Bytes of an f16 of each row.
const HALVES: usize = ROWS * 2;

/// A format of blocks, read for products.
///
/// # Safety
/// Of all functions: the unit can be read, and the CPU has the instructions of `I`.
pub(super) trait UnitLayout {
    /// Bytes of a block.
    const BYTES: usize;
    /// Values that share a scale.
    const GROUP: usize = 32;
    /// Groups of a block.
    const GROUPS: usize = 1;
    /// After this many groups the shifts repeat: 1, 2 or 8.
    const TURN: usize = 1;
    /// The codes' bias as a power of two.
    const BIAS: u32 = NONE;
    /// Whether the codes are signed bytes.
    const IS_SIGNED: bool = false;
    /// Whether there are offsets.
    const HAS_OFFSETS: bool = false;
    /// The scales of all groups.
    type Head: Copy;

    unsafe fn head(unit: *const u8) -> Self::Head;
    /// The codes of the group's `word`-th four values.
    unsafe fn codes<I: Isa>(unit: *const u8, group: usize, word: usize) -> I::Codes;
    unsafe fn scales<I: Isa>(unit: *const u8, head: &Self::Head, group: usize) -> I::Sums;
    unsafe fn offsets<I: Isa>(_: *const u8, _: &Self::Head, _: usize) -> I::Sums {
        // SAFETY: the caller's promise.
        unsafe { I::zero() }
    }
}

/// The low four bits of codes: the first 16 of 32 values are in the low halves of bytes, the others in the high halves.
#[inline(always)]
unsafe fn nibbles<I: Isa>(from: *const u8, word: usize) -> I::Codes {
    // SAFETY: the caller's promise.
    unsafe {
        let codes = I::codes(from.add(word % FOUR * WORD));
        I::field(codes, (word / FOUR * 4) as u32, 15)
    }
}

/// The fifth bit of each code, in its place.
#[inline(always)]
unsafe fn with_fifth_bit<I: Isa>(codes: I::Codes, bits: *const u8, word: usize) -> I::Codes {
    // SAFETY: the caller's promise.
    unsafe { I::merge::<4>(codes, I::field(I::codes(bits), word as u32, 1)) }
}

/// A format with blocks of 32: its constants and the codes of a word.
macro_rules! pairs {
    ($name:ident { $(const $constant:ident: $ty:ty = $value:expr;)* } |$unit:ident, $word:ident| $codes:expr) => {
        pub(super) struct $name;

        impl UnitLayout for $name {
            $(const $constant: $ty = $value;)*
            type Head = ();

            #[inline(always)]
            unsafe fn head(_: *const u8) {}

            #[inline(always)]
            unsafe fn codes<I: Isa>($unit: *const u8, _: usize, $word: usize) -> I::Codes {
                // SAFETY: the caller's promise.
                unsafe { $codes }
            }

            #[inline(always)]
            unsafe fn scales<I: Isa>(unit: *const u8, _: &(), _: usize) -> I::Sums {
                // SAFETY: the caller's promise.
                unsafe { I::load_f16(unit) }
            }

            #[inline(always)]
            unsafe fn offsets<I: Isa>(unit: *const u8, _: &(), _: usize) -> I::Sums {
                // SAFETY: the caller's promise.
                unsafe {
                    if Self::HAS_OFFSETS {
                        I::load_f16(unit.add(HALVES))
                    } else {
                        I::zero()
                    }
                }
            }
        }
    };
}

pairs!(Q8_0 { const BYTES: usize = 34; const IS_SIGNED: bool = true; }
    |unit, word| I::codes(unit.add(HALVES + word * WORD)));
pairs!(Q4_0 { const BYTES: usize = 18; const BIAS: u32 = 3; }
    |unit, word| nibbles::<I>(unit.add(HALVES), word));
pairs!(Q4_1 { const BYTES: usize = 20; const HAS_OFFSETS: bool = true; }
    |unit, word| nibbles::<I>(unit.add(2 * HALVES), word));
pairs!(Q5_0 { const BYTES: usize = 22; const BIAS: u32 = 4; }
|unit, word| with_fifth_bit::<I>(
    nibbles::<I>(unit.add(HALVES + WORD), word),
    unit.add(HALVES),
    word,
));
pairs!(Q5_1 { const BYTES: usize = 24; const HAS_OFFSETS: bool = true; }
|unit, word| with_fifth_bit::<I>(
    nibbles::<I>(unit.add(2 * HALVES + WORD), word),
    unit.add(2 * HALVES),
    word,
));
pairs!(Iq4Nl { const BYTES: usize = 18; const IS_SIGNED: bool = true; }
    |unit, word| I::lookup(nibbles::<I>(unit.add(HALVES), word), &IQ4_NL_CODEBOOK));

/// MXFP4, whose scale is a power of two.
pub(super) struct MxFp4;

impl UnitLayout for MxFp4 {
    const BYTES: usize = 17;
    const IS_SIGNED: bool = true;
    type Head = [f32; ROWS];

    #[inline(always)]
    unsafe fn head(unit: *const u8) -> [f32; ROWS] {
        // SAFETY: the caller's promise.
        unsafe { bytes_at::<ROWS>(unit) }.map(half_of_power)
    }

    #[inline(always)]
    unsafe fn codes<I: Isa>(unit: *const u8, _: usize, word: usize) -> I::Codes {
        // SAFETY: the caller's promise.
        unsafe { I::lookup(nibbles::<I>(unit.add(ROWS), word), &MXFP4_DOUBLED) }
    }

    #[inline(always)]
    unsafe fn scales<I: Isa>(_: *const u8, head: &[f32; ROWS], _: usize) -> I::Sums {
        // SAFETY: the caller's promise.
        unsafe { I::load(head.as_ptr()) }
    }
}

#[inline(always)]
unsafe fn bytes_at<const N: usize>(from: *const u8) -> [u8; N] {
    // SAFETY: the caller's promise.
    unsafe { from.cast::<[u8; N]>().read_unaligned() }
}

/// A small integer per group and row: the multiples of scales and offsets.
#[derive(Clone, Copy)]
pub(super) struct Multiples<const N: usize> {
    scales: [u8; N],
    offsets: [u8; N],
}

/// 6 bits for each of eight groups: those of the first four have a byte each, those of the others are in the bits that
/// these leave free.
#[inline(always)]
fn six_bits(bytes: &[u8; 12 * ROWS]) -> Multiples<{ 8 * ROWS }> {
    const FOUR_GROUPS: usize = 4 * ROWS;
    let (mut scales, mut offsets) = ([0; 8 * ROWS], [0; 8 * ROWS]);
    for i in 0..FOUR_GROUPS {
        let [first, second, third] = [0, 1, 2].map(|part| bytes[part * FOUR_GROUPS + i]);
        scales[i] = first & 63;
        scales[FOUR_GROUPS + i] = third & 15 | first >> 6 << 4;
        offsets[i] = second & 63;
        offsets[FOUR_GROUPS + i] = third >> 4 | second >> 6 << 4;
    }
    Multiples { scales, offsets }
}

/// 6 bits for each of sixteen groups, 32 too large: four bits in the halves of eight bytes, two more in the quarters of
/// four.
#[inline(always)]
fn three_quarters(bytes: &[u8; 12 * ROWS]) -> Multiples<{ 16 * ROWS }> {
    const FOUR_GROUPS: usize = 4 * ROWS;
    let mut scales = [0; 16 * ROWS];
    for (quarter, scales) in scales.chunks_exact_mut(FOUR_GROUPS).enumerate() {
        let low = &bytes[quarter % 2 * FOUR_GROUPS..][..FOUR_GROUPS];
        let high = &bytes[2 * FOUR_GROUPS..];
        for ((scale, low), high) in scales.iter_mut().zip(low).zip(high) {
            let code = low >> (quarter / 2 * 4) & 15 | (high >> (2 * quarter) & 3) << 4;
            *scale = code.wrapping_sub(32);
        }
    }
    Multiples {
        scales,
        offsets: [0; 16 * ROWS],
    }
}

/// A format with blocks of 256: its constants; the multiples of its groups; whether those of scales are signed; the
/// codes of a word of a group.
macro_rules! supers {
    ($name:ident, $groups:literal { $(const $constant:ident: $ty:ty = $value:expr;)* }
        |$of:ident| $head:expr, $scales:ident, |$unit:ident, $group:ident, $word:ident| $codes:expr) => {
        pub(super) struct $name;

        impl UnitLayout for $name {
            const GROUPS: usize = $groups;
            const GROUP: usize = 256 / $groups;
            const TURN: usize = if $groups == 8 { 2 } else { 8 };
            $(const $constant: $ty = $value;)*
            type Head = Multiples<{ $groups * ROWS }>;

            #[inline(always)]
            unsafe fn head($of: *const u8) -> Self::Head {
                // SAFETY: the caller's promise.
                unsafe { $head }
            }

            #[inline(always)]
            unsafe fn codes<I: Isa>($unit: *const u8, $group: usize, $word: usize) -> I::Codes {
                // SAFETY: the caller's promise.
                unsafe { $codes }
            }

            #[inline(always)]
            unsafe fn scales<I: Isa>(unit: *const u8, head: &Self::Head, group: usize) -> I::Sums {
                // SAFETY: the caller's promise; there is a row of multiples for each group.
                unsafe {
                    let multiples = I::$scales(head.scales.as_ptr().add(group * ROWS));
                    I::mul(I::load_f16(unit), multiples)
                }
            }

            #[inline(always)]
            unsafe fn offsets<I: Isa>(unit: *const u8, head: &Self::Head, group: usize) -> I::Sums {
                // SAFETY: as above; with offsets, the number that they are negative multiples of follows the scales'.
                unsafe {
                    let least = I::mul(I::load_f16(unit.add(HALVES)), I::splat(-1.0));
                    I::mul(least, I::load_u8(head.offsets.as_ptr().add(group * ROWS)))
                }
            }
        }
    };
}

/// The field of a group in a word of codes.
#[inline(always)]
unsafe fn field<I: Isa>(from: *const u8, word: usize, shift: usize, mask: u8) -> I::Codes {
    // SAFETY: the caller's promise.
    unsafe { I::field(I::codes(from.add(word * WORD)), shift as u32, mask) }
}

/// The start of the codes of formats with 8 groups: behind two f16 and twelve bytes.
const BEHIND_SIX_BITS: usize = 2 * HALVES + 12 * ROWS;

supers!(Q4K, 8 { const BYTES: usize = 144; const HAS_OFFSETS: bool = true; }
|unit| six_bits(&bytes_at(unit.add(2 * HALVES))),
load_u8,
|unit, group, word| {
    field::<I>(unit.add(BEHIND_SIX_BITS), group / 2 * 8 + word, group % 2 * 4, 15)
});
supers!(Q5K, 8 { const BYTES: usize = 176; const HAS_OFFSETS: bool = true; }
|unit| six_bits(&bytes_at(unit.add(2 * HALVES))),
load_u8,
|unit, group, word| {
    let bits = unit.add(BEHIND_SIX_BITS);
    I::merge::<4>(
        field::<I>(bits.add(8 * WORD), group / 2 * 8 + word, group % 2 * 4, 15),
        field::<I>(bits, word, group, 1),
    )
});

/// Which of four fields of a byte belong to a group of 16: a half of 128 values is four times 32.
#[inline(always)]
fn quarter(group: usize) -> usize {
    group / 2 % 4
}

/// The word of a group of 16 in a half of 128 values whose 32 bytes all groups share.
#[inline(always)]
fn shared(group: usize, word: usize) -> usize {
    group / 8 * 8 + group % 2 * 4 + word
}

supers!(Q6K, 16 { const BYTES: usize = 210; const BIAS: u32 = 5; }
|unit| Multiples {
    scales: bytes_at(unit.add(HALVES)),
    offsets: [0; 16 * ROWS],
},
load_i8,
|unit, group, word| {
    let high = unit.add(HALVES + 16 * ROWS);
    let quarter = quarter(group);
    let low_word = group / 8 * 16 + quarter % 2 * 8 + group % 2 * 4 + word;
    I::merge::<4>(
        field::<I>(high.add(16 * WORD), low_word, quarter / 2 * 4, 15),
        field::<I>(high, shared(group, word), 2 * quarter, 3),
    )
});
supers!(Q3K, 16 { const BYTES: usize = 110; const BIAS: u32 = 2; }
|unit| three_quarters(&bytes_at(unit.add(HALVES))),
load_i8,
|unit, group, word| {
    let masks = unit.add(HALVES + 12 * ROWS);
    I::merge::<2>(
        field::<I>(masks.add(8 * WORD), shared(group, word), 2 * quarter(group), 3),
        field::<I>(masks, group % 2 * 4 + word, group / 2, 1),
    )
});
supers!(Q2K, 16 { const BYTES: usize = 84; const HAS_OFFSETS: bool = true; }
|unit| {
    let bytes: [u8; 16 * ROWS] = bytes_at(unit.add(2 * HALVES));
    Multiples {
        scales: bytes.map(|byte| byte & 15),
        offsets: bytes.map(|byte| byte >> 4),
    }
},
load_u8,
|unit, group, word| {
    let codes = unit.add(2 * HALVES + 16 * ROWS);
    field::<I>(codes, shared(group, word), 2 * quarter(group), 3)
});
