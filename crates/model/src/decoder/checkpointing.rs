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

use super::{DecoderLayer, Model};
use crate::forward::context::ForwardContext;
use crate::forward::exchange::ExchangedExperts;
use crate::forward::recorder::Recorder;
use crate::forward::routing::{Routed, RoutingRecord};
use crate::keys::layer_of;
use crate::modules::linear::Weight;
use crate::modules::lora::Lora;
use crate::rope::RotaryTable;

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

/// What differentiates the micro-batches of a pass, by their numbers in it.
pub trait Objective {
    /// A loss of the hidden states after the last norm, `[batch, seq, hidden_size]`.
    fn loss(&mut self, number: usize, hidden: Tensor<3>, ctx: &ForwardContext<'_>) -> Tensor<1>;

    /// A term of the routing of a mixture layer that the pass records, if there is one. Layers with nothing to train are
    /// included, which have no gradient.
    fn term(&mut self, number: usize, record: &RoutingRecord) -> Option<Tensor<1>>;
}

impl Trace {
    /// Runs the layers of a model over some micro-batches. These take turns in each layer, so that while the rows of one
    /// travel to experts of other ranks, another one is computed.
    ///
    /// # Shapes
    /// - `inputs`: `[batch, seq]` each
    ///
    /// # Panics
    /// If an id is not below the vocabulary's size, or a pass has a cache.
    pub fn new(
        model: &Model,
        inputs: Vec<Tensor<2, Int>>,
        passes: &mut [ForwardContext<'_>],
        checkpointing: Checkpointing,
    ) -> Vec<Self> {
        let enter = |(input_ids, ctx): (Tensor<2, Int>, &mut ForwardContext<'_>)| {
            assert!(
                ctx.caches.is_empty(),
                "a pass that is differentiated has no cache"
            );
            Self {
                output: model.enter(input_ids.clone(), ctx).inner(),
                layers: Vec::with_capacity(model.model.layers.len()),
                first: model.first_trained_layer(),
                input_ids,
            }
        };
        let turns = inputs.into_iter().zip(passes.iter_mut());
        let mut traces: Vec<Self> = turns.map(enter).collect();
        match checkpointing {
            Checkpointing::None => Self::run_in_graphs(&mut traces, model, passes),
            Checkpointing::Block => {
                Self::run_without_graphs(&mut traces, &model.clone().valid(), passes);
            }
        }
        traces
    }

    fn run_in_graphs(traces: &mut [Self], model: &Model, passes: &mut [ForwardContext<'_>]) {
        for (layer_idx, layer) in model.model.layers.iter().enumerate() {
            let starts = traces.iter().map(|trace| LayerStart {
                x: leaf(model, trace.first, layer_idx, trace.output.clone()),
                dims: trace.input_ids.dims(),
            });
            let graphs = run_layer(layer, starts.collect(), passes, layer_idx);
            for (trace, graph) in traces.iter_mut().zip(graphs) {
                trace.output = graph.y.clone().inner();
                if layer_idx >= trace.first {
                    trace.layers.push(Run::Graph(graph));
                }
            }
        }
    }

    fn run_without_graphs(traces: &mut [Self], plain: &Model, passes: &mut [ForwardContext<'_>]) {
        let rotary = |(trace, ctx): (&Self, &ForwardContext<'_>)| {
            plain.rotary(trace.input_ids.dims()[1], ctx, &trace.output.device())
        };
        let turns = traces.iter().zip(passes.iter());
        let tables: Vec<RotaryTable> = turns.map(rotary).collect();
        for (layer_idx, layer) in plain.model.layers.iter().enumerate() {
            let mut recorders: Vec<Recorder> =
                traces.iter().map(|_| Recorder::of_routing()).collect();
            let turns = recorders.iter_mut().zip(passes.iter()).zip(&tables);
            let first_runs = turns.map(|((recorder, ctx), rotary)| ForwardContext {
                dropout_seed: ctx.dropout_seed,
                segments: ctx.segments.clone(),
                rotary: Some(rotary.clone()),
                ..ForwardContext::recorded(ctx.compute, recorder)
            });
            let starts = traces.iter().map(|trace| LayerStart {
                x: trace.output.clone(),
                dims: trace.input_ids.dims(),
            });
            let mut first_runs: Vec<ForwardContext<'_>> = first_runs.collect();
            let graphs = run_layer(layer, starts.collect(), &mut first_runs, layer_idx);
            drop(first_runs);
            let records = recorders.into_iter().map(|mut seen| seen.routing.pop());
            let turns = traces.iter_mut().zip(passes.iter_mut()).zip(records);
            for (((trace, ctx), record), graph) in turns.zip(graphs) {
                trace.output = graph.y;
                if layer_idx >= trace.first {
                    let chosen = record.map(|record| record.routed.ids);
                    trace.layers.push(Run::Input(graph.x, chosen));
                } else if let Some(record) = record {
                    // There is no second run to record.
                    ctx.record_routing(|| record.tracked());
                }
            }
        }
    }

    /// Differentiates micro-batches. Returns the gradients of the trained tensors by name, for each. Leaves routing without
    /// graphs in the recorders.
    ///
    /// # Panics
    /// If the model or the passes are not those of these traces.
    pub fn backward(
        mut traces: Vec<Self>,
        model: &Model,
        passes: &mut [ForwardContext<'_>],
        objective: &mut dyn Objective,
    ) -> Vec<Vec<(String, Tensor<1>)>> {
        let starts = traces.iter().zip(passes.iter()).enumerate();
        let mut turns: Vec<BackwardTurn> = starts
            .map(|(number, (trace, ctx))| {
                let mut gradients = vec![];
                let x = Tensor::from_inner(trace.output.clone()).require_grad();
                let hidden = model.leave(x.clone(), trace.input_ids.dims());
                let total = objective.loss(number, hidden, ctx);
                let dx = differentiate(model, total, &x, &mut gradients);
                BackwardTurn { dx, gradients }
            })
            .collect();
        for layer_idx in (model.first_trained_layer()..model.model.layers.len()).rev() {
            let mut graphs = graphs(&mut traces, model, passes, layer_idx);
            // Every rank comes here for every layer, so none waits for one that has nothing to train.
            for (turn, graph) in turns.iter().zip(&mut graphs) {
                graph.send(&turn.dx);
            }
            for (turn, graph) in turns.iter_mut().zip(&mut graphs) {
                graph.serve(model, &mut turn.gradients);
            }
            for (number, (turn, graph)) in turns.iter_mut().zip(graphs).enumerate() {
                let record = passes[number].routing_of(layer_idx);
                let term = record.and_then(|record| {
                    let term = objective.term(number, record);
                    record.forget_graph();
                    term
                });
                turn.dx = graph.finish(model, turn, term);
                // Experts of the next layer get their gradients while another micro-batch is differentiated.
                if let Some(Run::Graph(next)) = traces[number].layers.last_mut() {
                    next.send(&turn.dx);
                }
            }
        }
        let all = traces.into_iter().zip(turns).zip(passes.iter_mut());
        let ends = all.enumerate().map(|(number, ((trace, turn), ctx))| {
            let mut term = |record: &RoutingRecord| _ = objective.term(number, record);
            trace.finish(turn, model, ctx, &mut term)
        });
        ends.collect()
    }

    /// The gradients, with those of the embedding. `term` gets the routing of the frozen layers, which count in the loss and
    /// have no gradient.
    fn finish(
        self,
        turn: BackwardTurn,
        model: &Model,
        ctx: &mut ForwardContext<'_>,
        term: &mut dyn FnMut(&RoutingRecord),
    ) -> Vec<(String, Tensor<1>)> {
        let BackwardTurn { dx, mut gradients } = turn;
        for layer_idx in 0..self.first {
            if let Some(record) = ctx.routing_of(layer_idx) {
                term(record);
            }
        }
        if model.is_embedding_trained() {
            let x = model.enter(self.input_ids, ctx);
            let total = (x.clone() * Tensor::from_inner(dx)).sum();
            differentiate(model, total, &x, &mut gradients);
        }
        if let Some(recorder) = &mut ctx.recorder {
            recorder.routing.sort_by_key(|record| record.layer_idx);
        }
        gradients
    }
}

/// A micro-batch in a backward pass.
struct BackwardTurn {
    /// The gradient of the output of the layer that is next, `[tokens, hidden_size]`.
    dx: Tensor<2>,
    gradients: Vec<(String, Tensor<1>)>,
}

/// Where a micro-batch enters a layer.
struct LayerStart {
    /// `[tokens, hidden_size]`.
    x: Tensor<2>,
    /// Rows and columns.
    dims: [usize; 2],
}

/// Runs a layer over micro-batches, in turns.
fn run_layer(
    layer: &DecoderLayer,
    starts: Vec<LayerStart>,
    passes: &mut [ForwardContext<'_>],
    layer_idx: usize,
) -> Vec<LayerGraph> {
    let starts = starts.into_iter().zip(passes.iter_mut());
    let runs = starts.map(|(start, ctx)| {
        let run = layer.send(start.x.clone(), start.dims, ctx, layer_idx);
        (start.x, run)
    });
    let mut runs: Vec<_> = runs.collect();
    for ((_, run), ctx) in runs.iter_mut().zip(passes.iter()) {
        layer.serve(run, ctx);
    }
    let ends = runs.into_iter().zip(passes).map(|((x, run), ctx)| {
        let y = layer.finish(run, ctx, layer_idx);
        let exchanged = ctx.exchanged.take();
        LayerGraph { x, y, exchanged }
    });
    ends.collect()
}

/// The graphs of a layer: those that were kept, or of another run, with the experts of the first.
fn graphs(
    traces: &mut [Trace],
    model: &Model,
    passes: &mut [ForwardContext<'_>],
    layer_idx: usize,
) -> Vec<LayerGraph> {
    let (mut kept, mut starts) = (Vec::new(), Vec::new());
    for (trace, ctx) in traces.iter_mut().zip(passes.iter_mut()) {
        match trace.layers.pop().expect("a run per layer") {
            Run::Graph(graph) => kept.push(graph),
            Run::Input(x, chosen) => {
                ctx.replay = chosen.map(Tensor::from_inner);
                starts.push(LayerStart {
                    x: leaf(model, trace.first, layer_idx, x),
                    dims: trace.input_ids.dims(),
                });
            }
        }
    }
    if starts.is_empty() {
        return kept;
    }
    run_layer(&model.model.layers[layer_idx], starts, passes, layer_idx)
}

impl LayerGraph {
    /// Sends the gradient of the output to experts of other ranks, unless it is sent.
    fn send(&mut self, dy: &Tensor<2>) {
        let experts = self.exchanged.iter_mut();
        experts.for_each(|experts| experts.send(dy));
    }

    /// Differentiates this rank's experts.
    fn serve(&mut self, model: &Model, gradients: &mut Vec<(String, Tensor<1>)>) {
        for experts in &mut self.exchanged {
            experts.serve(|found| gradients.extend(model.gradients(found)));
        }
    }

    /// Differentiates by the gradient of the output and a term of the routing. Returns the gradient of the input.
    fn finish(self, model: &Model, turn: &mut BackwardTurn, term: Option<Tensor<1>>) -> Tensor<2> {
        let experts = self.exchanged.into_iter();
        experts.for_each(ExchangedExperts::finish);
        // The gradient of this sum by y is exactly dx.
        let mut total = (self.y * Tensor::from_inner(turn.dx.clone())).sum();
        if let Some(term) = term {
            total = total + term;
        }
        differentiate(model, total, &self.x, &mut turn.gradients)
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
