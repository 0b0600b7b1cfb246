//! The keys of a `config.json` that are not read: those that change nothing, and those that other programs compute with and
//! this one does not.
//!
//! What is read is on no list: asking for a key records it ([`super::fields`]). A key that is neither read nor here is unknown,
//! and is named when a model is opened.
//!
//! Sources: the classes of huggingface/transformers 5.24 and 4.33 to 4.57, vllm-project/vllm, and the `config.json` of the
//! published models.

use serde_json::{Value, json};

use super::Family;
use super::fields::Fields;
use crate::Error;

/// Keys of any model that change nothing in what it computes.
const DESCRIPTION_KEYS: &[&str] = &[
    // What made the file, and for which class.
    "_name_or_path",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "architectures",
    "attn_implementation",
    "auto_map",
    "model_type",
    "transformers_version",
    "transformers.js_config",
    "unsloth_fixed",
    "unsloth_version",
    "custom_pipelines",
    "finetuning_task",
    "task_specific_params",
    "problem_type",
    "tokenizer_class",
    // Numbers come in the formats of the tensors.
    "dtype",
    "torch_dtype",
    // How other programs run or return it.
    "chunk_size_feed_forward",
    "ep_size",
    "gradient_checkpointing",
    "is_decoder",
    "is_encoder_decoder",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pretraining_tp",
    "return_dict",
    "return_dict_in_generate",
    "tie_encoder_decoder",
    "torchscript",
    "use_bfloat16",
    "use_cache",
    "use_return_dict",
    "use_return_dict_in_generate",
    // Classifiers' labels.
    "id2label",
    "label2id",
    // Training of the router, which a recipe decides.
    "aux_loss_alpha",
    "router_aux_loss_coef",
    "seq_aux",
    // Tokens: generation and the tokenizer read them.
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "decoder_start_token_id",
    // Defaults of sampling, which have a file of their own.
    "bad_words_ids",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "begin_suppress_tokens",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    // Of encoders.
    "add_cross_attention",
    "cross_attention_hidden_size",
    "prefix",
    "pruned_heads",
    "tf_legacy_loss",
];

/// Keys of one kind of model that change nothing: what follows from others, or belongs to what is switched off.
const OF_LATENT_ATTENTION: &[&str] = &["head_dim", "qk_head_dim"];
const OF_QWEN2: &[&str] = &[
    "max_window_layers",
    "sliding_window",
    "use_mrope",
    "use_sliding_window",
];
/// Of block FP8: which weights have it, their dtypes say.
const OF_QUANTIZATION: &[&str] = &[
    "quantization_config.dequantize",
    "quantization_config.modules_to_not_convert",
    "quantization_config.ignored_layers",
    "quantization_config.use_deep_gemm",
];

/// Keys that would change the result, and the only values that do not.
fn neutral_values() -> [(&'static str, Value); 15] {
    let off = || json!(false);
    [
        ("attention_multiplier", Value::Null),
        ("attn_logit_softcapping", Value::Null),
        ("clip_qkv", Value::Null),
        ("embedding_multiplier", json!(1)),
        ("final_logit_softcapping", Value::Null),
        ("logit_scale", json!(1)),
        ("logits_scaling", json!(1)),
        ("qk_layernorm", off()),
        ("residual_multiplier", json!(1)),
        ("use_dual_chunk_attention", off()),
        ("use_mrope", off()),
        ("use_parallel_residual", off()),
        ("use_qk_norm", off()),
        ("index_topk", Value::Null),
        ("is_causal", json!(true)),
    ]
}

/// Keys of training that are not built, and change nothing if they are zero.
const DROPOUTS: [&str; 5] = [
    "attention_dropout",
    "embd_pdrop",
    "hidden_dropout",
    "resid_pdrop",
    "router_jitter_noise",
];

/// Whether a key has a value that changes nothing.
pub(super) fn is_off(key: &str, value: &Value) -> bool {
    DROPOUTS.contains(&key) && value.as_f64() == Some(0.0)
}

/// Refuses what would change the result.
pub(super) fn check_neutral(keys: &Fields<'_>) -> Result<(), Error> {
    for (key, neutral) in neutral_values() {
        keys.only(key, &[neutral])?;
    }
    Ok(())
}

/// The harmless keys of a family.
pub(super) fn harmless(family: Family) -> [&'static [&'static str]; 3] {
    let of_family = match family {
        Family::DeepseekV2 | Family::DeepseekV3 => OF_LATENT_ATTENTION,
        Family::Qwen2 => OF_QWEN2,
        Family::Llama => &[],
    };
    [DESCRIPTION_KEYS, of_family, OF_QUANTIZATION]
}
