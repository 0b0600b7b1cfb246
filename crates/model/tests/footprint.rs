//! Bytes that the headers of a file tell, against those of the model that is opened from it.

use checkpoint::Folder;
use moeforge_model::CacheType;
use moeforge_model::footprint::FrozenBytes;
use moeforge_model::load::{self, Training};

#[path = "../../../tests/goldens/paths.rs"]
mod goldens;

/// What is f32 in memory, whatever it is in the file: routers.
const ROUTERS: f64 = 0.02;

#[test]
fn headers_tell_what_a_token_reads() {
    let device = kernels::device::of_tests();
    for name in [
        "deepseek_v2_lite",
        "deepseek_v3",
        "deepseek_v3_fp8",
        "qwen2_distill",
        "llama_distill",
        "gguf/deepseek_v3_q8_0.gguf",
        "gguf/llama_q4_1.gguf",
    ] {
        let folder = Folder::open(&goldens::path(name)).unwrap();
        let config = load::read_config(&folder).unwrap();
        let told = FrozenBytes::of(&folder, &config, &|_| true).unwrap().mapped;
        let model = load::load(&folder, Training::Frozen, &device).unwrap();
        let pairs = [
            (told.experts, model.expert_bytes() as f64),
            (told.common(), model.common_bytes() as f64),
            (
                told.per_token(&config),
                model.decode_traffic(1, 0.0, CacheType::F32).weights,
            ),
        ];
        for (told, found) in pairs {
            assert!((told - found).abs() <= ROUTERS * found, "{name}: {pairs:?}");
        }
    }
}
