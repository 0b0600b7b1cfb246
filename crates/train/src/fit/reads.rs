//! Values that are read from the device together: each read waits for all work before it.

use burn::tensor::Tensor;
use data::Batch;
use kernels::device;
use model::{Recorder, RoutingRecord};

use crate::routing::BatchChoices;

/// Tensors to read, and where each will be.
#[derive(Debug, Default)]
pub(super) struct Reads(Vec<Tensor<1>>);

/// The number of a tensor in [`Reads`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Read(usize);

/// The choices of one layer's router, which will be read.
#[derive(Clone, Copy, Debug)]
pub(super) struct ChoicesRead {
    pub(super) layer_idx: usize,
    pub(super) n_experts: usize,
    top_k: usize,
    ids: Read,
}

/// What was read.
#[derive(Debug)]
pub(super) struct ReadValues(Vec<Vec<f32>>);

impl Reads {
    /// Adds a tensor.
    pub(super) fn push(&mut self, values: Tensor<1>) -> Read {
        self.0.push(values.inner());
        Read(self.0.len() - 1)
    }

    /// Adds the choices of the routers that were recorded. Ids of experts are exact in f32.
    pub(super) fn push_choices(&mut self, recorder: &Recorder) -> Vec<ChoicesRead> {
        let records = recorder.routing.iter();
        let of_layer = |record: &RoutingRecord| {
            let ([_, n_experts], [tokens, top_k]) =
                (record.routed.scores.dims(), record.routed.ids.dims());
            let ids = record.routed.ids.clone().reshape([tokens * top_k]);
            ChoicesRead {
                layer_idx: record.layer_idx,
                n_experts,
                top_k,
                ids: self.push(ids.float()),
            }
        };
        records.map(of_layer).collect()
    }

    /// Reads all of them at once.
    pub(super) fn read(self) -> ReadValues {
        let lengths: Vec<usize> = self.0.iter().map(|values| values.dims()[0]).collect();
        if lengths.is_empty() {
            return ReadValues(Vec::new());
        }
        let all = device::read(Tensor::cat(self.0, 0));
        let mut left = all.as_slice();
        let mut cut = |n: usize| {
            let (values, rest) = left.split_at(n);
            left = rest;
            values.to_vec()
        };
        ReadValues(lengths.into_iter().map(&mut cut).collect())
    }
}

impl ReadValues {
    /// The values of a tensor.
    pub(super) fn of(&self, read: Read) -> &[f32] {
        &self.0[read.0]
    }

    /// The choices of a layer's router for a batch.
    pub(super) fn choices(&self, of: ChoicesRead, batch: &Batch) -> BatchChoices {
        let ids = self.of(of.ids).iter().map(|id| *id as u16);
        BatchChoices::new(of.layer_idx, of.top_k, ids, &batch.lengths, batch.cols)
    }

    /// The value of a tensor of one.
    pub(super) fn scalar(&self, read: Read) -> f64 {
        f64::from(self.0[read.0][0])
    }
}
