//! Causal attention in tiles: the scores of 64 queries against the keys they may see, never the whole square.
//!
//! One kernel serves all forms. Heads may share keys and values in groups (the distills); with one key head whose
//! values are a prefix of its keys it is the absorbed form of latent attention. Queries are the last `seq`
//! positions of the `kv_seq` keys: query `i` sees keys up to `kv_seq − seq + i`.
//!
//! Backward recomputes the scores from the saved log-sum-exp of every row.
//!
//! Source of the recomputation: FlashAttention-2, arXiv:2307.08691, section 3.1; without its online softmax, since
//! a tile's whole row of scores fits in cache here.

use rayon::prelude::*;

use crate::gemm::with_scratch;
use crate::strided::{Mat, MatMut, Write, gemm};

/// Queries per tile.
const TILE_QUERIES: usize = 64;

/// The sizes of one call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) batch: usize,
    pub(crate) seq: usize,
    pub(crate) kv_seq: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    /// Width of a query and of a key.
    pub(crate) dim: usize,
    /// Width of a value.
    pub(crate) v_dim: usize,
    /// Distance between two values of a head that follow one another.
    pub(crate) v_stride: usize,
}

impl Shape {
    /// Keys that the queries of a tile may see, all together.
    fn visible(&self, tile: &std::ops::Range<usize>) -> usize {
        self.kv_seq - self.seq + tile.end
    }

    /// Head `head` of sequence `row`, of a tensor `[batch, len, heads, dim]`.
    fn head<'a>(
        &self,
        x: &'a [f32],
        row: usize,
        head: usize,
        [len, heads, dim]: [usize; 3],
    ) -> Mat<'a> {
        let rows = &x[row * len * heads * dim..(row + 1) * len * heads * dim];
        Mat::new(&rows[(head * dim).min(rows.len())..], len, dim, heads * dim)
    }

    fn q<'a>(&self, q: &'a [f32], row: usize, head: usize) -> Mat<'a> {
        self.head(q, row, head, [self.seq, self.heads, self.dim])
    }

    fn k<'a>(&self, k: &'a [f32], row: usize, kv_head: usize) -> Mat<'a> {
        self.head(k, row, kv_head, [self.kv_seq, self.kv_heads, self.dim])
    }

    fn v<'a>(&self, v: &'a [f32], row: usize, kv_head: usize) -> Mat<'a> {
        let rows = &v[row * self.kv_seq * self.v_stride..(row + 1) * self.kv_seq * self.v_stride];
        Mat::new(
            &rows[(kv_head * self.v_dim).min(rows.len())..],
            self.kv_seq,
            self.v_dim,
            self.v_stride,
        )
    }

    fn o<'a>(&self, o: &'a [f32], row: usize, head: usize) -> Mat<'a> {
        self.head(o, row, head, [self.seq, self.heads, self.v_dim])
    }

    fn tiles(&self) -> impl Iterator<Item = std::ops::Range<usize>> + Clone + use<> {
        crate::gemm::tiles(0..self.seq, TILE_QUERIES)
    }
}

/// q `[batch, seq, heads, dim]`, k `[batch, kv_seq, kv_heads, dim]`, v `[…, v_dim]` → out `[batch, seq, heads, v_dim]`
/// and the log-sum-exp of every row of scores `[batch, heads, seq]`.
pub(crate) fn forward(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    scale: f32,
    shape: Shape,
) -> (Vec<f32>, Vec<f32>) {
    let Shape {
        batch,
        seq,
        heads,
        v_dim,
        ..
    } = shape;
    let mut out = vec![0.0; batch * seq * heads * v_dim];
    let mut lse = vec![0.0; batch * heads * seq];
    let all = MatMut::dense(&mut out, batch * seq, heads * v_dim);
    lse.par_chunks_mut(seq.max(1))
        .enumerate()
        .for_each(|(task, lse)| {
            let (row, head) = (task / heads, task % heads);
            let kv_head = head / (heads / shape.kv_heads);
            let (q, k, v) = (
                shape.q(q, row, head),
                shape.k(k, row, kv_head),
                shape.v(v, row, kv_head),
            );
            for tile in shape.tiles() {
                let visible = shape.visible(&tile);
                // SAFETY: a task writes the columns of its head in the rows of its sequence.
                #[expect(unsafe_code, reason = "disjoint blocks of one output")]
                let out = unsafe {
                    all.part(
                        row * seq + tile.start..row * seq + tile.end,
                        head * v_dim..(head + 1) * v_dim,
                    )
                };
                with_scratch(tile.len() * visible, |scores| {
                    masked_scores(
                        scores,
                        q.block(tile.clone(), 0..shape.dim),
                        k,
                        scale,
                        visible,
                    );
                    for (scores, lse) in scores.chunks_mut(visible).zip(&mut lse[tile.clone()]) {
                        *lse = softmax(scores);
                    }
                    gemm(
                        out,
                        Mat::dense(scores, tile.len(), visible),
                        v.block(0..visible, 0..v_dim),
                        1.0,
                        Write::Replace,
                    );
                });
            }
        });
    (out, lse)
}

/// Scores of a tile of queries, −∞ where the key lies after the query.
fn masked_scores(scores: &mut [f32], q: Mat<'_>, k: Mat<'_>, scale: f32, visible: usize) {
    let rows = q.rows();
    gemm(
        MatMut::dense(scores, rows, visible),
        q,
        k.block(0..visible, 0..k.cols()).t(),
        scale,
        Write::Replace,
    );
    for (i, scores) in scores.chunks_mut(visible).enumerate() {
        scores[visible - rows + i + 1..].fill(f32::NEG_INFINITY);
    }
}

/// Softmax in place; returns the log-sum-exp.
fn softmax(scores: &mut [f32]) -> f32 {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
        sum += *score;
    }
    scores.iter_mut().for_each(|score| *score /= sum);
    max + sum.ln()
}

/// What the backward pass reads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Saved<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    pub(crate) out: &'a [f32],
    pub(crate) lse: &'a [f32],
}

/// Gradients of q, k and v, in their shapes.
pub(crate) fn backward(dout: &[f32], saved: Saved<'_>, scale: f32, shape: Shape) -> [Vec<f32>; 3] {
    let Shape {
        batch,
        seq,
        kv_seq,
        heads,
        kv_heads,
        dim,
        v_dim,
        ..
    } = shape;
    let mut dq = vec![0.0; saved.q.len()];
    let mut dk = vec![0.0; saved.k.len()];
    let mut dv = vec![0.0; saved.v.len()];
    let dq_all = MatMut::dense(&mut dq, batch * seq, heads * dim);
    let dk_all = MatMut::dense(&mut dk, batch * kv_seq, kv_heads * dim);
    let dv_all = MatMut::dense(&mut dv, batch * kv_seq, kv_heads * v_dim);
    (0..batch * kv_heads).into_par_iter().for_each(|task| {
        let (row, kv_head) = (task / kv_heads, task % kv_heads);
        let (rows, kv_rows) = (row * seq..(row + 1) * seq, row * kv_seq..(row + 1) * kv_seq);
        // SAFETY: a task writes the columns of its key head, and of the query heads that share it, in the rows of
        // its sequence.
        #[expect(unsafe_code, reason = "disjoint blocks of three outputs")]
        let (mut dk, mut dv) = unsafe {
            (
                dk_all.part(kv_rows.clone(), kv_head * dim..(kv_head + 1) * dim),
                dv_all.part(kv_rows, kv_head * v_dim..(kv_head + 1) * v_dim),
            )
        };
        let group = heads / kv_heads;
        for head in kv_head * group..(kv_head + 1) * group {
            // SAFETY: as above.
            #[expect(unsafe_code, reason = "disjoint blocks of three outputs")]
            let dq = unsafe { dq_all.part(rows.clone(), head * dim..(head + 1) * dim) };
            backward_head(
                dout,
                saved,
                scale,
                (shape, row, head),
                [
                    dq,
                    dk.block(0..kv_seq, 0..dim),
                    dv.block(0..kv_seq, 0..v_dim),
                ],
            );
        }
    });
    [dq, dk, dv]
}

/// Adds one head's part to `[dq, dk, dv]`.
fn backward_head(
    dout: &[f32],
    saved: Saved<'_>,
    scale: f32,
    (shape, row, head): (Shape, usize, usize),
    grads: [MatMut<'_>; 3],
) {
    let [mut dq, mut dk, mut dv] = grads;
    let kv_head = head / (shape.heads / shape.kv_heads);
    let (q, k, v) = (
        shape.q(saved.q, row, head),
        shape.k(saved.k, row, kv_head),
        shape.v(saved.v, row, kv_head),
    );
    let (dout, out) = (shape.o(dout, row, head), shape.o(saved.out, row, head));
    let lse = &saved.lse[(row * shape.heads + head) * shape.seq..][..shape.seq];
    for tile in shape.tiles() {
        let visible = shape.visible(&tile);
        let (rows, size) = (tile.len(), tile.len() * visible);
        let (q, dout_tile) = (
            q.block(tile.clone(), 0..shape.dim),
            dout.block(tile.clone(), 0..shape.v_dim),
        );
        with_scratch(2 * size, |scratch| {
            let (p, ds) = scratch.split_at_mut(size);
            masked_scores(p, q, k, scale, visible);
            for (p, lse) in p.chunks_mut(visible).zip(&lse[tile.clone()]) {
                p.iter_mut().for_each(|p| *p = (*p - lse).exp());
            }
            gemm(
                MatMut::dense(ds, rows, visible),
                dout_tile,
                v.block(0..visible, 0..shape.v_dim).t(),
                1.0,
                Write::Replace,
            );
            for (i, (ds, p)) in ds.chunks_mut(visible).zip(p.chunks(visible)).enumerate() {
                let (dout, out) = (dout.row(tile.start + i), out.row(tile.start + i));
                let delta: f32 = dout.iter().zip(out).map(|(dout, out)| dout * out).sum();
                ds.iter_mut()
                    .zip(p)
                    .for_each(|(ds, p)| *ds = p * (*ds - delta));
            }
            let (p, ds) = (Mat::dense(p, rows, visible), Mat::dense(ds, rows, visible));
            gemm(
                dq.block(tile.clone(), 0..shape.dim),
                ds,
                k.block(0..visible, 0..shape.dim),
                scale,
                Write::Replace,
            );
            gemm(
                dk.block(0..visible, 0..shape.dim),
                ds.t(),
                q,
                scale,
                Write::Add,
            );
            gemm(
                dv.block(0..visible, 0..shape.v_dim),
                p.t(),
                dout_tile,
                1.0,
                Write::Add,
            );
        });
    }
}
