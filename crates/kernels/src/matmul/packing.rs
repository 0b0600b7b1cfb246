//! Packing: the operands of a product as the microkernel reads them.
//!
//! The right operand is packed into panels as wide as a tile. Packing also transposes if needed. Rows of the left
//! operand are converted to pairs of bf16, or transposed, a few at a time.

#![expect(
    unsafe_code,
    reason = "pointers into packed panels; sizes are checked by `gemm`"
)]

use super::lanes::Lanes;
use super::microkernel::Panel;
use crate::memory::Mat;

/// The block if the left operand is transposed, which happens once per block: so the block is wider.
pub(super) const TRANSPOSED_BLOCK: [usize; 2] = [256, 512];
/// Rows of a left operand that are transposed or converted to pairs at once: whole tiles, and whole vectors.
pub(super) const TRANSPOSED: usize = 48;
/// The stride of transposed rows. A power of two would put them into the same few lines of the first-level cache.
pub(super) const TRANSPOSED_STRIDE: usize = TRANSPOSED_BLOCK[0] + 16;

/// Whether the right operand is read in place: its rows are contiguous and end with a whole vector, and at most two
/// rows of tiles read them.
#[inline(always)]
pub(super) fn is_read_in_place<V: Lanes>(a: Mat<'_>, b: Mat<'_>) -> bool {
    V::DEPTH == 1
        && a.rows() <= 2 * V::ROWS
        && b.strides()[1] == 1
        && b.cols().is_multiple_of(V::LEN)
}

/// The panels of a right operand.
#[derive(Clone, Copy)]
pub(super) struct Panels {
    ptr: *const f32,
    /// The stride of a panel's rows, if it is not the panel's width.
    stride: Option<usize>,
    /// Rows of a panel.
    depth: usize,
}

impl Panels {
    pub(super) fn packed(panels: &[f32], depth: usize) -> Self {
        Self {
            ptr: panels.as_ptr(),
            stride: None,
            depth,
        }
    }

    pub(super) fn in_place(b: Mat<'_>) -> Self {
        Self {
            ptr: b.as_ptr(),
            stride: Some(b.strides()[0]),
            depth: b.rows(),
        }
    }

    /// The first panel, `width` wide, and those behind it.
    ///
    /// # Safety
    /// There is such a panel.
    #[inline(always)]
    pub(super) unsafe fn split(self, width: usize) -> (Panel, Self) {
        let (stride, taken) = match self.stride {
            Some(stride) => (stride, width),
            None => (width, self.depth * width),
        };
        let panel = Panel {
            ptr: self.ptr,
            stride,
        };
        // SAFETY: at most one past the end of what the panels lie in.
        let ptr = unsafe { self.ptr.add(taken) };
        (panel, Self { ptr, ..self })
    }
}

/// The widths of the panels that cover `left` columns: whole tiles, then as few vectors as suffice.
#[inline(always)]
pub(super) fn panel_width<V: Lanes, const NV: usize>(left: usize) -> usize {
    left.next_multiple_of(V::LEN).min(NV * V::LEN)
}

/// Copies a block of the right operand into panels, rows of a panel one after another, zeros at its edge.
///
/// # Safety
/// As [`blocks`]; `panels` holds the padded block.
#[inline(always)]
pub(super) unsafe fn pack<V: Lanes, const NV: usize>(b: Mat<'_>, panels: &mut [f32]) {
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
            to = to.add(rows.div_ceil(V::DEPTH) * width);
        }
        start += width;
    }
}

/// All panels from contiguous rows, a row of words at a time, in memory order.
///
/// # Safety
/// As [`pack`].
#[inline(always)]
pub(super) unsafe fn pack_rows<V: Lanes, const NV: usize>(b: Mat<'_>, panels: &mut [f32]) {
    let (rows, cols, stride) = (b.rows(), b.cols(), b.strides()[0]);
    let steps = rows.div_ceil(V::DEPTH);
    for step in 0..steps {
        let from = b.as_ptr().wrapping_add(step * V::DEPTH * stride);
        let depth = V::DEPTH.min(rows - step * V::DEPTH);
        let (mut start, mut panel) = (0, panels.as_mut_ptr());
        while start < cols {
            let width = panel_width::<V, NV>(cols - start);
            for at in (0..width).step_by(V::LEN) {
                let left = cols.saturating_sub(start + at).min(V::LEN);
                // SAFETY: only real columns are read, and the panel has `width`.
                unsafe {
                    let from = from.wrapping_add(start + at);
                    let words = V::across(from, stride, depth, left);
                    words.store(panel.add(step * width + at));
                }
            }
            // SAFETY: the next panel, or the end of the last.
            panel = unsafe { panel.add(steps * width) };
            start += width;
        }
    }
}

/// A panel from columns, a square at a time.
///
/// # Safety
/// As [`pack`].
#[inline(always)]
pub(super) unsafe fn pack_columns<V: Lanes>(
    from: *const f32,
    [row_stride, col_stride]: [usize; 2],
    [rows, real, width]: [usize; 3],
    to: *mut f32,
) {
    assert_eq!(row_stride, 1, "rows or columns of a view are contiguous");
    for col in (0..width).step_by(V::LEN) {
        for step in (0..rows.div_ceil(V::DEPTH)).step_by(V::LEN) {
            let row = step * V::DEPTH;
            let size = [
                real.saturating_sub(col).min(V::LEN),
                (rows - row).min(V::DEPTH * V::LEN),
            ];
            // SAFETY: what is read lies inside the operand, what is written inside the panel.
            unsafe {
                let from = from.wrapping_add(row + col * col_stride);
                let to = to.add(step * width + col);
                transpose::<V, false>(from, col_stride, size, to, width);
            }
        }
    }
}

/// A square of words of the largest vectors.
#[repr(align(64))]
pub(super) struct Square([f32; WIDEST_VECTOR * WIDEST_VECTOR]);

const WIDEST_VECTOR: usize = 16;

/// [`Lanes::transpose`] of the words of some lines of values: across `DEPTH · LEN` lines at most, of `len ≤ LEN` values
/// each, or along `LEN` lines, of `len ≤ DEPTH · LEN`.
///
/// # Safety
/// As there.
#[inline(always)]
pub(super) unsafe fn transpose<V: Lanes, const ACROSS: bool>(
    from: *const f32,
    stride: usize,
    [lines, len]: [usize; 2],
    to: *mut f32,
    to_stride: usize,
) {
    if V::DEPTH == 1 {
        // SAFETY: the caller's promise; values are words.
        return unsafe { V::transpose(from, stride, [lines, len], to, to_stride) };
    }
    let mut square = Square([0.0; WIDEST_VECTOR * WIDEST_VECTOR]);
    let words = square.0.as_mut_ptr();
    let [height, width] = if ACROSS { [V::DEPTH, 1] } else { [1, V::DEPTH] };
    // SAFETY: the caller's promise; the square has room.
    unsafe {
        for (i, line) in (0..lines).step_by(height).enumerate() {
            let from = from.add(line * stride);
            let row = if ACROSS {
                V::across(from, stride, height.min(lines - line), len)
            } else {
                V::along(from, len)
            };
            row.store(words.add(i * V::LEN));
        }
        let size = [lines.div_ceil(height), len.div_ceil(width)];
        V::transpose(words, V::LEN, size, to, to_stride);
    }
}

/// Converts rows of a left operand to words; its columns are contiguous.
///
/// # Safety
/// As [`blocks`]; `to` holds the rows.
#[inline(always)]
pub(super) unsafe fn pair_left<V: Lanes>(a: Mat<'_>, to: &mut [f32]) {
    for (row, to) in (0..a.rows()).zip(to.chunks_mut(TRANSPOSED_STRIDE)) {
        let from = a.row(row);
        for col in (0..from.len()).step_by(V::DEPTH * V::LEN) {
            // SAFETY: inside the row; rows of the copy are longer than the block is deep, by a vector.
            unsafe {
                let words = V::along(from.as_ptr().add(col), from.len() - col);
                words.store(to.as_mut_ptr().add(col / V::DEPTH));
            }
        }
    }
}

/// Transposes rows of a left operand whose columns are not contiguous.
///
/// # Safety
/// As [`blocks`]; `to` holds the rows.
#[inline(always)]
pub(super) unsafe fn transpose_left<V: Lanes>(a: Mat<'_>, to: &mut [f32]) {
    let [row_stride, col_stride] = a.strides();
    assert_eq!(row_stride, 1, "rows or columns of a view are contiguous");
    let deep = V::DEPTH * V::LEN;
    for col in (0..a.cols()).step_by(deep) {
        let cols = deep.min(a.cols() - col);
        for row in (0..a.rows()).step_by(V::LEN) {
            let size = [cols, V::LEN.min(a.rows() - row)];
            // SAFETY: what is read lies inside the operand; rows of the copy are longer than the block is deep, by a
            // vector.
            unsafe {
                let from = a.as_ptr().add(row + col * col_stride);
                let to = to
                    .as_mut_ptr()
                    .add(row * TRANSPOSED_STRIDE + col / V::DEPTH);
                transpose::<V, true>(from, col_stride, size, to, TRANSPOSED_STRIDE);
            }
        }
    }
}
