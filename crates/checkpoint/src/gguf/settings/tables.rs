//! The keys of a GGUF's metadata, with what they are in a `config.json`.
//!
//! Reading and writing go by the same rows. A key that is read is obeyed: reading records it, so these lists cannot differ from
//! the code; a key that is neither read nor on a list here is unknown.
//!
//! Source: ggml-org/llama.cpp: gguf-py/gguf/constants.py, src/llama-model.cpp, conversion/{base,deepseek}.py.

/// What a setting is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Count,
    Number,
    Flag,
}
pub(super) use Kind::{Count, Flag, Number};

/// Whether a setting is required.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    Required,
    Optional,
}
pub(super) use Need::{Optional, Required};

/// Keys of the metadata after the architecture's name, and of a `config.json`. A key that is read is obeyed: it is recorded, and
/// every other is either on a list below or unknown.
pub(super) type KeyTable = [(&'static str, &'static str, Kind, Need)];

pub(super) const COMMON: &KeyTable = &[
    ("embedding_length", "hidden_size", Count, Required),
    ("feed_forward_length", "intermediate_size", Count, Required),
    (BLOCKS, "num_hidden_layers", Count, Required),
    (HEADS, "num_attention_heads", Count, Required),
    (
        "attention.layer_norm_rms_epsilon",
        "rms_norm_eps",
        Number,
        Required,
    ),
    ("context_length", "max_position_embeddings", Count, Required),
];
pub(super) const GROUPED_QUERIES: &KeyTable = &[
    (KEY_HEADS, "num_key_value_heads", Count, Optional),
    ("attention.key_length", "head_dim", Count, Optional),
];
pub(super) const DEEPSEEK: &KeyTable = &[
    ("attention.q_lora_rank", "q_lora_rank", Count, Optional),
    ("attention.kv_lora_rank", "kv_lora_rank", Count, Required),
    (ROPE_DIM, "qk_rope_head_dim", Count, Required),
    (
        "leading_dense_block_count",
        "first_k_dense_replace",
        Count,
        Optional,
    ),
    (
        "expert_feed_forward_length",
        "moe_intermediate_size",
        Count,
        Required,
    ),
    (EXPERT_COUNT, "n_routed_experts", Count, Optional),
    ("expert_shared_count", "n_shared_experts", Count, Optional),
    ("expert_used_count", "num_experts_per_tok", Count, Optional),
    (EXPERT_SCALE, "routed_scaling_factor", Number, Optional),
    ("expert_weights_norm", "norm_topk_prob", Flag, Optional),
    ("expert_group_count", "n_group", Count, Optional),
    ("expert_group_used_count", "topk_group", Count, Optional),
    (MODULES, "num_nextn_predict_layers", Count, Optional),
];
/// What absent keys of a mixture mean here. In a `config.json` they would mean something else.
pub(super) const ABSENT_IN_DEEPSEEK: [(&str, &str); 6] = [
    ("first_k_dense_replace", "0"),
    ("n_shared_experts", "0"),
    ("routed_scaling_factor", "1.0"),
    ("norm_topk_prob", "false"),
    ("n_group", "1"),
    ("topk_group", "1"),
];
pub(super) const ROPE_SCALING: &KeyTable = &[
    (ROPE_FACTOR, "factor", Number, Optional),
    (
        "rope.scaling.original_context_length",
        "original_max_position_embeddings",
        Count,
        Optional,
    ),
    ("rope.scaling.yarn_beta_fast", "beta_fast", Number, Optional),
    ("rope.scaling.yarn_beta_slow", "beta_slow", Number, Optional),
    // Written by llama.cpp's converter, and not read by llama.cpp for these architectures.
    (
        "rope.scaling.yarn_attn_factor",
        "attention_factor",
        Number,
        Optional,
    ),
];
/// Keys that llama.cpp computes with, and the only values of them that change nothing.
pub(super) const NEUTRAL: [(&str, &[&str]); 17] = [
    ("attention.causal", &["true"]),
    ("attention.clamp_kqv", &["0"]),
    ("attention.max_alibi_bias", &["0"]),
    ("attention.scale", &["0"]),
    ("attention.output_scale", &["0", "1"]),
    ("attention.sliding_window", &["0"]),
    ("attention.temperature_length", &["0"]),
    ("attention.temperature_scale", &["0"]),
    ("attn_logit_softcapping", &["0"]),
    ("router_logit_softcapping", &["0"]),
    ("final_logit_softcapping", &["0"]),
    ("embedding_scale", &["0", "1"]),
    ("logit_scale", &["0", "1"]),
    ("residual_scale", &["0", "1"]),
    ("use_parallel_residual", &["false"]),
    ("rope.scaling.alpha", &["0"]),
    ("rope.scaling.yarn_ext_factor", &["1"]),
];
/// The same in models without experts.
pub(super) const NEUTRAL_IN_DENSE: [(&str, &[&str]); 2] =
    [(EXPERT_COUNT, &["0"]), ("expert_used_count", &["0"])];
/// Keys after the architecture's name that change nothing.
pub(super) const HARMLESS: [&str; 2] = ["rope.scaling.finetuned", "pooling_type"];
/// Keys before it that change nothing: what a file is, where it is from, how it was made.
pub(super) const DESCRIPTIONS: [&str; 22] = [
    "general.alignment",
    "general.architecture",
    "general.author",
    "general.basename",
    "general.datasets",
    "general.description",
    "general.doi",
    "general.file_type",
    "general.finetune",
    "general.languages",
    "general.license",
    "general.name",
    "general.organization",
    "general.quantized_by",
    "general.repo_url",
    "general.size_label",
    "general.tags",
    "general.url",
    "general.uuid",
    "general.version",
    "split.tensors.count",
    "split.no",
];
/// Beginnings of such keys.
pub(super) const DESCRIBED: [&str; 5] = [
    "general.base_model.",
    "general.dataset.",
    "general.license.",
    "general.source.",
    "quantize.imatrix.",
];
/// Keys that other code reads.
pub(super) const READ_ELSEWHERE: [&str; 2] = ["tokenizer.", "split."];
/// Recommended sampling, in the metadata and in a `generation_config.json`.
pub(super) const SAMPLING: [(&str, &str, Kind); 4] = [
    ("general.sampling.temp", "temperature", Number),
    ("general.sampling.top_k", "top_k", Count),
    ("general.sampling.top_p", "top_p", Number),
    ("general.sampling.min_p", "min_p", Number),
];
/// The number of layers with those for multi-token prediction, and the number of the latter.
pub(super) const BLOCKS: &str = "block_count";
pub(super) const MODULES: &str = "nextn_predict_layers";
pub(super) const HEADS: &str = "attention.head_count";
pub(super) const KEY_HEADS: &str = "attention.head_count_kv";
pub(super) const ROPE_DIM: &str = "rope.dimension_count";
pub(super) const ROPE_FACTOR: &str = "rope.scaling.factor";
/// Multiplies YaRN's own factor of cosines and sines.
pub(super) const ATTENTION_FACTOR: &str = "rope.scaling.attn_factor";
pub(super) const EXPERT_SCALE: &str = "expert_weights_scale";
pub(super) const EXPERT_COUNT: &str = "expert_count";
/// The scoring function of a router, as a number.
pub(super) const GATING: &str = "expert_gating_func";
pub(super) const SOFTMAX: u64 = 1;
pub(super) const SIGMOID: u64 = 2;
/// A deepseek2's `mscale_all_dim`, times 0.1 for historical reasons. The converter drops `mscale`: the two are the same in
/// every release, and llama.cpp assumes it.
pub(super) const YARN_LOG_MULTIPLIER: &str = "rope.scaling.yarn_log_multiplier";
pub(super) const YARN_LOG_UNIT: f64 = 0.1;
