//! Blocked products: a serial product over the tiles of a weight, and the grid of tasks of a parallel one.
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

/// The output columns of a task and its most rows. Tasks are tall, because each packs its weights anew.
const WIDTH: usize = 256;
const HEIGHT: usize = 1024;
/// The pieces that each of the last columns of tasks is cut into, one column per thread; the pieces per thread if there
/// are few columns. The last tasks are small, so that cores of unequal speed end together.
const PIECES: usize = 4;
/// The fewest rows of a task.
const FEWEST_ROWS: usize = 48;
/// `y = x · wᵀ` for the output columns `outs`; serial.
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
    // Tiles also serve tasks with few rows: they are part of a product with many.
    match plan(&w, usize::MAX, LayerPass::Forward) {
        ProductPlan::Int8Gemm(packed) => {
            let rows: Vec<usize> = (0..x.rows()).collect();
            return packed.multiply(&GemvInput::new(x, [&packed]), &rows, outs, y, accumulate);
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

/// `dx = dy · w` for the weight rows `outs` (the columns of `dy`) and the columns `ins`; serial.
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

/// Runs `task` in parallel over a grid of output blocks whose widths are multiples of `grain`. The height of a task
/// changes no result, so it may depend on the number of threads.
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
