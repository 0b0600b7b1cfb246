//! Causal attention in tiles: the scores of 64 queries against the keys they may see, never the whole square.
//!
//! One kernel serves all forms, because it reads keys and values in place. Heads may share them in groups (the
//! distills). A key may end in a part that all heads share, in a tensor of its own (expanded latent attention: the
//! rotated key), and keys and values may be parts of one row (the output of `kv_b_proj`). With one key head whose
//! values are a prefix of its keys, it is the absorbed form. Queries are the last `seq` positions of the `kv_seq` keys:
//! query `i` sees keys up to `kv_seq − seq + i`. A row packed with several sequences is treated as several rows: no
//! tile crosses a boundary, so the result of a sequence does not depend on its neighbors. A sequence that continues an
//! earlier one reads that one's keys where they are.
//!
//! Backward recomputes the scores from the saved log-sum-exp of every row.
//!
//! Source of the recomputation: FlashAttention-2, arXiv:2307.08691, section 3.1; without its online softmax, since
//! a tile's whole row of scores fits in cache here.

use std::ops::Range;

use rayon::prelude::*;

use super::segments::{SegmentView, Segments};
use crate::gemv::MAX_GEMV_ROWS;
use crate::matmul::gemm;
use crate::memory::{Mat, MatMut, with_scratch, zeros};
use crate::settings::Accumulate;
use crate::simd::{dot, exp};
use crate::threads::{parallel_for, spin_for, tiles};

/// Queries per tile.
const TILE_QUERIES: usize = 64;

/// The features of heads in a tensor `[batch, len, heads, width]`: `dim` of them, from `start` of each head.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadLayout {
    pub(crate) heads: usize,
    pub(crate) width: usize,
    pub(crate) start: usize,
    pub(crate) dim: usize,
}

impl HeadLayout {
    /// All features of each head.
    pub(crate) fn whole(heads: usize, dim: usize) -> Self {
        Self {
            heads,
            width: dim,
            start: 0,
            dim,
        }
    }

    /// The columns of a head, with the tensor as a matrix `[batch · len, heads · width]`.
    fn cols(&self, head: usize) -> Range<usize> {
        let start = head * self.width + self.start;
        start..start + self.dim
    }

    /// A head of sequence `row`: `[len, dim]`.
    fn of<'a>(&self, values: &'a [f32], len: usize, row: usize, head: usize) -> Mat<'a> {
        let all = Mat::dense(values, (row + 1) * len, self.heads * self.width);
        all.block(row * len..(row + 1) * len, self.cols(head))
    }

    /// The same, to be written.
    ///
    /// # Safety
    /// Views that live at the same time must be of different heads or sequences.
    #[expect(unsafe_code, reason = "disjoint columns of one tensor")]
    unsafe fn part<'a>(&self, all: &MatMut<'a>, len: usize, row: usize, head: usize) -> MatMut<'a> {
        // SAFETY: heads are different columns, sequences different rows.
        unsafe { all.part(row * len..(row + 1) * len, self.cols(head)) }
    }

    /// The tensor as a writable matrix with `rows` rows.
    fn all<'a>(&self, values: &'a mut [f32], rows: usize) -> MatMut<'a> {
        MatMut::dense(values, rows, self.heads * self.width)
    }
}

/// The sizes of one call, and the layouts of its tensors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionShape {
    pub(crate) batch: usize,
    pub(crate) seq: usize,
    pub(crate) kv_seq: usize,
    /// `dim` is that of `k` and `shared` together.
    pub(crate) q: HeadLayout,
    pub(crate) k: HeadLayout,
    pub(crate) v: HeadLayout,
    /// The end of every key, one for all heads; its `dim` may be 0.
    pub(crate) shared: HeadLayout,
}

impl AttentionShape {
    fn out(&self) -> HeadLayout {
        HeadLayout::whole(self.q.heads, self.v.dim)
    }

    /// The tiles of each row: the same for all heads.
    fn tiles(&self, segments: &Segments) -> Vec<Vec<QueryTile>> {
        let rows = 0..self.batch;
        rows.map(|row| self.tiles_of(segments, row).collect())
            .collect()
    }

    fn tiles_of(&self, segments: &Segments, row: usize) -> impl Iterator<Item = QueryTile> + use<> {
        let before = self.kv_seq - self.seq;
        let views = segments.views(row, self.seq).into_iter();
        views.flat_map(move |SegmentView { own, earlier }| {
            tiles(own.clone(), TILE_QUERIES).map(move |queries| {
                let mut keys = earlier.clone();
                // Rows with tokens before them are whole.
                let last = own.start..before + queries.end;
                match keys.last_mut() {
                    Some(range) if range.end == last.start => range.end = last.end,
                    _ => keys.push(last),
                }
                QueryTile { queries, keys }
            })
        })
    }
}

/// Some queries of a segment, and the keys that they see together.
#[derive(Clone, Debug)]
struct QueryTile {
    queries: Range<usize>,
    /// Ranges in order; the last ones are the queries' own.
    keys: Vec<Range<usize>>,
}

impl QueryTile {
    /// The number of keys.
    fn n_keys(&self) -> usize {
        self.keys.iter().map(Range::len).sum()
    }

    /// The ranges of keys, each with its columns in a matrix of all, and how a sum over them goes on.
    fn parts(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>, Accumulate)> {
        let mut at = 0;
        self.keys.iter().map(move |keys| {
            let accumulate = if at == 0 {
                Accumulate::Replace
            } else {
                Accumulate::Add
            };
            let columns = at..at + keys.len();
            at = columns.end;
            (keys.clone(), columns, accumulate)
        })
    }
}

/// Keys and values, in tensors that [`AttentionShape`] describes. They may be the same tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvInputs<'a> {
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    pub(crate) shared: &'a [f32],
}

/// The inputs of one head.
#[derive(Clone, Copy)]
struct AttentionHead<'a> {
    q: Mat<'a>,
    k: Mat<'a>,
    v: Mat<'a>,
    shared: Mat<'a>,
    scale: f32,
}

impl<'a> AttentionHead<'a> {
    fn new(
        q: &'a [f32],
        context: KvInputs<'a>,
        scale: f32,
        shape: AttentionShape,
        at: [usize; 2],
    ) -> Self {
        let ([row, head], len) = (at, shape.kv_seq);
        let kv_head = head / (shape.q.heads / shape.k.heads);
        Self {
            q: shape.q.of(q, shape.seq, row, head),
            k: shape.k.of(context.k, len, row, kv_head),
            v: shape.v.of(context.v, len, row, kv_head),
            shared: shape.shared.of(context.shared, len, row, 0),
            scale,
        }
    }

    /// Scores of a tile of queries, −∞ where the key lies after the query.
    fn scores(&self, tile: &QueryTile, scores: &mut [f32]) {
        let (rows, own, visible) = (tile.queries.len(), self.k.cols(), tile.n_keys());
        let mut all = MatMut::dense(scores, rows, visible);
        let mut accumulate = Accumulate::Replace;
        for (keys, cols) in [(self.k, 0..own), (self.shared, own..self.q.cols())] {
            if cols.is_empty() {
                continue;
            }
            let q = self.q.block(tile.queries.clone(), cols);
            for (seen, columns, _) in tile.parts() {
                let keys = keys.block(seen, 0..keys.cols());
                let scores = all.block(0..rows, columns);
                gemm(scores, q, keys.t(), self.scale, accumulate);
            }
            accumulate = Accumulate::Add;
        }
        for (i, scores) in scores.chunks_mut(visible).enumerate() {
            scores[visible - rows + i + 1..].fill(f32::NEG_INFINITY);
        }
    }
}

/// q `[batch, seq, heads, dim]` → out `[batch, seq, heads, v_dim]` and the log-sum-exp of every row of scores
/// `[batch, heads, seq]`.
pub(crate) fn forward(
    q: &[f32],
    context: KvInputs<'_>,
    scale: f32,
    shape: AttentionShape,
    segments: &Segments,
) -> (Vec<f32>, Vec<f32>) {
    let (place, heads) = (shape.out(), shape.q.heads);
    let mut out = zeros(shape.batch * shape.seq * heads * place.dim);
    let mut lse = vec![0.0; shape.batch * heads * shape.seq];
    let all = place.all(&mut out, shape.batch * shape.seq);
    let lses = MatMut::dense(&mut lse, shape.batch * heads, shape.seq);
    let tiles = shape.tiles(segments);
    let head = |task: usize| {
        let (row, head) = (task / heads, task % heads);
        let inputs = AttentionHead::new(q, context, scale, shape, [row, head]);
        // SAFETY: a task writes one head of one sequence.
        #[expect(unsafe_code, reason = "disjoint blocks of two outputs")]
        let (out, mut lse) = unsafe {
            (
                place.part(&all, shape.seq, row, head),
                lses.part(task..task + 1, 0..shape.seq),
            )
        };
        forward_head(inputs, &tiles[row], out, lse.values());
    };
    if shape.seq <= MAX_GEMV_ROWS {
        spin_for(shape.batch * heads, head);
    } else {
        parallel_for(shape.batch * heads, head);
    }
    (out, lse)
}

fn forward_head(
    head: AttentionHead<'_>,
    tiles: &[QueryTile],
    mut out: MatMut<'_>,
    lse: &mut [f32],
) {
    let v_dim = head.v.cols();
    for tile in tiles {
        let (queries, rows, visible) = (tile.queries.clone(), tile.queries.len(), tile.n_keys());
        with_scratch(rows * visible, |scores| {
            head.scores(tile, scores);
            for (scores, lse) in scores.chunks_mut(visible).zip(&mut lse[queries.clone()]) {
                *lse = softmax(scores);
            }
            let all = Mat::dense(scores, rows, visible);
            for (seen, columns, accumulate) in tile.parts() {
                let out = out.block(queries.clone(), 0..v_dim);
                let (scores, v) = (all.block(0..rows, columns), head.v.block(seen, 0..v_dim));
                gemm(out, scores, v, 1.0, accumulate);
            }
        });
    }
}

/// Softmax in place; returns the log-sum-exp.
fn softmax(scores: &mut [f32]) -> f32 {
    let max = exp::max(scores);
    let sum = exp::exp_shifted(scores, max);
    exp::scale(scores, 1.0 / sum);
    max + sum.ln()
}

/// The tensors saved for the backward pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SavedAttention<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) context: KvInputs<'a>,
    pub(crate) out: &'a [f32],
    pub(crate) lse: &'a [f32],
}

/// Gradients of keys and values, in the layout of their tensors; the backward pass adds to them.
#[derive(Debug)]
pub(crate) enum KvGrads<'a> {
    /// Keys and values in two tensors.
    Apart {
        dk: &'a mut [f32],
        dv: &'a mut [f32],
    },
    /// Both in the rows of one tensor, and the shared part of the keys in another.
    Together {
        dkv: &'a mut [f32],
        dshared: &'a mut [f32],
    },
}

/// Returns the gradient of q, and adds those of keys and values to `grads`.
pub(crate) fn backward(
    dout: &[f32],
    saved: SavedAttention<'_>,
    scale: f32,
    (shape, segments): (AttentionShape, &Segments),
    grads: KvGrads<'_>,
) -> Vec<f32> {
    let mut dq = zeros(saved.q.len());
    let dq_all = shape.q.all(&mut dq, shape.batch * shape.seq);
    let kv_rows = shape.batch * shape.kv_seq;
    let (kv_heads, group) = (shape.k.heads, shape.q.heads / shape.k.heads);
    let mut nothing: [f32; 0] = [];
    let (dk_all, dv_all, dshared) = match grads {
        KvGrads::Apart { dk, dv } => (
            shape.k.all(dk, kv_rows),
            shape.v.all(dv, kv_rows),
            &mut nothing[..],
        ),
        KvGrads::Together { dkv, dshared } => {
            let all = shape.k.all(dkv, kv_rows);
            // SAFETY: keys and values are different columns.
            #[expect(
                unsafe_code,
                reason = "two views of one tensor, written in different columns"
            )]
            let again = unsafe { all.part(0..kv_rows, 0..all.cols()) };
            (all, again, dshared)
        }
    };
    // Every key head adds to the shared part, so each has a sum of its own; at the end these are added in order.
    let shared = HeadLayout::whole(kv_heads, shape.shared.dim);
    let mut partial = zeros(kv_rows * kv_heads * shared.dim);
    let partial_all = shared.all(&mut partial, kv_rows);
    let tiles = shape.tiles(segments);
    (0..shape.batch * kv_heads)
        .into_par_iter()
        .with_max_len(1)
        .for_each(|task| {
            let (row, kv_head) = (task / kv_heads, task % kv_heads);
            // SAFETY: a task writes the columns of its key head, and of the query heads that share it, in the rows of
            // its sequence.
            #[expect(unsafe_code, reason = "disjoint blocks of four outputs")]
            let [mut dk, mut dv, mut dshared] = unsafe {
                [
                    (shape.k, &dk_all),
                    (shape.v, &dv_all),
                    (shared, &partial_all),
                ]
                .map(|(place, all)| place.part(all, shape.kv_seq, row, kv_head))
            };
            for head in kv_head * group..(kv_head + 1) * group {
                let inputs = AttentionHead::new(saved.q, saved.context, scale, shape, [row, head]);
                let place = shape.out();
                let outputs = HeadOutputs {
                    out: place.of(saved.out, shape.seq, row, head),
                    dout: place.of(dout, shape.seq, row, head),
                    lse: &saved.lse[(row * shape.q.heads + head) * shape.seq..][..shape.seq],
                };
                // SAFETY: as above.
                #[expect(unsafe_code, reason = "disjoint blocks of four outputs")]
                let dq = unsafe { shape.q.part(&dq_all, shape.seq, row, head) };
                let keys = 0..shape.kv_seq;
                let [dk, dv, dshared] = [&mut dk, &mut dv, &mut dshared].map(|d| {
                    let cols = 0..d.cols();
                    d.block(keys.clone(), cols)
                });
                backward_head(inputs, outputs, &tiles[row], [dq, dk, dv, dshared]);
            }
        });
    add_partial(dshared, &partial, shape.shared, shared);
    dq
}

/// Adds the key heads' parts of the shared gradient, in order.
fn add_partial(dshared: &mut [f32], partial: &[f32], to: HeadLayout, from: HeadLayout) {
    if from.dim == 0 {
        return;
    }
    for (row, partial) in dshared
        .chunks_mut(to.width)
        .zip(partial.chunks(from.heads * from.dim))
    {
        for part in partial.chunks(from.dim) {
            row[to.cols(0)]
                .iter_mut()
                .zip(part)
                .for_each(|(sum, part)| *sum += part);
        }
    }
}

/// The output of one head, and its gradient.
#[derive(Clone, Copy)]
struct HeadOutputs<'a> {
    out: Mat<'a>,
    dout: Mat<'a>,
    lse: &'a [f32],
}

/// Adds one head's gradients to `[dq, dk, dv, dshared]`.
fn backward_head(
    head: AttentionHead<'_>,
    outputs: HeadOutputs<'_>,
    tiles: &[QueryTile],
    grads: [MatMut<'_>; 4],
) {
    let [mut dq, mut dk, mut dv, mut dshared] = grads;
    let (own, dim, v_dim) = (head.k.cols(), head.q.cols(), head.v.cols());
    for tile in tiles {
        let (queries, rows, visible) = (tile.queries.clone(), tile.queries.len(), tile.n_keys());
        let dout = outputs.dout.block(queries.clone(), 0..v_dim);
        with_scratch(2 * rows * visible, |scratch| {
            let (p, ds) = scratch.split_at_mut(rows * visible);
            head.scores(tile, p);
            for (p, lse) in p.chunks_mut(visible).zip(&outputs.lse[queries.clone()]) {
                exp::exp_shifted(p, *lse);
            }
            let mut dp = MatMut::dense(ds, rows, visible);
            for (seen, columns, _) in tile.parts() {
                let (v, dp) = (head.v.block(seen, 0..v_dim), dp.block(0..rows, columns));
                gemm(dp, dout, v.t(), 1.0, Accumulate::Replace);
            }
            for (i, (ds, p)) in ds.chunks_mut(visible).zip(p.chunks(visible)).enumerate() {
                let at = queries.start + i;
                score_gradients(ds, p, outputs.dout.row(at), outputs.out.row(at));
            }
            let (p, ds) = (Mat::dense(p, rows, visible), Mat::dense(ds, rows, visible));
            for (seen, columns, accumulate) in tile.parts() {
                let [p, ds] = [p, ds].map(|of_all| of_all.block(0..rows, columns.clone()));
                let dv = dv.block(seen.clone(), 0..v_dim);
                gemm(dv, p.t(), dout, 1.0, Accumulate::Add);
                for (keys, dkeys, cols) in [
                    (head.k, &mut dk, 0..own),
                    (head.shared, &mut dshared, own..dim),
                ] {
                    let q = head.q.block(queries.clone(), cols.clone());
                    let keys = keys.block(seen.clone(), 0..cols.len());
                    let dkeys = dkeys.block(seen.clone(), 0..cols.len());
                    let dq = dq.block(queries.clone(), cols);
                    gemm(dq, ds, keys, head.scale, accumulate);
                    gemm(dkeys, ds.t(), q, head.scale, Accumulate::Add);
                }
            }
        });
    }
}

/// Replaces a row of the probabilities' gradients by those of the scores: `p · (dp − ⟨dout, out⟩)`.
fn score_gradients(ds: &mut [f32], p: &[f32], dout: &[f32], out: &[f32]) {
    let delta = dot(dout, out);
    ds.iter_mut()
        .zip(p)
        .for_each(|(ds, p)| *ds = p * (*ds - delta));
}
