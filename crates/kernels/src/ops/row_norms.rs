//! The Euclidean norms of a weight's rows, a low-rank update included, without the updated weight.

use rayon::prelude::*;

use crate::matmul::{TILE, WeightOperand, gemm};
use crate::memory::{Mat, MatMut, with_scratch};
use crate::settings::Accumulate;
use crate::threads::tiles;

/// Rows per task.
const TASK_ROWS: usize = 64;

/// `‖w_i + scale · b_i · a‖` of every row `i`; `update` is `a [rank, in]`, `b [out, rank]` and the scale.
///
/// Squares are added in f64 along the row, so a norm depends on shapes alone.
pub(crate) fn row_norms(w: WeightOperand<'_>, update: Option<(Mat<'_>, Mat<'_>, f32)>) -> Vec<f32> {
    let (out, width) = (w.out_width(), w.in_width());
    let tasks: Vec<_> = tiles(0..out, TASK_ROWS).collect();
    let norms = tasks.into_par_iter().flat_map_iter(|rows| {
        let mut squares = vec![0f64; rows.len()];
        with_scratch(TASK_ROWS * TILE, |scratch| {
            for cols in tiles(0..width, TILE) {
                let tile = &mut scratch[..rows.len() * cols.len()];
                w.read(rows.clone(), cols.clone(), tile);
                if let Some((a, b, scale)) = update {
                    let a = a.block(0..a.rows(), cols.clone());
                    let b = b.block(rows.clone(), 0..b.cols());
                    let tile = MatMut::dense(tile, rows.len(), cols.len());
                    gemm(tile, b, a, scale, Accumulate::Add);
                }
                for (square, row) in squares.iter_mut().zip(tile.chunks(cols.len())) {
                    *square += row.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>();
                }
            }
        });
        squares.into_iter().map(|square| square.sqrt() as f32)
    });
    norms.collect()
}
