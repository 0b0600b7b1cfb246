//! Gradients of a pass that keeps only the layers' inputs are those of a pass that keeps everything, bit for bit; and both
//! are those of one graph, up to the order of sums.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

#[path = "../../../tests/goldens/paths.rs"]
mod goldens;

use std::collections::BTreeMap;

use burn::tensor::{Device, Int, Tensor, TensorData};
use checkpoint::Folder;
use moeforge_model::adapt::{self, LoraConfig, Scaling};
use moeforge_model::{
    Checkpointing, Compute, ForwardContext, Model, Objective, Recorder, RoutingRecord, Trace,
    Training, load,
};

/// The bits of a loss and of all gradients, by name.
type Bits = (Vec<u32>, BTreeMap<String, Vec<u32>>);

/// Relative error of f32 sums in another order.
const SUMS: f32 = 1e-4;
/// Where such sums are rounded to bf16, some fall on the other side: half the distance of neighbors.
const ROUNDED_SUMS: f32 = 4e-3;

const MODELS: [&str; 4] = [
    "deepseek_v2_lite",
    "deepseek_v3",
    "deepseek_v3_fp8",
    "qwen2_distill",
];

fn open(name: &str, training: Training, device: &Device) -> Model {
    load::load(
        &Folder::open(&goldens::path(name)).unwrap(),
        training,
        device,
    )
    .unwrap()
}

/// Updates of some layers' modules, both factors with values.
fn adapted(name: &str, target: &[&str], device: &Device) -> Model {
    let mut model = open(name, Training::Frozen, device);
    let settings = LoraConfig {
        target: target.iter().map(|target| (*target).into()).collect(),
        exclude: vec![],
        rank: 3,
        alpha: 6.0,
        scaling: Scaling::Plain,
        rank_pattern: vec![],
        alpha_pattern: vec![],
        dropout: 0.1,
        seed: 5,
        use_dora: false,
        experts_share: None,
    };
    adapt::attach(&mut model, &settings, device).unwrap();
    model.map_parameters(&mut |name, values| {
        values + if name.ends_with("lora_b") { 0.01 } else { 0.0 }
    });
    model
}

fn ids(model: &Model, device: &Device) -> Tensor<2, Int> {
    let vocab = model.config.vocab_size as i32;
    let ids: Vec<i32> = (0..3 * 21).map(|i| i * i * 31 % vocab).collect();
    Tensor::from_data(TensorData::new(ids, [3, 21]), device)
}

fn ctx(compute: Compute, recorder: &mut Recorder) -> ForwardContext<'_> {
    ForwardContext {
        dropout_seed: Some(7),
        ..ForwardContext::recorded(compute, recorder)
    }
}

/// A mean over tokens; not the sum, so that the gradients' factors are no powers of two.
fn loss(
    model: &Model,
    hidden: Tensor<3>,
    targets: Tensor<2, Int>,
    ctx: &ForwardContext<'_>,
) -> Tensor<1> {
    model.loss(hidden, targets, ctx).sum() / 61.0
}

/// Something of the routing that has a gradient.
fn term(record: &RoutingRecord) -> Tensor<1> {
    (record.routed.scores.clone() * record.routed.scores.clone()).sum() * 0.3
}

fn bits(values: Tensor<1>) -> Vec<u32> {
    let values: Vec<f32> = values.into_data().try_to_vec().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// One graph from the embedding to the loss, differentiated as a whole.
fn whole(model: &Model, ids: &Tensor<2, Int>, compute: Compute) -> BTreeMap<String, Vec<f32>> {
    let mut recorder = Recorder::of_routing();
    let mut ctx = ctx(compute, &mut recorder);
    let hidden = model.hidden(ids.clone(), &mut ctx);
    let loss = loss(model, hidden, ids.clone(), &ctx);
    let records = recorder.routing.iter();
    let total = records.fold(loss, |total, record| total + term(record));
    let gradients = model.gradients(&mut total.backward()).into_iter();
    let values = |g: Tensor<1>| g.into_data().try_to_vec().unwrap();
    gradients.map(|(name, g)| (name, values(g))).collect()
}

/// The loss of a model, and its bits.
struct LossOf<'a> {
    model: &'a Model,
    ids: &'a Tensor<2, Int>,
    seen: Vec<u32>,
}

impl Objective for LossOf<'_> {
    fn loss(&mut self, _: usize, hidden: Tensor<3>, ctx: &ForwardContext<'_>) -> Tensor<1> {
        let loss = loss(self.model, hidden, self.ids.clone(), ctx);
        self.seen = bits(loss.clone().inner());
        loss
    }

    fn term(&mut self, _: usize, record: &RoutingRecord) -> Option<Tensor<1>> {
        Some(term(record))
    }
}

fn traced(
    model: &Model,
    ids: &Tensor<2, Int>,
    compute: Compute,
    checkpointing: Checkpointing,
) -> Bits {
    let mut recorder = Recorder::of_routing();
    let mut passes = [ctx(compute, &mut recorder)];
    let traces = Trace::new(model, vec![ids.clone()], &mut passes, checkpointing);
    let mut objective = LossOf {
        model,
        ids,
        seen: vec![],
    };
    let gradients = Trace::backward(traces, model, &mut passes, &mut objective).remove(0);
    let seen = objective.seen;
    let layers: Vec<usize> = recorder
        .routing
        .iter()
        .map(|record| record.layer_idx)
        .collect();
    assert!(layers.is_sorted(), "records are left in the layers' order");
    let gradients = gradients.into_iter().map(|(name, g)| (name, bits(g)));
    (seen, gradients.collect())
}

fn assert_same(model: &Model, device: &Device, compute: Compute, what: &str) {
    let ids = ids(model, device);
    let run = |checkpointing| traced(model, &ids, compute, checkpointing);
    let (expected, found) = (run(Checkpointing::None), run(Checkpointing::Block));
    assert_eq!(expected.0, found.0, "{what}: loss");
    let whole = whole(model, &ids, compute);
    let tolerance = match compute {
        Compute::F32 => SUMS,
        _ => ROUNDED_SUMS,
    };
    assert!(!whole.is_empty(), "{what}: something is trained");
    let names = |bits: &Bits| bits.1.keys().cloned().collect::<Vec<_>>();
    assert_eq!(whole.keys().cloned().collect::<Vec<_>>(), names(&expected));
    assert_eq!(names(&expected), names(&found), "{what}");
    for (name, gradient) in &expected.1 {
        assert!(*gradient == found.1[name], "{what}: {name} differs");
        let whole = &whole[name];
        let size = whole.iter().fold(0f32, |max, g| max.max(g.abs()));
        let pairs = gradient.iter().map(|g| f32::from_bits(*g)).zip(whole);
        let error = pairs.fold(0f32, |max, (a, b)| max.max((a - b).abs()));
        assert!(
            error <= tolerance * size,
            "{what}: {name} is off by {error} of {size}"
        );
    }
}

#[test]
fn gradients_of_updates_are_those_of_a_plain_pass() {
    let device = Device::flex().autodiff();
    for name in MODELS {
        for compute in [Compute::F32, Compute::Bf16] {
            let model = adapted(name, &["all-linear"], &device);
            assert_same(&model, &device, compute, &format!("{name} {compute:?}"));
        }
    }
}

#[test]
fn layers_below_the_first_update_are_left_out() {
    let device = Device::flex().autodiff();
    let model = adapted("deepseek_v3", &["layers.1.self_attn.o_proj"], &device);
    assert_same(&model, &device, Compute::F32, "one module");
}

#[test]
fn gradients_of_all_weights_are_those_of_a_plain_pass() {
    let device = Device::flex().autodiff();
    for name in ["deepseek_v2_lite", "deepseek_v3", "qwen2_distill"] {
        let model = open(name, Training::Full, &device);
        assert_same(&model, &device, Compute::F32, name);
    }
}

#[test]
fn a_replayed_choice_is_taken_as_it_is() {
    let device = Device::flex();
    let model = open("deepseek_v3", Training::Frozen, &device);
    let ids = ids(&model, &device);
    let run = |replay| {
        let mut recorder = Recorder::of_routing();
        let mut ctx = ForwardContext {
            replay,
            ..ForwardContext::recorded(Compute::F32, &mut recorder)
        };
        model.hidden(ids.clone(), &mut ctx);
        assert!(ctx.replay.is_none(), "one layer takes it");
        recorder.routing[0].routed.ids.clone()
    };
    let own = run(None);
    let replayed = run(Some(own.zeros_like() + 1));
    let replayed: Vec<i32> = replayed.into_data().iter().collect();
    assert!(replayed.iter().all(|id| *id == 1), "{replayed:?}");
}
