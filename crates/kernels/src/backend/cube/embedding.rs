//! Rows of stored matrices in f32, and the gradient of a trained embedding.

#![expect(
    clippy::needless_range_loop,
    reason = "kernels index buffers; they have no iterators"
)]

use burn::backend::TensorMetadata;
use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::cubecl::{CubeDim, calculate_cube_count_elemwise};
use burn::tensor::DType;

use super::formats::{StackShape, value};
use super::tensors::{contiguous, empty, zeros};
use crate::formats::placed::{Coding, CubeTensor, Placed};

/// `out[t, c] = w[ids[t], c]`; a thread per number. Rows of other shards are left to their launches.
#[cube(launch)]
fn rows_at(
    ids: &[i32],
    codes: &[u32],
    high: &[u32],
    scales: &[u32],
    out: &mut [f32],
    w: StackShape,
    first_row: usize,
    total: usize,
    #[comptime] coding: Coding,
) {
    if ABSOLUTE_POS >= total {
        terminate!();
    }
    let row = first_row + ids[ABSOLUTE_POS / w.cols] as usize;
    if row >= w.first && row < w.first + w.rows {
        let col = ABSOLUTE_POS % w.cols;
        out[ABSOLUTE_POS] = value(codes, high, scales, &w, row - w.first, col, coding);
    }
}

/// ids `[tokens]` → `[tokens, cols]`.
pub(super) fn embed(ids: CubeTensor, w: &Placed) -> CubeTensor {
    let ids = contiguous(ids);
    let (tokens, cols) = (ids.shape()[0], w.stack.cols);
    let out = empty(&ids, [tokens, cols], DType::F32);
    let total = tokens * cols;
    if total == 0 {
        return out;
    }
    let client = &ids.client;
    let dim = CubeDim::new(client, total);
    for shard in &w.stack.shards {
        let count = calculate_cube_count_elemwise(client, total, dim);
        let [codes, high, scales] = shard.planes.clone().map(CubeTensor::into_buffer_arg);
        let (ids, to) = (ids.clone().into_buffer_arg(), out.clone().into_buffer_arg());
        let (shape, coding) = (w.stack.shape(shard), w.stack.coding);
        rows_at::launch(
            client,
            count,
            dim,
            ids,
            codes,
            high,
            scales,
            to,
            shape,
            w.first_row,
            total,
            coding,
        );
    }
    out
}

/// The next token with the same id, or the number of tokens; and whether a token is the first with its id. A thread per
/// token.
#[cube(launch)]
fn chains(ids: &[i32], next: &mut [i32], is_first: &mut [i32], n: usize) {
    if ABSOLUTE_POS >= n {
        terminate!();
    }
    let id = ids[ABSOLUTE_POS];
    let mut first = 1i32;
    let mut after = n;
    for token in 0..n {
        if ids[token] == id {
            if token < ABSOLUTE_POS {
                first = 0;
            }
            if token > ABSOLUTE_POS {
                after = min(after, token);
            }
        }
    }
    next[ABSOLUTE_POS] = after as i32;
    is_first[ABSOLUTE_POS] = first;
}

/// Adds the rows of all tokens with one id, in their order; a thread per column of each first token.
#[cube(launch)]
fn add_rows(
    ids: &[i32],
    next: &[i32],
    is_first: &[i32],
    dy: &[f32],
    dw: &mut [f32],
    n: usize,
    width: usize,
) {
    if ABSOLUTE_POS >= n * width {
        terminate!();
    }
    let token = ABSOLUTE_POS / width;
    let col = ABSOLUTE_POS % width;
    if is_first[token] == 0 {
        terminate!();
    }
    let mut sum = 0f32;
    let mut at = token;
    while at < n {
        sum += dy[at * width + col];
        at = next[at] as usize;
    }
    dw[ids[token] as usize * width + col] = sum;
}

/// ids `[tokens]`, dy `[tokens, width]` → `[vocab, width]`.
pub(super) fn embed_dw(ids: CubeTensor, dy: CubeTensor, vocab: usize) -> CubeTensor {
    let (ids, dy) = (contiguous(ids), contiguous(dy));
    let [n, width] = dy.shape().dims();
    let dw = zeros(&dy, [vocab, width]);
    if n * width == 0 {
        return dw;
    }
    let client = &dy.client;
    let [next, is_first] = [0, 1].map(|_| empty(&ids, [n], DType::I32));
    let arg = |tensor: &CubeTensor| tensor.clone().into_buffer_arg();
    let dim = CubeDim::new(client, n);
    let count = calculate_cube_count_elemwise(client, n, dim);
    chains::launch(client, count, dim, arg(&ids), arg(&next), arg(&is_first), n);
    let dim = CubeDim::new(client, n * width);
    let count = calculate_cube_count_elemwise(client, n * width, dim);
    let chain = (arg(&next), arg(&is_first));
    add_rows::launch(
        client,
        count,
        dim,
        arg(&ids),
        chain.0,
        chain.1,
        arg(&dy),
        arg(&dw),
        n,
        width,
    );
    dw
}
