//! The loss of a batch on the CPU backend: only the tokens that have a target are looked at.

use burn_flex::FlexTensor;

use super::values::{Floats, floats, int_values};
use crate::matmul::WeightOperand;
use crate::memory::Mat;
use crate::ops::loss::{self, OutputHead};
use crate::settings::Compute;

/// The tokens of a loss that have a target, gathered.
pub(super) struct TrainedTokens {
    /// Their positions in the batch.
    pub(super) at: Vec<usize>,
    pub(super) targets: Vec<usize>,
    h: Vec<f32>,
    u: Vec<f32>,
    pub(super) hidden: usize,
    pub(super) rank: usize,
}

impl TrainedTokens {
    pub(super) fn new(
        h: &FlexTensor,
        u: Option<&FlexTensor>,
        targets: &FlexTensor,
        compute: Compute,
    ) -> Self {
        let targets = int_values(targets);
        let at = loss::trained(&targets);
        let (h, u) = (Floats::rounded(h, compute), u.map(Floats::new));
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

    pub(super) fn head<'a>(
        &'a self,
        w: WeightOperand<'a>,
        b: Option<&'a Floats>,
    ) -> OutputHead<'a> {
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

    /// Losses and log-sum-exps of the whole batch `h`, 0 where there is no target.
    fn spread(&self, losses: Vec<(f32, f32)>, h: &FlexTensor) -> (FlexTensor, FlexTensor) {
        let n = h.layout().shape().as_slice()[0];
        let (mut loss, mut lse) = (vec![0.0; n], vec![0.0; n]);
        for (at, values) in self.at.iter().zip(losses) {
            (loss[*at], lse[*at]) = values;
        }
        (floats(loss, [n]), floats(lse, [n]))
    }

    /// Spreads rows of the trained tokens over the whole batch.
    pub(super) fn scatter(&self, rows: &[f32], width: usize, n_tokens: usize) -> FlexTensor {
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

pub(super) fn loss_forward(
    h: &FlexTensor,
    low_rank: Option<(&FlexTensor, &FlexTensor)>,
    w: WeightOperand<'_>,
    targets: &FlexTensor,
    compute: Compute,
) -> (FlexTensor, FlexTensor) {
    let tokens = TrainedTokens::new(h, low_rank.map(|(u, _)| u), targets, compute);
    let b = low_rank.map(|(_, b)| Floats::new(b));
    tokens.check(w);
    let losses = loss::forward(tokens.head(w, b.as_ref()), &tokens.targets);
    tokens.spread(losses, h)
}

/// Losses and log-sum-exps of a frozen head, and the losses' gradients by `h`.
pub(super) fn loss_with_gradients(
    h: &FlexTensor,
    w: WeightOperand<'_>,
    targets: &FlexTensor,
    compute: Compute,
) -> [FlexTensor; 3] {
    let tokens = TrainedTokens::new(h, None, targets, compute);
    tokens.check(w);
    let (losses, dh) = loss::forward_with_gradients(tokens.head(w, None), &tokens.targets);
    let (loss, lse) = tokens.spread(losses, h);
    let n_tokens = lse.layout().num_elements();
    let dh = tokens.scatter(&dh, tokens.hidden, n_tokens);
    [loss, lse, dh]
}
