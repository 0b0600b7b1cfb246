//! What a forward pass asks of a GPU: launches and nothing else.

use std::path::Path;

use burn::tensor::{Int, Tensor, TensorData};
use checkpoint::Folder;
use kernels::device;
use moeforge_model::RotaryTable;
use moeforge_model::{Compute, ForwardContext, Training, load};

/// The layers of every family, from ids that are on the device to logits: recorded, which fails at an upload and panics
/// at a read.
#[test]
fn gpu_layers_upload_nothing_and_read_nothing() {
    let device = device::of_tests();
    if !device::is_gpu(&device) {
        return;
    }
    for name in [
        "deepseek_v2_lite",
        "deepseek_v3",
        "deepseek_v3_fp8",
        "qwen2_distill",
        "llama_distill",
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../tests/goldens")
            .join(name);
        let folder = Folder::open(&path).unwrap();
        let model = load::load(&folder, Training::Frozen, &device).unwrap();
        let (seq, config) = (9, &model.config);
        let ids: Vec<i32> = (0..seq as i32).map(|i| i * 7 % 50).collect();
        let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [seq]), &device);
        let rotary = RotaryTable::new(&config.rope, 0..seq, config.rope_dim(), &device);
        let recorded = device::recorded(&device, || {
            let mut ctx = ForwardContext::new(Compute::F32);
            ctx.rotary = Some(rotary.clone());
            let mut x = model.model.embed_tokens.forward(ids.clone());
            for (layer_idx, layer) in model.model.layers.iter().enumerate() {
                x = layer.forward(x, [1, seq], &mut ctx, layer_idx);
            }
            model.logits(model.model.norm.forward(x), &ctx)
        });
        assert_eq!(recorded, Ok(()), "{name}");
    }
    // What the test would see if there were an upload.
    let uploads = device::recorded(&device, || {
        Tensor::<1>::from_floats([1.0, 2.0], &device) * 2.0
    });
    assert!(uploads.is_err());
}

/// The same weights in one piece and cut into many.
#[test]
fn gpu_logits_are_the_same_however_weights_are_cut() {
    let device = device::of_tests();
    if !device::is_gpu(&device) {
        return;
    }
    for name in ["deepseek_v2_lite", "deepseek_v3_fp8"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../tests/goldens")
            .join(name);
        let folder = Folder::open(&path).unwrap();
        let logits = |limit| {
            device::limit_shard_bytes(limit);
            let model = load::load(&folder, Training::Frozen, &device).unwrap();
            device::limit_shard_bytes(usize::MAX);
            let ids = Tensor::<2, Int>::from_ints([[1, 7, 30, 2, 9]], &device);
            let mut ctx = ForwardContext::new(Compute::F32);
            let hidden = model.hidden(ids, &mut ctx);
            let [_, seq, width] = hidden.dims();
            let logits = model.logits(hidden.reshape([seq, width]), &ctx).into_data();
            logits.try_to_vec::<f32>().unwrap()
        };
        assert_eq!(logits(4096), logits(usize::MAX), "{name}");
    }
}
