//! What a pass notes of the inputs of weights, for whoever asks what their columns are worth.

use std::sync::Arc;

use burn::tensor::{Int, Tensor};
use kernels::{Direction, ExpertBank, Matrix};

use super::{ForwardContext, Observe};
use crate::linear::Weight;

/// What entered a frozen weight in one pass.
#[expect(
    clippy::large_enum_variant,
    reason = "tensor handles; there are a few for each layer"
)]
#[derive(Clone, Debug)]
pub enum InputRecord {
    /// A linear layer's.
    Linear {
        /// The weight, the same one as the model's.
        matrix: Arc<Matrix>,
        /// Sums over the tokens of the inputs' squares, `[1, in]`.
        squares: Tensor<2>,
        /// How many tokens.
        tokens: usize,
    },
    /// Those of a weight that each head multiplies with its own rows of, or with their transpose.
    PerHead {
        /// The weight, the same one as the model's.
        matrix: Arc<Matrix>,
        /// Which way.
        direction: Direction,
        /// Sums over the tokens of the inputs' squares, `[heads, in]`.
        squares: Tensor<2>,
        /// How many tokens.
        tokens: usize,
    },
    /// A layer's routed experts'.
    Experts {
        /// The weights, the same ones as the model's.
        bank: Arc<ExpertBank>,
        /// `[tokens, hidden_size]`.
        x: Tensor<2>,
        /// The experts of every token, `[tokens, top_k]`.
        ids: Tensor<2, Int>,
    },
}

impl ForwardContext<'_> {
    /// Notes the input `[tokens, in]` of a linear layer, if that is asked for.
    pub(crate) fn observe_input(&self, weight: &Weight, x: &Tensor<2>) {
        if let (Observe::Inputs, Weight::Frozen(frozen)) = (self.observe, weight) {
            self.inputs.borrow_mut().push(InputRecord::Linear {
                matrix: Arc::clone(&frozen.matrix),
                squares: x.clone().powi_scalar(2).sum_dim(0),
                tokens: x.dims()[0],
            });
        }
    }

    /// Notes the input `[tokens, heads, in]` of a product head by head, if that is asked for.
    pub(crate) fn observe_heads(&self, weight: &Weight, x: &Tensor<3>, direction: Direction) {
        if let (Observe::Inputs, Weight::Frozen(frozen)) = (self.observe, weight) {
            self.inputs.borrow_mut().push(InputRecord::PerHead {
                matrix: Arc::clone(&frozen.matrix),
                direction,
                squares: x.clone().powi_scalar(2).sum_dim(0).squeeze_dim::<2>(0),
                tokens: x.dims()[0],
            });
        }
    }

    /// Notes the input `[tokens, hidden_size]` of a layer's experts, if that is asked for.
    pub(crate) fn observe_experts(
        &self,
        bank: &Arc<ExpertBank>,
        x: &Tensor<2>,
        ids: &Tensor<2, Int>,
    ) {
        if self.observe == Observe::Inputs {
            self.inputs.borrow_mut().push(InputRecord::Experts {
                bank: Arc::clone(bank),
                x: x.clone(),
                ids: ids.clone(),
            });
        }
    }
}
