//! Attention of a few queries over a KV cache, for decoding: over latents that all heads share, whose first features
//! are the values (the absorbed form), and over keys and values that heads share in groups.
//!
//! The queries of all heads that share keys are rows of one product, so a tile of the cache is read once for all of
//! them; if keys and values are the same, twice, but the second time from the CPU's cache. It is decoded in registers.
//! Each tile gives unnormalized sums with the largest score they are relative to; at the end, sums are brought to a
//! common maximum and added in order. Tiles are the same for any number of threads and any data type of the cache, and
//! a query's result has the bits it has without the queries after it.
//!
//! Source: Flash-Decoding, <https://crfm.stanford.edu/2023/10/12/flashdecoding.html>.

use std::ops::Range;

use super::kv::KvRows;
use crate::memory::{Mat, MatMut, with_scratch};
use crate::simd::exp;
use crate::threads::{Pieces, spin_for};

/// Keys per tile: those of DeepSeek V3 are 144 KiB in f32, a part of the second-level cache.
const KEYS: usize = 64;
/// Values per task in [`finish`].
const VALUES: usize = 1 << 13;

/// The last queries of a sequence, and all its keys and values.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DecodeQueries<'a> {
    /// `[seq · heads, dim]`.
    pub(crate) queries: Mat<'a>,
    pub(crate) seq: usize,
    pub(crate) keys: KvRows<'a>,
    /// `None` if values are the first features of their keys.
    pub(crate) values: Option<KvRows<'a>>,
    /// Features of a value.
    pub(crate) v_dim: usize,
    /// The scale of the scores.
    pub(crate) scale: f32,
}

impl DecodeQueries<'_> {
    fn heads(&self) -> usize {
        self.queries.rows() / self.seq.max(1)
    }

    /// The number of heads that share keys.
    fn group(&self) -> usize {
        self.heads() / self.keys.heads.max(1)
    }

    /// The indices of the queries that share a head's keys, position by position.
    fn queries_of(&self, kv_head: usize) -> Vec<usize> {
        let (heads, group) = (self.heads(), self.group());
        let first = |at: usize| at * heads + kv_head * group;
        (0..self.seq)
            .flat_map(|at| first(at)..first(at) + group)
            .collect()
    }
}

/// Returns `[seq · heads, v_dim]`.
pub(crate) fn forward(sequence: DecodeQueries<'_>) -> Vec<f32> {
    let (v_dim, kv_heads) = (sequence.v_dim, sequence.keys.heads);
    let rows = sequence.seq * sequence.group();
    let pieces = Pieces::new(sequence.keys.len, KEYS);
    let tasks = pieces.len() * kv_heads;
    let mut out = vec![0.0; sequence.queries.rows() * v_dim];
    // A row of sums, its largest score and the sum of its exponentials.
    let width = v_dim + 2;
    with_scratch(tasks * rows * width, |partial| {
        let all = MatMut::dense(partial, tasks * rows, width);
        spin_for(tasks, |i| {
            // SAFETY: tasks write different rows.
            #[expect(unsafe_code, reason = "disjoint rows of the sums")]
            let sums = unsafe { all.part(i * rows..(i + 1) * rows, 0..width) };
            attend(&sequence, pieces.get(i / kv_heads), i % kv_heads, sums);
        });
        finish(&sequence, partial, &mut out);
    });
    out
}

/// The unnormalized sums over a tile of a head's keys, `[seq · group, v_dim + 2]`.
fn attend(sequence: &DecodeQueries<'_>, keys: Range<usize>, kv_head: usize, mut sums: MatMut<'_>) {
    let (queries, v_dim) = (sequence.queries_of(kv_head), sequence.v_dim);
    let (rows, n, group) = (queries.len(), keys.len(), sequence.group());
    let earlier = sequence.keys.len - sequence.seq;
    let values = sequence.values.unwrap_or(sequence.keys);
    let values = values.tile(keys.clone(), kv_head);
    with_scratch(rows * n, |scores| {
        let all = MatMut::dense(scores, rows, n);
        let of_keys = sequence.keys.tile(keys.clone(), kv_head);
        of_keys.scores(sequence.queries, &queries, all);
        for (row, scores) in scores.chunks_mut(n).enumerate() {
            let visible = earlier + row / group + 1;
            let (seen, later) = scores.split_at_mut(visible.saturating_sub(keys.start).min(n));
            exp::scale(seen, sequence.scale);
            let largest = exp::max(seen);
            let sum = exp::exp_shifted(seen, largest);
            // Later keys get the weight zero, which does not change a sum.
            later.fill(0.0);
            sums.row(row)[v_dim..].copy_from_slice(&[largest, sum]);
        }
        let scores = Mat::dense(scores, rows, n);
        values.sum(scores, sums.block(0..rows, 0..v_dim));
    });
}

/// Combines the sums of all tiles, `[pieces, kv_heads, seq, group, v_dim + 2]` → `[seq, heads, v_dim]`.
fn finish(sequence: &DecodeQueries<'_>, partial: &[f32], out: &mut [f32]) {
    let (v_dim, heads, group) = (sequence.v_dim, sequence.heads(), sequence.group());
    let (rows, width) = (sequence.queries.rows(), v_dim + 2);
    let pieces = partial.len() / (rows * width).max(1);
    let out = MatMut::dense(out, rows, v_dim);
    let rows_of_task = (VALUES / (pieces * v_dim).max(1)).max(1);
    Pieces::new(rows, rows_of_task).spin_for(|tile| {
        // SAFETY: tasks write different rows.
        #[expect(unsafe_code, reason = "disjoint rows of the output")]
        let mut out = unsafe { out.part(tile.clone(), 0..v_dim) };
        for (i, row) in tile.enumerate() {
            let (at, head) = (row / heads, row % heads);
            let left = (head / group * sequence.seq + at) * group + head % group;
            let of_piece = |piece: usize| &partial[(piece * rows + left) * width..][..width];
            let parts = || (0..pieces).map(of_piece);
            let largest = parts().fold(f32::NEG_INFINITY, |largest, part| largest.max(part[v_dim]));
            let factor = |part: &[f32]| exp::exp::<false>(part[v_dim] - largest);
            let sum: f32 = parts().map(|part| factor(part) * part[v_dim + 1]).sum();
            let out = out.row(i);
            for part in parts() {
                let factor = factor(part) / sum;
                let values = out.iter_mut().zip(part);
                values.for_each(|(out, value)| *out += factor * value);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::CacheType;
    use crate::testing::noise;

    const DIM: usize = 24;
    const V_DIM: usize = 21;

    /// Queries of 3 heads, written out in f64.
    fn expected(queries: &[f32], latents: &[f32]) -> Vec<f64> {
        let keys: Vec<&[f32]> = latents.chunks(DIM).collect();
        let of_query = |query: &[f32]| {
            let score = |key: &&[f32]| -> f64 {
                let products = query.iter().zip(*key);
                0.7 * products.map(|(q, k)| f64::from(q * k)).sum::<f64>()
            };
            let exps: Vec<f64> = keys.iter().map(|key| score(key).exp()).collect();
            let sum: f64 = exps.iter().sum();
            let value = |col: usize| {
                let values = keys.iter().zip(&exps);
                values
                    .map(|(key, exp)| f64::from(key[col]) * exp)
                    .sum::<f64>()
                    / sum
            };
            (0..V_DIM).map(value).collect::<Vec<_>>()
        };
        queries.chunks(DIM).flat_map(of_query).collect()
    }

    fn run(queries: &[f32], latents: &[f32], seq: usize) -> Vec<f32> {
        let bytes: Vec<u8> = latents.iter().flat_map(|v| v.to_le_bytes()).collect();
        let keys = KvRows {
            form: CacheType::F32,
            bytes: &bytes,
            len: latents.len() / DIM,
            heads: 1,
            width: DIM,
        };
        forward(DecodeQueries {
            queries: Mat::dense(queries, queries.len() / DIM, DIM),
            seq,
            keys,
            values: None,
            v_dim: V_DIM,
            scale: 0.7,
        })
    }

    #[test]
    fn sums_are_those_written_out_for_any_length() {
        for kv_seq in [1, 2, 63, 64, 65, 200, 1100] {
            let (queries, latents) = (noise(3 * DIM, 1), noise(kv_seq * DIM, 2));
            let found = run(&queries, &latents, 1);
            for (found, expected) in found.iter().zip(expected(&queries, &latents)) {
                assert!(
                    (f64::from(*found) - expected).abs() < 1e-5,
                    "{found} {expected}"
                );
            }
        }
    }

    #[test]
    fn a_query_has_the_bits_it_has_alone() {
        for kv_seq in [5, 64, 66, 67, 130] {
            let (queries, latents) = (noise(5 * 3 * DIM, 1), noise(kv_seq * DIM, 2));
            let together = run(&queries, &latents, 5);
            for query in 0..5 {
                let seen = &latents[..(kv_seq - 4 + query) * DIM];
                let alone = run(&queries[query * 3 * DIM..][..3 * DIM], seen, 1);
                let found = &together[query * alone.len()..][..alone.len()];
                let same = alone
                    .iter()
                    .zip(found)
                    .all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "query {query} of {kv_seq}");
            }
        }
    }

    #[test]
    fn scores_far_apart_stay_finite() {
        // The first piece's scores lie so far below the second's that they count for nothing.
        let mut latents = vec![-1.0; 64 * DIM];
        latents.extend(vec![1.0; 10 * DIM]);
        let queries = vec![60.0; DIM];
        let found = run(&queries, &latents, 1);
        assert!(
            found.iter().all(|value| (value - 1.0).abs() < 1e-6),
            "{found:?}"
        );
    }
}
