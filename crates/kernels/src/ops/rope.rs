//! Rotary position embedding: pairs of features are rotated by an angle that grows with the position.
//!
//! Which features form a pair depends on the checkpoint: neighbors (2j, 2j+1) in DeepSeek's latent attention,
//! half-split (j, j + d/2) in the distills and in V3.2's indexer. The output keeps the layout of the input.

use rayon::prelude::*;

use crate::memory::zeros;

/// Rows per task: those of a decoding step are one.
const ROTATED_TASK_ROWS: usize = 16;

/// Which two features of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// (0, 1), (2, 3), …
    Interleaved,
    /// (0, d/2), (1, d/2 + 1), …
    HalfSplit,
}

/// Rotates forward, or backward (the gradient, since a rotation's transpose is its inverse).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rotation {
    Forward,
    Backward,
}

/// x `[batch, seq, heads, dim]` with the last `2 · half` features of each head rotated by cos, sin `[seq, half]`.
pub(crate) fn rotate(
    x: &[f32],
    cos: &[f32],
    sin: &[f32],
    dims: [usize; 4],
    layout: RopeLayout,
    rotation: Rotation,
) -> Vec<f32> {
    let [_, seq, heads, dim] = dims;
    let half = cos.len() / seq.max(1);
    let start = dim - 2 * half;
    let mut y = zeros(x.len());
    let width = (heads * dim).max(1);
    let tasks = y
        .par_chunks_mut(width * ROTATED_TASK_ROWS)
        .zip(x.par_chunks(width * ROTATED_TASK_ROWS));
    tasks.enumerate().for_each(|(task, (y, x))| {
        let rows = y.chunks_mut(width).zip(x.chunks(width));
        for (row, (y, x)) in (task * ROTATED_TASK_ROWS..).zip(rows) {
            let position = row % seq;
            let (cos, sin) = (
                &cos[position * half..][..half],
                &sin[position * half..][..half],
            );
            for (y, x) in y.chunks_mut(dim).zip(x.chunks(dim)) {
                y[..start].copy_from_slice(&x[..start]);
                let (y, x) = (&mut y[start..], &x[start..]);
                for j in 0..half {
                    let (a, b) = match layout {
                        RopeLayout::Interleaved => (2 * j, 2 * j + 1),
                        RopeLayout::HalfSplit => (j, j + half),
                    };
                    let sin = if rotation == Rotation::Forward {
                        sin[j]
                    } else {
                        -sin[j]
                    };
                    y[a] = x[a] * cos[j] - x[b] * sin;
                    y[b] = x[a] * sin + x[b] * cos[j];
                }
            }
        }
    });
    y
}
