//! Products in blocks: one on one thread over the tiles of a weight, and the grid of tasks that a large one is cut into.
//!
//! Tasks are cut along rows and columns of the result alone, so results do not depend on the number of threads.

use std::ops::Range;

use super::gemm::gemm_pairs;
use super::operand::{LONG_TILE, LayerPass, TILE, WeightOperand};
use super::plan::{ProductPlan, plan};
use crate::gemv::GemvInput;
use crate::memory::{Mat, MatMut};
use crate::settings::Accumulate;
use crate::threads::{parallel_for, tiles};

/// Columns of the output that one task computes, and the most rows: tall, since each task packs its weights anew.
const WIDTH: usize = 256;
const HEIGHT: usize = 1024;
/// Pieces of each of the last columns, one column for each thread, and pieces per thread if there are few columns: small
/// tasks, so that cores of unequal speed end together.
const PIECES: usize = 4;
/// Fewer rows are not worth a task.
const FEWEST_ROWS: usize = 48;
/// `y = x · wᵀ` on one thread, for the output columns `outs`.
pub(crate) fn nt_serial(
    x: Mat<'_>,
    w: WeightOperand<'_>,
    outs: Range<usize>,
    mut y: MatMut<'_>,
    accumulate: Accumulate,
) {
    if x.cols() == 0 && accumulate == Accumulate::Replace {
        (0..x.rows()).for_each(|row| y.row(row).fill(0.0));
    }
    // A task is cut from more rows than are few, or has no more of them than others have in tiles.
    match plan(&w, usize::MAX, LayerPass::Forward) {
        ProductPlan::Int8Gemm(packed) => {
            let rows: Vec<usize> = (0..x.rows()).collect();
            return packed.multiply((&GemvInput::new(x, [&packed]), &rows), outs, y, accumulate);
        }
        ProductPlan::Bf16PairsGemm(pairs) => {
            let pairs = pairs.block(outs, 0..pairs.cols());
            return gemm_pairs(y, x, pairs.t(), accumulate);
        }
        _ => {}
    }
    let rows = 0..x.rows();
    w.for_tiles(
        outs.clone(),
        0..x.cols(),
        LONG_TILE,
        |out_tile, in_tile, tile| {
            let accumulate = accumulate.after(in_tile.start == 0);
            let y = y.block(
                rows.clone(),
                out_tile.start - outs.start..out_tile.end - outs.start,
            );
            let x = x.block(rows.clone(), in_tile);
            w.multiply(y, x, tile.t(), accumulate);
        },
    );
}

/// `dx = dy · w` on one thread, for the weight rows `outs` (which are `dy`'s columns) and the columns `ins`.
pub(crate) fn nn_serial(
    dy: Mat<'_>,
    w: WeightOperand<'_>,
    outs: Range<usize>,
    ins: Range<usize>,
    mut dx: MatMut<'_>,
    accumulate: Accumulate,
) {
    let rows = 0..dy.rows();
    if outs.is_empty() && accumulate == Accumulate::Replace {
        rows.clone().for_each(|row| dx.row(row).fill(0.0));
    }
    w.for_tiles(
        outs.clone(),
        ins.clone(),
        [TILE; 2],
        |out_tile, in_tile, tile| {
            let accumulate = accumulate.after(out_tile.start == outs.start);
            let dx = dx.block(
                rows.clone(),
                in_tile.start - ins.start..in_tile.end - ins.start,
            );
            let dy = dy.block(
                rows.clone(),
                out_tile.start - outs.start..out_tile.end - outs.start,
            );
            w.multiply(dx, dy, tile, accumulate);
        },
    );
}

/// Runs `task` over a grid of output blocks, in parallel; the blocks' widths are multiples of `grain`. How many rows a
/// task has changes no result, so it may depend on the number of threads.
pub(super) fn for_each_task(
    [rows, cols]: [usize; 2],
    grain: usize,
    task: impl Fn(Range<usize>, Range<usize>) + Sync,
) {
    let columns: Vec<_> = tiles(0..cols, WIDTH.next_multiple_of(grain)).collect();
    let threads = rayon::current_num_threads();
    let (tall, last) = columns.split_at(columns.len().saturating_sub(threads));
    let pieces = (PIECES * threads).div_ceil(last.len().max(1));
    let short = rows.div_ceil(pieces).clamp(FEWEST_ROWS, HEIGHT);
    let blocks: Vec<_> = [(tall, HEIGHT), (last, short)]
        .into_iter()
        .flat_map(|(columns, height)| {
            let rows = move || tiles(0..rows, height);
            columns
                .iter()
                .flat_map(move |cols| rows().map(move |rows| (rows, cols.clone())))
        })
        .collect();
    parallel_for(blocks.len(), |i| {
        let (rows, cols) = blocks[i].clone();
        task(rows, cols);
    });
}
