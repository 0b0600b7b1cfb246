//! What one forward pass carries from layer to layer besides the residual stream.

pub(crate) mod inputs;

use std::cell::RefCell;

use burn::tensor::{Int, Tensor};
use kernels::{Compute, KvBuffer, Segments};

pub use self::inputs::InputRecord;
use crate::cache::Cache;
use crate::moe::router::Routed;
use crate::precision::Class;
use crate::rope::RotaryTable;

/// The settings of a pass, the tables it computes once, and what it leaves behind.
#[derive(Debug)]
pub struct ForwardContext<'a> {
    /// What products round their operands to.
    pub compute: Compute,
    /// The seed of this pass's dropout; none means no dropout.
    pub dropout_seed: Option<u64>,
    /// What each sequence of the input has of earlier tokens, a cache per row; none means that the input is whole.
    pub caches: Vec<&'a mut Cache>,
    /// The sequences that packed rows hold. None sees another, and each counts its positions from 0. Not together with
    /// caches.
    pub segments: Segments,
    /// The experts that the next mixture layer takes, `[tokens, top_k]`, chosen when it ran before.
    pub replay: Option<Tensor<2, Int>>,
    /// What it leaves behind.
    pub observe: Observe,
    /// What the mixture layers left, by layer.
    pub routing: Vec<RoutingRecord>,
    /// The residual stream after each part, by the part's path.
    pub residuals: Vec<(String, Tensor<2>)>,
    /// What entered the weights.
    pub inputs: RefCell<Vec<InputRecord>>,
    /// Rotary tables of the input's positions; filled by the decoder.
    pub rotary: Option<RotaryTable>,
}

/// What attention of a layer reads, of `N` kinds.
#[derive(Debug)]
pub(crate) enum KvSource<const N: usize> {
    /// Only what is new, `[batch, seq, heads, width]` each.
    New([Tensor<4>; N]),
    /// All that is held of each sequence, the new tokens included.
    Cached(Vec<[KvBuffer; N]>),
}

/// What a pass keeps for whoever looks at it later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observe {
    /// Keep the routing.
    Routing,
    /// Keep the residual stream after every part of a layer.
    Residuals,
    /// Keep the mean squares of what enters the weights. Latent attention runs absorbed then, in the form whose products a
    /// GGUF's weights are made for.
    Inputs,
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

/// Number of routing choices, `top_k` for each token, that are not among the `others` for the same token.
pub fn routing_drift<T: PartialEq>(choices: &[T], others: &[T], top_k: usize) -> usize {
    let tokens = choices.chunks(top_k).zip(others.chunks(top_k));
    let changed = tokens.map(|(ids, others)| ids.iter().filter(|id| !others.contains(id)).count());
    changed.sum()
}

impl<'a> ForwardContext<'a> {
    /// A pass over whole sequences without dropout.
    pub fn new(compute: Compute) -> Self {
        Self {
            compute,
            dropout_seed: None,
            caches: Vec::new(),
            segments: Segments::whole(),
            replay: None,
            observe: Observe::Nothing,
            routing: Vec::new(),
            residuals: Vec::new(),
            inputs: RefCell::default(),
            rotary: None,
        }
    }

    /// A pass that continues sequences: every row of its input the one of its cache, whatever the lengths of the others.
    pub fn cached(compute: Compute, caches: impl IntoIterator<Item = &'a mut Cache>) -> Self {
        Self {
            caches: caches.into_iter().collect(),
            ..Self::new(compute)
        }
    }

    /// The positions of an input `[batch, seq]`: of one row where all rows have the same, else of all of them.
    pub(crate) fn positions(&self, seq: usize) -> Vec<usize> {
        if let Some(positions) = self.segments.positions(seq) {
            return positions;
        }
        if self.caches.is_empty() {
            return (0..seq).collect();
        }
        let of_row = |cache: &&mut Cache| cache.len()..cache.len() + seq;
        self.caches.iter().flat_map(of_row).collect()
    }

    /// Appends what a layer makes of the new tokens, `[batch, seq, heads, width]` each, to its caches. Returns what attention
    /// reads.
    pub(crate) fn append<const N: usize>(
        &mut self,
        layer_idx: usize,
        rows: [Tensor<4>; N],
    ) -> KvSource<N> {
        if self.caches.is_empty() {
            return KvSource::New(rows);
        }
        let batch = self.caches.len();
        let append = |(row, cache): (usize, &mut &mut Cache)| {
            let held = &mut cache.layers[layer_idx].rows;
            for (held, rows) in held.iter_mut().zip(&rows) {
                assert_eq!(rows.dims()[0], batch, "a cache per row");
                held.append(rows.clone().slice(row..row + 1));
            }
            std::array::from_fn(|i| held[i].clone())
        };
        KvSource::Cached(self.caches.iter_mut().enumerate().map(append).collect())
    }

    /// Called once it is through all layers.
    pub(crate) fn advance(&mut self, seq: usize) {
        for cache in &mut self.caches {
            cache.advance(seq);
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

/// Attention of each sequence of a batch by itself, over queries `[batch, seq, heads, dim]` and what is held of it.
pub(crate) fn per_sequence<T>(
    q: Tensor<4>,
    held: &[T],
    attend: impl Fn(Tensor<4>, &T) -> Tensor<4>,
) -> Tensor<4> {
    if let [held] = held {
        return attend(q, held);
    }
    let rows = held.iter().enumerate();
    let rows = rows.map(|(row, held)| attend(q.clone().slice(row..row + 1), held));
    Tensor::cat(rows.collect(), 0)
}
