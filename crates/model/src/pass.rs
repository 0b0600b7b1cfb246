//! What one forward pass carries from layer to layer besides the residual stream.

use burn::tensor::Tensor;
use kernels::Compute;

use crate::cache::Cache;
use crate::moe::router::Routed;
use crate::precision::Class;
use crate::rope::RotaryTable;

/// The settings of a pass, the tables it computes once, and what it leaves behind.
#[derive(Debug)]
pub struct Pass<'a> {
    /// What products round their operands to.
    pub compute: Compute,
    /// The seed of this pass's dropout; none means no dropout.
    pub dropout_seed: Option<u64>,
    /// Keys of earlier tokens; none means that the input is whole.
    pub cache: Option<&'a mut Cache>,
    /// Whether mixture layers leave their [`RoutingRecord`].
    pub observe: Observe,
    /// What they left, by layer.
    pub routing: Vec<RoutingRecord>,
    /// Rotary tables of the input's positions; filled by the decoder.
    pub rotary: Option<RotaryTable>,
}

/// Whether a pass keeps its routing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observe {
    /// Keep it.
    Routing,
    /// Drop it.
    Nothing,
}

/// The routing of one mixture layer in one pass.
#[derive(Clone, Debug)]
pub struct RoutingRecord {
    /// Which layer.
    pub layer_idx: usize,
    /// Router logits `[tokens, experts]`, f32.
    pub logits: Tensor<2>,
    /// What was made of them.
    pub routed: Routed,
}

impl<'a> Pass<'a> {
    /// A pass over whole sequences without dropout.
    pub fn new(compute: Compute) -> Self {
        Self {
            compute,
            dropout_seed: None,
            cache: None,
            observe: Observe::Nothing,
            routing: Vec::new(),
            rotary: None,
        }
    }

    /// A pass that continues the sequences in a cache.
    pub fn cached(compute: Compute, cache: &'a mut Cache) -> Self {
        Self {
            cache: Some(cache),
            ..Self::new(compute)
        }
    }

    /// What a class of products computes in.
    pub(crate) fn compute_of(&self, class: Class) -> Compute {
        class.compute(self.compute)
    }

    /// The rotary tables of this pass.
    pub(crate) fn rotary(&self) -> RotaryTable {
        self.rotary
            .clone()
            .expect("the decoder sets the tables before its first layer")
    }
}
