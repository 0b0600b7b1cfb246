//! Products, sums and maxima of tensors, cut so that no thread of a GPU goes over more than it may.

use std::ops::Range;

use burn::backend::Backend;
use burn::backend::tensor::FloatTensor;

use crate::backend::plain::reals::Reals;

/// The longest sum, maximum or list of rows that one thread of a GPU may go over: some drivers cut loops at 65,535.
pub(crate) const LONGEST: usize = 1 << 15;

/// `0..n` in parts of at most `size`.
pub(crate) fn parts(n: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..n)
        .step_by(size)
        .map(move |start| start..n.min(start + size))
}

impl<B: Backend> Reals<B> {
    /// Matrix products of the last two axes; the axes before them are equal.
    pub(crate) fn matmul(self, rhs: Self) -> Self {
        let (mut shape, right) = (self.shape(), rhs.shape());
        let (rows, cols) = (right.len() - 2, right.len() - 1);
        let inner = shape[cols];
        shape[cols] = right[cols];
        if shape.contains(&0) || inner == 0 {
            return Self::zeros(&shape, &self.device());
        }
        let products = parts(inner, LONGEST).map(|part| {
            let (a, b) = (self.clone(), rhs.clone());
            let (a, b) = (a.narrow(cols, part.clone()), b.narrow(rows, part));
            Self::new(B::float_matmul(a.into_tensor(), b.into_tensor()))
        });
        let sum = products.reduce(|a, b| a + b);
        sum.unwrap_or_else(|| Self::zeros(&shape, &self.device()))
    }

    /// `self · rhsᵀ`.
    pub(crate) fn matmul_t(self, rhs: Self) -> Self {
        self.matmul(rhs.t())
    }

    /// The sum over an axis, which stays with size 1.
    pub(crate) fn sum(self, dim: usize) -> Self {
        self.reduced(dim, B::float_sum_dim, |a, b| a + b)
    }

    /// The largest along an axis, which stays with size 1 and must not be empty.
    pub(crate) fn max(self, dim: usize) -> Self {
        self.reduced(dim, B::float_max_dim, Self::larger)
    }

    /// A reduction in two steps if the axis is long: of pieces of about the square root, then of their results.
    fn reduced(
        self,
        dim: usize,
        reduce: fn(FloatTensor<B>, usize) -> FloatTensor<B>,
        join: fn(Self, Self) -> Self,
    ) -> Self {
        let (mut shape, n) = (self.shape(), self.shape()[dim]);
        if self.is_empty() {
            shape[dim] = 1;
            return Self::zeros(&shape, &self.device());
        }
        if n <= LONGEST / 2 {
            return Self::new(reduce(self.into_tensor(), dim));
        }
        let piece = n.isqrt().next_power_of_two().min(LONGEST);
        let whole = n / piece * piece;
        let mut cut = shape.clone();
        cut.splice(dim..=dim, [n / piece, piece]);
        let pieces = self.clone().narrow(dim, 0..whole).reshape(&cut);
        shape[dim] = n / piece;
        let of_pieces = Self::new(reduce(pieces.into_tensor(), dim + 1)).reshape(&shape);
        let sum = of_pieces.reduced(dim, reduce, join);
        if whole == n {
            return sum;
        }
        join(sum, self.narrow(dim, whole..n).reduced(dim, reduce, join))
    }
}
