//! A model's trained tensors by name, for optimizers and checkpoints.
//!
//! Names are the module's field names; the variants of enums leave no trace in them. All tensors are handed out flat:
//! what treats them does not care for their shape.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Gradients, Tensor};

use crate::decoder::{FeedForward, Model};

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
        let mut collector = Collector {
            path: Path::default(),
            found: Vec::new(),
        };
        self.visit(&mut collector);
        collector.found
    }

    /// The gradients of the trained tensors that have one, flat, taken out of `gradients`.
    pub fn gradients(&self, gradients: &mut Gradients) -> Vec<(String, Tensor<1>)> {
        let mut taker = GradientTaker {
            path: Path::default(),
            gradients,
            found: Vec::new(),
        };
        self.visit(&mut taker);
        taker.found
    }

    /// Replaces trained tensors: `update` sees each one's name and flat values and returns its new values.
    ///
    /// The values are nobody else's while it has them, so it may change them where they lie, as long as nothing but
    /// this model holds them.
    pub fn map_parameters(&mut self, update: &mut dyn FnMut(&str, Tensor<1>) -> Tensor<1>) {
        let emptied = self.clone().map(&mut Emptier);
        let model = std::mem::replace(self, emptied);
        *self = model.map(&mut Updater {
            path: Path::default(),
            update,
        });
    }

    /// The numbers of the trained or updated experts of a layer, by the path of anything in it; none if it has no experts.
    pub fn expert_numbers(&self, path: &str) -> Vec<usize> {
        let layer = path.split('.').nth(2).and_then(|layer| layer.parse().ok());
        let layer = layer.and_then(|layer: usize| self.model.layers.get(layer));
        match layer.map(|layer| &layer.mlp) {
            Some(FeedForward::Moe(moe)) => moe.experts.numbers(),
            _ => vec![],
        }
    }

    /// The correction biases of the routers, by layer: moved by the balancer, never by an optimizer.
    pub fn correction_biases(&mut self) -> impl Iterator<Item = (usize, &mut Tensor<1>)> {
        self.model
            .layers
            .iter_mut()
            .enumerate()
            .filter_map(|(layer_idx, layer)| match &mut layer.mlp {
                FeedForward::Moe(moe) => moe
                    .router
                    .e_score_correction_bias
                    .as_mut()
                    .map(|bias| (layer_idx, bias)),
                FeedForward::Dense(_) => None,
            })
    }
}

/// The path of the module being visited.
#[derive(Default)]
struct Path(Vec<String>);

impl Path {
    fn enter(&mut self, name: &str, container: &str) {
        if !container.starts_with("Enum:") {
            self.0.push(name.into());
        }
    }

    fn exit(&mut self, container: &str) {
        if !container.starts_with("Enum:") {
            self.0.pop();
        }
    }

    fn name(&self) -> String {
        self.0.join(".")
    }
}

fn flat<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let len = tensor.shape().num_elements();
    tensor.reshape([len])
}

struct Collector {
    path: Path,
    found: Vec<Parameter>,
}

impl ModuleVisitor for Collector {
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

struct GradientTaker<'a> {
    path: Path,
    gradients: &'a mut Gradients,
    found: Vec<(String, Tensor<1>)>,
}

impl ModuleVisitor for GradientTaker<'_> {
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

/// Leaves a model without the values of its trained tensors.
struct Emptier;

impl ModuleMapper for Emptier {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !param.val().is_require_grad() {
            return param;
        }
        param.map(|tensor| Tensor::zeros([0; D], &tensor.device()))
    }
}

struct Updater<'a> {
    path: Path,
    update: &'a mut dyn FnMut(&str, Tensor<1>) -> Tensor<1>,
}

impl ModuleMapper for Updater<'_> {
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
