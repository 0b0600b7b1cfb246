//! Root-mean-square norms.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

/// `x · (mean(x²) + eps)^-½ · weight`.
#[derive(Module, Debug)]
pub struct Norm {
    /// `[width]`; frozen unless it requires a gradient.
    pub weight: Param<Tensor<1>>,
    /// Added to the mean square.
    #[module(skip)]
    pub eps: f32,
}

impl Norm {
    /// # Shapes
    /// - `x`: `[tokens, width]`
    /// - returns: `[tokens, width]`
    ///
    /// # Panics
    /// If the width does not fit.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        kernels::rms_norm(x, self.weight.val(), self.eps)
    }

    /// The norm of the first features of every row; the others stay as they are.
    ///
    /// # Shapes
    /// - `x`: `[tokens, width or more]`
    /// - returns: the shape of `x`
    ///
    /// # Panics
    /// If the rows are too narrow.
    pub fn forward_start(&self, x: Tensor<2>) -> Tensor<2> {
        kernels::rms_norm_start(x, self.weight.val(), self.eps)
    }
}
