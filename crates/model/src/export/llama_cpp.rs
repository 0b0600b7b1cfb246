//! What another program computes with our GGUF files.

use kernels::GroupScore;

use crate::config::{AttentionConfig, ModelConfig, RopeScaling};

/// What llama.cpp computes otherwise with a model in a GGUF, or cannot open: sentences, none if it agrees.
///
/// Source: ggml-org/llama.cpp, commit 0c1e570: src/llama-context.cpp, src/llama-graph.cpp, src/models/deepseek2.cpp.
pub fn llama_cpp_differences(config: &ModelConfig) -> Vec<String> {
    let mut found = Vec::new();
    let mut add = |text: String| found.push(text);
    let mla = match &config.attention {
        AttentionConfig::Mla(mla) => Some(mla),
        AttentionConfig::Gqa(_) => None,
    };
    match config.rope.scaling {
        RopeScaling::Yarn {
            beta_fast,
            beta_slow,
            ..
        } if [beta_fast, beta_slow] != [32.0, 1.0] => add(format!(
            "it takes 32 and 1 for `beta_fast` {beta_fast} and `beta_slow` {beta_slow}"
        )),
        RopeScaling::Yarn { mscale_all_dim, .. } if mla.is_some() && mscale_all_dim == 0.0 => {
            add(
                "it scales the softmax by YaRN's temperature, though there is no `mscale_all_dim`"
                    .into(),
            );
        }
        RopeScaling::Linear { .. } if mla.is_some() => {
            add(
                "it scales the softmax by a temperature, though the rotary scaling is linear"
                    .into(),
            );
        }
        _ => {}
    }
    if let Some(choice) = config
        .moe
        .as_ref()
        .map(|moe| moe.choice)
        .filter(|c| c.n_group > 1)
    {
        if choice.topk_group >= choice.n_group {
            add("it cannot open the file: it expects `topk_group` below `n_group`".into());
        } else if choice.group_score == GroupScore::Max {
            add("it chooses groups of experts by their two best scores, not by the best".into());
        }
    }
    if let Some(mla) = mla {
        let layers = config.num_hidden_layers;
        // It tells the two kinds of query projection by these numbers alone.
        let is_lite = matches!(layers, 26 | 27) || (layers, config.vocab_size) == (48, 128_256);
        match mla.q_lora_rank {
            None if !is_lite => add(format!(
                "it cannot open the file: without `q_lora_rank` it expects 26 or 27 layers, not {layers}"
            )),
            Some(_) if is_lite => add(format!(
                "it cannot open the file: with {layers} layers it expects no `q_lora_rank`"
            )),
            _ => {}
        }
    }
    found
}
