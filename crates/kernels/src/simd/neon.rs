//! [`Isa`] on ARM: NEON with dot products of bytes.

#![expect(
    unsafe_code,
    reason = "vector instructions on pointers; `gemv` checks sizes and features"
)]

use std::arch::aarch64::*;
use std::arch::asm;

use super::isa::Isa;

/// Four registers for the 16 lanes.
#[derive(Clone, Copy)]
pub(crate) struct Neon;

/// Bytes of the smallest cache line.
const LINE: usize = 64;

/// Adds to each lane four products of signed bytes. The standard library's `vdotq_s32` is not stable yet.
#[inline]
#[target_feature(enable = "dotprod")]
fn dot(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the function has the feature; the instruction changes one register.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// 16 numbers of four registers, from 16 values of 16 bits each.
#[inline(always)]
unsafe fn widened(low: uint16x8_t, high: uint16x8_t) -> [uint32x4_t; 4] {
    unsafe {
        [
            vmovl_u16(vget_low_u16(low)),
            vmovl_high_u16(low),
            vmovl_u16(vget_low_u16(high)),
            vmovl_high_u16(high),
        ]
    }
}

// SAFETY (all below): the caller's promises about pointers; the caller checked for dotprod. No closures here:
// instructions in a closure would be calls.
impl Isa for Neon {
    type Codes = [uint8x16_t; 4];
    type Ints = [int32x4_t; 4];
    type Sums = [float32x4_t; 4];
    /// 16 of the 32 registers.
    const TILE: usize = 4;

    #[inline(always)]
    fn prefetch(from: *const u8, bytes: usize) {
        for at in (0..bytes).step_by(LINE) {
            // SAFETY: a hint, which never fails.
            unsafe {
                asm!(
                    "prfm pldl1keep, [{0}]",
                    in(reg) from.wrapping_add(at),
                    options(readonly, nostack, preserves_flags)
                );
            }
        }
    }

    #[inline(always)]
    unsafe fn zero() -> Self::Sums {
        unsafe { [vdupq_n_f32(0.0); 4] }
    }

    #[inline(always)]
    unsafe fn splat(number: f32) -> Self::Sums {
        unsafe { [vdupq_n_f32(number); 4] }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Sums {
        unsafe { from.cast::<Self::Sums>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::Sums {
        unsafe {
            let [low, high] = from.cast::<[uint16x8_t; 2]>().read_unaligned();
            let [low, high] = [vreinterpretq_f16_u16(low), vreinterpretq_f16_u16(high)];
            [
                vcvt_f32_f16(vget_low_f16(low)),
                vcvt_high_f32_f16(low),
                vcvt_f32_f16(vget_low_f16(high)),
                vcvt_high_f32_f16(high),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self::Sums {
        unsafe {
            let [low, high] = from.cast::<[uint16x8_t; 2]>().read_unaligned();
            let [a, b, c, d] = widened(low, high);
            [
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(a)),
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(b)),
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(c)),
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(d)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::Sums {
        unsafe {
            let bytes = vld1q_u8(from);
            let [a, b, c, d] = widened(vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
            [
                vcvtq_f32_u32(a),
                vcvtq_f32_u32(b),
                vcvtq_f32_u32(c),
                vcvtq_f32_u32(d),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self::Sums {
        unsafe {
            let bytes = vld1q_s8(from.cast());
            let [low, high] = [vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes)];
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_high_s16(high)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn store(sums: Self::Sums, to: *mut f32) {
        unsafe { to.cast::<Self::Sums>().write_unaligned(sums) }
    }

    #[inline(always)]
    unsafe fn mul(a: Self::Sums, b: Self::Sums) -> Self::Sums {
        unsafe {
            [
                vmulq_f32(a[0], b[0]),
                vmulq_f32(a[1], b[1]),
                vmulq_f32(a[2], b[2]),
                vmulq_f32(a[3], b[3]),
            ]
        }
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::Sums, b: Self::Sums, c: Self::Sums) -> Self::Sums {
        unsafe {
            [
                vfmaq_f32(c[0], a[0], b[0]),
                vfmaq_f32(c[1], a[1], b[1]),
                vfmaq_f32(c[2], a[2], b[2]),
                vfmaq_f32(c[3], a[3], b[3]),
            ]
        }
    }

    #[inline(always)]
    unsafe fn total(sums: Self::Sums) -> f32 {
        unsafe {
            let [low, high] = [vaddq_f32(sums[0], sums[2]), vaddq_f32(sums[1], sums[3])];
            let four = vaddq_f32(low, high);
            let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
            vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
        }
    }

    #[inline(always)]
    unsafe fn codes(from: *const u8) -> Self::Codes {
        unsafe { from.cast::<Self::Codes>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn field(codes: Self::Codes, shift: u32, mask: u8) -> Self::Codes {
        unsafe {
            let (left, mask) = (vdupq_n_s8(-(shift as i8)), vdupq_n_u8(mask));
            [
                vandq_u8(vshlq_u8(codes[0], left), mask),
                vandq_u8(vshlq_u8(codes[1], left), mask),
                vandq_u8(vshlq_u8(codes[2], left), mask),
                vandq_u8(vshlq_u8(codes[3], left), mask),
            ]
        }
    }

    #[inline(always)]
    unsafe fn merge<const SHIFT: u32>(a: Self::Codes, b: Self::Codes) -> Self::Codes {
        unsafe {
            let left = vdupq_n_s8(SHIFT as i8);
            [
                vorrq_u8(a[0], vshlq_u8(b[0], left)),
                vorrq_u8(a[1], vshlq_u8(b[1], left)),
                vorrq_u8(a[2], vshlq_u8(b[2], left)),
                vorrq_u8(a[3], vshlq_u8(b[3], left)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn lookup(codes: Self::Codes, table: &[i8; 16]) -> Self::Codes {
        unsafe {
            let table = vld1q_u8(table.as_ptr().cast());
            [
                vqtbl1q_u8(table, codes[0]),
                vqtbl1q_u8(table, codes[1]),
                vqtbl1q_u8(table, codes[2]),
                vqtbl1q_u8(table, codes[3]),
            ]
        }
    }

    #[inline(always)]
    unsafe fn start(start: i32, shift: u32) -> Self::Ints {
        unsafe { [vdupq_n_s32(start.checked_shl(shift).unwrap_or(0)); 4] }
    }

    /// Unsigned codes are below 64, so they are signed bytes too.
    #[inline(always)]
    unsafe fn dot(sums: Self::Ints, codes: Self::Codes, x: *const i8) -> Self::Ints {
        unsafe { Self::dot_signed(sums, codes, x) }
    }

    #[inline(always)]
    unsafe fn start_signed(_: i32) -> Self::Ints {
        unsafe { Self::start(0, 0) }
    }

    #[inline(always)]
    unsafe fn dot_signed(sums: Self::Ints, codes: Self::Codes, x: *const i8) -> Self::Ints {
        unsafe {
            let x = vreinterpretq_s8_s32(vdupq_n_s32(x.cast::<i32>().read_unaligned()));
            [
                dot(sums[0], vreinterpretq_s8_u8(codes[0]), x),
                dot(sums[1], vreinterpretq_s8_u8(codes[1]), x),
                dot(sums[2], vreinterpretq_s8_u8(codes[2]), x),
                dot(sums[3], vreinterpretq_s8_u8(codes[3]), x),
            ]
        }
    }

    #[inline(always)]
    unsafe fn to_floats(ints: Self::Ints) -> Self::Sums {
        unsafe {
            [
                vcvtq_f32_s32(ints[0]),
                vcvtq_f32_s32(ints[1]),
                vcvtq_f32_s32(ints[2]),
                vcvtq_f32_s32(ints[3]),
            ]
        }
    }
}
