//! Logits of the golden models over caches of fewer bits, compared with logits of the whole input.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]
#![expect(
    clippy::print_stdout,
    reason = "figures for whoever runs these with --no-capture"
)]

#[path = "../../../tests/goldens/paths.rs"]
mod goldens;

use std::path::Path;

use burn::tensor::{Device, Int, Tensor, TensorData};
use checkpoint::{Folder, Safetensors};
use moeforge_model::{Cache, CacheType, Compute, ForwardContext, Model, Training, load};

const ALL: [&str; 7] = [
    "deepseek_v2_lite",
    "deepseek_v2_group",
    "deepseek_v3",
    "deepseek_v3_fp8",
    "deepseek_v3_fp8_ue8m0",
    "qwen2_distill",
    "llama_distill",
];

/// `[batch, seq]`.
fn golden_ids(folder: &Path, device: &Device) -> Tensor<2, Int> {
    let tensors = Safetensors::open(&folder.join("golden.safetensors")).unwrap();
    let tensor = tensors.tensor("input_ids").unwrap();
    let ids = tensor.bytes.as_chunks().0.iter();
    let ids: Vec<i32> = ids.map(|id| i64::from_le_bytes(*id) as i32).collect();
    let shape = [tensor.shape[0], tensor.shape[1]];
    Tensor::from_data(TensorData::new(ids, shape), device)
}

/// `[batch · seq, vocab]`.
fn logits(model: &Model, ids: Tensor<2, Int>, ctx: &mut ForwardContext<'_>) -> Vec<f32> {
    let [batch, seq] = ids.dims();
    let hidden = model.hidden(ids, ctx);
    let hidden = hidden.reshape([batch * seq, model.config.hidden_size]);
    let logits = model.logits(hidden, ctx).into_data();
    logits.try_to_vec().unwrap()
}

/// What rounding the cache may change of a position's logits, relative to their root mean square: five times half a step of
/// a typical number, over three or four layers. In blocks the step is of the largest of 32, some 2.5 times the typical one.
const ROUNDED: [(CacheType, f64); 3] = [
    (CacheType::F16, 5.0 / 4096.0),
    (CacheType::Bf16, 5.0 / 512.0),
    (CacheType::Q8_0, 5.0 * 2.5 / 254.0),
];

/// The root mean square of the differences of two positions' logits, relative to that of the second's.
fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    let squares = |values: &mut dyn Iterator<Item = f32>| -> f64 {
        values.map(|value| f64::from(value).powi(2)).sum()
    };
    let differences = &mut found.iter().zip(expected).map(|(a, b)| a - b);
    (squares(differences) / squares(&mut expected.iter().copied())).sqrt()
}

#[test]
fn logits_over_rounded_caches_are_near_the_full_ones() {
    let device = kernels::device::of_tests();
    for name in ALL {
        let folder = goldens::path(name);
        let ids = golden_ids(&folder, &device);
        let folder = Folder::open(&folder).unwrap();
        let model = load::load(&folder, Training::Frozen, &device).unwrap();
        let ([batch, seq], vocab) = (ids.dims(), model.config.vocab_size);
        let full = logits(&model, ids.clone(), &mut ForwardContext::new(Compute::F32));
        for (cache_type, most) in ROUNDED {
            // Position by position, and in pieces that rebuild keys and values.
            for piece in [1, 9, seq] {
                let mut caches = vec![Cache::new(&model.config, cache_type); batch];
                let mut errors = Vec::new();
                for start in (0..seq).step_by(piece) {
                    let end = seq.min(start + piece);
                    let some = ids.clone().slice([0..batch, start..end]);
                    let found = logits(
                        &model,
                        some,
                        &mut ForwardContext::cached(Compute::F32, &mut caches),
                    );
                    for (row, found) in found.chunks((end - start) * vocab).enumerate() {
                        let expected = &full[(row * seq + start) * vocab..];
                        let both = found.chunks(vocab).zip(expected.chunks(vocab));
                        errors
                            .extend(both.map(|(found, expected)| relative_error(found, expected)));
                    }
                }
                // Of a mixture some positions choose other experts, and are far off.
                errors.sort_by(f64::total_cmp);
                let error = errors[errors.len() / 2];
                println!("{name}: {cache_type:?}, {piece} at a time: {error:.1e}");
                assert!(error > 0.0 && error < most, "{name} {cache_type:?} {error}");
            }
        }
    }
}
