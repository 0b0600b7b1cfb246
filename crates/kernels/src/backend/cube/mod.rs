//! The GPU backend: kernels for what burn's own operations cannot do, or not without reading back. Everything else is
//! plain (see [`crate::backend::plain`]).
//!
//! A kernel's document names its grid, its bindings and its shared memory. Grids are folded, because a dimension has at
//! most 65,535 groups; threads behind the last number leave. No loop of a thread is longer than 65,535 steps: software
//! adapters end longer ones in silence.

pub(crate) mod checksum;
mod elementwise;
mod embedding;
mod experts;
mod formats;
mod linear;
mod route;
mod tensors;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use burn::backend::Cube;
use burn::backend::TensorMetadata;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::DType;

use self::linear::HeadProducts;
use self::tensors::{contiguous, empty};
use crate::backend::gradients::Gradients;
use crate::backend::plain;
use crate::backend::plain::primitives::{Primitives, SlotTable, Stack};
use crate::backend::traits::{Direction, HeadRows, Kernels};
use crate::formats::placed::{CubeTensor, Placed};
use crate::formats::{Matrix, SplitKvB};
use crate::ops::dropout::Dropout;
use crate::ops::route::TopK;
use crate::settings::Compute;

/// A stored weight on the device: in one piece, or as the two parts of a `kv_b_proj`.
enum OnDevice<'a> {
    Whole(&'a Placed),
    Split {
        keys: &'a Placed,
        values: &'a Placed,
        heads: usize,
        /// Rows of a head in the keys' part of the whole, and in the values'.
        widths: [usize; 2],
    },
}

impl<'a> OnDevice<'a> {
    fn of(w: &'a Matrix) -> Option<Self> {
        match w.split_kv_b() {
            None => w.placed().map(Self::Whole),
            Some(split) => Self::of_split(split),
        }
    }

    fn of_split(split: &'a SplitKvB) -> Option<Self> {
        let [keys, values] = split.parts()?;
        Some(Self::Split {
            keys: keys.placed()?,
            values: values.placed()?,
            heads: split.heads(),
            widths: split.widths(),
        })
    }
}

/// `x · wᵀ` or `x · w`.
fn product(x: CubeTensor, w: &Matrix, direction: Direction) -> Option<CubeTensor> {
    let on_device = OnDevice::of(w)?;
    let x = contiguous(x);
    let [tokens, width] = x.shape().dims();
    let [from, to] = match direction {
        Direction::Forward => [w.cols(), w.rows()],
        Direction::Transposed => [w.rows(), w.cols()],
    };
    assert_eq!(width, from, "width of the weight");
    let y = empty(&x, [tokens, to], DType::F32);
    match on_device {
        OnDevice::Whole(placed) => {
            let whole = HeadProducts {
                heads: 1,
                rows_each: 0,
                start: 0,
                len: w.rows(),
                direction,
                x: [from, 0, 0],
                y: [to, 0, 0],
            };
            whole.write(&x, placed, &y);
            Some(y)
        }
        OnDevice::Split {
            keys,
            values,
            heads,
            widths,
        } => Some(match direction {
            Direction::Forward => split_forward(&x, [keys, values], heads, widths, y),
            Direction::Transposed => split_back(&x, [keys, values], heads, widths),
        }),
    }
}

/// The products of one input with the keys' rows, which are stored as columns, and with the values' rows of each head.
fn split_forward(
    x: &CubeTensor,
    [keys, values]: [&Placed; 2],
    heads: usize,
    [nope, v]: [usize; 2],
    y: CubeTensor,
) -> CubeTensor {
    let rank = values.stack.cols;
    let of_keys = HeadProducts {
        heads,
        rows_each: rank,
        start: 0,
        len: rank,
        direction: Direction::Transposed,
        x: [rank, 0, 0],
        y: [heads * (nope + v), nope + v, 0],
    };
    of_keys.write(x, keys, &y);
    let of_values = HeadProducts {
        rows_each: v,
        len: v,
        direction: Direction::Forward,
        y: [heads * (nope + v), nope + v, nope],
        ..of_keys
    };
    of_values.write(x, values, &y);
    y
}

/// The input's gradient: the sum over heads of what keys and values give back.
fn split_back(
    dy: &CubeTensor,
    [keys, values]: [&Placed; 2],
    heads: usize,
    [nope, v]: [usize; 2],
) -> CubeTensor {
    let (rank, tokens) = (values.stack.cols, dy.shape()[0]);
    let [of_keys, of_values] = [0, 1].map(|_| empty(dy, [tokens, heads, rank], DType::F32));
    let back_from_keys = HeadProducts {
        heads,
        rows_each: rank,
        start: 0,
        len: rank,
        direction: Direction::Forward,
        x: [heads * (nope + v), nope + v, 0],
        y: [heads * rank, rank, 0],
    };
    back_from_keys.write(dy, keys, &of_keys);
    let back_from_values = HeadProducts {
        rows_each: v,
        len: v,
        direction: Direction::Transposed,
        x: [heads * (nope + v), nope + v, nope],
        ..back_from_keys
    };
    back_from_values.write(dy, values, &of_values);
    let both = Cube::float_add(of_keys, of_values);
    let sum = Cube::float_sum_dim(both, 1);
    Cube::float_reshape(sum, [tokens, rank].into())
}

/// See [`crate::heads_linear`]; nothing if the weight does not lie on the device, or its parts are not whole heads' parts.
fn heads_product(x: CubeTensor, w: &Matrix, rows: HeadRows) -> Option<CubeTensor> {
    let x = contiguous(x);
    let [tokens, heads, width] = x.shape().dims();
    let out = match rows.direction {
        Direction::Forward => rows.len,
        Direction::Transposed => w.cols(),
    };
    let each = HeadProducts {
        heads,
        rows_each: w.rows() / heads,
        start: rows.start,
        len: rows.len,
        direction: rows.direction,
        x: [heads * width, width, 0],
        y: [heads * out, out, 0],
    };
    let (each, placed) = match OnDevice::of(w)? {
        OnDevice::Whole(placed) => (each, placed),
        OnDevice::Split {
            keys,
            values,
            widths: [nope, v],
            ..
        } => {
            if (rows.start, rows.len) == (0, nope) {
                // The keys' rows are columns there: each direction is the other.
                let (len, direction) = match rows.direction {
                    Direction::Forward => (w.cols(), Direction::Transposed),
                    Direction::Transposed => (w.cols(), Direction::Forward),
                };
                let rank = w.cols();
                (
                    HeadProducts {
                        rows_each: rank,
                        start: 0,
                        len,
                        direction,
                        ..each
                    },
                    keys,
                )
            } else if (rows.start, rows.len) == (nope, v) {
                (
                    HeadProducts {
                        rows_each: v,
                        start: 0,
                        ..each
                    },
                    values,
                )
            } else {
                return None;
            }
        }
    };
    let y = empty(&x, [tokens, heads, out], DType::F32);
    each.write(&x, placed, &y);
    Some(y)
}

impl Primitives for Cube {
    fn count(n: usize, device: &Self::Device) -> IntTensor<Self> {
        elementwise::count(n, device)
    }

    fn slot_table(
        order: IntTensor<Self>,
        offsets: IntTensor<Self>,
        top_k: usize,
    ) -> SlotTable<Self> {
        let (order, offsets) = (contiguous(order), contiguous(offsets));
        let [experts, tokens, places] = route::slot_tables(&order, &offsets, top_k);
        SlotTable {
            experts,
            tokens,
            places,
            n_experts: offsets.shape()[0] - 1,
            order,
            offsets,
        }
    }

    fn slots_nt(
        x: FloatTensor<Self>,
        w: Stack<'_, Self>,
        slots: &SlotTable<Self>,
    ) -> FloatTensor<Self> {
        experts::multiply(x.clone(), &w, slots, Direction::Forward)
            .unwrap_or_else(|| plain::primitives::nt(x, &w, slots))
    }

    fn slots_nn(
        dy: FloatTensor<Self>,
        w: Stack<'_, Self>,
        slots: &SlotTable<Self>,
    ) -> FloatTensor<Self> {
        experts::multiply(dy.clone(), &w, slots, Direction::Transposed)
            .unwrap_or_else(|| plain::primitives::nn(dy, &w, slots))
    }

    fn slots_tn(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        slots: &SlotTable<Self>,
    ) -> FloatTensor<Self> {
        experts::outer(a, b, slots)
    }

    fn decoded(w: &Matrix, device: &Self::Device) -> FloatTensor<Self> {
        match w.placed() {
            Some(placed) => embedding::embed(Self::count(w.rows(), device), placed),
            None => plain::primitives::uploaded::<Self>(w, device),
        }
    }
}

impl Kernels for Cube {
    fn dropout(x: FloatTensor<Self>, dropout: Dropout) -> FloatTensor<Self> {
        elementwise::dropout(x, dropout)
    }

    fn linear_frozen(x: FloatTensor<Self>, w: Arc<Matrix>, compute: Compute) -> FloatTensor<Self> {
        product(x.clone(), &w, Direction::Forward)
            .unwrap_or_else(|| plain::linear::linear_frozen::<Self>(x, &w, compute))
    }

    fn heads_linear(
        x: FloatTensor<Self>,
        w: Arc<Matrix>,
        heads: HeadRows,
        compute: Compute,
    ) -> FloatTensor<Self> {
        heads_product(x.clone(), &w, heads)
            .unwrap_or_else(|| plain::linear::heads_linear::<Self>(x, &w, heads, compute))
    }

    fn embed_frozen(ids: IntTensor<Self>, w: Arc<Matrix>) -> FloatTensor<Self> {
        match w.placed() {
            Some(placed) => embedding::embed(ids, placed),
            None => plain::elementwise::embed_frozen::<Self>(ids, &w),
        }
    }

    fn choose_experts(scores: FloatTensor<Self>, choice: TopK) -> IntTensor<Self> {
        route::choose_experts(scores, choice)
    }

    fn dispatch_slots(ids: IntTensor<Self>, experts: usize) -> (IntTensor<Self>, IntTensor<Self>) {
        let [order, offsets] = route::dispatch(ids, experts);
        (order, offsets)
    }
}

impl Gradients for Cube {
    fn linear_frozen_dx(dy: FloatTensor<Self>, w: &Matrix, compute: Compute) -> FloatTensor<Self> {
        product(dy.clone(), w, Direction::Transposed)
            .unwrap_or_else(|| plain::linear::linear_frozen_dx::<Self>(dy, w, compute))
    }

    fn embed_dw(ids: IntTensor<Self>, dy: FloatTensor<Self>, vocab: usize) -> FloatTensor<Self> {
        embedding::embed_dw(ids, dy, vocab)
    }
}
