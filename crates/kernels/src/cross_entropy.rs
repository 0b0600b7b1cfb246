//! The loss of a language model without its logits.
//!
//! `loss[t] = log Σ_v exp(h_t · w_v) − h_t · w_target`, computed for blocks of tokens over tiles of the vocabulary:
//! at no time are there more logits than 1024 × 512. Tokens without a target cost nothing. Backward computes
//! the tiles again from the saved log-sum-exp.
//!
//! A low-rank update of the head enters as a second product, `logits = h · wᵀ + u · bᵀ`.

use std::ops::Range;

use rayon::prelude::*;

use crate::exp;
use crate::product::gemm::{nn_serial, nt_serial, tiles, with_scratch};
use crate::product::strided::{Mat, MatMut, Write, gemm};
use crate::product::weights::Weights;

/// A target that is no target.
pub(crate) const IGNORED: i32 = -100;

/// Tokens per task and vocabulary entries per tile.
const TILE_TOKENS: usize = 128;
const TILE_VOCAB: usize = 512;
/// Tokens between two visits of the same vocabulary entry in the backward pass.
const PASS_TOKENS: usize = 1024;

/// The two products that make logits: h `[tokens, hidden]` with w `[vocab, hidden]`, u `[tokens, rank]` with
/// b `[vocab, rank]`; a rank of 0 leaves the second out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head<'a> {
    pub(crate) h: Mat<'a>,
    pub(crate) w: Weights<'a>,
    pub(crate) u: Mat<'a>,
    pub(crate) b: Weights<'a>,
}

impl Head<'_> {
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
            Write::Replace,
        );
        if self.u.cols() > 0 {
            nt_serial(
                self.u.block(tokens, 0..self.u.cols()),
                self.b,
                vocab,
                MatMut::dense(out, n, width),
                Write::Add,
            );
        }
    }

    /// The gradient of a tile of logits: `(softmax − onehot) · dloss`.
    fn dlogits(&self, tokens: Range<usize>, vocab: Range<usize>, rows: &[Row], out: &mut [f32]) {
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
pub(crate) struct Row {
    pub(crate) target: usize,
    pub(crate) lse: f32,
    /// Gradient of the token's loss.
    pub(crate) dloss: f32,
}

/// The positions that have a target.
pub(crate) fn trained(targets: &[i32]) -> Vec<usize> {
    (0..targets.len())
        .filter(|i| targets[*i] != IGNORED)
        .collect()
}

/// Loss and log-sum-exp per token of `head`, all of which have a target.
pub(crate) fn forward(head: Head<'_>, targets: &[usize]) -> Vec<(f32, f32)> {
    let blocks: Vec<_> = tiles(0..targets.len(), TILE_TOKENS).collect();
    blocks
        .into_par_iter()
        .flat_map_iter(|tokens| forward_block(head, tokens.clone(), &targets[tokens]))
        .collect()
}

fn forward_block(head: Head<'_>, tokens: Range<usize>, targets: &[usize]) -> Vec<(f32, f32)> {
    // Running maximum, sum of exponentials below it, and the target's logit.
    let mut state = vec![(f32::NEG_INFINITY, 0.0f32, 0.0f32); tokens.len()];
    with_scratch(tokens.len() * TILE_VOCAB, |scratch| {
        for vocab in tiles(0..head.vocab(), TILE_VOCAB) {
            let logits = &mut scratch[..tokens.len() * vocab.len()];
            head.logits(tokens.clone(), vocab.clone(), logits);
            for (logits, ((max, sum, at_target), target)) in logits
                .chunks_mut(vocab.len())
                .zip(state.iter_mut().zip(targets))
            {
                if vocab.contains(target) {
                    *at_target = logits[target - vocab.start];
                }
                let new_max = exp::max(logits).max(*max);
                *sum = *sum * (*max - new_max).exp() + exp::exp_shifted(logits, new_max);
                *max = new_max;
            }
        }
    });
    state
        .into_iter()
        .map(|(max, sum, at_target)| (max + sum.ln() - at_target, max + sum.ln()))
        .collect()
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
/// A tile of logits' gradients is made once, by tasks that own tokens, and read twice: by the same tasks for the
/// inputs, then by tasks that own rows of the weights.
pub(crate) fn backward(head: Head<'_>, rows: &[Row], wanted: [bool; 2]) -> Grads {
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

/// Fills a tile of `dlogits [tokens, vocab]`, and adds what it gives to the gradients of its tokens' `h` and `u`.
fn backward_inputs(
    head: Head<'_>,
    rows: &[Row],
    (tokens, vocab): (Range<usize>, Range<usize>),
    dlogits: &mut [f32],
    [dh, du]: [&mut [f32]; 2],
) {
    let (n, width) = (tokens.len(), vocab.len());
    let outputs = [dlogits, dh, du].map(|values| {
        let cols = values.len() / n;
        MatMut::dense(values, n, cols)
    });
    let blocks: Vec<_> = tiles(0..n, TILE_TOKENS).collect();
    blocks.into_par_iter().for_each(|block| {
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
                nn_serial(dlogits, w, vocab.clone(), ins, dx, Write::Add);
            }
        }
    });
}

/// `dw += dlogitsᵀ · x`, in parallel over rows of `dw`.
fn add_outer(dw: &mut [f32], dlogits: Mat<'_>, x: Mat<'_>) {
    let size = TILE_TOKENS * x.cols();
    if size == 0 {
        return;
    }
    dw.par_chunks_mut(size).enumerate().for_each(|(i, dw)| {
        let start = i * TILE_TOKENS;
        let rows = dw.len() / x.cols();
        let dlogits = dlogits.block(0..x.rows(), start..start + rows).t();
        gemm(
            MatMut::dense(dw, rows, x.cols()),
            dlogits,
            x,
            1.0,
            Write::Add,
        );
    });
}
