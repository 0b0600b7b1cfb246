//! The block formats as steps of 64 codes.
//!
//! A value is `scale · (code − bias) + offset`. A bias is the same for all codes of a format and a power of two; it is
//! multiplied with the sums of the activations in integers, before the scale. Offsets are of the formats with minima.
//!
//! Source: ggml-org/llama.cpp: ggml/src/ggml-common.h (the layouts); `ggml/decode.rs` is the plain reading of them.

#![expect(
    unsafe_code,
    reason = "vector instructions on pointers; `rows` checks sizes and features"
)]

use super::isa::Isa;

/// No bias: so far to the left nothing is left of a number.
const NONE: u32 = 32;

/// A format of blocks, read for products. A *unit* is two blocks of 32 values, or one of 256.
///
/// # Safety
/// Of all functions: the blocks can be read, and the CPU has the instructions of `I`.
pub(super) trait Format {
    /// Bytes of a block.
    const BYTES: usize;
    /// Steps of a unit: 1, or 4.
    const STEPS: usize;
    /// The codes' bias as a power of two.
    const BIAS: u32;
    /// Whether the codes are signed bytes.
    const IS_SIGNED: bool = false;
    /// Whether there are offsets.
    const HAS_OFFSETS: bool = false;
    /// What all steps of a unit read.
    type Head: Copy;

    unsafe fn head<I: Isa>(blocks: [*const u8; 2]) -> Self::Head;
    unsafe fn codes<I: Isa>(head: &Self::Head, step: usize) -> I::Codes;
    unsafe fn scales<I: Isa>(head: &Self::Head, step: usize) -> I::Sums;
    unsafe fn offsets<I: Isa>(_: &Self::Head, _: usize) -> I::Sums {
        // SAFETY: the caller's promise.
        unsafe { I::zero() }
    }
}

type Pair = [*const u8; 2];

#[inline(always)]
unsafe fn at(blocks: &Pair, offset: usize) -> Pair {
    // SAFETY: the caller's promise.
    unsafe { blocks.map(|block| block.add(offset)) }
}

#[inline(always)]
unsafe fn u32s(blocks: &Pair, offset: usize) -> [u32; 2] {
    // SAFETY: the caller's promise.
    unsafe { at(blocks, offset).map(|from| u32::from_le(from.cast::<u32>().read_unaligned())) }
}

/// A format of blocks of 32: bytes of a block, bias, whether codes are signed and there are offsets; then its codes.
macro_rules! pairs {
    ($name:ident, $bytes:expr, $bias:expr, $is_signed:expr, $has_offsets:expr, |$blocks:ident| $codes:expr) => {
        pub(super) struct $name;

        impl Format for $name {
            const BYTES: usize = $bytes;
            const STEPS: usize = 1;
            const BIAS: u32 = $bias;
            const IS_SIGNED: bool = $is_signed;
            const HAS_OFFSETS: bool = $has_offsets;
            type Head = Pair;

            #[inline(always)]
            unsafe fn head<I: Isa>(blocks: Pair) -> Pair {
                blocks
            }

            #[inline(always)]
            unsafe fn codes<I: Isa>($blocks: &Pair, _: usize) -> I::Codes {
                // SAFETY: the caller's promise.
                unsafe { $codes }
            }

            #[inline(always)]
            unsafe fn scales<I: Isa>(blocks: &Pair, _: usize) -> I::Sums {
                // SAFETY: the caller's promise.
                unsafe { I::halves_f16(*blocks) }
            }

            #[inline(always)]
            unsafe fn offsets<I: Isa>(blocks: &Pair, _: usize) -> I::Sums {
                // SAFETY: the caller's promise.
                unsafe {
                    if $has_offsets {
                        I::halves_f16(at(blocks, 2))
                    } else {
                        I::zero()
                    }
                }
            }
        }
    };
}

pairs!(Q8_0, 34, NONE, true, false, |blocks| I::bytes(at(
    blocks, 2
)));
pairs!(Q4_0, 18, 3, false, false, |blocks| I::nibbles(at(
    blocks, 2
)));
pairs!(Q4_1, 20, NONE, false, true, |blocks| I::nibbles(at(
    blocks, 4
)));
pairs!(Q5_0, 22, 4, false, false, |blocks| I::merge::<0>(
    I::nibbles(at(blocks, 6)),
    I::bits(u32s(blocks, 2), 16)
));
pairs!(Q5_1, 24, NONE, false, true, |blocks| I::merge::<0>(
    I::nibbles(at(blocks, 8)),
    I::bits(u32s(blocks, 4), 16)
));

#[inline(always)]
unsafe fn bytes_at<const N: usize>(block: *const u8, offset: usize) -> [u8; N] {
    // SAFETY: the caller's promise.
    unsafe { block.add(offset).cast::<[u8; N]>().read_unaligned() }
}

/// A block of 256, and its scales and offsets as numbers.
#[derive(Clone, Copy)]
pub(super) struct Super<const N: usize> {
    block: *const u8,
    scales: [f32; N],
    offsets: [f32; N],
}

/// Scales and minima of eight groups, of 6 bits each: of the first four in a byte each, of the others in what those
/// leave free.
#[inline(always)]
unsafe fn six_bits<I: Isa>(block: *const u8) -> Super<8> {
    // SAFETY: the caller's promise.
    let (d, min, bytes) = unsafe {
        (
            I::f16(block),
            I::f16(block.add(2)),
            bytes_at::<12>(block, 4),
        )
    };
    let word = |i: usize| {
        u32::from_le_bytes([
            bytes[4 * i],
            bytes[4 * i + 1],
            bytes[4 * i + 2],
            bytes[4 * i + 3],
        ])
    };
    let (first, second, third) = (word(0), word(1), word(2));
    let high = |word: u32| (word >> 6 & 0x0303_0303) << 4;
    let split = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let scales = split(first & 0x3F3F_3F3F, third & 0x0F0F_0F0F | high(first));
    let mins = split(
        second & 0x3F3F_3F3F,
        third >> 4 & 0x0F0F_0F0F | high(second),
    );
    Super {
        block,
        scales: scales.to_le_bytes().map(|scale| d * f32::from(scale)),
        offsets: mins.to_le_bytes().map(|scale| -min * f32::from(scale)),
    }
}

/// A format of blocks of 256 whose groups have 32 values.
macro_rules! eights {
    ($name:ident, $bytes:expr, |$block:ident, $step:ident| $codes:expr) => {
        pub(super) struct $name;

        impl Format for $name {
            const BYTES: usize = $bytes;
            const STEPS: usize = 4;
            const BIAS: u32 = NONE;
            const HAS_OFFSETS: bool = true;
            type Head = Super<8>;

            #[inline(always)]
            unsafe fn head<I: Isa>([block, _]: Pair) -> Super<8> {
                // SAFETY: the caller's promise.
                unsafe { six_bits::<I>(block) }
            }

            #[inline(always)]
            unsafe fn codes<I: Isa>(head: &Super<8>, $step: usize) -> I::Codes {
                let $block = head.block;
                // SAFETY: the caller's promise.
                unsafe { $codes }
            }

            #[inline(always)]
            unsafe fn scales<I: Isa>(head: &Super<8>, step: usize) -> I::Sums {
                // SAFETY: the caller's promise.
                unsafe { I::halves([head.scales[2 * step], head.scales[2 * step + 1]]) }
            }

            #[inline(always)]
            unsafe fn offsets<I: Isa>(head: &Super<8>, step: usize) -> I::Sums {
                // SAFETY: the caller's promise.
                unsafe { I::halves([head.offsets[2 * step], head.offsets[2 * step + 1]]) }
            }
        }
    };
}

eights!(Q4K, 144, |block, step| I::fields(
    block.add(16 + 32 * step),
    [0, 4],
    15
));
eights!(Q5K, 176, |block, step| I::merge::<4>(
    I::fields(block.add(48 + 32 * step), [0, 4], 15),
    I::fields(block.add(16), [2 * step as u32, 2 * step as u32 + 1], 1)
));

/// A format of blocks of 256 whose groups have 16 values.
macro_rules! sixteens {
    ($name:ident, $bytes:expr, $bias:expr, $has_offsets:expr, |$of:ident| $head:expr, |$block:ident, $step:ident| $codes:expr) => {
        pub(super) struct $name;

        impl Format for $name {
            const BYTES: usize = $bytes;
            const STEPS: usize = 4;
            const BIAS: u32 = $bias;
            const HAS_OFFSETS: bool = $has_offsets;
            type Head = Super<16>;

            #[inline(always)]
            unsafe fn head<I: Isa>([$of, _]: Pair) -> Super<16> {
                // SAFETY: the caller's promise.
                unsafe { $head }
            }

            #[inline(always)]
            unsafe fn codes<I: Isa>(head: &Super<16>, $step: usize) -> I::Codes {
                let $block = head.block;
                // SAFETY: the caller's promise.
                unsafe { $codes }
            }

            #[inline(always)]
            unsafe fn scales<I: Isa>(head: &Super<16>, step: usize) -> I::Sums {
                // SAFETY: the caller's promise.
                unsafe { I::quarters(head.scales[4 * step..].as_ptr()) }
            }

            #[inline(always)]
            unsafe fn offsets<I: Isa>(head: &Super<16>, step: usize) -> I::Sums {
                // SAFETY: the caller's promise.
                unsafe {
                    if $has_offsets {
                        I::quarters(head.offsets[4 * step..].as_ptr())
                    } else {
                        I::zero()
                    }
                }
            }
        }
    };
}

/// How far the two bits of a step's halves are to the left.
#[inline(always)]
fn two_bits(step: usize) -> [u32; 2] {
    let shift = step as u32 % 2 * 4;
    [shift, shift + 2]
}

sixteens!(
    Q6K,
    210,
    5,
    false,
    |block| {
        let (d, scales) = (I::f16(block.add(208)), bytes_at::<16>(block, 192));
        Super {
            block,
            scales: scales.map(|scale| d * f32::from(scale as i8)),
            offsets: [0.0; 16],
        }
    },
    |block, step| I::merge::<4>(
        I::halves_of_bytes(block.add(step / 2 * 64), step as u32 % 2 * 4),
        I::fields(block.add(128 + step / 2 * 32), two_bits(step), 3)
    )
);
sixteens!(
    Q3K,
    110,
    2,
    false,
    |block| {
        let (d, bytes) = (I::f16(block.add(108)), bytes_at::<12>(block, 96));
        let scale = |group: usize| {
            let low = bytes[group % 8] >> (group / 8 * 4) & 15;
            let high = bytes[8 + group % 4] >> (group / 4 * 2) & 3;
            d * (f32::from(low | high << 4) - 32.0)
        };
        Super {
            block,
            scales: std::array::from_fn(scale),
            offsets: [0.0; 16],
        }
    },
    |block, step| I::merge::<2>(
        I::fields(block.add(32 + step / 2 * 32), two_bits(step), 3),
        I::fields(block, [2 * step as u32, 2 * step as u32 + 1], 1)
    )
);
sixteens!(
    Q2K,
    84,
    NONE,
    true,
    |block| {
        let (d, min) = (I::f16(block.add(80)), I::f16(block.add(82)));
        let bytes = bytes_at::<16>(block, 0);
        Super {
            block,
            scales: bytes.map(|byte| d * f32::from(byte & 15)),
            offsets: bytes.map(|byte| -min * f32::from(byte >> 4)),
        }
    },
    |block, step| I::fields(block.add(16 + step / 2 * 32), two_bits(step), 3)
);
