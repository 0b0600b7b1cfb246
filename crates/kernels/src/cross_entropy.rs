//! The loss of a language model without its logits.
//!
//! `loss[t] = log Σ_v exp(h_t · w_v) − h_t · w_target`, computed for blocks of tokens over tiles of the vocabulary:
//! at no time are there more logits than one task's tile. Tokens without a target cost nothing. Backward computes
//! the tiles again from the saved log-sum-exp.
//!
//! A low-rank update of the head enters as a second product, `logits = h · wᵀ + u · bᵀ`.

use std::ops::Range;

use rayon::prelude::*;

use crate::gemm::{Weights, nn_serial, nt_serial, tiles, with_scratch};
use crate::strided::{Mat, MatMut, Write, gemm};

/// A target that is no target.
pub(crate) const IGNORED: i32 = -100;

/// Tokens per task and vocabulary entries per tile.
const TILE_TOKENS: usize = 128;
const TILE_VOCAB: usize = 512;

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
            logits
                .iter_mut()
                .for_each(|l| *l = (*l - row.lse).exp() * row.dloss);
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
                .chunks(vocab.len())
                .zip(state.iter_mut().zip(targets))
            {
                let new_max = logits.iter().copied().fold(*max, f32::max);
                let added: f32 = logits.iter().map(|l| (l - new_max).exp()).sum();
                *sum = *sum * (*max - new_max).exp() + added;
                *max = new_max;
                if vocab.contains(target) {
                    *at_target = logits[target - vocab.start];
                }
            }
        }
    });
    state
        .into_iter()
        .map(|(max, sum, at_target)| (max + sum.ln() - at_target, max + sum.ln()))
        .collect()
}

/// Gradients of h `[tokens, hidden]` and u `[tokens, rank]`.
pub(crate) fn backward_inputs(head: Head<'_>, rows: &[Row]) -> (Vec<f32>, Vec<f32>) {
    let (tokens, hidden, rank) = (rows.len(), head.h.cols(), head.u.cols());
    let mut dh = vec![0.0; tokens * hidden];
    let mut du = vec![0.0; tokens * rank];
    let (dh_all, du_all) = (
        MatMut::dense(&mut dh, tokens, hidden),
        MatMut::dense(&mut du, tokens, rank),
    );
    let blocks: Vec<_> = tiles(0..tokens, TILE_TOKENS).collect();
    blocks.into_par_iter().for_each(|tokens| {
        // SAFETY: tasks write different rows.
        #[expect(unsafe_code, reason = "disjoint rows of two outputs")]
        let (mut dh, mut du) = unsafe {
            (
                dh_all.part(tokens.clone(), 0..hidden),
                du_all.part(tokens.clone(), 0..rank),
            )
        };
        let n = tokens.len();
        with_scratch(n * TILE_VOCAB, |scratch| {
            for vocab in tiles(0..head.vocab(), TILE_VOCAB) {
                let dlogits = &mut scratch[..n * vocab.len()];
                head.dlogits(tokens.clone(), vocab.clone(), rows, dlogits);
                let dlogits = Mat::dense(dlogits, n, vocab.len());
                nn_serial(
                    dlogits,
                    head.w,
                    vocab.clone(),
                    0..hidden,
                    dh.block(0..n, 0..hidden),
                    Write::Add,
                );
                if rank > 0 {
                    nn_serial(
                        dlogits,
                        head.b,
                        vocab,
                        0..rank,
                        du.block(0..n, 0..rank),
                        Write::Add,
                    );
                }
            }
        });
    });
    (dh, du)
}

/// Gradients of w `[vocab, hidden]` and b `[vocab, rank]`; either is left out if not `wanted`.
pub(crate) fn backward_weights(head: Head<'_>, rows: &[Row], wanted: [bool; 2]) -> [Vec<f32>; 2] {
    let (vocab, hidden, rank) = (
        head.vocab(),
        head.h.cols() * usize::from(wanted[0]),
        head.u.cols() * usize::from(wanted[1]),
    );
    let mut dw = vec![0.0; vocab * hidden];
    let mut db = vec![0.0; vocab * rank];
    let (dw_all, db_all) = (
        MatMut::dense(&mut dw, vocab, hidden),
        MatMut::dense(&mut db, vocab, rank),
    );
    let blocks: Vec<_> = tiles(0..vocab, TILE_VOCAB).collect();
    blocks.into_par_iter().for_each(|vocab| {
        // SAFETY: tasks write different rows.
        #[expect(unsafe_code, reason = "disjoint rows of two outputs")]
        let (mut dw, mut db) = unsafe {
            (
                dw_all.part(vocab.clone(), 0..hidden),
                db_all.part(vocab.clone(), 0..rank),
            )
        };
        let width = vocab.len();
        with_scratch(TILE_TOKENS * TILE_VOCAB, |scratch| {
            for tokens in tiles(0..rows.len(), TILE_TOKENS) {
                let dlogits = &mut scratch[..tokens.len() * width];
                head.dlogits(tokens.clone(), vocab.clone(), rows, dlogits);
                let dlogits = Mat::dense(dlogits, tokens.len(), width).t();
                gemm(
                    dw.block(0..width, 0..hidden),
                    dlogits,
                    head.h.block(tokens.clone(), 0..hidden),
                    1.0,
                    Write::Add,
                );
                gemm(
                    db.block(0..width, 0..rank),
                    dlogits,
                    head.u.block(tokens, 0..rank),
                    1.0,
                    Write::Add,
                );
            }
        });
    });
    [dw, db]
}
