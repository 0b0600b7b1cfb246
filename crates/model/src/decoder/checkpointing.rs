//! A forward pass that is differentiated, layer by layer from the end.
//!
//! Every layer has a graph of its own, from its input to its output. The loss is differentiated by the last layer's
//! output, then each layer by its input, and a graph is dropped before the next is read. So a caller chooses what to save
//! between forward and backward: all graphs, or, with little memory, the input of each layer only. A layer then runs
//! again before its backward pass, with the experts that its first run chose. The graphs are the same, and the kernels
//! have the same bits for the same inputs, so the gradients are the same, bit for bit.
//!
//! Source of the idea: Chen et al., arXiv:1604.06174.

use burn::module::Module;
use burn::tensor::{Int, Tensor};
use kernels::device::is_gpu;

use super::Model;
use crate::forward::context::ForwardContext;
use crate::forward::exchange::ExchangedExperts;
use crate::forward::recorder::Recorder;
use crate::forward::routing::{Routed, RoutingRecord};
use crate::keys::layer_of;
use crate::modules::linear::Weight;
use crate::modules::lora::Lora;

/// What a forward pass saves for the backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checkpointing {
    /// All activations that the layers need for their gradients.
    #[default]
    None,
    /// The input of each layer, which runs again.
    Block,
}

/// A forward pass up to the last layer, to be differentiated.
#[derive(Debug)]
pub struct Trace {
    input_ids: Tensor<2, Int>,
    /// From the first with something to train.
    layers: Vec<Run>,
    /// The output of the last layer, without its graph.
    output: Tensor<2>,
    /// Layers below this one have nothing to train.
    first: usize,
}

/// What is saved of one layer, `[tokens, hidden_size]` each.
#[derive(Debug)]
enum Run {
    /// Input and output, with the graph between them.
    Graph(LayerGraph),
    /// The input, without a graph, and the experts that were chosen.
    Input(Tensor<2>, Option<Tensor<2, Int>>),
}

/// A layer's graph.
#[derive(Debug)]
struct LayerGraph {
    x: Tensor<2>,
    y: Tensor<2>,
    /// Experts that ranks share out, whose gradients come from outside of the graph.
    exchanged: Vec<ExchangedExperts>,
}

impl Trace {
    /// Runs the layers of a model.
    ///
    /// # Shapes
    /// - `input_ids`: `[batch, seq]`
    ///
    /// # Panics
    /// If an id is not below the vocabulary's size, or the pass has a cache.
    pub fn new(
        model: &Model,
        input_ids: Tensor<2, Int>,
        ctx: &mut ForwardContext<'_>,
        checkpointing: Checkpointing,
    ) -> Self {
        assert!(
            ctx.caches.is_empty(),
            "a pass that is differentiated has no cache"
        );
        let mut trace = Self {
            output: model.enter(input_ids.clone(), ctx).inner(),
            layers: Vec::with_capacity(model.model.layers.len()),
            first: model.first_trained_layer(),
            input_ids,
        };
        match checkpointing {
            Checkpointing::None => trace.run_in_graphs(model, ctx),
            Checkpointing::Block => trace.run_without_graphs(&model.clone().valid(), ctx),
        }
        trace
    }

    fn run_in_graphs(&mut self, model: &Model, ctx: &mut ForwardContext<'_>) {
        let dims = self.input_ids.dims();
        for (layer_idx, layer) in model.model.layers.iter().enumerate() {
            let x = leaf(model, self.first, layer_idx, self.output.clone());
            let y = layer.forward(x.clone(), dims, ctx, layer_idx);
            self.output = y.clone().inner();
            let exchanged = ctx.exchanged.take();
            if layer_idx >= self.first {
                self.layers.push(Run::Graph(LayerGraph { x, y, exchanged }));
            }
        }
    }

    fn run_without_graphs(&mut self, plain: &Model, ctx: &mut ForwardContext<'_>) {
        let dims = self.input_ids.dims();
        let rotary = plain.rotary(dims[1], ctx, &self.output.device());
        for (layer_idx, layer) in plain.model.layers.iter().enumerate() {
            let (x, mut recorder) = (self.output.clone(), Recorder::of_routing());
            let mut first_run = ForwardContext {
                dropout_seed: ctx.dropout_seed,
                segments: ctx.segments.clone(),
                rotary: Some(rotary.clone()),
                ..ForwardContext::recorded(ctx.compute, &mut recorder)
            };
            self.output = layer.forward(x.clone(), dims, &mut first_run, layer_idx);
            let record = recorder.routing.pop();
            if layer_idx >= self.first {
                let chosen = record.map(|record| record.routed.ids);
                self.layers.push(Run::Input(x, chosen));
            } else if let Some(record) = record {
                // There is no second run to record.
                ctx.record_routing(|| record.tracked());
            }
        }
    }

    /// Differentiates a loss of the hidden states after the last norm, `[batch, seq, hidden_size]`, plus a term of the routing
    /// of every mixture layer that the pass records (layers with nothing to train included, which have no gradient). Returns
    /// the gradients of the trained tensors by name. Leaves routing without graphs in the recorder.
    ///
    /// # Panics
    /// If the model or the pass is not the one of this trace.
    pub fn backward(
        self,
        model: &Model,
        ctx: &mut ForwardContext<'_>,
        loss: impl FnOnce(Tensor<3>, &ForwardContext<'_>) -> Tensor<1>,
        mut term: impl FnMut(&RoutingRecord) -> Option<Tensor<1>>,
    ) -> Vec<(String, Tensor<1>)> {
        let Self {
            input_ids,
            mut layers,
            output,
            first,
        } = self;
        let dims = input_ids.dims();
        let mut gradients = vec![];
        let mut dx = {
            let x = Tensor::from_inner(output).require_grad();
            let total = loss(model.leave(x.clone(), dims), ctx);
            differentiate(model, total, &x, &mut gradients)
        };
        for layer_idx in (first..model.model.layers.len()).rev() {
            let run = layers.pop().expect("a run per layer");
            let LayerGraph { x, y, exchanged } = run.graph(model, dims, first, ctx, layer_idx);
            // Every rank comes here for every layer, so none waits for one that has nothing to train.
            for experts in exchanged {
                experts.backward(&dx, |found| gradients.extend(model.gradients(found)));
            }
            // The gradient of this sum by y is exactly dx.
            let mut total = (y * Tensor::from_inner(dx)).sum();
            if let Some(record) = ctx.routing_of(layer_idx) {
                if let Some(term) = term(record) {
                    total = total + term;
                }
                record.forget_graph();
            }
            dx = differentiate(model, total, &x, &mut gradients);
        }
        // Frozen layers count in the loss and have no gradient.
        for layer_idx in 0..first {
            if let Some(record) = ctx.routing_of(layer_idx) {
                term(record);
            }
        }
        if model.is_embedding_trained() {
            let x = model.enter(input_ids, ctx);
            let total = (x.clone() * Tensor::from_inner(dx)).sum();
            differentiate(model, total, &x, &mut gradients);
        }
        if let Some(recorder) = &mut ctx.recorder {
            recorder.routing.sort_by_key(|record| record.layer_idx);
        }
        gradients
    }
}

impl Run {
    /// A layer's graph.
    fn graph(
        self,
        model: &Model,
        dims: [usize; 2],
        first: usize,
        ctx: &mut ForwardContext<'_>,
        layer_idx: usize,
    ) -> LayerGraph {
        match self {
            Self::Graph(graph) => graph,
            Self::Input(x, chosen) => {
                let x = leaf(model, first, layer_idx, x);
                ctx.replay = chosen.map(Tensor::from_inner);
                let layer = &model.model.layers[layer_idx];
                let y = layer.forward(x.clone(), dims, ctx, layer_idx);
                let exchanged = ctx.exchanged.take();
                LayerGraph { x, y, exchanged }
            }
        }
    }
}

/// The start of a layer's graph; tracked if something before the layer needs a gradient. On a GPU it always is: where only
/// parameters were tracked, others had gradients of NaN or zero (burn#5162).
fn leaf(model: &Model, first: usize, layer_idx: usize, x: Tensor<2>) -> Tensor<2> {
    let x = Tensor::from_inner(x);
    if layer_idx > first || model.is_embedding_trained() || is_gpu(&x.device()) {
        x.require_grad()
    } else {
        x
    }
}

/// Adds the gradients of a total to `gradients`, and returns the gradient of `x`: zeros if it has none.
fn differentiate(
    model: &Model,
    total: Tensor<1>,
    x: &Tensor<2>,
    gradients: &mut Vec<(String, Tensor<1>)>,
) -> Tensor<2> {
    // What is trained in the first layer may be other ranks' alone.
    if !total.is_tracked() {
        return x.clone().inner().zeros_like();
    }
    let mut found = total.backward();
    let dx = x
        .grad(&found)
        .unwrap_or_else(|| x.clone().inner().zeros_like());
    for (name, gradient) in model.gradients(&mut found) {
        match gradients.iter_mut().find(|(known, _)| *known == name) {
            Some((_, sum)) => *sum = sum.clone() + gradient,
            None => gradients.push((name, gradient)),
        }
    }
    dx
}

impl Model {
    /// The lowest layer with something to train; the number of layers if there is none.
    pub(super) fn first_trained_layer(&self) -> usize {
        if self.is_embedding_trained() {
            return 0;
        }
        let names = self.parameters().into_iter();
        names
            .filter_map(|parameter| layer_of(&parameter.name))
            .min()
            .unwrap_or(self.model.layers.len())
    }

    fn is_embedding_trained(&self) -> bool {
        let embedding = &self.model.embed_tokens;
        let has_trained_update = embedding.lora.as_ref().is_some_and(Lora::is_trained);
        match &embedding.weight {
            Weight::Trained(weight) => weight.val().is_require_grad() || has_trained_update,
            Weight::Frozen(_) => has_trained_update,
        }
    }
}

impl RoutingRecord {
    /// Drops the graph of the layer, and keeps the values.
    fn forget_graph(&mut self) {
        let values = |x: &Tensor<2>| Tensor::from_inner(x.clone().inner());
        self.logits = values(&self.logits);
        self.routed.scores = values(&self.routed.scores);
        self.routed.weights = values(&self.routed.weights);
    }

    /// The record of a run without autodiff, as a run with autodiff has it.
    fn tracked(self) -> Self {
        Self {
            layer_idx: self.layer_idx,
            logits: Tensor::from_inner(self.logits),
            routed: Routed {
                scores: Tensor::from_inner(self.routed.scores),
                ids: Tensor::from_inner(self.routed.ids),
                weights: Tensor::from_inner(self.routed.weights),
            },
        }
    }
}
