//! Fake-quantized models, compared with models that were written and read again.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]
#![expect(clippy::print_stdout, reason = "the figures are worth reading")]

#[path = "../../../tests/goldens/paths.rs"]
mod goldens;

use burn::tensor::{Device, Int, Tensor, TensorData};
use checkpoint::Folder;
use moeforge_model::adapt::AdapterWeights;
use moeforge_model::adapt::{self, LoraConfig, Scaling};
use moeforge_model::export::WeightFormat;
use moeforge_model::export::{convert, merge};
use moeforge_model::{Compute, ForwardContext, Model, Quantizer, Training, load};

fn golden(name: &str) -> Folder {
    Folder::open(&goldens::path(name)).unwrap()
}

fn load(folder: &Folder) -> Model {
    load::load(folder, Training::Frozen, &Device::flex()).unwrap()
}

fn logits(model: &Model) -> Vec<f32> {
    const SEQ: usize = 40;
    let ids: Vec<i32> = (0..SEQ as i32).map(|i| i * i % 280).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, SEQ]), &Device::flex());
    let mut ctx = ForwardContext::new(Compute::F32);
    let hidden = model.hidden(ids, &mut ctx);
    let width = hidden.dims()[2];
    let logits = model.logits(hidden.reshape([SEQ, width]), &ctx);
    logits.into_data().try_to_vec().unwrap()
}

/// Root mean square of the differences, relative to that of the values.
fn difference(found: &[f32], expected: &[f32]) -> f32 {
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>();
    let difference = squares(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    (difference / squares(&mut expected.iter().copied())).sqrt()
}

/// A model with an adapter that has an effect.
fn adapted(folder: &Folder) -> (Model, AdapterWeights) {
    let device = Device::flex().autodiff();
    let mut model = load::load(folder, Training::Frozen, &device).unwrap();
    let config = LoraConfig {
        target: vec!["o_proj".into(), "experts".into(), "kv_b_proj".into()],
        exclude: vec![],
        rank: 3,
        alpha: 6.0,
        scaling: Scaling::Plain,
        rank_pattern: vec![],
        alpha_pattern: vec![],
        dropout: 0.0,
        seed: 5,
        use_dora: false,
        experts_share: None,
    };
    adapt::attach(&mut model, &config, &device).unwrap();
    model.map_parameters(&mut |_, values| values + 0.02);
    let adapter = AdapterWeights::from_model(&model, Scaling::Plain, 0.0);
    let mut plain = load(folder);
    adapter.attach(&mut plain, &Device::flex()).unwrap();
    (plain, adapter)
}

#[test]
fn a_model_read_as_fp8_computes_what_its_fp8_merge_computes() {
    for name in ["deepseek_v3", "deepseek_v3_fp8", "deepseek_v3_fp8_ue8m0"] {
        let folder = golden(name);
        let (mut model, adapter) = adapted(&folder);
        let unrounded = logits(&model);
        let quantizer: Quantizer = "fp8".parse().unwrap();
        let formats = model.fake_quantize(quantizer, &mut |_| true).unwrap();
        assert!(formats["fp8"] > 30 && formats.len() == 1, "{formats:?}");
        let found = logits(&model);

        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("merged");
        merge(&folder, &adapter, WeightFormat::Fp8, &out, &mut |_, _| {}).unwrap();
        let expected = logits(&load(&Folder::open(&out).unwrap()));
        let (same, rounded) = (
            difference(&found, &expected),
            difference(&unrounded, &expected),
        );
        println!("{name}: {same:.1e} from the export, which is {rounded:.1e} from the adapter");
        // Sums in another order fall on another side of a rounding edge here and there.
        assert!(same < 1e-3 && rounded > 1e-2, "{name}: {same} {rounded}");
    }
}

#[test]
fn one_module_can_be_rounded_and_the_router_is_never() {
    let folder = golden("deepseek_v3");
    let mut paths = Vec::new();
    let mut look = |path: &str| {
        paths.push(path.to_owned());
        false
    };
    let none = load(&folder).fake_quantize("gguf:q4_0".parse().unwrap(), &mut look);
    assert!(none.unwrap().is_empty());
    // Rows of 24 are no whole blocks of 32.
    let formats = load(&folder).fake_quantize("gguf:q4_0".parse().unwrap(), &mut |_| true);
    let formats = formats.unwrap();
    assert!(
        formats["gguf:f16"] >= 24 && formats["gguf:q4_0"] > 24,
        "{formats:?}"
    );
    assert!(paths.iter().any(|path| path.ends_with("mlp.experts")));
    assert!(
        !paths
            .iter()
            .any(|path| path.ends_with("mlp.gate") || path.contains("lm_head"))
    );
    let exact = logits(&load(&folder));
    let rounded = |format: &str, chosen: &str| {
        let mut model = load(&folder);
        let quantizer = format.parse().unwrap();
        model
            .fake_quantize(quantizer, &mut |path| path.contains(chosen))
            .unwrap();
        difference(&logits(&model), &exact)
    };
    let (one, all) = (
        rounded("gguf:q4_0", "layers.0.self_attn.o_proj"),
        rounded("gguf:q4_0", ""),
    );
    assert!(0.0 < one && one < all, "{one} {all}");
    let finer = rounded("gguf:q8_0", "");
    assert!(finer < all, "{finer} {all}");
    assert_eq!(rounded("gguf:q8_0", "no such module"), 0.0);
}

#[test]
fn a_converted_model_is_the_same_model_in_another_format() {
    let place = tempfile::tempdir().unwrap();
    let folder = golden("deepseek_v3");
    let out = place.path().join("fp8");
    let report = convert(&folder, WeightFormat::Fp8, &out, &mut |_, _| {}).unwrap();
    assert_eq!(report.adapted, 0);
    let errors = report.errors.iter().map(|(_, error)| *error);
    // E4M3 has 3 bits of mantissa: a rounding is off by a 16th at most, evenly distributed by a 36th or so.
    assert!(errors.clone().all(|error| error < 0.04), "{report:?}");
    assert!(errors.fold(0.0, f64::max) > 0.01, "{report:?}");
    let fp8 = Folder::open(&out).unwrap();

    // FP8 to FP8 copies every byte; FP8 to f32 and on to FP8 has the same values again.
    let again = place.path().join("again");
    convert(&fp8, WeightFormat::Fp8, &again, &mut |_, _| {}).unwrap();
    let again = Folder::open(&again).unwrap();
    for name in fp8.names() {
        assert_eq!(
            fp8.tensor(name).unwrap().bytes,
            again.tensor(name).unwrap().bytes,
            "{name}"
        );
    }
    let wide = place.path().join("f32");
    convert(&fp8, WeightFormat::F32, &wide, &mut |_, _| {}).unwrap();
    let wide = Folder::open(&wide).unwrap();
    assert_eq!(logits(&load(&wide)), logits(&load(&fp8)));
}
