//! The loss of a language model without its logits.
//!
//! `loss[t] = log Σ_v exp(h_t · w_v) − h_t · w_target`, computed for blocks of tokens over tiles of the vocabulary: a
//! task holds at most 512 × 512 logits, and 1024 × 512 in the backward pass. Tokens without a target cost nothing.
//!
//! If the head is frozen, one pass over it gives losses and gradients: the gradient of a loss is `Σ_v softmax_v · w_v −
//! w_target`, which sums like the output of attention whose keys and values are `w`. Otherwise the backward pass
//! recomputes the tiles from the saved log-sum-exp.
//!
//! A low-rank update of the head enters as a second product, `logits = h · wᵀ + u · bᵀ`.
//!
//! Source of the sum relative to a running maximum: Milakov and Gimelshein, arXiv:1805.02867.

use std::ops::Range;

use rayon::prelude::*;

use crate::matmul::{WeightOperand, gemm, nn_serial, nt_serial};
use crate::memory::{Mat, MatMut, with_scratch, zeros};
use crate::settings::Accumulate;
use crate::simd::exp;
use crate::threads::tiles;

/// The target of a token that is not trained.
pub(crate) const IGNORED: i32 = -100;

/// The tokens and vocabulary entries of a tile of logits. There are many tokens, because a tile's weights are packed
/// anew for each tile of tokens.
const TILE_TOKENS: usize = 512;
const TILE_VOCAB: usize = 512;
/// The fewest tasks: if there are few tokens, the vocabulary is cut too.
const TASKS: usize = 32;
/// The tokens of a pass over the vocabulary in the backward pass, and those of one of its tasks.
const PASS_TOKENS: usize = 1024;
const PASS_TASK_TOKENS: usize = 256;
/// The vocabulary entries whose gradients a task computes.
const OUTER_ROWS: usize = 128;

/// The output head as two products: h `[tokens, hidden]` with w `[vocab, hidden]`, u `[tokens, rank]` with b `[vocab,
/// rank]`. The second is a low-rank update; there is none if the rank is 0.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OutputHead<'a> {
    pub(crate) h: Mat<'a>,
    pub(crate) w: WeightOperand<'a>,
    pub(crate) u: Mat<'a>,
    pub(crate) b: WeightOperand<'a>,
}

impl OutputHead<'_> {
    fn vocab(&self) -> usize {
        self.w.out_width()
    }

    fn logits(&self, tokens: Range<usize>, vocab: Range<usize>, out: &mut [f32]) {
        let (n, width) = (tokens.len(), vocab.len());
        nt_serial(
            self.h.block(tokens.clone(), 0..self.h.cols()),
            self.w,
            vocab.clone(),
            MatMut::dense(out, n, width),
            Accumulate::Replace,
        );
        if self.u.cols() > 0 {
            nt_serial(
                self.u.block(tokens, 0..self.u.cols()),
                self.b,
                vocab,
                MatMut::dense(out, n, width),
                Accumulate::Add,
            );
        }
    }

    /// The gradient of a tile of logits: `(softmax − onehot) · dloss`.
    fn dlogits(
        &self,
        tokens: Range<usize>,
        vocab: Range<usize>,
        rows: &[TokenLoss],
        out: &mut [f32],
    ) {
        self.logits(tokens.clone(), vocab.clone(), out);
        for (logits, row) in out.chunks_mut(vocab.len()).zip(&rows[tokens]) {
            exp::exp_shifted(logits, row.lse);
            exp::scale(logits, row.dloss);
            if vocab.contains(&row.target) {
                logits[row.target - vocab.start] -= row.dloss;
            }
        }
    }
}

/// One trained token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TokenLoss {
    pub(crate) target: usize,
    pub(crate) lse: f32,
    /// Gradient of the token's loss.
    pub(crate) dloss: f32,
}

/// What a token's logits say.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TokenOutcome {
    pub(crate) loss: f32,
    /// The log-sum-exp.
    pub(crate) lse: f32,
    /// The entry with the largest logit; the first of several.
    pub(crate) greedy: usize,
}

/// The positions that have a target.
pub(crate) fn trained(targets: &[i32]) -> Vec<usize> {
    (0..targets.len())
        .filter(|i| targets[*i] != IGNORED)
        .collect()
}

/// The outcome of `head` for each token, all of which have a target.
pub(crate) fn forward(head: OutputHead<'_>, targets: &[usize]) -> Vec<TokenOutcome> {
    let visits = visit(head, targets, 0);
    let (_, n_parts) = parts(head, targets);
    let of_token = |token| {
        let (tile, i) = (token / TILE_TOKENS, token % TILE_TOKENS);
        PartialSoftmax::of_all(&visits[tile * n_parts..][..n_parts], i).outcome()
    };
    (0..targets.len()).map(of_token).collect()
}

/// [`forward`] of a head without a low-rank update, and the gradients of the losses by `h`, `[tokens, hidden]`.
pub(crate) fn forward_with_gradients(
    head: OutputHead<'_>,
    targets: &[usize],
) -> (Vec<TokenOutcome>, Vec<f32>) {
    let hidden = head.h.cols();
    let visits = visit(head, targets, hidden);
    let (_, n_parts) = parts(head, targets);
    let mut dh = zeros(targets.len() * hidden);
    let losses = dh
        .par_chunks_mut(hidden.max(1))
        .zip(targets)
        .enumerate()
        .map(|(token, (dh, target))| {
            let (tile, i) = (token / TILE_TOKENS, token % TILE_TOKENS);
            let parts = &visits[tile * n_parts..][..n_parts];
            let seen = PartialSoftmax::of_all(parts, i);
            gradient(head.w, parts, (i, seen), *target, dh);
            seen.outcome()
        })
        .collect();
    (losses, dh)
}

/// The softmax of a token over part of the vocabulary.
#[derive(Clone, Copy)]
struct PartialSoftmax {
    max: f32,
    /// The sum of the exponentials, relative to the maximum.
    sum: f32,
    at_target: f32,
    /// The entry of the maximum.
    greedy: usize,
}

impl PartialSoftmax {
    const NOTHING: Self = Self {
        max: f32::NEG_INFINITY,
        sum: 0.0,
        at_target: 0.0,
        greedy: 0,
    };

    /// Adds the logits of a tile of the vocabulary and turns them into exponentials; returns the factor of the earlier
    /// ones, because the maximum may have grown.
    fn add(&mut self, logits: &mut [f32], vocab: &Range<usize>, target: usize) -> f32 {
        if vocab.contains(&target) {
            self.at_target = logits[target - vocab.start];
        }
        let largest = exp::max(logits);
        if largest > self.max {
            let at = logits.iter().position(|logit| *logit == largest);
            self.greedy = vocab.start + at.unwrap_or(0);
        }
        let max = largest.max(self.max);
        let faded = (self.max - max).exp();
        self.sum = self.sum * faded + exp::exp_shifted(logits, max);
        self.max = max;
        faded
    }

    /// The softmax of the `i`-th token of a tile over all parts of the vocabulary; only one part has its target.
    fn of_all(parts: &[VocabVisit], i: usize) -> Self {
        let parts = || parts.iter().map(|part| part.seen[i]);
        let larger = |a: Self, b: Self| if b.max > a.max { b } else { a };
        let largest = parts().fold(Self::NOTHING, larger);
        let max = largest.max;
        Self {
            sum: parts().map(|seen| seen.sum * (seen.max - max).exp()).sum(),
            at_target: parts().map(|seen| seen.at_target).sum(),
            ..largest
        }
    }

    fn outcome(self) -> TokenOutcome {
        let lse = self.max + self.sum.ln();
        TokenOutcome {
            loss: lse - self.at_target,
            lse,
            greedy: self.greedy,
        }
    }
}

/// The result of a task: a tile of tokens over a part of the vocabulary.
struct VocabVisit {
    seen: Vec<PartialSoftmax>,
    /// `[tokens, hidden]` sums of `exp(logit) · w`, relative to the maxima; empty if not wanted.
    sums: Vec<f32>,
}

/// The vocabulary entries of a part, and the number of parts, for a number of trained tokens.
pub(super) fn vocab_parts(tokens: usize, vocab: usize) -> (usize, usize) {
    let wanted = TASKS.div_ceil(tokens.div_ceil(TILE_TOKENS).max(1));
    let part = vocab
        .div_ceil(wanted)
        .next_multiple_of(TILE_VOCAB)
        .max(TILE_VOCAB);
    (part, vocab.div_ceil(part).max(1))
}

/// [`vocab_parts`] of a head.
fn parts(head: OutputHead<'_>, targets: &[usize]) -> (usize, usize) {
    vocab_parts(targets.len(), head.vocab())
}

/// The results for each tile of tokens and each part of the vocabulary; `wide` is the width of the sums.
fn visit(head: OutputHead<'_>, targets: &[usize], wide: usize) -> Vec<VocabVisit> {
    let (part, _) = parts(head, targets);
    let tasks: Vec<_> = tiles(0..targets.len(), TILE_TOKENS)
        .flat_map(|tokens| tiles(0..head.vocab(), part).map(move |vocab| (tokens.clone(), vocab)))
        .collect();
    tasks
        .into_par_iter()
        .with_max_len(1)
        .map(|(tokens, vocab)| visit_part(head, targets, (tokens, vocab), wide))
        .collect()
}

fn visit_part(
    head: OutputHead<'_>,
    targets: &[usize],
    (tokens, vocab): (Range<usize>, Range<usize>),
    wide: usize,
) -> VocabVisit {
    let (n, targets) = (tokens.len(), &targets[tokens.clone()]);
    let (mut seen, mut sums) = (vec![PartialSoftmax::NOTHING; n], vec![0.0; n * wide]);
    with_scratch(n * TILE_VOCAB, |scratch| {
        for vocab in tiles(vocab, TILE_VOCAB) {
            let logits = &mut scratch[..n * vocab.len()];
            head.logits(tokens.clone(), vocab.clone(), logits);
            for (i, logits) in logits.chunks_mut(vocab.len()).enumerate() {
                let faded = seen[i].add(logits, &vocab, targets[i]);
                if faded != 1.0 {
                    exp::scale(&mut sums[i * wide..][..wide], faded);
                }
            }
            if wide > 0 {
                let exps = Mat::dense(logits, n, vocab.len());
                let sums = MatMut::dense(&mut sums, n, wide);
                nn_serial(exps, head.w, vocab, 0..wide, sums, Accumulate::Add);
            }
        }
    });
    VocabVisit { seen, sums }
}

/// Sums of `exp(logit) · w` become a gradient: the mean of `w`, less the target's row.
fn gradient(
    w: WeightOperand<'_>,
    parts: &[VocabVisit],
    (i, seen): (usize, PartialSoftmax),
    target: usize,
    dh: &mut [f32],
) {
    for part in parts {
        let share = (part.seen[i].max - seen.max).exp() / seen.sum;
        let sums = &part.sums[i * dh.len()..][..dh.len()];
        dh.iter_mut()
            .zip(sums)
            .for_each(|(dh, sum)| *dh += share * sum);
    }
    with_scratch(dh.len(), |row| {
        w.read(target..target + 1, 0..dh.len(), row);
        dh.iter_mut().zip(&*row).for_each(|(dh, w)| *dh -= w);
    });
}

/// Gradients of a head's inputs and weights.
#[derive(Debug)]
pub(crate) struct Grads {
    /// `[tokens, hidden]`.
    pub(crate) dh: Vec<f32>,
    /// `[tokens, rank]`.
    pub(crate) du: Vec<f32>,
    /// `[vocab, hidden]`, empty if not wanted.
    pub(crate) dw: Vec<f32>,
    /// `[vocab, rank]`, empty if not wanted.
    pub(crate) db: Vec<f32>,
}

/// Gradients of the inputs, and of `w` and `b` if `wanted`.
///
/// A tile of logit gradients is computed once, by tasks that own tokens, and read twice: by the same tasks for the
/// inputs, then by tasks that own rows of the weights.
pub(crate) fn backward(head: OutputHead<'_>, rows: &[TokenLoss], wanted: [bool; 2]) -> Grads {
    let (vocab, hidden, rank) = (head.vocab(), head.h.cols(), head.u.cols());
    let [wide, low] = [
        hidden * usize::from(wanted[0]),
        rank * usize::from(wanted[1]),
    ];
    let mut grads = Grads {
        dh: vec![0.0; rows.len() * hidden],
        du: vec![0.0; rows.len() * rank],
        dw: vec![0.0; vocab * wide],
        db: vec![0.0; vocab * low],
    };
    let size = PASS_TOKENS.min(rows.len()) * TILE_VOCAB.min(vocab);
    with_scratch(size, |dlogits| {
        for tokens in tiles(0..rows.len(), PASS_TOKENS) {
            for vocab in tiles(0..vocab, TILE_VOCAB) {
                let dlogits = &mut dlogits[..tokens.len() * vocab.len()];
                let dh = &mut grads.dh[tokens.start * hidden..tokens.end * hidden];
                let du = &mut grads.du[tokens.start * rank..tokens.end * rank];
                backward_inputs(
                    head,
                    rows,
                    (tokens.clone(), vocab.clone()),
                    dlogits,
                    [dh, du],
                );
                let dlogits = Mat::dense(dlogits, tokens.len(), vocab.len());
                let dw = &mut grads.dw[vocab.start * wide..vocab.end * wide];
                add_outer(dw, dlogits, head.h.block(tokens.clone(), 0..wide));
                let db = &mut grads.db[vocab.start * low..vocab.end * low];
                add_outer(db, dlogits, head.u.block(tokens.clone(), 0..low));
            }
        }
    });
    grads
}

/// Fills a tile of `dlogits [tokens, vocab]` and adds its part of the gradients of its tokens' `h` and `u`.
fn backward_inputs(
    head: OutputHead<'_>,
    rows: &[TokenLoss],
    (tokens, vocab): (Range<usize>, Range<usize>),
    dlogits: &mut [f32],
    [dh, du]: [&mut [f32]; 2],
) {
    let (n, width) = (tokens.len(), vocab.len());
    let outputs = [dlogits, dh, du].map(|values| {
        let cols = values.len() / n;
        MatMut::dense(values, n, cols)
    });
    let blocks: Vec<_> = tiles(0..n, PASS_TASK_TOKENS).collect();
    blocks.into_par_iter().with_max_len(1).for_each(|block| {
        // SAFETY: tasks write different rows.
        #[expect(unsafe_code, reason = "disjoint rows of three outputs")]
        let [mut dlogits, dh, du] = unsafe {
            outputs
                .each_ref()
                .map(|all| all.part(block.clone(), 0..all.cols()))
        };
        let places = tokens.start + block.start..tokens.start + block.end;
        head.dlogits(places, vocab.clone(), rows, dlogits.values());
        let dlogits = Mat::dense(dlogits.values(), block.len(), width);
        for (w, dx) in [(head.w, dh), (head.b, du)] {
            let ins = 0..dx.cols();
            if !ins.is_empty() {
                nn_serial(dlogits, w, vocab.clone(), ins, dx, Accumulate::Add);
            }
        }
    });
}

/// `dw += dlogitsᵀ · x`, in parallel over rows of `dw`.
fn add_outer(dw: &mut [f32], dlogits: Mat<'_>, x: Mat<'_>) {
    let size = OUTER_ROWS * x.cols();
    if size == 0 {
        return;
    }
    dw.par_chunks_mut(size).enumerate().for_each(|(i, dw)| {
        let start = i * OUTER_ROWS;
        let rows = dw.len() / x.cols();
        let dlogits = dlogits.block(0..x.rows(), start..start + rows).t();
        gemm(
            MatMut::dense(dw, rows, x.cols()),
            dlogits,
            x,
            1.0,
            Accumulate::Add,
        );
    });
}
