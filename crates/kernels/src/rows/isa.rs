//! The vector operations that products of rows are made of, and what they mean.
//!
//! A step covers 64 values of a row. Their codes are multiplied with the activations' in integers, which is exact; sums are
//! kept in sixteen f32 lanes, each of four neighbors of a step. Every instruction set has the same lanes, fuses every
//! multiplication with its addition, and adds the lanes up in the same order: so all of them give the same bits, and
//! [`Portable`] says which.

#![expect(
    unsafe_code,
    reason = "vector instructions on pointers; `rows` checks sizes and features"
)]

use half::{bf16, f16};

/// Values of a step.
pub(super) const STEP: usize = 64;
/// Lanes of a sum.
pub(super) const LANES: usize = 16;

/// # Safety
/// Of all functions: the CPU has the instructions, and as many bytes can be read as a function says.
pub(super) trait Isa: Copy {
    /// 64 codes of a byte.
    type Codes: Copy;
    /// 16 f32 lanes.
    type Sums: Copy;

    /// Asks for the bytes of a step or so, which will be read soon; there need not be any.
    fn prefetch(from: *const u8, bytes: usize);
    unsafe fn zero() -> Self::Sums;
    /// An f16.
    unsafe fn f16(from: *const u8) -> f32;
    /// 16 f32.
    unsafe fn load(from: *const f32) -> Self::Sums;
    /// 16 f16.
    unsafe fn load_f16(from: *const u8) -> Self::Sums;
    /// 16 bf16.
    unsafe fn load_bf16(from: *const u8) -> Self::Sums;
    unsafe fn mul(a: Self::Sums, b: Self::Sums) -> Self::Sums;
    /// `a · b + c`.
    unsafe fn mul_add(a: Self::Sums, b: Self::Sums, c: Self::Sums) -> Self::Sums;
    /// The sum of all lanes: halves onto each other, four times.
    unsafe fn total(sums: Self::Sums) -> f32;
    /// The first number in eight lanes, the second in the others.
    unsafe fn halves(numbers: [f32; 2]) -> Self::Sums;
    /// Each of four numbers in four lanes.
    unsafe fn quarters(numbers: *const f32) -> Self::Sums;
    /// An f16 in eight lanes, another in the others.
    unsafe fn halves_f16(from: [*const u8; 2]) -> Self::Sums;

    /// 32 bytes, and 32 others.
    unsafe fn bytes(from: [*const u8; 2]) -> Self::Codes;
    /// Of 16 bytes the low halves, then the high ones; and the same of 16 others.
    unsafe fn nibbles(from: [*const u8; 2]) -> Self::Codes;
    /// Of 32 bytes twice the bits of `mask`, after a shift to the right by two numbers.
    unsafe fn fields(from: *const u8, shifts: [u32; 2], mask: u8) -> Self::Codes;
    /// The low or, shifted by 4, the high halves of 64 bytes.
    unsafe fn halves_of_bytes(from: *const u8, shift: u32) -> Self::Codes;
    /// `value` where a bit is set, of 32 bits and 32 others.
    unsafe fn bits(bits: [u32; 2], value: u8) -> Self::Codes;
    /// `a | b << shift`, where `b` leaves room for that.
    unsafe fn merge<const SHIFT: u32>(a: Self::Codes, b: Self::Codes) -> Self::Codes;

    /// Each four codes, unsigned and below 64, times 64 activations, on top of `start << shift`.
    unsafe fn dot(codes: Self::Codes, x: *const i8, start: *const i32, shift: u32) -> Self::Sums;
    /// Each four codes, signed, times 64 activations above −128.
    unsafe fn dot_signed(codes: Self::Codes, x: *const i8, start: *const i32) -> Self::Sums;
}

/// The meaning: plain loops. On an x86 without FMA a fused addition is a slow library call, which such a CPU has to bear.
#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Portable {
    /// The activations of a lane.
    unsafe fn four(x: *const i8, lane: usize) -> [i8; 4] {
        // SAFETY: the caller's promise.
        unsafe { x.add(4 * lane).cast::<[i8; 4]>().read_unaligned() }
    }
}

fn lanes(mut value: impl FnMut(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(&mut value)
}

// SAFETY (all below): the caller's promises about pointers.
impl Isa for Portable {
    type Codes = [u8; STEP];
    type Sums = [f32; LANES];

    fn prefetch(_: *const u8, _: usize) {}

    unsafe fn zero() -> Self::Sums {
        [0.0; LANES]
    }

    unsafe fn f16(from: *const u8) -> f32 {
        f16::from_bits(unsafe { u16_at(from) }).to_f32()
    }

    unsafe fn load(from: *const f32) -> Self::Sums {
        lanes(|i| unsafe { from.add(i).read_unaligned() })
    }

    unsafe fn load_f16(from: *const u8) -> Self::Sums {
        lanes(|i| unsafe { Self::f16(from.add(2 * i)) })
    }

    unsafe fn load_bf16(from: *const u8) -> Self::Sums {
        lanes(|i| bf16::from_bits(unsafe { u16_at(from.add(2 * i)) }).to_f32())
    }

    unsafe fn mul(a: Self::Sums, b: Self::Sums) -> Self::Sums {
        lanes(|i| a[i] * b[i])
    }

    unsafe fn mul_add(a: Self::Sums, b: Self::Sums, c: Self::Sums) -> Self::Sums {
        lanes(|i| a[i].mul_add(b[i], c[i]))
    }

    unsafe fn total(mut sums: Self::Sums) -> f32 {
        for half in [8, 4, 2, 1] {
            (0..half).for_each(|i| sums[i] += sums[i + half]);
        }
        sums[0]
    }

    unsafe fn halves(numbers: [f32; 2]) -> Self::Sums {
        lanes(|i| numbers[i / 8])
    }

    unsafe fn quarters(numbers: *const f32) -> Self::Sums {
        lanes(|i| unsafe { numbers.add(i / 4).read_unaligned() })
    }

    unsafe fn halves_f16(from: [*const u8; 2]) -> Self::Sums {
        unsafe { Self::halves(from.map(|from| Self::f16(from))) }
    }

    unsafe fn bytes(from: [*const u8; 2]) -> Self::Codes {
        std::array::from_fn(|i| unsafe { *from[i / 32].add(i % 32) })
    }

    unsafe fn nibbles(from: [*const u8; 2]) -> Self::Codes {
        std::array::from_fn(|i| {
            let byte = unsafe { *from[i / 32].add(i % 16) };
            byte >> (i / 16 % 2 * 4) & 15
        })
    }

    unsafe fn fields(from: *const u8, shifts: [u32; 2], mask: u8) -> Self::Codes {
        std::array::from_fn(|i| unsafe { *from.add(i % 32) } >> shifts[i / 32] & mask)
    }

    unsafe fn halves_of_bytes(from: *const u8, shift: u32) -> Self::Codes {
        std::array::from_fn(|i| unsafe { *from.add(i) } >> shift & 15)
    }

    unsafe fn bits(bits: [u32; 2], value: u8) -> Self::Codes {
        std::array::from_fn(|i| (bits[i / 32] >> (i % 32) & 1) as u8 * value)
    }

    unsafe fn merge<const SHIFT: u32>(a: Self::Codes, b: Self::Codes) -> Self::Codes {
        std::array::from_fn(|i| a[i] | b[i] << SHIFT)
    }

    unsafe fn dot(codes: Self::Codes, x: *const i8, start: *const i32, shift: u32) -> Self::Sums {
        lanes(|i| {
            // SAFETY: the caller's promise.
            let (x, start) = unsafe { (Self::four(x, i), start.add(i).read_unaligned()) };
            let start = start.checked_shl(shift).unwrap_or(0);
            let products = (0..4).map(|j| i32::from(x[j]) * i32::from(codes[4 * i + j]));
            (start + products.sum::<i32>()) as f32
        })
    }

    unsafe fn dot_signed(codes: Self::Codes, x: *const i8, _: *const i32) -> Self::Sums {
        lanes(|i| {
            // SAFETY: the caller's promise.
            let x = unsafe { Self::four(x, i) };
            let products = (0..4).map(|j| i32::from(x[j]) * i32::from(codes[4 * i + j] as i8));
            products.sum::<i32>() as f32
        })
    }
}

unsafe fn u16_at(from: *const u8) -> u16 {
    // SAFETY: the caller's promise.
    u16::from_le(unsafe { from.cast::<u16>().read_unaligned() })
}
