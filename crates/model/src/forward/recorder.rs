//! Records of a forward pass: routing, the residual stream, or the inputs of weights.

use std::cell::RefCell;
use std::sync::Arc;

use burn::tensor::{Int, Tensor};
use kernels::{Direction, ExpertBank, Matrix};

use super::routing::RoutingRecord;

/// Records one kind of thing in the passes that it is lent to.
#[derive(Debug)]
pub struct Recorder {
    kind: RecorderKind,
    /// What the routers decided, by layer.
    pub routing: Vec<RoutingRecord>,
    /// The residual stream after each part of the model, by the part's path.
    pub residuals: Vec<(String, Tensor<2>)>,
    /// Behind a cell, because linear layers share the context that they run in.
    inputs: RefCell<Vec<RecordedInput>>,
}

/// What a [`Recorder`] records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RecorderKind {
    Routing,
    Residuals,
    Inputs,
}

/// What entered a frozen weight in one pass.
#[expect(
    clippy::large_enum_variant,
    reason = "tensor handles; there are a few for each layer"
)]
#[derive(Clone, Debug)]
pub(crate) enum RecordedInput {
    /// The input of a linear layer.
    Linear {
        /// The weight, the same one as the model's.
        matrix: Arc<Matrix>,
        /// Sums over the tokens of the inputs' squares, `[1, in]`.
        squares: Tensor<2>,
        /// Number of tokens.
        tokens: usize,
    },
    /// The inputs of a product of each head with its own rows of a weight, or with their transpose.
    PerHead {
        /// The weight, the same one as the model's.
        matrix: Arc<Matrix>,
        /// The rows, or their transpose.
        direction: Direction,
        /// Sums over the tokens of the inputs' squares, `[heads, in]`.
        squares: Tensor<2>,
        /// Number of tokens.
        tokens: usize,
    },
    /// The inputs of a layer's routed experts.
    Experts {
        /// The weights, the same ones as the model's.
        bank: Arc<ExpertBank>,
        /// `[tokens, hidden_size]`.
        x: Tensor<2>,
        /// The experts of every token, `[tokens, top_k]`.
        ids: Tensor<2, Int>,
    },
}

impl Recorder {
    /// Records the routing of every mixture layer.
    pub fn of_routing() -> Self {
        Self::new(RecorderKind::Routing)
    }

    /// Records the residual stream after every part of a layer.
    pub fn of_residuals() -> Self {
        Self::new(RecorderKind::Residuals)
    }

    /// Records the squares of what enters frozen weights. This changes the form of latent attention; see
    /// `modules/attention/form.rs`.
    pub(crate) fn of_inputs() -> Self {
        Self::new(RecorderKind::Inputs)
    }

    fn new(kind: RecorderKind) -> Self {
        Self {
            kind,
            routing: Vec::new(),
            residuals: Vec::new(),
            inputs: RefCell::default(),
        }
    }

    pub(crate) fn records_routing(&self) -> bool {
        self.kind == RecorderKind::Routing
    }

    pub(crate) fn records_residuals(&self) -> bool {
        self.kind == RecorderKind::Residuals
    }

    pub(crate) fn records_inputs(&self) -> bool {
        self.kind == RecorderKind::Inputs
    }

    /// Records an input of a weight.
    pub(crate) fn record_input(&self, input: RecordedInput) {
        self.inputs.borrow_mut().push(input);
    }

    /// The inputs that were recorded since the last call.
    pub(crate) fn take_inputs(&self) -> Vec<RecordedInput> {
        self.inputs.take()
    }
}
