//! Products of slots with the matrices of their experts, in their first form: a thread for each number of the output.
//!
//! Grid: one thread per output number, folded into two dimensions. Bindings: x, the planes, the expert of each slot, y.
//! No shared memory. One launch per shard.

use burn::backend::TensorMetadata;
use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::cubecl::{CubeDim, calculate_cube_count_elemwise};
use burn::tensor::DType;

use super::formats::{StackShape, StackShapeLaunch, value};
use super::tensors::{contiguous, empty, word_plane};
use crate::backend::plain::primitives::{SlotTable, Stack};
use crate::backend::traits::Direction;
use crate::formats::Matrix;
use crate::formats::placed::{Coding, CubeTensor};

/// The slots of a launch.
#[derive(CubeLaunch, CubeType, Clone, Copy)]
struct SlotShape {
    /// Number of experts; slots of others count as zero.
    experts: usize,
    /// The row of the stack at which the first expert begins.
    first_row: usize,
    /// Width of a slot's input and output.
    x_width: usize,
    y_width: usize,
    /// Numbers of the output.
    total: usize,
}

/// `y[i, j] = Σ x[i, k] · w[expert of i][j, k]`.
#[cube(launch)]
fn slots_forward(
    x: &[f32],
    codes: &[u32],
    high: &[u32],
    scales: &[u32],
    expert_of: &[i32],
    y: &mut [f32],
    w: StackShape,
    at: SlotShape,
    #[comptime] coding: Coding,
    #[comptime] add: bool,
) {
    if ABSOLUTE_POS >= at.total {
        terminate!();
    }
    let slot = ABSOLUTE_POS / at.y_width;
    let expert = expert_of[slot] as usize;
    if expert >= at.experts {
        if comptime!(!add) {
            y[ABSOLUTE_POS] = 0f32;
        }
        terminate!();
    }
    let row = at.first_row + expert * w.rows_each + ABSOLUTE_POS % at.y_width;
    if row < w.first || row >= w.first + w.rows {
        terminate!();
    }
    let mut sum = 0f32;
    for k in 0..w.cols {
        sum += x[slot * at.x_width + k] * value(codes, high, scales, &w, row - w.first, k, coding);
    }
    y[ABSOLUTE_POS] = sum;
}

/// `y[i, j] = Σ x[i, k] · w[expert of i][k, j]`; shards after the first add to what is there.
#[cube(launch)]
fn slots_transposed(
    x: &[f32],
    codes: &[u32],
    high: &[u32],
    scales: &[u32],
    expert_of: &[i32],
    y: &mut [f32],
    w: StackShape,
    at: SlotShape,
    #[comptime] coding: Coding,
    #[comptime] add: bool,
) {
    if ABSOLUTE_POS >= at.total {
        terminate!();
    }
    let slot = ABSOLUTE_POS / at.y_width;
    let expert = expert_of[slot] as usize;
    let mut sum = 0f32;
    if comptime!(add) {
        sum += y[ABSOLUTE_POS];
    }
    if expert < at.experts {
        let own = at.first_row + expert * w.rows_each;
        let start = max(own, w.first);
        let end = min(own + w.rows_each, w.first + w.rows);
        let j = ABSOLUTE_POS % at.y_width;
        for row in start..end {
            let weight = value(codes, high, scales, &w, row - w.first, j, coding);
            sum += x[slot * at.x_width + row - own] * weight;
        }
    }
    y[ABSOLUTE_POS] = sum;
}

/// Sums of products over the slots of each expert: `out[e, m, n] = Σ a[i, m] · b[i, n]`, a range of slots per launch.
#[derive(CubeLaunch, CubeType, Clone, Copy)]
struct OuterShape {
    a_width: usize,
    b_width: usize,
    /// The slots of this launch.
    first: usize,
    end: usize,
    /// Numbers of the output.
    total: usize,
}

/// See [`OuterShape`]; launches after the first add to what is there.
#[cube(launch)]
fn slots_outer(
    a: &[f32],
    b: &[f32],
    offsets: &[i32],
    out: &mut [f32],
    at: OuterShape,
    #[comptime] add: bool,
) {
    if ABSOLUTE_POS >= at.total {
        terminate!();
    }
    let n = ABSOLUTE_POS % at.b_width;
    let m = ABSOLUTE_POS / at.b_width % at.a_width;
    let expert = ABSOLUTE_POS / at.b_width / at.a_width;
    let start = max(offsets[expert] as usize, at.first);
    let end = min(offsets[expert + 1] as usize, at.end);
    let mut sum = 0f32;
    if comptime!(add) {
        sum += out[ABSOLUTE_POS];
    }
    for slot in start..end {
        sum += a[slot * at.a_width + m] * b[slot * at.b_width + n];
    }
    out[ABSOLUTE_POS] = sum;
}

/// Slots that a thread adds over in one launch: software adapters end longer loops in silence.
const OUTER_SLOTS: usize = 1 << 15;

/// A stack as kernels read it: shards with their shape, and the coding.
struct StackView {
    shards: Vec<(StackShapeLaunch, [CubeTensor; 3])>,
    coding: Coding,
    first_row: usize,
    experts: usize,
    /// Rows and columns of an expert's matrix.
    dims: [usize; 2],
}

impl StackView {
    /// Nothing if stored matrices do not lie on the device as one stack.
    fn of(w: &Stack<'_, burn::backend::Cube>) -> Option<Self> {
        match w {
            Stack::Stored(matrices) => Self::stored(matrices),
            Stack::Dense(tensor) => Some(Self::dense(tensor.clone())),
        }
    }

    fn stored(matrices: &[Matrix]) -> Option<Self> {
        let first = matrices.first()?.placed()?;
        let stack = &first.stack;
        let in_order = |(i, w): (usize, &Matrix)| {
            w.placed().is_some_and(|placed| {
                std::sync::Arc::ptr_eq(&placed.stack, stack)
                    && placed.first_row == first.first_row + i * stack.rows_each
                    && w.rows() == stack.rows_each
            })
        };
        matrices.iter().enumerate().all(in_order).then(|| Self {
            shards: (stack.shards.iter())
                .map(|shard| (stack.shape(shard), shard.planes.clone()))
                .collect(),
            coding: stack.coding,
            first_row: first.first_row,
            experts: matrices.len(),
            dims: [stack.rows_each, stack.cols],
        })
    }

    /// A tensor `[experts, out, in]` is a stack of f32 whose words are its numbers.
    fn dense(tensor: CubeTensor) -> Self {
        let tensor = contiguous(tensor);
        let [experts, rows, cols] = tensor.shape().dims();
        let shape = StackShapeLaunch::new(rows, cols, cols, 0, 0, 0, 0, 0, 0, experts * rows);
        let [high, scales] = [0, 1].map(|_| empty(&tensor, [4], DType::U32));
        Self {
            shards: vec![(shape, [word_plane(tensor), high, scales])],
            coding: Coding::F32,
            first_row: 0,
            experts,
            dims: [rows, cols],
        }
    }
}

/// The products of all slots `[slots, …]`; `None` if the stack does not lie on the device.
pub(super) fn multiply(
    x: CubeTensor,
    w: &Stack<'_, burn::backend::Cube>,
    slots: &SlotTable<burn::backend::Cube>,
    direction: Direction,
) -> Option<CubeTensor> {
    let view = StackView::of(w)?;
    let (x, expert_of) = (contiguous(x), contiguous(slots.experts.clone()));
    let [n, x_width] = x.shape().dims();
    let [rows, cols] = view.dims;
    let (from, y_width) = match direction {
        Direction::Forward => (cols, rows),
        Direction::Transposed => (rows, cols),
    };
    assert_eq!(x_width, from, "width of the slots");
    let y = empty(&x, [n, y_width], DType::F32);
    let total = n * y_width;
    if total == 0 {
        return Some(y);
    }
    let dim = CubeDim::new(&x.client, total);
    for (i, (shape, planes)) in view.shards.into_iter().enumerate() {
        let count = calculate_cube_count_elemwise(&x.client, total, dim);
        let [codes, high, scales] = planes.map(CubeTensor::into_buffer_arg);
        let at = SlotShapeLaunch::new(view.experts, view.first_row, x_width, y_width, total);
        let launch = match direction {
            Direction::Forward => slots_forward::launch,
            Direction::Transposed => slots_transposed::launch,
        };
        launch(
            &x.client,
            count,
            dim,
            x.clone().into_buffer_arg(),
            codes,
            high,
            scales,
            expert_of.clone().into_buffer_arg(),
            y.clone().into_buffer_arg(),
            shape,
            at,
            view.coding,
            i > 0,
        );
    }
    Some(y)
}

/// `[slots, m]` and `[slots, n]` → `[experts, m, n]`.
pub(super) fn outer(
    a: CubeTensor,
    b: CubeTensor,
    slots: &SlotTable<burn::backend::Cube>,
) -> CubeTensor {
    let (a, b, offsets) = (
        contiguous(a),
        contiguous(b),
        contiguous(slots.offsets.clone()),
    );
    let ([n, a_width], [_, b_width]) = (a.shape().dims(), b.shape().dims());
    let out = empty(&a, [slots.n_experts, a_width, b_width], DType::F32);
    let total = slots.n_experts * a_width * b_width;
    if total == 0 {
        return out;
    }
    let dim = CubeDim::new(&a.client, total);
    for first in (0..n.max(1)).step_by(OUTER_SLOTS) {
        slots_outer::launch(
            &a.client,
            calculate_cube_count_elemwise(&a.client, total, dim),
            dim,
            a.clone().into_buffer_arg(),
            b.clone().into_buffer_arg(),
            offsets.clone().into_buffer_arg(),
            out.clone().into_buffer_arg(),
            OuterShapeLaunch::new(a_width, b_width, first, first + OUTER_SLOTS, total),
            first > 0,
        );
    }
    out
}
