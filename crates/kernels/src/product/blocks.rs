//! A whole product, cut into blocks that fit the caches.
//!
//! The right operand is packed into panels, as wide as a tile of the microkernel, of which one block fits the second-level
//! cache. Packing also turns a transposed operand, so that `x · wᵀ` runs as fast as `dy · w`. Of the left
//! operand a tile's rows are copied side by side, which costs little and keeps them out of each other's way in the cache.
//!
//! Source of the cut: Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008, with the roles of
//! the operands exchanged, since ours are row-major.

#![expect(
    unsafe_code,
    reason = "pointers into packed panels; sizes are checked by `gemm`"
)]

use super::microkernel::{DEPTH, LEFT_STRIDE, Lanes, Out, Portable, tile};
use super::strided::{Mat, MatMut, Write};
use crate::product::gemm::with_scratch;

/// Columns of the right operand per block.
const WIDTH: usize = 512;
/// Rows of the largest tile.
const MAX_ROWS: usize = 12;
/// Vectors that cross a cache line cost double.
const CACHE_LINE: usize = 64;

/// `dst = scale · a · b`, or added to `dst`, with the widest vectors the CPU has; serial.
pub(super) fn product(dst: &MatMut<'_>, a: Mat<'_>, b: Mat<'_>, scale: f32, write: Write) {
    let [_, depth, cols] = [a.rows(), a.cols(), b.cols()];
    let padded = cols.min(WIDTH).next_multiple_of(16);
    let len = depth.min(DEPTH) * padded + MAX_ROWS * LEFT_STRIDE + CACHE_LINE / size_of::<f32>();
    with_scratch(len, |scratch| {
        let skipped = scratch.as_ptr().align_offset(CACHE_LINE);
        let (left, panels) = scratch[skipped..].split_at_mut(MAX_ROWS * LEFT_STRIDE);
        let call = Call {
            dst,
            a,
            b,
            scale,
            write,
            left,
            panels,
        };
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                // SAFETY: detected just above.
                return unsafe { avx512(call) };
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                // SAFETY: detected just above.
                return unsafe { avx2(call) };
            }
        }
        // SAFETY: needs no special instructions.
        unsafe { blocks::<Portable, 4>(call) }
    });
}

/// One call, and room for what it packs.
struct Call<'a> {
    dst: &'a MatMut<'a>,
    a: Mat<'a>,
    b: Mat<'a>,
    scale: f32,
    write: Write,
    left: &'a mut [f32],
    panels: &'a mut [f32],
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512(call: Call<'_>) {
    // SAFETY: this function has the feature.
    unsafe { blocks::<super::microkernel::Avx512, 2>(call) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(call: Call<'_>) {
    // SAFETY: this function has the features.
    unsafe { blocks::<super::microkernel::Avx2, 2>(call) }
}

/// # Safety
/// The CPU has the instructions of `V`, and the operands fit.
#[inline(always)]
unsafe fn blocks<V: Lanes, const NV: usize>(call: Call<'_>) {
    let (depth, cols) = (call.a.cols(), call.b.cols());
    for first in (0..depth).step_by(DEPTH) {
        let sums = first..depth.min(first + DEPTH);
        for start in (0..cols).step_by(WIDTH) {
            let outs = start..cols.min(start + WIDTH);
            let b = call.b.block(sums.clone(), outs.clone());
            // SAFETY: the caller's promise; the scratch holds a block.
            unsafe {
                pack::<V, NV>(b, call.panels);
                let a = call.a.block(0..call.a.rows(), sums.clone());
                let write = call.write.after(first == 0);
                let dst = call.dst.part(0..a.rows(), outs);
                block::<V, NV>(dst, a, call.panels, call.scale, write, call.left);
            }
        }
    }
}

/// Widths of the panels that cover some columns: whole tiles, then a vector where that is enough.
#[inline(always)]
fn panel_width<V: Lanes, const NV: usize>(left: usize) -> usize {
    if left > V::LEN { NV * V::LEN } else { V::LEN }
}

/// Copies a block of the right operand into panels, rows of a panel one after another, zeros at its edge.
///
/// # Safety
/// As [`blocks`]; `panels` holds the padded block.
#[inline(always)]
unsafe fn pack<V: Lanes, const NV: usize>(b: Mat<'_>, panels: &mut [f32]) {
    let (rows, cols) = (b.rows(), b.cols());
    let strides = b.strides();
    if strides[1] == 1 {
        // SAFETY: the caller's promise.
        return unsafe { pack_rows::<V, NV>(b, panels) };
    }
    let mut start = 0;
    let mut to = panels.as_mut_ptr();
    while start < cols {
        let width = panel_width::<V, NV>(cols - start);
        let real = width.min(cols - start);
        // SAFETY: columns start..start + real exist, and the panels have room.
        unsafe {
            let from = b.as_ptr().add(start * strides[1]);
            pack_columns::<V>(from, strides, [rows, real, width], to);
            to = to.add(rows * width);
        }
        start += width;
    }
}

/// All panels from contiguous rows, a row at a time: in the order in which they lie in memory.
///
/// # Safety
/// As [`pack`].
#[inline(always)]
unsafe fn pack_rows<V: Lanes, const NV: usize>(b: Mat<'_>, panels: &mut [f32]) {
    let (rows, cols) = (b.rows(), b.cols());
    for row in 0..rows {
        let from = b.row(row).as_ptr();
        let (mut start, mut panel) = (0, panels.as_mut_ptr());
        while start < cols {
            let width = panel_width::<V, NV>(cols - start);
            for at in (0..width).step_by(V::LEN) {
                let left = cols.saturating_sub(start + at);
                // SAFETY: only real columns are read, and the panel has `width`.
                unsafe {
                    let from = from.wrapping_add(start + at);
                    let values = if left >= V::LEN {
                        V::load(from)
                    } else {
                        V::load_first(from, left)
                    };
                    values.store(panel.add(row * width + at));
                }
            }
            // SAFETY: the next panel, or the end of the last.
            panel = unsafe { panel.add(rows * width) };
            start += width;
        }
    }
}

/// A panel from columns, a square at a time where they are contiguous.
///
/// # Safety
/// As [`pack`].
#[inline(always)]
unsafe fn pack_columns<V: Lanes>(
    from: *const f32,
    [row_stride, col_stride]: [usize; 2],
    [rows, real, width]: [usize; 3],
    to: *mut f32,
) {
    if row_stride != 1 {
        for (row, col) in (0..rows).flat_map(|row| (0..width).map(move |col| (row, col))) {
            // SAFETY: only real columns are read.
            unsafe {
                let value = from.wrapping_add(row * row_stride + col * col_stride);
                *to.add(row * width + col) = if col < real { *value } else { 0.0 };
            }
        }
        return;
    }
    for row in (0..rows).step_by(V::LEN) {
        for col in (0..width).step_by(V::LEN) {
            let size = [real.saturating_sub(col), rows - row].map(|n| n.min(V::LEN));
            // SAFETY: what is read lies inside the operand, what is written inside the panel.
            unsafe {
                let from = from.wrapping_add(row + col * col_stride);
                V::transpose(from, col_stride, size, to.add(row * width + col), width);
            }
        }
    }
}

/// All tiles of a block.
///
/// # Safety
/// As [`blocks`]; the panels are those of the block.
#[inline(always)]
unsafe fn block<V: Lanes, const NV: usize>(
    dst: MatMut<'_>,
    a: Mat<'_>,
    panels: &[f32],
    scale: f32,
    write: Write,
    left: &mut [f32],
) {
    let (depth, cols) = (a.cols(), dst.cols());
    for row in (0..a.rows()).step_by(V::TILE[0]) {
        let rows = row..a.rows().min(row + V::TILE[0]);
        // SAFETY: there is room for the rows of a tile.
        unsafe { copy_left::<V>(a.block(rows.clone(), 0..depth), left) };
        let (mut col, mut panel) = (0, panels.as_ptr());
        while col < cols {
            let width = panel_width::<V, NV>(cols - col);
            // SAFETY: the tile lies inside dst, the panel inside the panels.
            unsafe {
                let out = Out {
                    ptr: dst.as_ptr().add(row * dst.stride() + col),
                    stride: dst.stride(),
                    cols: width.min(cols - col),
                    scale,
                    add: write == Write::Add,
                };
                if width == V::LEN {
                    tile::<V, 1>(rows.len(), depth, left.as_ptr(), panel, out);
                } else {
                    tile::<V, NV>(rows.len(), depth, left.as_ptr(), panel, out);
                }
                panel = panel.add(depth * width);
            }
            col += width;
        }
    }
}

/// Copies a tile's rows of the left operand.
///
/// # Safety
/// As [`blocks`]; `to` holds the rows.
#[inline(always)]
unsafe fn copy_left<V: Lanes>(a: Mat<'_>, to: &mut [f32]) {
    let [row_stride, col_stride] = a.strides();
    if col_stride == 1 {
        for (row, to) in (0..a.rows()).zip(to.chunks_mut(LEFT_STRIDE)) {
            to[..a.cols()].copy_from_slice(a.row(row));
        }
    } else if row_stride == 1 {
        for col in (0..a.cols()).step_by(V::LEN) {
            let cols = V::LEN.min(a.cols() - col);
            for row in (0..a.rows()).step_by(V::LEN) {
                let size = [cols, V::LEN.min(a.rows() - row)];
                // SAFETY: what is read lies inside the operand; rows of the copy are longer than `DEPTH` by a vector.
                unsafe {
                    let from = a.as_ptr().add(row + col * col_stride);
                    let to = to.as_mut_ptr().add(row * LEFT_STRIDE + col);
                    V::transpose(from, col_stride, size, to, LEFT_STRIDE);
                }
            }
        }
    } else {
        for (row, to) in (0..a.rows()).zip(to.chunks_mut(LEFT_STRIDE)) {
            for (col, to) in (0..a.cols()).zip(to) {
                // SAFETY: inside the operand.
                *to = unsafe { *a.as_ptr().add(row * row_stride + col * col_stride) };
            }
        }
    }
}
