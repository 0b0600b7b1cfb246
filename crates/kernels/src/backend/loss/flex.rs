//! The loss on the CPU backend: only the tokens that have a target are read.

use std::sync::Arc;

use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::backend::flex::values::{Floats, floats, int_values, ints, owned};
use crate::backend::gradients::LossSaved;
use crate::backend::linear::flex::trained;
use crate::formats::Matrix;
use crate::matmul::WeightOperand;
use crate::memory::Mat;
use crate::ops::loss::{self, OutputHead, TokenLoss, TokenOutcome};
use crate::settings::{Compute, OperandRounding};

pub(crate) fn cross_entropy_frozen(
    h: FlexTensor,
    u: FlexTensor,
    b: FlexTensor,
    targets: FlexTensor,
    w: Arc<Matrix>,
    compute: Compute,
) -> [FlexTensor; 3] {
    let w = WeightOperand::frozen(&w, compute);
    loss_forward(
        &h,
        Some((&u, &b)),
        w,
        &targets,
        compute.rounding_before_product(),
    )
}

pub(crate) fn cross_entropy_frozen_grads(
    dloss: FlexTensor,
    saved: LossSaved<FlexTensor, FlexTensor>,
    [u, b]: [FlexTensor; 2],
    w: &Matrix,
    compute: Compute,
    want_b: bool,
) -> [FlexTensor; 3] {
    let tokens = TrainedTokens::new(&saved.h, Some(&u), &saved.targets, compute.rounding());
    let b = Floats::new(&b);
    let (head, rows) = (
        tokens.head(WeightOperand::frozen(w, compute), Some(&b)),
        loss_rows(&tokens, &dloss, &saved.lse),
    );
    let n = saved.h.layout().shape().as_slice()[0];
    let grads = loss::backward(head, &rows, [false, want_b]);
    [
        tokens.scatter(&grads.dh, tokens.hidden, n),
        tokens.scatter(&grads.du, tokens.rank, n),
        floats(grads.db, if want_b { b.dims::<2>() } else { [0, 0] }),
    ]
}

pub(crate) fn cross_entropy_with_gradients(
    h: FlexTensor,
    targets: FlexTensor,
    w: &Matrix,
    compute: Compute,
) -> [FlexTensor; 3] {
    loss_with_gradients(&h, WeightOperand::frozen(w, compute), &targets, compute)
}

pub(crate) fn scaled_rows(x: FlexTensor, factors: FlexTensor) -> FlexTensor {
    let mut x = owned(x);
    let factors = Floats::new(&factors);
    let width = x.layout().num_elements() / factors.len().max(1);
    x.storage_mut::<f32>()
        .par_chunks_mut(width.max(1))
        .zip(factors.par_iter())
        .for_each(|(row, factor)| row.iter_mut().for_each(|x| *x *= factor));
    x
}

pub(crate) fn cross_entropy_trained(
    h: FlexTensor,
    w: FlexTensor,
    targets: FlexTensor,
    compute: Compute,
) -> [FlexTensor; 3] {
    let w = Floats::new(&w);
    loss_forward(
        &h,
        None,
        trained(&w, compute),
        &targets,
        compute.rounding_before_product(),
    )
}

pub(crate) fn cross_entropy_trained_grads(
    dloss: FlexTensor,
    saved: LossSaved<FlexTensor, FlexTensor>,
    w: FlexTensor,
    compute: Compute,
    want_w: bool,
) -> [FlexTensor; 2] {
    let tokens = TrainedTokens::new(&saved.h, None, &saved.targets, compute.rounding());
    let w = Floats::new(&w);
    let (head, rows) = (
        tokens.head(trained(&w, compute), None),
        loss_rows(&tokens, &dloss, &saved.lse),
    );
    let grads = loss::backward(head, &rows, [want_w, false]);
    let n = saved.h.layout().shape().as_slice()[0];
    [
        tokens.scatter(&grads.dh, tokens.hidden, n),
        floats(grads.dw, if want_w { w.dims::<2>() } else { [0, 0] }),
    ]
}

/// The tokens of a loss that have a target, gathered.
struct TrainedTokens {
    /// Their positions in the batch.
    at: Vec<usize>,
    targets: Vec<usize>,
    h: Vec<f32>,
    u: Vec<f32>,
    hidden: usize,
    rank: usize,
}

impl TrainedTokens {
    fn new(
        h: &FlexTensor,
        u: Option<&FlexTensor>,
        targets: &FlexTensor,
        rounding: OperandRounding,
    ) -> Self {
        let targets = int_values(targets);
        let at = loss::trained(&targets);
        let (h, u) = (Floats::rounded(h, rounding), u.map(Floats::new));
        let (hidden, rank) = (h.dims::<2>()[1], u.as_ref().map_or(0, |u| u.dims::<2>()[1]));
        let gather = |x: &[f32], width: usize| {
            at.iter()
                .flat_map(|i| &x[i * width..(i + 1) * width])
                .copied()
                .collect::<Vec<_>>()
        };
        Self {
            targets: at.iter().map(|i| targets[*i] as usize).collect(),
            h: gather(&h, hidden),
            u: u.map_or(vec![], |u| gather(&u, rank)),
            at,
            hidden,
            rank,
        }
    }

    fn head<'a>(&'a self, w: WeightOperand<'a>, b: Option<&'a Floats>) -> OutputHead<'a> {
        let n = self.at.len();
        let b = b.map_or(WeightOperand::trained(&[], 0, Compute::F32), |b| {
            WeightOperand::trained(b, self.rank, Compute::F32)
        });
        OutputHead {
            h: Mat::dense(&self.h, n, self.hidden),
            w,
            u: Mat::dense(&self.u, n, self.rank),
            b,
        }
    }

    fn check(&self, w: WeightOperand<'_>) {
        assert!(
            self.targets.iter().all(|t| *t < w.out_width()),
            "a target is not below {}",
            w.out_width()
        );
    }

    /// Losses, log-sum-exps and greedy tokens of the whole batch `h`, 0 for a token without a target.
    fn spread(&self, outcomes: Vec<TokenOutcome>, h: &FlexTensor) -> [FlexTensor; 3] {
        let n = h.layout().shape().as_slice()[0];
        let (mut loss, mut lse, mut greedy) = (vec![0.0; n], vec![0.0; n], vec![0; n]);
        for (at, outcome) in self.at.iter().zip(outcomes) {
            (loss[*at], lse[*at]) = (outcome.loss, outcome.lse);
            greedy[*at] = outcome.greedy as i32; // Below the vocabulary's size, which fits.
        }
        [floats(loss, [n]), floats(lse, [n]), ints(greedy, [n])]
    }

    /// Spreads rows of the trained tokens over the whole batch.
    fn scatter(&self, rows: &[f32], width: usize, n_tokens: usize) -> FlexTensor {
        let mut all = vec![0.0; n_tokens * width];
        if width > 0 {
            self.at
                .iter()
                .zip(rows.chunks(width))
                .for_each(|(at, row)| all[at * width..(at + 1) * width].copy_from_slice(row));
        }
        floats(all, [n_tokens, width])
    }
}

fn loss_forward(
    h: &FlexTensor,
    low_rank: Option<(&FlexTensor, &FlexTensor)>,
    w: WeightOperand<'_>,
    targets: &FlexTensor,
    rounding: OperandRounding,
) -> [FlexTensor; 3] {
    let tokens = TrainedTokens::new(h, low_rank.map(|(u, _)| u), targets, rounding);
    let b = low_rank.map(|(_, b)| Floats::new(b));
    tokens.check(w);
    let outcomes = loss::forward(tokens.head(w, b.as_ref()), &tokens.targets);
    tokens.spread(outcomes, h)
}

/// Losses and log-sum-exps of a frozen head, and the losses' gradients by `h`.
fn loss_with_gradients(
    h: &FlexTensor,
    w: WeightOperand<'_>,
    targets: &FlexTensor,
    compute: Compute,
) -> [FlexTensor; 3] {
    let tokens = TrainedTokens::new(h, None, targets, compute.rounding());
    tokens.check(w);
    let (outcomes, dh) = loss::forward_with_gradients(tokens.head(w, None), &tokens.targets);
    let [loss, lse, _] = tokens.spread(outcomes, h);
    let n_tokens = lse.layout().num_elements();
    let dh = tokens.scatter(&dh, tokens.hidden, n_tokens);
    [loss, lse, dh]
}

fn loss_rows(tokens: &TrainedTokens, dloss: &FlexTensor, lse: &FlexTensor) -> Vec<TokenLoss> {
    let (dloss, lse) = (Floats::new(dloss), Floats::new(lse));
    let rows = tokens.at.iter().zip(&tokens.targets);
    rows.map(|(at, target)| TokenLoss {
        target: *target,
        lse: lse[*at],
        dloss: dloss[*at],
    })
    .collect()
}
