//! Experts that ranks share out, over all layers.

use std::ops::Range;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;

use super::parameters::FieldPath;
use super::{FeedForward, Model};
use crate::forward::context::ForwardContext;
use crate::forward::routing::Routed;
use crate::keys::layer_of;
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
    /// Takes all experts back. `values` gives the values of whole stacks by their paths.
    pub fn unshard_experts(&mut self, values: &mut dyn FnMut(&str) -> Option<Tensor<1>>) {
        for (_, experts) in self.experts_mut() {
            experts.shard = None;
        }
        self.map_stacks(&mut |name, shard| match values(name) {
            Some(values) => {
                let [_, rows, cols] = shard.dims();
                let n = values.dims()[0] / (rows * cols).max(1);
                values.reshape([n, rows, cols])
            }
            None => shard,
        });
    }

    /// The stacks of which this rank holds a share; none if it holds all experts.
    pub fn stack_shards(&self) -> Vec<StackShard> {
        let stacks = self.stacks().into_iter();
        let shards = stacks.filter_map(|(name, values)| {
            let shard = self.experts_of(&name)?.shard.as_ref()?;
            Some(StackShard {
                name,
                ranges: shard.updated().to_vec(),
                values,
            })
        });
        shards.collect()
    }

    /// The stacks of all layers, trained or not, by their paths.
    fn stacks(&self) -> Vec<(String, Tensor<3>)> {
        let mut collector = CollectStacks::default();
        self.visit(&mut collector);
        collector.found
    }

    /// Replaces the stacks of all layers.
    fn map_stacks(&mut self, change: &mut dyn FnMut(&str, Tensor<3>) -> Tensor<3>) {
        *self = self.clone().map(&mut ChangeStacks {
            path: FieldPath::default(),
            change,
        });
    }

    /// The experts of the layer of a path.
    fn experts_of(&self, path: &str) -> Option<&Experts> {
        match &self.model.layers.get(layer_of(path)?)?.mlp {
            FeedForward::Moe(moe) => Some(&moe.experts),
            FeedForward::Dense(_) => None,
        }
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

/// Whether a parameter is a stack: those of experts are what has three dimensions.
fn is_stack(dimensions: usize, path: &FieldPath) -> bool {
    dimensions == 3 && path.name().contains(".mlp.experts.")
}

#[derive(Default)]
struct CollectStacks {
    path: FieldPath,
    found: Vec<(String, Tensor<3>)>,
}

impl ModuleVisitor for CollectStacks {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, container: &str) {
        self.path.exit(container);
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if is_stack(D, &self.path) {
            self.found.push((self.path.name(), stack_of(param.val())));
        }
    }
}

struct ChangeStacks<'a> {
    path: FieldPath,
    change: &'a mut dyn FnMut(&str, Tensor<3>) -> Tensor<3>,
}

impl ModuleMapper for ChangeStacks<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, container: &str) {
        self.path.exit(container);
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !is_stack(D, &self.path) {
            return param;
        }
        let name = self.path.name();
        param.map(|old| {
            let (is_trained, device) = (old.is_require_grad(), old.device());
            let stack = (self.change)(&name, stack_of(old));
            let dims = stack.dims();
            let values = stack.reshape::<D, _>(std::array::from_fn::<usize, D, _>(|i| dims[i]));
            match device.is_autodiff() {
                true => Tensor::from_inner(values).set_require_grad(is_trained),
                false => values,
            }
        })
    }
}

/// The values of a stack, without autodiff.
fn stack_of<const D: usize>(tensor: Tensor<D>) -> Tensor<3> {
    let dims = tensor.dims();
    let values = match tensor.device().is_autodiff() {
        true => tensor.inner(),
        false => tensor,
    };
    values.reshape([dims[0], dims[1], dims[2]])
}
