//! A whole product, packed in blocks that fit the caches.
//!
//! The right operand is packed into panels as wide as a tile of the microkernel; a block of panels fits the
//! second-level cache. Packing also transposes if needed, so `x · wᵀ` is as fast as `dy · w`. The left operand is read
//! in place, unless it is transposed: then some of its rows are transposed at a time.
//!
//! Source of the cut: Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008, with the roles
//! of the operands exchanged, since ours are row-major.
//!
//! In bf16, two values that follow one another in the sum are one word, in panels and in the left rows, which are
//! converted a few at a time.

#![expect(
    unsafe_code,
    reason = "pointers into packed panels; sizes are checked by `gemm`"
)]

use super::kernel_version::KernelVersion;
use super::lanes::{Lanes, PortableLanes, WIDEST};
#[cfg(target_arch = "x86_64")]
use super::lanes_x86::{Avx2Lanes, Avx512Lanes};
use super::microkernel::{Left, Out, tile};
use super::packing::{
    Panels, TRANSPOSED, TRANSPOSED_BLOCK, TRANSPOSED_STRIDE, is_read_in_place, pack, pair_left,
    panel_width, transpose_left,
};
use crate::memory::{Mat, MatMut, with_scratch};
use crate::settings::Accumulate;

/// Rows (of words) and columns of the right operand per block: its panels take half of a second-level cache of 1 MiB.
const PANEL_BLOCK: [usize; 2] = [512, 256];
/// The columns of a block if the left operand has at most [`NARROW_BLOCK_ROWS`] rows: they gain less from panels than
/// is lost by what panels push out of the cache.
const NARROW_BLOCK: usize = 128;
const NARROW_BLOCK_ROWS: usize = 256;
/// Vectors that cross a cache line cost double.
const CACHE_LINE: usize = 64;

/// The right operand of a product.
#[derive(Clone, Copy)]
pub(super) enum Right<'a> {
    Values(Mat<'a>),
    /// Pairs of bf16 as words, `[sum / 2, cols]`, column by column.
    Pairs(Mat<'a>),
}

impl Right<'_> {
    /// Rows, or pairs of rows, and columns.
    pub(super) fn dims(&self) -> [usize; 2] {
        let (Self::Values(b) | Self::Pairs(b)) = self;
        [b.rows(), b.cols()]
    }
}

/// `dst = scale · a · b`, or added to `dst`, with the widest vectors the CPU has; serial.
pub(super) fn product(
    dst: &MatMut<'_>,
    a: Mat<'_>,
    b: Mat<'_>,
    scale: f32,
    accumulate: Accumulate,
) {
    let version = KernelVersion::all()
        .next_back()
        .unwrap_or(KernelVersion::Portable);
    product_in(version, dst, a, Right::Values(b), scale, accumulate);
}

/// Whether the CPU has instructions for [`product_bf16`].
pub(crate) fn multiplies_pairs() -> bool {
    KernelVersion::bf16().is_some()
}

/// [`product`] with operands rounded to bf16, with instructions for pairs.
///
/// # Panics
/// If the CPU has none.
pub(super) fn product_bf16(dst: &MatMut<'_>, a: Mat<'_>, b: Right<'_>, accumulate: Accumulate) {
    let version = KernelVersion::bf16().expect("instructions for bf16");
    product_in(version, dst, a, b, 1.0, accumulate);
}

/// [`product`] with a given instruction set, which the CPU has.
fn product_in(
    version: KernelVersion,
    dst: &MatMut<'_>,
    a: Mat<'_>,
    b: Right<'_>,
    scale: f32,
    accumulate: Accumulate,
) {
    let depth = version.depth();
    let (block, transposed) = if depth == 1 && a.strides()[1] == 1 {
        let [deep, wide] = PANEL_BLOCK;
        let is_narrow = a.rows() < NARROW_BLOCK_ROWS;
        ([deep, if is_narrow { NARROW_BLOCK } else { wide }], 0)
    } else {
        (TRANSPOSED_BLOCK, TRANSPOSED * TRANSPOSED_STRIDE)
    };
    let padded = b.dims()[1].min(block[1]).next_multiple_of(WIDEST);
    let steps = a.cols().div_ceil(depth).min(block[0]);
    let len = steps * padded + transposed + CACHE_LINE / size_of::<f32>();
    with_scratch(len, |scratch| {
        let skipped = scratch.as_ptr().align_offset(CACHE_LINE);
        let (left, panels) = scratch[skipped..].split_at_mut(transposed);
        let call = GemmCall {
            dst,
            a,
            b,
            scale,
            accumulate,
            block,
            left,
            panels,
        };
        // SAFETY: versions are made where the CPU has their instructions.
        unsafe {
            match version {
                KernelVersion::Portable => blocks::<PortableLanes, 4>(call),
                #[cfg(target_arch = "x86_64")]
                KernelVersion::Avx2 => avx2(call),
                #[cfg(target_arch = "x86_64")]
                KernelVersion::Avx512 => avx512(call),
                #[cfg(target_arch = "x86_64")]
                KernelVersion::Avx512Bf16 => avx512_bf16(call),
            }
        }
    });
}

/// A product, and memory for packed operands.
struct GemmCall<'a> {
    dst: &'a MatMut<'a>,
    a: Mat<'a>,
    b: Right<'a>,
    scale: f32,
    accumulate: Accumulate,
    /// Rows of words and columns of the right operand per block.
    block: [usize; 2],
    left: &'a mut [f32],
    panels: &'a mut [f32],
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512(call: GemmCall<'_>) {
    // SAFETY: this function has the feature.
    unsafe { blocks::<Avx512Lanes<1>, 4>(call) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn avx512_bf16(call: GemmCall<'_>) {
    // SAFETY: this function has the features.
    unsafe { blocks::<Avx512Lanes<2>, 4>(call) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(call: GemmCall<'_>) {
    // SAFETY: this function has the features.
    unsafe { blocks::<Avx2Lanes, 2>(call) }
}

/// # Safety
/// The CPU has the instructions of `V`, and the operands fit.
#[inline(always)]
unsafe fn blocks<V: Lanes, const NV: usize>(call: GemmCall<'_>) {
    let (depth, cols) = (call.a.cols(), call.b.dims()[1]);
    let [deep, wide] = call.block;
    for first in (0..depth).step_by(deep * V::DEPTH) {
        let sums = first..depth.min(first + deep * V::DEPTH);
        let steps = first / V::DEPTH..sums.end.div_ceil(V::DEPTH);
        for start in (0..cols).step_by(wide) {
            let outs = start..cols.min(start + wide);
            // SAFETY: the caller's promise; the scratch holds a block.
            unsafe {
                let panels = match call.b {
                    Right::Pairs(words) => {
                        let words = words.block(steps.clone(), outs.clone());
                        pack::<V::Words, NV>(words, call.panels);
                        Panels::packed(call.panels, steps.len())
                    }
                    Right::Values(b) => {
                        let b = b.block(sums.clone(), outs.clone());
                        if is_read_in_place::<V>(call.a, b) {
                            Panels::in_place(b)
                        } else {
                            pack::<V, NV>(b, call.panels);
                            Panels::packed(call.panels, steps.len())
                        }
                    }
                };
                let a = call.a.block(0..call.a.rows(), sums.clone());
                let accumulate = call.accumulate.after(first == 0);
                let dst = call.dst.part(0..a.rows(), outs);
                block::<V, NV>(dst, a, panels, call.scale, accumulate, call.left);
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
    panels: Panels,
    scale: f32,
    accumulate: Accumulate,
    left: &mut [f32],
) {
    for first in (0..a.rows()).step_by(TRANSPOSED) {
        let group = first..a.rows().min(first + TRANSPOSED);
        let a = a.block(group.clone(), 0..a.cols());
        let is_contiguous = a.strides()[1] == 1;
        let left = if is_contiguous && V::DEPTH == 1 {
            Left {
                ptr: a.as_ptr(),
                stride: a.strides()[0],
            }
        } else {
            // SAFETY: there is room for the rows of a group.
            unsafe {
                if is_contiguous {
                    pair_left::<V>(a, left);
                } else {
                    transpose_left::<V>(a, left);
                }
            }
            Left {
                ptr: left.as_ptr(),
                stride: TRANSPOSED_STRIDE,
            }
        };
        // Tiles of equal height: a tile of a row or two would wait for its operands.
        let height = a.rows().div_ceil(a.rows().div_ceil(V::ROWS));
        for row in (0..a.rows()).step_by(height) {
            let rows = row..a.rows().min(row + height);
            let left = Left {
                ptr: left.ptr.wrapping_add(row * left.stride),
                ..left
            };
            // SAFETY: parts of one thread, one after another; the caller's promise.
            unsafe {
                let dst = dst.part(first + row..first + rows.end, 0..dst.cols());
                let steps = a.cols().div_ceil(V::DEPTH);
                row_of_tiles::<V, NV>(dst, left, steps, panels, (scale, accumulate));
            }
        }
    }
}

/// The tiles of a few rows, over all panels.
///
/// # Safety
/// As [`blocks`]; the panels are those of the block, and `left` covers the rows of `dst`.
#[inline(always)]
unsafe fn row_of_tiles<V: Lanes, const NV: usize>(
    dst: MatMut<'_>,
    left: Left,
    depth: usize,
    mut panels: Panels,
    (scale, accumulate): (f32, Accumulate),
) {
    let (rows, cols) = (dst.rows(), dst.cols());
    let mut col = 0;
    while col < cols {
        let width = panel_width::<V, NV>(cols - col);
        // SAFETY: the tile lies inside dst, the panel inside the panels.
        unsafe {
            let out = Out {
                ptr: dst.as_ptr().add(col),
                stride: dst.stride(),
                cols: width.min(cols - col),
                scale,
                add: accumulate == Accumulate::Add,
            };
            let (panel, behind) = panels.split(width);
            match width / V::LEN {
                1 => tile::<V, 1>(rows, depth, left, panel, out),
                2 => tile::<V, 2>(rows, depth, left, panel, out),
                3 => tile::<V, 3>(rows, depth, left, panel, out),
                _ => tile::<V, NV>(rows, depth, left, panel, out),
            }
            panels = behind;
        }
        col += width;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::round_to_bf16;
    use crate::testing::noise;

    /// f32 sums of up to 1061 products below 1, in another order.
    const TOLERANCE: f64 = 2e-4;

    /// The operands as they are, or rounded to bf16.
    fn operands([m, n, k]: [usize; 3], are_rounded: bool) -> [Vec<f32>; 2] {
        let mut all = [noise(m * k, 1), noise(k * n, 2)];
        if are_rounded {
            all.iter_mut().for_each(|values| round_to_bf16(values));
        }
        all
    }

    /// The product of every version, as bits; operands may be stored transposed.
    fn all(
        size: [usize; 3],
        transposed: [bool; 2],
        accumulate: Accumulate,
    ) -> Vec<(KernelVersion, Vec<f32>)> {
        let [m, n, k] = size;
        let [a, b] = operands(size, false);
        let view = |values, rows, cols, transposed| match transposed {
            true => Mat::dense(values, cols, rows).t(),
            false => Mat::dense(values, rows, cols),
        };
        let (a, b) = (view(&a, m, k, transposed[0]), view(&b, k, n, transposed[1]));
        let product = |version| {
            // Wider than the product, so that a write past its edge is seen.
            let mut dst = vec![0.5; m * (n + 3)];
            let view = MatMut::new(&mut dst, m, n, n + 3);
            product_in(version, &view, a, Right::Values(b), 0.75, accumulate);
            (version, dst)
        };
        KernelVersion::all()
            .chain(KernelVersion::bf16())
            .map(product)
            .collect()
    }

    fn by_hand(
        size: [usize; 3],
        transposed: [bool; 2],
        accumulate: Accumulate,
        are_rounded: bool,
    ) -> Vec<f64> {
        let [m, n, k] = size;
        let [a, b] = operands(size, are_rounded);
        let at = |values: &[f32], [rows, cols]: [usize; 2], i: usize, j: usize, transposed| {
            f64::from(
                values[if transposed {
                    j * rows + i
                } else {
                    i * cols + j
                }],
            )
        };
        let start = if accumulate == Accumulate::Add {
            0.5
        } else {
            0.0
        };
        let mut dst = vec![0.5; m * (n + 3)];
        for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
            let products = (0..k)
                .map(|p| at(&a, [m, k], i, p, transposed[0]) * at(&b, [k, n], p, j, transposed[1]));
            dst[i * (n + 3) + j] = start + 0.75 * products.sum::<f64>();
        }
        dst
    }

    #[test]
    fn every_version_gives_the_sums_written_out_over_ragged_shapes() {
        let sizes = [
            [1, 1, 1],
            [5, 16, 3],
            [12, 32, 40],
            [12, 48, 7],
            [13, 33, 65],
            [40, 8, 19],
            [29, 17, 300],
            [7, 530, 21],
            [25, 100, 257],
            [50, 66, 1061],
        ];
        let ways = [[false, false], [false, true], [true, false], [true, true]];
        for (size, transposed) in sizes.iter().flat_map(|s| ways.map(|w| (s, w))) {
            for accumulate in [Accumulate::Replace, Accumulate::Add] {
                let [expected, of_rounded] = [false, true]
                    .map(|are_rounded| by_hand(*size, transposed, accumulate, are_rounded));
                for (version, found) in all(*size, transposed, accumulate) {
                    let expected = if version.depth() == 1 {
                        &expected
                    } else {
                        &of_rounded
                    };
                    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
                        assert!(
                            (f64::from(*found) - expected).abs() < TOLERANCE,
                            "{version:?} {size:?} {transposed:?} {accumulate:?} at {i}: {found} {expected}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn the_width_of_fused_vectors_changes_no_bit() {
        let [m, n, k] = [29, 77, 300];
        let (a, b) = (noise(m * k, 1), noise(k * n, 2));
        let one_by_one = |i: usize, j: usize| {
            (0..k).step_by(PANEL_BLOCK[0]).fold(0f32, |before, first| {
                let sum = (first..k.min(first + PANEL_BLOCK[0]))
                    .fold(0f32, |sum, p| a[i * k + p].mul_add(b[p * n + j], sum));
                sum.mul_add(0.75, before)
            })
        };
        let versions = all([m, n, k], [false, false], Accumulate::Replace);
        for (version, found) in versions
            .into_iter()
            .filter(|(version, _)| version.depth() == 1)
        {
            // Plain ones fuse where the instruction is certain to be there.
            if version != KernelVersion::Portable || cfg!(target_arch = "aarch64") {
                for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                    assert_eq!(found[i * (n + 3) + j], one_by_one(i, j), "{version:?}");
                }
            }
        }
    }

    #[test]
    fn an_element_does_not_depend_on_what_is_beside_it() {
        for version in KernelVersion::all().chain(KernelVersion::bf16()) {
            check_alone(version);
        }
    }

    fn check_alone(version: KernelVersion) {
        let product = |view: &MatMut<'_>, a, b| {
            product_in(version, view, a, Right::Values(b), 1.0, Accumulate::Replace);
        };
        let (a, b) = (noise(40 * 300, 1), noise(300 * 90, 2));
        let (a, b) = (Mat::dense(&a, 40, 300), Mat::dense(&b, 300, 90));
        let mut whole = vec![0.0; 40 * 90];
        product(&MatMut::dense(&mut whole, 40, 90), a, b);
        for (rows, cols) in [
            (0..1, 0..90),
            (3..20, 5..6),
            (39..40, 41..90),
            (7..33, 16..64),
        ] {
            let mut part = vec![0.0; rows.len() * cols.len()];
            let view = MatMut::dense(&mut part, rows.len(), cols.len());
            let (a, b) = (a.block(rows.clone(), 0..300), b.block(0..300, cols.clone()));
            product(&view, a, b);
            for (row, part) in rows.zip(part.chunks(cols.len())) {
                assert_eq!(part, &whole[row * 90..][cols.clone()]);
            }
        }
    }

    #[test]
    fn stored_pairs_give_what_values_do() {
        let Some(version) = KernelVersion::bf16() else {
            return;
        };
        for [m, n, k] in [[1, 5, 2], [50, 66, 1062], [300, 300, 40]] {
            let [a, b] = operands([m, n, k], true);
            let pairs: Vec<f32> = b
                .as_chunks::<2>()
                .0
                .iter()
                .map(|pair| {
                    let [low, high] = pair.map(|value| value.to_bits() >> 16);
                    f32::from_bits(low | high << 16)
                })
                .collect();
            let a = Mat::dense(&a, m, k);
            let product = |b| {
                let mut dst = vec![f32::NAN; m * n];
                let view = MatMut::dense(&mut dst, m, n);
                product_in(version, &view, a, b, 1.0, Accumulate::Replace);
                dst
            };
            let found = product(Right::Pairs(Mat::dense(&pairs, n, k / 2).t()));
            assert_eq!(found, product(Right::Values(Mat::dense(&b, n, k).t())));
        }
    }
}
