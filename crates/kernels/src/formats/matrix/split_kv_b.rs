//! The `kv_b_proj` of latent attention in two parts, as llama.cpp stores it.
//!
//! For each head, `kv_b_proj` has rows that rebuild its keys and rows that rebuild its values. A GGUF stores the keys'
//! rows in a matrix of their own, transposed head by head, because decoding multiplies with them that way round. Both
//! parts may be quantized, so the transposition cannot be undone in bytes. A [`SplitKvB`] reads the parts as the one
//! matrix they were.
//!
//! Source: ggml-org/llama.cpp: conversion/deepseek.py, `attn_k_b` and `attn_v_b`.

use std::ops::Range;
use std::sync::Arc;

use super::{Format, Matrix};
use crate::error::Error;
use crate::formats::interleaved::ROWS;
use crate::memory::with_scratch;

/// The side of the squares that are transposed: whole blocks of every format whose blocks fit a head's width.
const SQUARE: usize = 32;

/// Keys and values of all heads: rows `[keys | values]` per head.
#[derive(Clone, Debug)]
pub struct SplitKvB {
    /// `[heads · rank, nope]`: the keys' rows of each head, as columns.
    keys: Arc<Matrix>,
    /// `[heads · v, rank]`.
    values: Arc<Matrix>,
    heads: usize,
    /// The row of the whole matrix at which this view starts.
    first_row: usize,
}

impl SplitKvB {
    /// # Errors
    /// If the parts do not have `heads` heads of one rank.
    pub(super) fn new(keys: Matrix, values: Matrix, heads: usize) -> Result<Self, Error> {
        let rank = values.cols();
        let fits = heads > 0
            && keys.rows() == heads.saturating_mul(rank)
            && values.rows().is_multiple_of(heads);
        if !fits {
            return Err(Error::SplitKvB {
                heads,
                keys: [keys.rows(), keys.cols()],
                values: [values.rows(), rank],
            });
        }
        Ok(Self {
            keys: keys.into(),
            values: values.into(),
            heads,
            first_row: 0,
        })
    }

    /// Number of heads.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// The rows of a head that rebuild its keys, and those that rebuild its values.
    pub fn widths(&self) -> [usize; 2] {
        [self.keys.cols(), self.values.rows() / self.heads]
    }

    /// Whether both parts are bf16.
    pub(crate) fn are_bf16(&self) -> bool {
        let parts = [&self.keys, &self.values];
        parts
            .iter()
            .all(|part| matches!(part.format(), Format::Bf16))
    }

    /// The rows of a head that rebuild its keys, transposed: `[rank, nope]`, over the stored bytes.
    ///
    /// # Panics
    /// If there is no such head.
    pub fn keys(&self, head: usize) -> Matrix {
        let rank = self.values.cols();
        self.keys.row_range(head * rank..(head + 1) * rank)
    }

    /// The rows of a head that rebuild its values: `[v, rank]`, over the stored bytes.
    ///
    /// # Panics
    /// If there is no such head.
    pub fn values(&self, head: usize) -> Matrix {
        let [_, v] = self.widths();
        self.values.row_range(head * v..(head + 1) * v)
    }

    /// The matrix with both parts replaced by `map`, if every head has whole strips.
    pub(super) fn map_stored(&self, map: &mut dyn FnMut(&Matrix) -> Matrix) -> Self {
        let [_, v] = self.widths();
        if [self.cols(), v]
            .iter()
            .any(|rows| !rows.is_multiple_of(ROWS))
        {
            return self.clone();
        }
        Self {
            keys: self.keys.map_stored(map).into(),
            values: self.values.map_stored(map).into(),
            ..*self
        }
    }

    /// Keys and values of all heads; nothing of a view that starts later.
    #[cfg(feature = "gpu")]
    pub(crate) fn parts(&self) -> Option<[&Matrix; 2]> {
        (self.first_row == 0).then_some([&self.keys, &self.values])
    }

    /// Visits both parts.
    #[cfg(feature = "gpu")]
    pub(super) fn for_each_part<E>(
        &mut self,
        visit: &mut dyn FnMut(&mut Matrix) -> Result<(), E>,
    ) -> Result<(), E> {
        visit(Arc::make_mut(&mut self.keys))?;
        visit(Arc::make_mut(&mut self.values))
    }

    pub(super) fn rows(&self) -> usize {
        self.widths().iter().sum::<usize>() * self.heads
    }

    pub(super) fn cols(&self) -> usize {
        self.values.cols()
    }

    pub(super) fn size_bytes(&self) -> usize {
        self.keys.size_bytes() + self.values.size_bytes()
    }

    /// A view that starts `row` rows later.
    pub(super) fn starting_at(&self, row: usize) -> Self {
        Self {
            first_row: self.first_row + row,
            ..self.clone()
        }
    }

    /// Decodes a tile, row-major and contiguous.
    pub(super) fn decode(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let (width, [nope, v]) = (cols.len(), self.widths());
        let (start, end) = (self.first_row + rows.start, self.first_row + rows.end);
        let mut row = start;
        while row < end {
            let (head, at) = (row / (nope + v), row % (nope + v));
            let (part, start_of_part) = if at < nope { (nope, 0) } else { (v, nope) };
            let at = at - start_of_part;
            let n = (part - at).min(end - row);
            let out = &mut out[(row - start) * width..][..n * width];
            if start_of_part == 0 {
                self.decode_keys(head, at..at + n, cols.clone(), out);
            } else {
                self.values
                    .decode(head * v + at..head * v + at + n, cols.clone(), out);
            }
            row += n;
        }
    }

    /// Decodes rows of a head that rebuild its keys: columns of the stored part.
    fn decode_keys(&self, head: usize, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let (width, first) = (cols.len(), head * self.cols());
        with_scratch(SQUARE * SQUARE, |square| {
            for line in cuts(cols.clone()) {
                for part in cuts(rows.clone()) {
                    let square = &mut square[..line.len() * part.len()];
                    let stored = first + line.start..first + line.end;
                    self.keys.decode(stored, part.clone(), square);
                    for (col, values) in line.clone().zip(square.chunks_exact(part.len())) {
                        for (row, value) in part.clone().zip(values) {
                            out[(row - rows.start) * width + col - cols.start] = *value;
                        }
                    }
                }
            }
        });
    }
}

/// Cuts a range at multiples of [`SQUARE`].
fn cuts(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let mut start = range.start;
    std::iter::from_fn(move || {
        let cut = start..range.end.min((start / SQUARE + 1) * SQUARE);
        start = cut.end;
        (!cut.is_empty()).then_some(cut)
    })
}

#[cfg(test)]
mod tests {
    use super::Format;
    use super::*;
    use crate::formats::ggml::Ggml;
    use crate::testing::{every_block_format, every_format, noise};

    /// The parts of three heads over the values of a whole: keys of width 5, values of width 4, rank 7.
    fn split(whole: &[f32]) -> [Matrix; 2] {
        let ([nope, v, rank, heads], mut keys, mut values) = ([5, 4, 7, 3], vec![], vec![]);
        for head in whole.chunks_exact((nope + v) * rank) {
            for col in 0..rank {
                keys.extend((0..nope).map(|row| head[row * rank + col]));
            }
            values.extend_from_slice(&head[nope * rank..]);
        }
        [
            Matrix::from_f32(heads * rank, nope, &keys),
            Matrix::from_f32(heads * v, rank, &values),
        ]
    }

    #[test]
    fn the_parts_are_the_whole_they_were_cut_from() {
        let whole = noise(27 * 7, 1);
        let [keys, values] = split(&whole);
        let size = keys.size_bytes() + values.size_bytes();
        let found = Matrix::from_split_kv_b(keys, values, 3).unwrap();
        assert_eq!((found.rows(), found.cols()), (27, 7));
        assert_eq!(found.size_bytes(), size);
        assert_eq!(found.to_f32(), whole);
        for (rows, cols) in [(0..27, 2..6), (3..20, 0..7), (8..10, 1..2), (6..6, 0..7)] {
            let mut tile = vec![0.0; rows.len() * cols.len()];
            found.decode(rows.clone(), cols.clone(), &mut tile);
            for (row, line) in rows.clone().zip(tile.chunks(cols.len())) {
                assert_eq!(line, &whole[row * 7..][cols.clone()], "{rows:?} {cols:?}");
            }
            // A view of rows, and one of that view's rows.
            let view = found.row_range(rows.clone());
            assert_eq!(view.to_f32(), whole[rows.start * 7..rows.end * 7]);
            if rows.len() > 2 {
                let inner = view.row_range(1..rows.len() - 1).to_f32();
                assert_eq!(inner, whole[(rows.start + 1) * 7..(rows.end - 1) * 7]);
            }
        }
        let x = noise(7, 2);
        for (row, line) in whole.chunks(7).enumerate() {
            let expected: f32 = line.iter().zip(&x).map(|(w, x)| w * x).sum();
            assert!((found.dot(row, &x) - expected).abs() < 1e-5);
        }
    }

    /// Parts in formats of their own, with rows of more than one square and none that a square fills.
    #[test]
    fn quantized_parts_decode_as_they_do_alone() {
        let (heads, rank, nope, v) = (2, 512, 96, 3);
        let bytes = vec![0x29; heads * rank * nope / 32 * 18];
        let format = Format::Ggml(Ggml::Q4_0);
        let keys = Matrix::dense(heads * rank, nope, format, bytes.into()).unwrap();
        for values in every_block_format(heads * v) {
            let whole = Matrix::from_split_kv_b(keys.clone(), values.clone(), heads).unwrap();
            let (found, keys, values) = (whole.to_f32(), keys.to_f32(), values.to_f32());
            for (row, line) in found.chunks(rank).enumerate() {
                let (head, at) = (row / (nope + v), row % (nope + v));
                let expected: Vec<f32> = if at < nope {
                    (0..rank)
                        .map(|col| keys[(head * rank + col) * nope + at])
                        .collect()
                } else {
                    values[(head * v + at - nope) * rank..][..rank].to_vec()
                };
                assert_eq!(line, expected, "row {row}");
            }
        }
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let matrix = |rows, cols| every_format(rows, cols, 3).remove(0);
        assert!(Matrix::from_split_kv_b(matrix(6, 4), matrix(8, 3), 2).is_ok());
        for (keys, values, heads) in [
            (matrix(6, 4), matrix(8, 3), 0),
            (matrix(6, 4), matrix(7, 3), 2),
            (matrix(6, 4), matrix(8, 2), 2),
        ] {
            let error = Matrix::from_split_kv_b(keys, values, heads).unwrap_err();
            assert!(error.to_string().contains("heads"), "{error}");
        }
    }
}
