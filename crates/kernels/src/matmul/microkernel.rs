//! The innermost part of every product: a few rows of the output, a few vectors wide, held in registers.
//!
//! `tile` sums `a(i, p) · b(p, j)` over `p` with one multiplication and addition after another, fused if the CPU can.
//! So an element's value depends on its row and column alone: not on its tile, on the rows next to it, or on the width
//! of fused vectors.
//!
//! Operands are words of 32 bits: one f32 value, or two bf16 values that follow one another in the sum, if the CPU has
//! an instruction that multiplies pairs and adds both products.

#![expect(
    unsafe_code,
    reason = "vector instructions on pointers; the callers in this folder check sizes and features"
)]

use std::hint::black_box;

use super::lanes::{Lanes, MAX_ROWS, WIDEST};

/// The output of a tile: `scale · sum`, added to it or replacing it.
#[derive(Clone, Copy)]
pub(super) struct Out {
    pub(super) ptr: *mut f32,
    pub(super) stride: usize,
    /// Columns that exist; the panel may be wider.
    pub(super) cols: usize,
    pub(super) scale: f32,
    pub(super) add: bool,
}

/// Rows of the left operand: word `p` of row `i` is at `ptr + i · stride + p`.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub(super) ptr: *const f32,
    pub(super) stride: usize,
}

/// Columns of the right operand as wide as a tile: row `p` is at `ptr + p · stride`.
#[derive(Clone, Copy)]
pub(super) struct Panel {
    pub(super) ptr: *const f32,
    pub(super) stride: usize,
}

/// One tile of `rows ≤ ROWS` rows and `NV` vectors, summed over `len` rows of a panel of words.
///
/// # Safety
/// The operands cover the tile, the panel has `len` rows of `NV · LEN` values, and the CPU has the instructions of `V`.
#[inline(always)]
pub(super) unsafe fn tile<V: Lanes, const NV: usize>(
    rows: usize,
    len: usize,
    left: Left,
    panel: Panel,
    out: Out,
) {
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match rows {
            1 => sums::<V, 1, NV>(len, left, panel, out),
            2 => sums::<V, 2, NV>(len, left, panel, out),
            3 => sums::<V, 3, NV>(len, left, panel, out),
            4 => sums::<V, 4, NV>(len, left, panel, out),
            5 => sums::<V, 5, NV>(len, left, panel, out),
            6 => sums::<V, 6, NV>(len, left, panel, out),
            _ => unreachable!("tiles have at most six rows"),
        }
    }
}

/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn sums<V: Lanes, const MR: usize, const NV: usize>(
    len: usize,
    left: Left,
    panel: Panel,
    out: Out,
) {
    // SAFETY: row i < MR and p < len lie inside the operands, and stores end at `out.cols`.
    unsafe {
        // Hides that the rows are equally far apart. Otherwise the compiler would derive each address from the one
        // before, for every value: a chain of additions as long as the multiplications.
        let rows: [_; MR] =
            std::array::from_fn(|i| black_box(left.ptr.wrapping_add(i * left.stride)));
        let mut sums = [[V::splat(0.0); NV]; MR];
        for p in 0..len {
            let mut b = [V::splat(0.0); NV];
            for (j, b) in b.iter_mut().enumerate() {
                *b = V::load(panel.ptr.add(p * panel.stride + j * V::LEN));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let value = V::splat(*rows[i].add(p));
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = sum.add_products(value, b);
                }
            }
        }
        // Both loops are short enough to be unrolled, so that the sums never leave the registers.
        let scale = V::splat(out.scale);
        let whole = out.cols == NV * V::LEN;
        if whole && out.add {
            for (i, sums) in sums.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    let to = out.ptr.add(i * out.stride + j * V::LEN);
                    sum.mul_add(scale, V::load(to)).store(to);
                }
            }
        } else if whole {
            for (i, sums) in sums.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    let to = out.ptr.add(i * out.stride + j * V::LEN);
                    sum.mul_add(scale, V::splat(0.0)).store(to);
                }
            }
        } else {
            let mut rows = [0.0; MAX_ROWS * WIDEST];
            for (i, sums) in sums.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    sum.store(rows.as_mut_ptr().add((i * NV + j) * V::LEN));
                }
            }
            for (i, row) in rows.chunks_exact(NV * V::LEN).enumerate().take(MR) {
                edge::<V>(row, out.ptr.add(i * out.stride), out);
            }
        }
    }
}

/// Writes the first `out.cols` of a row of sums.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn edge<V: Lanes>(sums: &[f32], to: *mut f32, out: Out) {
    let (scale, zero) = (unsafe { V::splat(out.scale) }, unsafe { V::splat(0.0) });
    for (at, sums) in (0..out.cols).step_by(V::LEN).zip(sums.chunks_exact(V::LEN)) {
        let len = V::LEN.min(out.cols - at);
        // SAFETY: the first `cols` columns exist.
        unsafe {
            let to = to.add(at);
            let before = if out.add {
                V::load_first(to, len)
            } else {
                zero
            };
            let sum = V::load(sums.as_ptr());
            sum.mul_add(scale, before).store_first(to, len);
        }
    }
}
