//! A layer's routed experts as the kernels read them: weights and low-rank updates.

use super::bank::ExpertBank;
use super::expert_cache::CachedExpert;
use super::slots::ExpertSlots;
use crate::formats::Quantizer;
use crate::matmul::{WeightFakeQuant, WeightOperand, gemm, nn_serial, nt_serial};
use crate::memory::{Mat, MatMut, with_scratch};
use crate::ops::dropout::Dropout;
use crate::settings::{Accumulate, Compute};

/// The settings of low-rank updates; the factors themselves are tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertLora {
    /// The scale of the update of gate, up and down.
    pub scale: [f32; 3],
    /// Dropout on the input of the updates; off with fake quantization.
    pub dropout: Dropout,
    /// Fake-quantizes the updated weights, as [`crate::linear_fake_quantized`] does.
    pub quantizer: Option<Quantizer>,
}

impl ExpertLora {
    /// No update.
    pub(crate) fn none() -> Self {
        Self {
            scale: [0.0; 3],
            dropout: Dropout::OFF,
            quantizer: None,
        }
    }
}

/// The three projections of an expert, as indices.
pub(super) const GATE: usize = 0;
pub(super) const UP: usize = 1;
pub(super) const DOWN: usize = 2;

/// A layer's experts as the kernel reads them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RoutedExperts<'a> {
    pub(crate) weights: ExpertOperands<'a>,
    /// Factors `[experts, rank, in]` and `[experts, out, rank]` of gate, up and down. Rank 0 means none.
    pub(crate) factors: [StackedFactors<'a>; 3],
    pub(crate) lora: ExpertLora,
    pub(crate) compute: Compute,
    pub(crate) hidden: usize,
    pub(crate) inner: usize,
    pub(crate) n_experts: usize,
}

/// The weights of all experts.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ExpertOperands<'a> {
    /// A bank, and cached copies of some of its experts, in order.
    Frozen(&'a ExpertBank, &'a [CachedExpert]),
    /// Stacked f32 values of gate, up and down.
    Trained([&'a [f32]; 3]),
}

/// Stacked low-rank factors of one projection.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StackedFactors<'a> {
    pub(crate) a: &'a [f32],
    pub(crate) b: &'a [f32],
    pub(crate) rank: usize,
}

impl<'a> RoutedExperts<'a> {
    /// Input and output width of a projection.
    pub(super) fn widths(&self, projection: usize) -> [usize; 2] {
        if projection == DOWN {
            [self.inner, self.hidden]
        } else {
            [self.hidden, self.inner]
        }
    }

    pub(super) fn weights(&self, projection: usize, expert: usize) -> WeightOperand<'a> {
        let [in_width, out_width] = self.widths(projection);
        let weights = match self.weights {
            ExpertOperands::Frozen(bank, copies) => {
                let copy = copies.binary_search_by_key(&expert, |copy| copy.expert);
                let weight = match copy {
                    Ok(at) => &copies[at].weights[projection],
                    Err(_) => &[&bank.gate, &bank.up, &bank.down][projection][expert],
                };
                WeightOperand::frozen(weight, self.compute)
            }
            ExpertOperands::Trained(stacks) => {
                let size = in_width * out_width;
                WeightOperand::trained(
                    &stacks[projection][expert * size..][..size],
                    in_width,
                    self.compute,
                )
            }
        };
        let Some(quantizer) = self.lora.quantizer else {
            return weights;
        };
        let factors = self.factors(projection, expert);
        weights.fake_quantized(WeightFakeQuant {
            quantizer,
            update: factors.map(|(a, b)| (a, b, self.lora.scale[projection])),
        })
    }

    /// One expert's factors, if they are applied to the activations.
    pub(super) fn activation_factors(
        &self,
        projection: usize,
        expert: usize,
    ) -> Option<(Mat<'a>, Mat<'a>)> {
        match self.lora.quantizer {
            Some(_) => None,
            None => self.factors(projection, expert),
        }
    }

    /// One expert's factors `a [rank, in]` and `b [out, rank]`.
    pub(super) fn factors(&self, projection: usize, expert: usize) -> Option<(Mat<'a>, Mat<'a>)> {
        let [in_width, out_width] = self.widths(projection);
        let StackedFactors { a, b, rank } = self.factors[projection];
        (rank > 0).then(|| {
            let a = Mat::dense(&a[expert * rank * in_width..], rank, in_width);
            (
                a,
                Mat::dense(&b[expert * rank * out_width..], out_width, rank),
            )
        })
    }

    /// `y = x · wᵀ + scale · (drop(x) · aᵀ) · bᵀ` for the rows of `slots`.
    pub(super) fn project(
        &self,
        projection: usize,
        slots: &ExpertSlots,
        x: Mat<'_>,
        y: &mut [f32],
    ) {
        let (rows, [_, out_width]) = (x.rows(), self.widths(projection));
        nt_serial(
            x,
            self.weights(projection, slots.expert),
            0..out_width,
            MatMut::dense(y, rows, out_width),
            Accumulate::Replace,
        );
        let Some((a, b)) = self.activation_factors(projection, slots.expert) else {
            return;
        };
        self.with_dropped(projection, slots, x, |x| {
            with_scratch(rows * a.rows(), |low| {
                gemm(
                    MatMut::dense(low, rows, a.rows()),
                    x,
                    a.t(),
                    1.0,
                    Accumulate::Replace,
                );
                let low = Mat::dense(low, rows, a.rows());
                gemm(
                    MatMut::dense(y, rows, out_width),
                    low,
                    b.t(),
                    self.lora.scale[projection],
                    Accumulate::Add,
                );
            });
        });
    }

    /// The input gradient of [`Self::project`], added to `dx` or replacing it.
    pub(super) fn project_back(
        &self,
        projection: usize,
        slots: &ExpertSlots,
        dy: Mat<'_>,
        dx: &mut [f32],
        accumulate: Accumulate,
    ) {
        let (rows, [in_width, out_width]) = (dy.rows(), self.widths(projection));
        nn_serial(
            dy,
            self.weights(projection, slots.expert),
            0..out_width,
            0..in_width,
            MatMut::dense(dx, rows, in_width),
            accumulate,
        );
        let Some((a, b)) = self.activation_factors(projection, slots.expert) else {
            return;
        };
        with_scratch(rows * (a.rows() + in_width), |scratch| {
            let (low, dropped) = scratch.split_at_mut(rows * a.rows());
            gemm(
                MatMut::dense(low, rows, a.rows()),
                dy,
                b,
                self.lora.scale[projection],
                Accumulate::Replace,
            );
            let low = Mat::dense(low, rows, a.rows());
            if self.lora.dropout.is_off() {
                return gemm(
                    MatMut::dense(dx, rows, in_width),
                    low,
                    a,
                    1.0,
                    Accumulate::Add,
                );
            }
            gemm(
                MatMut::dense(dropped, rows, in_width),
                low,
                a,
                1.0,
                Accumulate::Replace,
            );
            self.drop_rows(projection, slots, dropped, in_width);
            dx.iter_mut()
                .zip(dropped)
                .for_each(|(dx, dropped)| *dx += *dropped);
        });
    }

    /// Lends `x` after the update's dropout.
    pub(super) fn with_dropped(
        &self,
        projection: usize,
        slots: &ExpertSlots,
        x: Mat<'_>,
        use_it: impl FnOnce(Mat<'_>),
    ) {
        if self.lora.dropout.is_off() {
            return use_it(x);
        }
        let width = x.cols();
        with_scratch(x.rows() * width, |copy| {
            (0..x.rows()).for_each(|row| copy[row * width..][..width].copy_from_slice(x.row(row)));
            self.drop_rows(projection, slots, copy, width);
            use_it(Mat::dense(copy, x.rows(), width));
        });
    }

    /// The gradients `a [rank, in]` and `b [out, rank]` of one expert's factors, from its inputs and output gradients.
    pub(super) fn factor_grads(
        &self,
        projection: usize,
        slots: &ExpertSlots,
        [x, dy]: [Mat<'_>; 2],
        [mut da, mut db]: [MatMut<'_>; 2],
    ) {
        let Some((a, b)) = self.factors(projection, slots.expert) else {
            return;
        };
        let (n, rank, scale) = (x.rows(), a.rows(), self.lora.scale[projection]);
        self.with_dropped(projection, slots, x, |x| {
            with_scratch(2 * n * rank, |scratch| {
                let (low, dlow) = scratch.split_at_mut(n * rank);
                gemm(
                    MatMut::dense(low, n, rank),
                    x,
                    a.t(),
                    scale,
                    Accumulate::Replace,
                );
                gemm(
                    MatMut::dense(dlow, n, rank),
                    dy,
                    b,
                    scale,
                    Accumulate::Replace,
                );
                let [low, dlow] = [low, dlow].map(|values| Mat::dense(values, n, rank));
                let db = MatMut::dense(db.values(), dy.cols(), rank);
                gemm(db, dy.t(), low, 1.0, Accumulate::Replace);
                let da = MatMut::dense(da.values(), rank, x.cols());
                gemm(da, dlow.t(), x, 1.0, Accumulate::Replace);
            });
        });
    }

    /// Values of all experts as a matrix with a row per expert.
    pub(super) fn by_expert<'v>(&self, values: &'v mut [f32]) -> MatMut<'v> {
        let width = values.len() / self.n_experts.max(1);
        MatMut::dense(values, self.n_experts, width)
    }

    pub(super) fn drop_rows(
        &self,
        projection: usize,
        slots: &ExpertSlots,
        rows: &mut [f32],
        width: usize,
    ) {
        let dropout = self.lora.dropout.fork(projection as u64);
        for (key, row) in slots.keys.clone().zip(rows.chunks_mut(width)) {
            dropout.apply(row, (key * width) as u64);
        }
    }
}
