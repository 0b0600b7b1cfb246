//! Names of tensors: in a GGUF, and in the folder that it was converted from.
//!
//! Source: ggml-org/llama.cpp: gguf-py/gguf/{constants,tensor_mapping}.py.

/// Names of a layer's parts: in a GGUF, and in a Hugging Face folder. The halves of a `kv_b_proj` have the converter's own names
/// in the folder.
const LAYER: [(&str, &str); 27] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_a", "self_attn.q_a_proj"),
    ("attn_q_a_norm", "self_attn.q_a_layernorm"),
    ("attn_q_b", "self_attn.q_b_proj"),
    ("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
    ("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
    ("attn_kv_b", "self_attn.kv_b_proj"),
    ("attn_k_b", "self_attn.k_b_proj"),
    ("attn_v_b", "self_attn.v_b_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_gate_inp", "mlp.gate"),
    ("ffn_gate_shexp", "mlp.shared_experts.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_experts.up_proj"),
    ("ffn_down_shexp", "mlp.shared_experts.down_proj"),
    // Multi-token prediction.
    ("nextn.eh_proj", "eh_proj"),
    ("nextn.embed_tokens", "embed_tokens"),
    ("nextn.enorm", "enorm"),
    ("nextn.hnorm", "hnorm"),
    ("nextn.shared_head_head", "shared_head.head"),
    ("nextn.shared_head_norm", "shared_head.norm"),
];
/// The end of the up-projection's name, which a GGUF splits.
pub(crate) const KV_B: &str = ".kv_b_proj.weight";
/// A router's bias: the only tensor whose kind is not the last word of both its names.
pub(crate) const ROUTER_BIAS: (&str, &str) =
    ("exp_probs_b.bias", "mlp.gate.e_score_correction_bias");
/// A llama's modules that may have a bias or not.
pub(crate) const ATTENTION_BIASES: [&str; 4] = ["attn_q", "attn_k", "attn_v", "attn_output"];
pub(crate) const FEED_FORWARD_BIASES: [&str; 3] = ["ffn_gate", "ffn_up", "ffn_down"];
/// Names outside the layers.
const MODEL: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];
/// A layer's stacked experts, and the projections of an expert in the stack.
const STACKED: [(&str, &[&str]); 4] = [
    ("ffn_gate_exps", &["gate_proj"]),
    ("ffn_up_exps", &["up_proj"]),
    ("ffn_down_exps", &["down_proj"]),
    ("ffn_gate_up_exps", &["gate_proj", "up_proj"]),
];

/// The name of a tensor in the folder. An unknown name stays.
pub(crate) fn key(name: &str) -> String {
    if let Some((_, key)) = MODEL.iter().find(|known| known.0 == name) {
        return (*key).to_owned();
    }
    let in_layer = || {
        let (layer, rest) = in_layer(name)?;
        if rest == ROUTER_BIAS.0 {
            return Some(format!("model.layers.{layer}.{}", ROUTER_BIAS.1));
        }
        let (part, kind) = rest.rsplit_once('.')?;
        let (_, key) = LAYER.iter().find(|known| known.0 == part)?;
        Some(format!("model.layers.{layer}.{key}.{kind}"))
    };
    in_layer().unwrap_or_else(|| name.to_owned())
}

/// Whether a tensor is the bias of one of a layer's modules.
pub(crate) fn is_bias_of(name: &str, parts: &[&str]) -> bool {
    let part = in_layer(name).and_then(|(_, rest)| rest.strip_suffix(".bias"));
    part.is_some_and(|part| parts.contains(&part))
}

/// The layer number and the projections of a layer's stacked experts.
pub(crate) fn stacked(name: &str) -> Option<(u32, &'static [&'static str])> {
    let (layer, rest) = in_layer(name)?;
    let part = rest.strip_suffix(".weight")?;
    let (_, projections) = STACKED.iter().find(|known| known.0 == part)?;
    Some((layer, projections))
}

/// The name of an expert's projection in the folder.
pub(crate) fn expert(layer: u32, expert: usize, projection: &str) -> String {
    format!("model.layers.{layer}.mlp.experts.{expert}.{projection}.weight")
}

/// The name of a folder's tensor in the GGUF. An unknown name stays.
pub(crate) fn name(key: &str) -> String {
    if let Some((name, _)) = MODEL.iter().find(|known| known.1 == key) {
        return (*name).to_owned();
    }
    let in_layer = || {
        let (layer, rest) = layer_of(key)?;
        if rest == ROUTER_BIAS.1 {
            return Some(format!("blk.{layer}.{}", ROUTER_BIAS.0));
        }
        let (module, kind) = rest.rsplit_once('.')?;
        let (part, _) = LAYER.iter().find(|known| known.1 == module)?;
        Some(format!("blk.{layer}.{part}.{kind}"))
    };
    in_layer().unwrap_or_else(|| key.to_owned())
}

/// The name of the stack of an expert's tensor; none for other tensors.
pub(crate) fn stack(key: &str) -> Option<String> {
    let (layer, rest) = layer_of(key)?;
    let rest = rest.strip_prefix("mlp.experts.")?.strip_suffix(".weight")?;
    let (_, projection) = rest.split_once('.')?;
    let of_one = |known: &&(&str, &[&str])| known.1 == [projection];
    let (part, _) = STACKED.iter().find(of_one)?;
    Some(format!("blk.{layer}.{part}.weight"))
}

/// The number of a layer of the folder, and a tensor's name there.
fn layer_of(key: &str) -> Option<(u32, &str)> {
    let (layer, rest) = key.strip_prefix("model.layers.")?.split_once('.')?;
    Some((layer.parse().ok()?, rest))
}

/// The number of a tensor's layer, and its name there.
fn in_layer(name: &str) -> Option<(u32, &str)> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    Some((layer.parse().ok()?, rest))
}
