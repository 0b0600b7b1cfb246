//! A model's trained tensors by name, for optimizers and checkpoints.
//!
//! A name is the path of field names to the tensor; variants of enums do not show in it. All tensors are handed out flat,
//! because optimizers and checkpoints do not depend on their shapes.

use std::ops::Range;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Gradients, Tensor};

use super::{FeedForward, Model};
use crate::keys::layer_of;

/// A trained tensor.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Its path in the model.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values, flat and without autodiff.
    pub values: Tensor<1>,
}

impl Model {
    /// All trained tensors, in the order of the model's fields.
    pub fn parameters(&self) -> Vec<Parameter> {
        let mut collector = CollectParameters {
            path: FieldPath::default(),
            found: Vec::new(),
        };
        self.visit(&mut collector);
        collector.found
    }

    /// The gradients of the trained tensors that have one, flat, taken out of `gradients`.
    pub fn gradients(&self, gradients: &mut Gradients) -> Vec<(String, Tensor<1>)> {
        let mut taker = TakeGradients {
            path: FieldPath::default(),
            gradients,
            found: Vec::new(),
        };
        self.visit(&mut taker);
        taker.found
    }

    /// Replaces trained tensors: `update` sees each one's name and flat values and returns its new values.
    ///
    /// The model gives its values away meanwhile, so `update` may change them in place as long as nothing but this model
    /// holds them.
    pub fn map_parameters(&mut self, update: &mut dyn FnMut(&str, Tensor<1>) -> Tensor<1>) {
        let emptied = self.clone().map(&mut TakeValues);
        let model = std::mem::replace(self, emptied);
        *self = model.map(&mut ApplyUpdate {
            path: FieldPath::default(),
            update,
        });
    }

    /// The trained or updated experts of a layer, by the path of anything in it; none if it has no experts.
    pub fn updated_experts(&self, path: &str) -> Vec<usize> {
        let layer = layer_of(path).and_then(|layer| self.model.layers.get(layer));
        match layer.map(|layer| &layer.mlp) {
            Some(FeedForward::Moe(moe)) => moe.experts.updated_ids(),
            _ => vec![],
        }
    }

    /// The checkpoint keys that a trained tensor stands for, each with its part of the flat values. Empty for adapters.
    pub fn parameter_keys(&self, parameter: &str, len: usize) -> Vec<(String, Range<usize>)> {
        if parameter.contains(".lora.") {
            return vec![];
        }
        // Field names are keys, except for stacked experts: `….experts.weights.up_proj` holds all of them, and
        // `….experts.weights.trained.up_proj` a subset.
        let Some((layer, projection)) = parameter.split_once(".experts.weights.") else {
            return vec![(parameter.into(), 0..len)];
        };
        let projection = projection.strip_prefix("trained.").unwrap_or(projection);
        let expert_ids = self.updated_experts(layer);
        let size = len / expert_ids.len().max(1);
        let key = |expert| format!("{layer}.experts.{expert}.{projection}.weight");
        let parts = (0..).zip(expert_ids);
        parts
            .map(|(place, expert)| (key(expert), place * size..(place + 1) * size))
            .collect()
    }

    /// The correction biases of the routers, by layer.
    pub fn correction_biases(&self) -> impl Iterator<Item = (usize, &Tensor<1>)> {
        let layers = self.model.layers.iter().enumerate();
        layers.filter_map(|(layer_idx, layer)| match &layer.mlp {
            FeedForward::Moe(moe) => {
                let bias = moe.router.e_score_correction_bias.as_ref();
                bias.map(|bias| (layer_idx, bias))
            }
            FeedForward::Dense(_) => None,
        })
    }

    /// [`Self::correction_biases`], for the balancer to move them; an optimizer never does.
    pub fn correction_biases_mut(&mut self) -> impl Iterator<Item = (usize, &mut Tensor<1>)> {
        let layers = self.model.layers.iter_mut().enumerate();
        layers.filter_map(|(layer_idx, layer)| match &mut layer.mlp {
            FeedForward::Moe(moe) => {
                let bias = moe.router.e_score_correction_bias.as_mut();
                bias.map(|bias| (layer_idx, bias))
            }
            FeedForward::Dense(_) => None,
        })
    }
}

/// The path of the module being visited.
#[derive(Default)]
pub(super) struct FieldPath(Vec<String>);

impl FieldPath {
    pub(super) fn enter(&mut self, name: &str, container: &str) {
        if !container.starts_with("Enum:") {
            self.0.push(name.into());
        }
    }

    pub(super) fn exit(&mut self, container: &str) {
        if !container.starts_with("Enum:") {
            self.0.pop();
        }
    }

    pub(super) fn name(&self) -> String {
        self.0.join(".")
    }
}

/// The values of a tensor, one after another.
pub(crate) fn flat<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let len = tensor.shape().num_elements();
    tensor.reshape([len])
}

struct CollectParameters {
    path: FieldPath,
    found: Vec<Parameter>,
}

impl ModuleVisitor for CollectParameters {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, container: &str) {
        self.path.exit(container);
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val();
        if tensor.is_require_grad() {
            let shape = tensor.dims().to_vec();
            self.found.push(Parameter {
                name: self.path.name(),
                shape,
                values: flat(tensor.inner()),
            });
        }
    }
}

struct TakeGradients<'a> {
    path: FieldPath,
    gradients: &'a mut Gradients,
    found: Vec<(String, Tensor<1>)>,
}

impl ModuleVisitor for TakeGradients<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, container: &str) {
        self.path.exit(container);
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val();
        if tensor.is_require_grad()
            && let Some(gradient) = tensor.grad_remove(self.gradients)
        {
            self.found.push((self.path.name(), flat(gradient)));
        }
    }
}

/// Replaces the values of a model's trained tensors by empty ones.
struct TakeValues;

impl ModuleMapper for TakeValues {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !param.val().is_require_grad() {
            return param;
        }
        param.map(|tensor| Tensor::zeros([0; D], &tensor.device()))
    }
}

struct ApplyUpdate<'a> {
    path: FieldPath,
    update: &'a mut dyn FnMut(&str, Tensor<1>) -> Tensor<1>,
}

impl ModuleMapper for ApplyUpdate<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, container: &str) {
        self.path.exit(container);
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !param.val().is_require_grad() {
            return param;
        }
        let name = self.path.name();
        param.map(|tensor| {
            let dims = tensor.dims();
            let values = (self.update)(&name, flat(tensor.inner()));
            Tensor::from_inner(values.reshape(dims)).require_grad()
        })
    }
}
