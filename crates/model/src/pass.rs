//! What one forward pass carries from layer to layer besides the residual stream.

use burn::tensor::Tensor;
use kernels::{Compute, Segments};

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
    /// The sequences that packed rows hold. None sees another, and each counts its positions from 0. Not together with
    /// a cache.
    pub segments: Segments,
    /// What it leaves behind.
    pub observe: Observe,
    /// What the mixture layers left, by layer.
    pub routing: Vec<RoutingRecord>,
    /// The residual stream after each part, by the part's path.
    pub residuals: Vec<(String, Tensor<2>)>,
    /// Rotary tables of the input's positions; filled by the decoder.
    pub rotary: Option<RotaryTable>,
}

/// What a pass keeps for whoever looks at it later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observe {
    /// Keep the routing.
    Routing,
    /// Keep the residual stream after every part of a layer.
    Residuals,
    /// Keep nothing.
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
            segments: Segments::whole(),
            observe: Observe::Nothing,
            routing: Vec::new(),
            residuals: Vec::new(),
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

    /// Notes the residual stream after a part of the model, if that is asked for.
    pub(crate) fn observe_sum(&mut self, x: &Tensor<2>, path: impl FnOnce() -> String) {
        if self.observe == Observe::Residuals {
            self.residuals.push((path(), x.clone()));
        }
    }

    /// The rotary tables of this pass.
    pub(crate) fn rotary(&self) -> RotaryTable {
        self.rotary
            .clone()
            .expect("the decoder sets the tables before its first layer")
    }
}
