//! Causal attention over whole sequences, a tile of queries at a time; see [`crate::backend::attention`].

use std::ops::Range;

use burn::backend::tensor::{Device, FloatTensor, IntTensor};

use crate::backend::gradients::Gradients;
use crate::backend::plain::ints::{Ints, Mask};
use crate::backend::plain::reals::Reals;
use crate::backend::plain::sums::parts;
use crate::backend::traits::Kernels;
use crate::ops::attention::Segments;

/// Queries per tile.
const QUERY_TILE: usize = 512;
/// The score of a key that a query does not see: its exponential is 0 next to any other.
const UNSEEN: f32 = -1e30;

/// The sizes of one call, and who sees whom.
struct Shape {
    batch: usize,
    seq: usize,
    kv_seq: usize,
    heads: usize,
    kv_heads: usize,
    /// The query from which on a key is not seen, `[batch][kv_seq]`, among all keys.
    ends: Vec<Vec<usize>>,
    segments: Segments,
    tile: usize,
}

/// A range of queries, and of the keys that they see together.
type Tile = (Range<usize>, Range<usize>);

impl Shape {
    fn new<B: Kernels>([q, k]: [&Reals<B>; 2], segments: &Segments, tile: usize) -> Self {
        let ([batch, seq, heads, _], [_, kv_seq, kv_heads, _]) = (q.dims(), k.dims());
        Self {
            batch,
            seq,
            kv_seq,
            heads,
            kv_heads,
            ends: (0..batch).map(|row| segments.ends(row, kv_seq)).collect(),
            segments: segments.clone(),
            tile,
        }
    }

    fn tiles(&self) -> impl Iterator<Item = Tile> {
        let earlier = self.kv_seq - self.seq;
        parts(self.seq, self.tile).map(move |tile| {
            let query = earlier + tile.start;
            let first = |ends: &Vec<usize>| ends.iter().position(|end| *end > query).unwrap_or(0);
            let keys = self.ends.iter().map(first).min().unwrap_or(0)..earlier + tile.end;
            (tile, keys)
        })
    }

    /// `[batch, len, heads, dim]` → `[batch · kv_heads, group · len, dim]` of a range of positions.
    fn rows<B: Kernels>(&self, x: &Reals<B>, range: Range<usize>) -> Reals<B> {
        let ([batch, _, heads, dim], len) = (x.dims(), range.len());
        let group = heads / self.kv_heads;
        let x = x.clone().narrow(1, range).permute(&[0, 2, 1, 3]);
        x.reshape(&[batch * self.kv_heads, group * len, dim])
    }

    /// The inverse of [`Self::rows`] for a whole range of `len` positions.
    fn positions<B: Kernels>(&self, rows: Reals<B>, len: usize) -> Reals<B> {
        let [_, all, dim] = rows.dims();
        let heads = self.kv_heads * (all / len.max(1));
        let rows = rows.reshape(&[self.batch, heads, len, dim]);
        rows.permute(&[0, 2, 1, 3])
    }

    /// The log-sum-exps of a tile, `[batch, heads, seq]` → `[batch · kv_heads, group · len, 1]`.
    fn lse_rows<B: Kernels>(&self, lse: &Reals<B>, range: Range<usize>) -> Reals<B> {
        let rows = [
            self.batch * self.kv_heads,
            self.heads / self.kv_heads * range.len(),
            1,
        ];
        lse.clone().narrow(2, range).reshape(&rows)
    }

    /// Which keys of a tile its queries do not see, `[batch, 1, queries, keys]`: later ones, and those of sequences
    /// that they do not continue.
    fn unseen<B: Kernels>(&self, (tile, keys): &Tile, like: &Reals<B>) -> Mask<B> {
        let (device, n, earlier) = (like.device(), tile.len(), self.kv_seq - self.seq);
        let shape = [self.batch, 1, n, keys.len()];
        let last = Ints::count(n, &device).plus((earlier + tile.start) as i32);
        let key = Ints::count(keys.len(), &device).plus(keys.start as i32);
        let key = key.reshape(&[1, 1, 1, keys.len()]);
        let last = last.reshape(&[1, 1, n, 1]);
        let is_later = last.clone().lower(key).expand(&shape);
        if self.segments.are_whole() {
            return is_later;
        }
        let ends = self.key_ends(&device).narrow(3, keys.clone());
        let is_seen = last.lower(ends).expand(&shape);
        is_seen.not().or(is_later)
    }

    /// The query from which on each key is not seen, `[batch, 1, 1, kv_seq]`: uploaded once, for all layers of a pass.
    fn key_ends<B: Kernels>(&self, device: &Device<B>) -> Ints<B> {
        let upload = || {
            let ends = self.ends.iter().flatten().map(|end| *end as i32);
            Ints::<B>::upload(ends.collect(), &[self.batch, 1, 1, self.kv_seq], device)
                .into_tensor()
        };
        Ints::new(self.segments.uploaded::<IntTensor<B>>(upload))
    }
}

/// The scaled scores of a tile, `[batch · kv_heads, group · queries, keys]`.
fn scores<B: Kernels>(shape: &Shape, inputs: [&Reals<B>; 2], tile: &Tile, scale: f32) -> Reals<B> {
    let [q, k] = inputs;
    let (n, seen) = (tile.0.len(), tile.1.len());
    let scores = shape
        .rows(q, tile.0.clone())
        .matmul_t(shape.rows(k, tile.1.clone()))
        * scale;
    let rows: [usize; 3] = scores.dims();
    let scores = scores.reshape(&[shape.batch, shape.heads, n, seen]);
    let unseen = shape.unseen(tile, &scores);
    scores.filled(unseen, UNSEEN).reshape(&rows)
}

/// Output `[batch, seq, heads, v_dim]` and log-sum-exp of every row of scores `[batch, heads, seq]`.
pub(crate) fn causal_attention<B: Kernels>(
    inputs: [FloatTensor<B>; 3],
    scale: f32,
    segments: &Segments,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let inputs = inputs.map(Reals::<B>::new);
    let (out, lse) = attend(&inputs, scale, segments, QUERY_TILE);
    (out.into_tensor(), lse.into_tensor())
}

/// [`causal_attention`] in tiles of a size.
pub(super) fn attend<B: Kernels>(
    [q, k, v]: &[Reals<B>; 3],
    scale: f32,
    segments: &Segments,
    tile: usize,
) -> (Reals<B>, Reals<B>) {
    let shape = &Shape::new([q, k], segments, tile);
    let [.., v_dim] = v.dims::<4>();
    let (mut outs, mut lses) = (vec![], vec![]);
    for tile in shape.tiles() {
        let n = tile.0.len();
        let scores = scores(shape, [q, k], &tile, scale);
        let max = scores.clone().max(2);
        let exps = (scores - max.clone()).exp();
        let sum = exps.clone().sum(2);
        let out = exps.matmul(shape.rows(v, tile.1)) / sum.clone();
        outs.push(shape.positions(out, n));
        lses.push((max + sum.log()).reshape(&[shape.batch, shape.heads, n]));
    }
    if outs.is_empty() {
        let (batch, heads, device) = (shape.batch, shape.heads, q.device());
        let out = Reals::zeros(&[batch, 0, heads, v_dim], &device);
        return (out, Reals::zeros(&[batch, heads, 0], &device));
    }
    (Reals::cat(outs, 1), Reals::cat(lses, 2))
}

/// Gradients of q, k and v; `saved` is q, k, v, the output and the log-sum-exp.
pub(crate) fn attention_grads<B: Gradients>(
    dout: FloatTensor<B>,
    saved: [FloatTensor<B>; 5],
    scale: f32,
    segments: &Segments,
) -> [FloatTensor<B>; 3] {
    let saved = saved.map(Reals::<B>::new);
    let grads = backward(Reals::new(dout), &saved, scale, segments, QUERY_TILE);
    grads.map(Reals::into_tensor)
}

/// With the probabilities `p`: `dv = pᵀ · dout`, `ds = p · (dout · vᵀ − ⟨dout, out⟩)`, `dq = scale · ds · k` and `dk =
/// scale · dsᵀ · q`.
///
/// In tiles of a size.
pub(super) fn backward<B: Kernels>(
    dout: Reals<B>,
    [q, k, v, out, lse]: &[Reals<B>; 5],
    scale: f32,
    segments: &Segments,
    tile: usize,
) -> [Reals<B>; 3] {
    let (shape, device) = (&Shape::new([q, k], segments, tile), q.device());
    // Keys' and values' gradients as `[batch · kv_heads, kv_seq, dim]`.
    let [mut dk, mut dv] = [k, v].map(|x| {
        let [batch, len, heads, dim] = x.dims();
        Reals::zeros(&[batch * heads, len, dim], &device)
    });
    let mut dqs = vec![];
    for tile in shape.tiles() {
        let (queries, keys) = tile.clone();
        let rows = |x: &Reals<B>| shape.rows(x, queries.clone());
        let (dout, out, q_rows) = (rows(&dout), rows(out), rows(q));
        let lse = shape.lse_rows(lse, queries.clone());
        let p = (scores(shape, [q, k], &tile, scale) - lse).exp();
        let delta = (dout.clone() * out).sum(2);
        let dp = dout.clone().matmul_t(shape.rows(v, keys.clone()));
        let ds = p.clone() * (dp - delta) * scale;
        let dq = ds.clone().matmul(shape.rows(k, keys.clone()));
        dqs.push(shape.positions(dq, queries.len()));
        dk = dk.add_at(1, keys.clone(), ds.t().matmul(q_rows));
        dv = dv.add_at(1, keys, p.t().matmul(dout));
    }
    let dq = if dqs.is_empty() {
        Reals::zeros(&q.shape(), &device)
    } else {
        Reals::cat(dqs, 1)
    };
    let [dk, dv] = [dk, dv].map(|grad| shape.positions(grad, shape.kv_seq));
    [dq, dk, dv]
}

/// The features of expanded latent attention: `own` of a key and then the values in every head's row, `shared` at the
/// end of the latents.
#[derive(Clone, Copy)]
struct Parts {
    own: usize,
    shared: usize,
}

impl Parts {
    fn new<B: Kernels>(q: &Reals<B>, kv: &Reals<B>, v_dim: usize) -> Self {
        let ([.., dim], [.., width]) = (q.dims::<4>(), kv.dims::<4>());
        let own = width - v_dim;
        Self {
            own,
            shared: dim - own,
        }
    }

    /// Keys `[batch, kv_seq, heads, dim]` and values `[batch, kv_seq, heads, v_dim]`.
    fn split<B: Kernels>(self, kv: Reals<B>, latents: Reals<B>) -> [Reals<B>; 2] {
        let ([batch, len, heads, width], [.., latent]) = (kv.dims(), latents.dims::<4>());
        let end = latents.narrow(3, latent - self.shared..latent);
        let end = end.expand(&[batch, len, heads, self.shared]);
        let own = kv.clone().narrow(3, 0..self.own);
        let keys = Reals::cat(vec![own, end], 3);
        [keys, kv.narrow(3, self.own..width)]
    }

    /// Gradients of the rows and of the latents `[batch, kv_seq, 1, latent]`.
    fn join<B: Kernels>(self, [dk, dv]: [Reals<B>; 2], latent: usize) -> [Reals<B>; 2] {
        let [batch, len, _, dim] = dk.dims();
        let own = dk.clone().narrow(3, 0..self.own);
        let end = dk.narrow(3, self.own..dim).sum(2);
        let start = Reals::zeros(&[batch, len, 1, latent - self.shared], &end.device());
        [
            Reals::cat(vec![own, dv], 3),
            Reals::cat(vec![start, end], 3),
        ]
    }
}

/// [`causal_attention`] over rows `[batch, kv_seq, heads, width]` and latents `[batch, kv_seq, 1, latent]`.
pub(crate) fn expanded_attention<B: Kernels>(
    [q, kv, latents]: [FloatTensor<B>; 3],
    v_dim: usize,
    scale: f32,
    segments: Segments,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let [rows, kv, latents] = [q.clone(), kv, latents].map(Reals::<B>::new);
    let [k, v] = Parts::new(&rows, &kv, v_dim).split(kv, latents);
    B::causal_attention(q, k.into_tensor(), v.into_tensor(), scale, segments)
}

/// Gradients of q, the rows and the latents, which are saved with the output and the log-sum-exp.
pub(crate) fn expanded_attention_grads<B: Gradients>(
    dout: FloatTensor<B>,
    [q, kv, latents, out, lse]: [FloatTensor<B>; 5],
    v_dim: usize,
    scale: f32,
    segments: &Segments,
) -> [FloatTensor<B>; 3] {
    let [rows, kv, latents] = [q.clone(), kv, latents].map(Reals::<B>::new);
    let ([.., latent], parts) = (latents.dims::<4>(), Parts::new(&rows, &kv, v_dim));
    let [k, v] = parts.split(kv, latents).map(Reals::into_tensor);
    let [dq, dk, dv] = B::attention_grads(dout, [q, k, v, out, lse], scale, segments);
    let [dkv, dlatents] = parts.join([dk, dv].map(Reals::<B>::new), latent);
    [dq, dkv.into_tensor(), dlatents.into_tensor()]
}
