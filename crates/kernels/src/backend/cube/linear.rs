//! Products with stored matrices, in their first form: a thread for each number of the output.
//!
//! Grid: one thread per output number, folded into two dimensions. Bindings: x, codes, high bits, scales, y. No shared
//! memory. One launch per shard; each adds the rows of the shard, or writes the outputs that belong to them.

use burn::backend::TensorMetadata;
use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::cubecl::{CubeDim, calculate_cube_count_elemwise};

use super::formats::{StackShape, StackShapeLaunch, value};
use crate::backend::traits::Direction;
use crate::formats::placed::{Coding, CubeTensor, Placed, PlacedShard, PlacedStack};

/// Which rows of a stack belong to which head, and where inputs and outputs of a head are.
#[derive(CubeLaunch, CubeType, Clone, Copy)]
struct Heads {
    /// Rows of the stack: the first, those of a head, and the first and the number of those that are used of a head.
    first_row: usize,
    rows_each: usize,
    start: usize,
    len: usize,
    heads: usize,
    /// From a token to the next and from a head to the next, and where a head's numbers begin, in x and in y.
    x_token: usize,
    x_head: usize,
    x_first: usize,
    y_token: usize,
    y_head: usize,
    y_first: usize,
    /// Numbers of the output.
    total: usize,
}

/// `y[t, h, j] = Σ x[t, h, k] · w[row of (h, j), k]`.
#[cube(launch)]
fn forward(
    x: &[f32],
    codes: &[u32],
    high: &[u32],
    scales: &[u32],
    y: &mut [f32],
    w: StackShape,
    at: Heads,
    #[comptime] coding: Coding,
) {
    if ABSOLUTE_POS >= at.total {
        terminate!();
    }
    let j = ABSOLUTE_POS % at.len;
    let head = ABSOLUTE_POS / at.len % at.heads;
    let token = ABSOLUTE_POS / at.len / at.heads;
    let row = at.first_row + head * at.rows_each + at.start + j;
    if row < w.first || row >= w.first + w.rows {
        terminate!();
    }
    let from = token * at.x_token + head * at.x_head + at.x_first;
    let mut sum = 0f32;
    for k in 0..w.cols {
        sum += x[from + k] * value(codes, high, scales, &w, row - w.first, k, coding);
    }
    y[token * at.y_token + head * at.y_head + at.y_first + j] = sum;
}

/// `y[t, h, j] = Σ x[t, h, k] · w[row of (h, k), j]`; shards after the first add to what is there.
#[cube(launch)]
fn transposed(
    x: &[f32],
    codes: &[u32],
    high: &[u32],
    scales: &[u32],
    y: &mut [f32],
    w: StackShape,
    at: Heads,
    #[comptime] coding: Coding,
    #[comptime] add: bool,
) {
    if ABSOLUTE_POS >= at.total {
        terminate!();
    }
    let j = ABSOLUTE_POS % w.cols;
    let head = ABSOLUTE_POS / w.cols % at.heads;
    let token = ABSOLUTE_POS / w.cols / at.heads;
    let from = token * at.x_token + head * at.x_head + at.x_first;
    let to = token * at.y_token + head * at.y_head + at.y_first + j;
    // Those of the head's rows that the shard has.
    let own = at.first_row + head * at.rows_each + at.start;
    let start = max(own, w.first);
    let end = min(own + at.len, w.first + w.rows);
    let mut sum = 0f32;
    if comptime!(add) {
        sum += y[to];
    }
    for row in start..end {
        sum += x[from + row - own] * value(codes, high, scales, &w, row - w.first, j, coding);
    }
    y[to] = sum;
}

impl PlacedStack {
    /// The scalars of kernels.
    pub(super) fn shape(&self, shard: &PlacedShard) -> StackShapeLaunch {
        let ([codes, high, scales], [grid_rows, grid_cols, grid_first]) = (self.strides, self.grid);
        StackShapeLaunch::new(
            self.rows_each,
            self.cols,
            codes,
            high,
            scales,
            grid_rows,
            grid_cols,
            grid_first,
            shard.first,
            shard.rows,
        )
    }
}

/// Products of each head with its own rows of a stack.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeadProducts {
    pub(super) heads: usize,
    /// Rows of the stack from a head to the next, and those that are used of each.
    pub(super) rows_each: usize,
    pub(super) start: usize,
    pub(super) len: usize,
    pub(super) direction: Direction,
    /// From a token to the next and from a head to the next, and where a head's numbers begin.
    pub(super) x: [usize; 3],
    pub(super) y: [usize; 3],
}

impl HeadProducts {
    /// Numbers that a head of a token has in the output.
    fn width(&self, stack: &PlacedStack) -> usize {
        match self.direction {
            Direction::Forward => self.len,
            Direction::Transposed => stack.cols,
        }
    }

    fn launch(&self, first_row: usize, total: usize) -> HeadsLaunch {
        let ([x_token, x_head, x_first], [y_token, y_head, y_first]) = (self.x, self.y);
        HeadsLaunch::new(
            first_row,
            self.rows_each,
            self.start,
            self.len,
            self.heads,
            x_token,
            x_head,
            x_first,
            y_token,
            y_head,
            y_first,
            total,
        )
    }

    /// Writes the products of all tokens to `y`.
    pub(super) fn write(&self, x: &CubeTensor, w: &Placed, y: &CubeTensor) {
        let (stack, tokens) = (&w.stack, x.shape()[0]);
        let total = tokens * self.heads * self.width(stack);
        if total == 0 {
            return;
        }
        let client = &x.client;
        let dim = CubeDim::new(client, total);
        for (i, shard) in stack.shards.iter().enumerate() {
            let count = calculate_cube_count_elemwise(client, total, dim);
            let [codes, high, scales] = shard.planes.clone().map(CubeTensor::into_buffer_arg);
            let (x, y) = (x.clone().into_buffer_arg(), y.clone().into_buffer_arg());
            let (shape, at) = (stack.shape(shard), self.launch(w.first_row, total));
            let coding = stack.coding;
            match self.direction {
                Direction::Forward => {
                    forward::launch(
                        client, count, dim, x, codes, high, scales, y, shape, at, coding,
                    );
                }
                Direction::Transposed => transposed::launch(
                    client,
                    count,
                    dim,
                    x,
                    codes,
                    high,
                    scales,
                    y,
                    shape,
                    at,
                    coding,
                    i > 0,
                ),
            }
        }
    }
}
