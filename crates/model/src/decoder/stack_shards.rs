//! Experts that ranks share out, over all layers.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::Tensor;

use super::{FeedForward, Model};
use crate::Error;
use crate::forward::context::ForwardContext;
use crate::forward::exchange::ExpertRanks;
use crate::forward::routing::Routed;
use crate::modules::experts::Experts;

/// A stack of experts of which a rank holds a share.
#[derive(Clone, Debug)]
pub struct StackShard {
    /// Its path in the model.
    pub name: String,
    /// The share of each rank of a group.
    pub ranges: Vec<Range<usize>>,
    /// This rank's share, without autodiff.
    pub values: Tensor<3>,
}

impl Model {
    /// Keeps this rank's share of every layer's experts; the other ranks of its group serve theirs.
    ///
    /// # Errors
    /// If experts share a factor.
    pub fn shard_experts(&mut self, ranks: &Arc<ExpertRanks>) -> Result<(), Error> {
        let mut layers = self.experts_mut();
        layers.try_for_each(|(layer_idx, experts)| experts.shard(ranks, layer_idx))
    }

    /// Takes all experts back. `values` gives the values of whole stacks by their paths.
    pub fn unshard_experts(&mut self, values: &mut dyn FnMut(&str) -> Option<Tensor<1>>) {
        for (layer_idx, experts) in self.experts_mut() {
            experts.unshard(&mut |name| values(&path_of(layer_idx, name)));
        }
    }

    /// The stacks of which this rank holds a share; none if it holds all experts.
    pub fn stack_shards(&self) -> Vec<StackShard> {
        let layers = self.model.layers.iter().enumerate();
        let stacks = layers.filter_map(|(layer_idx, layer)| match &layer.mlp {
            FeedForward::Moe(moe) => Some((layer_idx, moe.experts.stack_shards())),
            FeedForward::Dense(_) => None,
        });
        let of_layer = |(layer_idx, stacks): (usize, Vec<(String, _, Tensor<3>)>)| {
            stacks
                .into_iter()
                .map(move |(name, ranges, values)| StackShard {
                    name: path_of(layer_idx, &name),
                    ranges,
                    values: match values.device().is_autodiff() {
                        true => values.inner(),
                        false => values,
                    },
                })
        };
        stacks.flat_map(of_layer).collect()
    }

    /// Serves a forward pass of other ranks, in which this one has no tokens of its own.
    pub fn serve_experts(&self, ctx: &ForwardContext<'_>) {
        let device = self.model.norm.weight.val().device();
        let hidden = self.config.hidden_size;
        for layer in &self.model.layers {
            let FeedForward::Moe(moe) = &layer.mlp else {
                continue;
            };
            let [experts, top_k] = [moe.experts.dims()[0], moe.router.config.choice.top_k];
            let none = |width| Tensor::zeros([0, width], &device);
            let routed = Routed {
                scores: none(experts),
                ids: Tensor::zeros([0, top_k], &device),
                weights: none(top_k),
            };
            if let Some(mut running) = moe.experts.send(&none(hidden), &routed, ctx) {
                moe.experts.serve(&mut running, ctx);
                moe.experts.finish(running, ctx);
            }
        }
    }

    fn experts_mut(&mut self) -> impl Iterator<Item = (usize, &mut Experts)> {
        let layers = self.model.layers.iter_mut().enumerate();
        layers.filter_map(|(layer_idx, layer)| match &mut layer.mlp {
            FeedForward::Moe(moe) => Some((layer_idx, &mut moe.experts)),
            FeedForward::Dense(_) => None,
        })
    }
}

fn path_of(layer_idx: usize, name: &str) -> String {
    format!("model.layers.{layer_idx}.mlp.experts.{name}")
}
