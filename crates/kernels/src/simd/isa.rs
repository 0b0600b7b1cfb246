//! The vector operations of products with few rows, and what they mean.
//!
//! Sums are kept in sixteen f32 lanes. The codes of weights and activations are multiplied in integers, which is exact.
//! Every instruction set has the same lanes, fuses every multiplication with its addition, and adds the lanes in the
//! same order: so all of them give the same bits, and [`Portable`] defines which.

#![expect(
    unsafe_code,
    reason = "vector instructions on pointers; `gemv` checks sizes and features"
)]

use half::{bf16, f16};

/// Lanes of a sum.
pub(crate) const LANES: usize = 16;
/// Codes of a lane.
pub(crate) const FOUR: usize = 4;

/// # Safety
/// Of all functions: the CPU has the instructions, and as many bytes can be read as a function says.
pub(crate) trait Isa: Copy {
    /// Four codes of a byte in each of 16 lanes.
    type Codes: Copy;
    /// 16 i32 lanes.
    type Ints: Copy;
    /// 16 f32 lanes.
    type Sums: Copy;
    /// Rows of activations that are multiplied with one row of lanes at a time: their sums fit the registers.
    const TILE: usize = 8;

    /// Prefetches bytes that will be read soon. The address may be invalid.
    fn prefetch(from: *const u8, bytes: usize);

    unsafe fn zero() -> Self::Sums;
    /// The same value in all lanes.
    unsafe fn splat(number: f32) -> Self::Sums;
    /// 16 f32.
    unsafe fn load(from: *const f32) -> Self::Sums;
    /// 16 f16.
    unsafe fn load_f16(from: *const u8) -> Self::Sums;
    /// 16 bf16.
    unsafe fn load_bf16(from: *const u8) -> Self::Sums;
    /// 16 unsigned bytes.
    unsafe fn load_u8(from: *const u8) -> Self::Sums;
    /// 16 signed bytes.
    unsafe fn load_i8(from: *const u8) -> Self::Sums;
    /// Writes 16 f32.
    unsafe fn store(sums: Self::Sums, to: *mut f32);
    unsafe fn mul(a: Self::Sums, b: Self::Sums) -> Self::Sums;
    /// `a · b + c`.
    unsafe fn mul_add(a: Self::Sums, b: Self::Sums, c: Self::Sums) -> Self::Sums;
    /// The sum of all lanes: the upper half is added to the lower, four times.
    unsafe fn total(sums: Self::Sums) -> f32;

    /// 64 bytes.
    unsafe fn codes(from: *const u8) -> Self::Codes;
    /// Every byte shifted to the right and masked.
    unsafe fn field(codes: Self::Codes, shift: u32, mask: u8) -> Self::Codes;
    /// `a | b << SHIFT`; no bit of `b` may be shifted out of its byte.
    unsafe fn merge<const SHIFT: u32>(a: Self::Codes, b: Self::Codes) -> Self::Codes;
    /// Looks up what each code stands for.
    unsafe fn lookup(codes: Self::Codes, table: &[i8; 16]) -> Self::Codes;

    /// `start << shift` in all lanes; 0 for shifts of 32 and more.
    unsafe fn start(start: i32, shift: u32) -> Self::Ints;
    /// Adds the products of codes, unsigned and below 64, with four activations, the same for all lanes.
    unsafe fn dot(sums: Self::Ints, codes: Self::Codes, x: *const i8) -> Self::Ints;
    /// The start of a sum of [`Self::dot_signed`], from the negative sum of all activations.
    unsafe fn start_signed(start: i32) -> Self::Ints;
    /// Adds the products of signed codes with four activations above −128.
    unsafe fn dot_signed(sums: Self::Ints, codes: Self::Codes, x: *const i8) -> Self::Ints;
    unsafe fn to_floats(ints: Self::Ints) -> Self::Sums;
}

/// The definition, in plain loops. Some are functions of their own to keep the code small. Without FMA, a fused
/// addition is a slow library call on x86, which such a CPU has to bear.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

/// Bytes of a register of codes.
const CODES: usize = LANES * FOUR;

#[inline(always)]
fn lanes<T>(value: impl FnMut(usize) -> T) -> [T; LANES] {
    std::array::from_fn(value)
}

#[inline(always)]
fn u16_at(bytes: &[u8; 2 * LANES], lane: usize) -> u16 {
    u16::from_le_bytes([bytes[2 * lane], bytes[2 * lane + 1]])
}

// SAFETY (all below): the caller's promises about pointers.
impl Isa for Portable {
    type Codes = [u8; CODES];
    type Ints = [i32; LANES];
    type Sums = [f32; LANES];

    fn prefetch(_: *const u8, _: usize) {}

    unsafe fn zero() -> Self::Sums {
        [0.0; LANES]
    }

    unsafe fn splat(number: f32) -> Self::Sums {
        [number; LANES]
    }

    unsafe fn load(from: *const f32) -> Self::Sums {
        unsafe { from.cast::<Self::Sums>().read_unaligned() }
    }

    #[inline(never)]
    unsafe fn load_f16(from: *const u8) -> Self::Sums {
        let bytes = unsafe { from.cast::<[u8; 2 * LANES]>().read_unaligned() };
        lanes(|i| f16::from_bits(u16_at(&bytes, i)).to_f32())
    }

    unsafe fn load_bf16(from: *const u8) -> Self::Sums {
        let bytes = unsafe { from.cast::<[u8; 2 * LANES]>().read_unaligned() };
        lanes(|i| bf16::from_bits(u16_at(&bytes, i)).to_f32())
    }

    unsafe fn load_u8(from: *const u8) -> Self::Sums {
        unsafe { from.cast::<[u8; LANES]>().read_unaligned() }.map(f32::from)
    }

    unsafe fn load_i8(from: *const u8) -> Self::Sums {
        unsafe { from.cast::<[i8; LANES]>().read_unaligned() }.map(f32::from)
    }

    unsafe fn store(sums: Self::Sums, to: *mut f32) {
        unsafe { to.cast::<Self::Sums>().write_unaligned(sums) }
    }

    unsafe fn mul(a: Self::Sums, b: Self::Sums) -> Self::Sums {
        lanes(|i| a[i] * b[i])
    }

    #[inline(never)]
    unsafe fn mul_add(a: Self::Sums, b: Self::Sums, c: Self::Sums) -> Self::Sums {
        lanes(|i| a[i].mul_add(b[i], c[i]))
    }

    unsafe fn total(mut sums: Self::Sums) -> f32 {
        for half in [8, 4, 2, 1] {
            (0..half).for_each(|i| sums[i] += sums[i + half]);
        }
        sums[0]
    }

    unsafe fn codes(from: *const u8) -> Self::Codes {
        unsafe { from.cast::<Self::Codes>().read_unaligned() }
    }

    #[inline(never)]
    unsafe fn field(codes: Self::Codes, shift: u32, mask: u8) -> Self::Codes {
        codes.map(|code| code >> shift & mask)
    }

    #[inline(never)]
    unsafe fn merge<const SHIFT: u32>(a: Self::Codes, b: Self::Codes) -> Self::Codes {
        std::array::from_fn(|i| a[i] | b[i] << SHIFT)
    }

    #[inline(never)]
    unsafe fn lookup(codes: Self::Codes, table: &[i8; 16]) -> Self::Codes {
        codes.map(|code| table[usize::from(code)] as u8)
    }

    unsafe fn start(start: i32, shift: u32) -> Self::Ints {
        [start.checked_shl(shift).unwrap_or(0); LANES]
    }

    #[inline(never)]
    unsafe fn dot(sums: Self::Ints, codes: Self::Codes, x: *const i8) -> Self::Ints {
        let x = unsafe { x.cast::<[i8; FOUR]>().read_unaligned() };
        let product = |i: usize, j: usize| i32::from(codes[FOUR * i + j]) * i32::from(x[j]);
        lanes(|i| sums[i] + (0..FOUR).map(|j| product(i, j)).sum::<i32>())
    }

    unsafe fn start_signed(_: i32) -> Self::Ints {
        [0; LANES]
    }

    #[inline(never)]
    unsafe fn dot_signed(sums: Self::Ints, codes: Self::Codes, x: *const i8) -> Self::Ints {
        let x = unsafe { x.cast::<[i8; FOUR]>().read_unaligned() };
        let product = |i: usize, j: usize| i32::from(codes[FOUR * i + j] as i8) * i32::from(x[j]);
        lanes(|i| sums[i] + (0..FOUR).map(|j| product(i, j)).sum::<i32>())
    }

    unsafe fn to_floats(ints: Self::Ints) -> Self::Sums {
        ints.map(|int| int as f32)
    }
}
