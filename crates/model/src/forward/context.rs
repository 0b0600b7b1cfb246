//! What one forward pass carries from layer to layer besides the residual stream.

use std::cell::RefCell;
use std::sync::Arc;

use burn::tensor::{Int, Tensor};
use kernels::{Compute, Direction, ExpertBank, KvBuffer, Matrix, Segments};

use super::cache::Cache;
use super::exchange::ExchangedExperts;
use super::recorder::{RecordedInput, Recorder};
use super::routing::RoutingRecord;
use crate::precision::PrecisionClass;
use crate::rope::RotaryTable;

/// The settings of a pass, its tables and caches, and the recorder that watches it.
#[derive(Debug)]
pub struct ForwardContext<'a> {
    /// What products round their operands to.
    pub compute: Compute,
    /// The seed of this pass's dropout; none means no dropout.
    pub dropout_seed: Option<u64>,
    /// KV caches, one per sequence; none means that the input is whole.
    pub caches: Vec<&'a mut Cache>,
    /// The sequences that packed rows hold. None sees another, and each counts its positions from 0. They exclude caches.
    pub segments: Segments,
    /// The experts of the next mixture layer, `[tokens, top_k]`, chosen when it ran before. The layer takes them out.
    pub replay: Option<Tensor<2, Int>>,
    /// Rotary tables of the input's positions; filled by the decoder.
    pub rotary: Option<RotaryTable>,
    /// What records the pass, if anything does.
    pub recorder: Option<&'a mut Recorder>,
    /// What the layer that has just run needs of other ranks in its backward pass. Behind a cell, because experts share the
    /// context that they run in.
    pub exchanged: RefCell<Vec<ExchangedExperts>>,
}

/// The rows that attention of a layer reads, of `N` kinds.
#[derive(Debug)]
pub(crate) enum KvSource<const N: usize> {
    /// The new rows only, `[batch, seq, heads, width]` each.
    New([Tensor<4>; N]),
    /// All rows in the caches of each sequence, the new ones included.
    Cached(Vec<[KvBuffer; N]>),
}

impl<'a> ForwardContext<'a> {
    /// A pass over whole sequences without dropout.
    pub fn new(compute: impl Into<Compute>) -> Self {
        Self {
            compute: compute.into(),
            dropout_seed: None,
            caches: Vec::new(),
            segments: Segments::whole(),
            replay: None,
            rotary: None,
            recorder: None,
            exchanged: RefCell::default(),
        }
    }

    /// A pass that continues sequences: each row of its input belongs to one cache, whatever the lengths of the others.
    pub fn cached(
        compute: impl Into<Compute>,
        caches: impl IntoIterator<Item = &'a mut Cache>,
    ) -> Self {
        Self {
            caches: caches.into_iter().collect(),
            ..Self::new(compute)
        }
    }

    /// A pass over whole sequences without dropout that is recorded.
    pub fn recorded(compute: impl Into<Compute>, recorder: &'a mut Recorder) -> Self {
        Self {
            recorder: Some(recorder),
            ..Self::new(compute)
        }
    }

    /// The positions of an input `[batch, seq]`: those of one row if all rows have the same, else those of all rows.
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

    /// Appends a layer's rows for the new tokens, `[batch, seq, heads, width]` each, to its caches. Returns the source of keys
    /// and values for attention.
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
            let buffers = &mut cache.layers[layer_idx].buffers;
            for (buffer, rows) in buffers.iter_mut().zip(&rows) {
                assert_eq!(rows.dims()[0], batch, "a cache per row");
                buffer.append(rows.clone().slice(row..row + 1));
            }
            std::array::from_fn(|i| buffers[i].clone())
        };
        KvSource::Cached(self.caches.iter_mut().enumerate().map(append).collect())
    }

    /// Called once the pass is through all layers.
    pub(crate) fn advance(&mut self, seq: usize) {
        for cache in &mut self.caches {
            cache.advance(seq);
        }
    }

    /// What a class of products computes in.
    pub(crate) fn compute_of(&self, class: PrecisionClass) -> Compute {
        class.compute(self.compute)
    }

    /// The rotary tables of this pass.
    pub(crate) fn rotary(&self) -> RotaryTable {
        self.rotary
            .clone()
            .expect("the decoder sets the tables before its first layer")
    }

    /// Whether inputs of weights are recorded.
    pub(crate) fn records_inputs(&self) -> bool {
        let recorder = self.recorder.as_ref();
        recorder.is_some_and(|recorder| recorder.records_inputs())
    }

    /// The routing that was recorded of a layer.
    pub(crate) fn routing_of(&mut self, layer_idx: usize) -> Option<&mut RoutingRecord> {
        let mut records = self.recorder.as_mut()?.routing.iter_mut();
        records.find(|record| record.layer_idx == layer_idx)
    }

    /// Records the routing of a layer, if routing is recorded.
    pub(crate) fn record_routing(&mut self, record: impl FnOnce() -> RoutingRecord) {
        if let Some(recorder) = self.recorder.as_mut().filter(|r| r.records_routing()) {
            recorder.routing.push(record());
        }
    }

    /// Records the residual stream after a part of the model, if that is recorded.
    pub(crate) fn record_residual(&mut self, x: &Tensor<2>, path: impl FnOnce() -> String) {
        if let Some(recorder) = self.recorder.as_mut().filter(|r| r.records_residuals()) {
            recorder.residuals.push((path(), x.clone()));
        }
    }

    /// Records the input `[tokens, in]` of a linear layer's frozen weight, if inputs are recorded.
    pub(crate) fn record_input(&self, matrix: Option<&Arc<Matrix>>, x: &Tensor<2>) {
        self.record(matrix, |matrix| RecordedInput::Linear {
            matrix: Arc::clone(matrix),
            squares: x.clone().powi_scalar(2).sum_dim(0),
            tokens: x.dims()[0],
        });
    }

    /// Records the input `[tokens, heads, in]` of a product head by head, if inputs are recorded.
    pub(crate) fn record_heads(
        &self,
        matrix: Option<&Arc<Matrix>>,
        x: &Tensor<3>,
        direction: Direction,
    ) {
        self.record(matrix, |matrix| RecordedInput::PerHead {
            matrix: Arc::clone(matrix),
            direction,
            squares: x.clone().powi_scalar(2).sum_dim(0).squeeze_dim::<2>(0),
            tokens: x.dims()[0],
        });
    }

    /// Records the input `[tokens, hidden_size]` of a layer's experts, if inputs are recorded.
    pub(crate) fn record_experts(
        &self,
        bank: &Arc<ExpertBank>,
        x: &Tensor<2>,
        ids: &Tensor<2, Int>,
    ) {
        self.record(Some(bank), |bank| RecordedInput::Experts {
            bank: Arc::clone(bank),
            x: x.clone(),
            ids: ids.clone(),
        });
    }

    fn record<W>(&self, frozen: Option<&Arc<W>>, input: impl FnOnce(&Arc<W>) -> RecordedInput) {
        let recorder = self.recorder.as_ref().filter(|r| r.records_inputs());
        if let (Some(recorder), Some(frozen)) = (recorder, frozen) {
            recorder.record_input(input(frozen));
        }
    }
}

/// Attention of each sequence of a batch by itself, over queries `[batch, seq, heads, dim]` and its cache.
pub(crate) fn per_sequence<T>(
    q: Tensor<4>,
    buffers: &[T],
    attend: impl Fn(Tensor<4>, &T) -> Tensor<4>,
) -> Tensor<4> {
    if let [buffers] = buffers {
        return attend(q, buffers);
    }
    let rows = buffers.iter().enumerate();
    let rows = rows.map(|(row, buffers)| attend(q.clone().slice(row..row + 1), buffers));
    Tensor::cat(rows.collect(), 0)
}
