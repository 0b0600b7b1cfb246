//! The loss of a language model without its logits.
//!
//! `loss[t] = log Σ_v exp(h_t · w_v) − h_t · w_target`, computed for blocks of tokens over tiles of the vocabulary:
//! at no time does a task hold more logits than 128 × 256, and backward more than 1024 × 256. Tokens without a target cost nothing.
//!
//! Where the head is frozen, one visit of it gives losses and gradients: the gradient of a loss is
//! `Σ_v softmax_v · w_v − w_target`, which sums like the output of attention whose keys and values are `w`. Otherwise
//! backward computes the tiles again from the saved log-sum-exp.
//!
//! A low-rank update of the head enters as a second product, `logits = h · wᵀ + u · bᵀ`.
//!
//! Source of the sum relative to a running maximum: Milakov and Gimelshein, arXiv:1805.02867.

use std::ops::Range;

use rayon::prelude::*;

use crate::exp;
use crate::product::gemm::{nn_serial, nt_serial, tiles, with_scratch, zeros};
use crate::product::strided::{Mat, MatMut, Write, gemm};
use crate::product::weights::Weights;

/// A target that is no target.
pub(crate) const IGNORED: i32 = -100;

/// Tokens per task and vocabulary entries per tile.
const TILE_TOKENS: usize = 128;
const TILE_VOCAB: usize = 256;
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
        .flat_map_iter(|tokens| forward_block(head, tokens.clone(), &targets[tokens], None))
        .collect()
}

/// [`forward`] of a head without a low-rank update, and the gradients of the losses by `h`, `[tokens, hidden]`.
pub(crate) fn forward_with_gradients(
    head: Head<'_>,
    targets: &[usize],
) -> (Vec<(f32, f32)>, Vec<f32>) {
    let hidden = head.h.cols();
    let mut dh = zeros(targets.len() * hidden);
    let losses = dh
        .par_chunks_mut((TILE_TOKENS * hidden).max(1))
        .zip(targets.par_chunks(TILE_TOKENS))
        .enumerate()
        .flat_map_iter(|(i, (dh, targets))| {
            let start = i * TILE_TOKENS;
            forward_block(head, start..start + targets.len(), targets, Some(dh))
        })
        .collect();
    (losses, dh)
}

/// What is known of a token after some of the vocabulary.
#[derive(Clone, Copy)]
struct Seen {
    max: f32,
    /// Of the exponentials, relative to the maximum.
    sum: f32,
    at_target: f32,
}

impl Seen {
    /// Adds a tile of logits, which become exponentials; returns by how much the maximum changed the earlier ones.
    fn add(&mut self, logits: &mut [f32], target: Option<usize>) -> f32 {
        if let Some(at) = target {
            self.at_target = logits[at];
        }
        let max = exp::max(logits).max(self.max);
        let faded = (self.max - max).exp();
        self.sum = self.sum * faded + exp::exp_shifted(logits, max);
        self.max = max;
        faded
    }
}

fn forward_block(
    head: Head<'_>,
    tokens: Range<usize>,
    targets: &[usize],
    mut dh: Option<&mut [f32]>,
) -> Vec<(f32, f32)> {
    let (n, hidden) = (tokens.len(), head.h.cols());
    let mut seen = vec![
        Seen {
            max: f32::NEG_INFINITY,
            sum: 0.0,
            at_target: 0.0
        };
        n
    ];
    with_scratch(n * TILE_VOCAB, |scratch| {
        for vocab in tiles(0..head.vocab(), TILE_VOCAB) {
            let logits = &mut scratch[..n * vocab.len()];
            head.logits(tokens.clone(), vocab.clone(), logits);
            for (i, logits) in logits.chunks_mut(vocab.len()).enumerate() {
                let target = vocab
                    .contains(&targets[i])
                    .then(|| targets[i] - vocab.start);
                let faded = seen[i].add(logits, target);
                if let Some(dh) = &mut dh
                    && faded != 1.0
                {
                    exp::scale(&mut dh[i * hidden..][..hidden], faded);
                }
            }
            if let Some(dh) = &mut dh {
                let (exps, dh) = (
                    Mat::dense(logits, n, vocab.len()),
                    MatMut::dense(dh, n, hidden),
                );
                nn_serial(exps, head.w, vocab, 0..hidden, dh, Write::Add);
            }
        }
    });
    if let Some(dh) = dh {
        finish_gradients(head.w, &seen, targets, dh);
    }
    let losses = |seen: Seen| {
        let lse = seen.max + seen.sum.ln();
        (lse - seen.at_target, lse)
    };
    seen.into_iter().map(losses).collect()
}

/// Sums of `exp(logit) · w` become gradients: means of `w`, less the targets' rows.
fn finish_gradients(w: Weights<'_>, seen: &[Seen], targets: &[usize], dh: &mut [f32]) {
    let hidden = w.in_width();
    with_scratch(hidden, |row| {
        for ((dh, seen), target) in dh.chunks_mut(hidden.max(1)).zip(seen).zip(targets) {
            w.read(*target..target + 1, 0..hidden, row);
            let share = 1.0 / seen.sum;
            dh.iter_mut()
                .zip(&*row)
                .for_each(|(dh, w)| *dh = *dh * share - w);
        }
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
