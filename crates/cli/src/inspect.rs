//! `inspect`: a model's architecture and tensors, from its config and the headers of its files. No weight is read.

use std::collections::BTreeMap;
use std::process::ExitCode;

use checkpoint::Folder;
use model::Policy;
use model::config::AttentionConfig;
use model::load::{self, Audit};
use model::{Cache, CacheType, Compute, ModelConfig};
use serde_json::{Value, json};

use crate::console::Console;
use crate::open::{listed, note_keys, open_folder};
use crate::plan::lines::parameters;

/// Show a model's architecture, sizes, tensors, weight formats, and KV-cache bytes per token.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Model: Hugging Face folder, GGUF file, or `org/name` in the local Hugging Face cache.
    pub(crate) model: String,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
    /// List all tensors.
    #[arg(long)]
    pub(crate) tensors: bool,
}

/// The tensors of one dtype.
#[derive(Debug, Default)]
struct DtypeTotal {
    count: usize,
    bytes: u64,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let (folder, name) = open_folder(&args.model)?;
    note_keys(&folder, console)?;
    let config = load::read_config(&folder)?;
    let audit = load::audit(&folder)?;
    if args.json {
        let mut object = object(&name, &folder, &config, &audit)?;
        if args.tensors {
            object["all_tensors"] = tensors(&folder)?;
        }
        console.result(format_args!("{object:#}"));
        return Ok(ExitCode::SUCCESS);
    }
    console.result(table(&rows(&name, &folder, &config, &audit)?));
    let policy = Policy::of_checkpoint(&folder, Compute::F32)?;
    console.result(format_args!("\n{policy}"));
    if args.tensors {
        for tensor in folder.names().map(|name| folder.stored(name)) {
            let tensor = tensor?;
            console.result(format_args!(
                "{}  {}  {:?}",
                tensor.name, tensor.dtype, tensor.shape
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn stored(folder: &Folder) -> anyhow::Result<BTreeMap<String, DtypeTotal>> {
    let mut by_dtype: BTreeMap<String, DtypeTotal> = BTreeMap::new();
    for name in folder.names() {
        let tensor = folder.stored(name)?;
        let stored = by_dtype.entry(tensor.dtype.to_string()).or_default();
        stored.count += 1;
        stored.bytes += tensor.bytes.len() as u64;
    }
    Ok(by_dtype)
}

fn object(
    name: &str,
    folder: &Folder,
    config: &ModelConfig,
    audit: &Audit,
) -> anyhow::Result<Value> {
    let parameters = parameters(config);
    let stored = stored(folder)?.into_iter().map(
        |(dtype, stored)| json!({"dtype": dtype, "count": stored.count, "bytes": stored.bytes}),
    );
    let unindexed: Vec<&str> = folder.unindexed().iter().map(|t| &*t.name).collect();
    let mut object = json!({
        "name": name,
        "path": folder.path(),
        "family": config.model_type.name(),
        "num_hidden_layers": config.num_hidden_layers,
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "parameters": {"total": parameters.total, "active": parameters.active},
        "cache_bytes_per_token": cache_bytes(config),
        "tensors": stored.collect::<Vec<_>>(),
        "tensor_bytes": folder.tensor_bytes(),
        "mtp_tensors": audit.mtp.len(),
        "unknown_tensors": audit.unknown,
        "missing_tensors": audit.missing,
        "problem": problem(folder, config),
        "unindexed_tensors": unindexed,
        "precision": Policy::of_checkpoint(folder, Compute::F32)?.to_json(),
    });
    object["attention"] = match &config.attention {
        AttentionConfig::Mla(mla) => json!({
            "form": "mla",
            "q_lora_rank": mla.q_lora_rank,
            "kv_lora_rank": mla.kv_lora_rank,
            "qk_nope_head_dim": mla.qk_nope_head_dim,
            "qk_rope_head_dim": mla.qk_rope_head_dim,
            "v_head_dim": mla.v_head_dim,
        }),
        AttentionConfig::Gqa(gqa) => json!({
            "form": "gqa",
            "num_key_value_heads": gqa.num_key_value_heads,
            "head_dim": gqa.head_dim,
        }),
    };
    object["moe"] = config.moe.as_ref().map_or(Value::Null, |moe| {
        json!({
            "n_routed_experts": moe.n_routed_experts,
            "n_shared_experts": moe.n_shared_experts,
            "num_experts_per_tok": moe.choice.top_k,
            "moe_intermediate_size": moe.moe_intermediate_size,
            "first_k_dense_replace": moe.first_k_dense_replace,
            "n_group": moe.choice.n_group,
            "topk_group": moe.choice.topk_group,
        })
    });
    Ok(object)
}

fn tensors(folder: &Folder) -> anyhow::Result<Value> {
    let mut list = Vec::new();
    for name in folder.names() {
        let tensor = folder.stored(name)?;
        list.push(json!({
            "name": name,
            "dtype": tensor.dtype.to_string(),
            "shape": tensor.shape,
            "bytes": tensor.bytes.len(),
        }));
    }
    Ok(list.into())
}

fn rows(
    name: &str,
    folder: &Folder,
    config: &ModelConfig,
    audit: &Audit,
) -> anyhow::Result<Vec<(&'static str, String)>> {
    let parameters = parameters(config);
    let mut layers = config.num_hidden_layers.to_string();
    if config.num_nextn_predict_layers > 0 {
        let mtp = config.num_nextn_predict_layers;
        layers = format!("{layers}, and {mtp} for multi-token prediction (--speculative)");
    }
    let mut rows = vec![
        ("model", format!("{name} ({})", config.model_type.name())),
        ("path", folder.path().display().to_string()),
        ("layers", layers),
        (
            "widths",
            format!(
                "hidden {}, feed-forward {}",
                config.hidden_size, config.intermediate_size
            ),
        ),
        ("attention", attention(config)),
    ];
    if let Some(moe) = &config.moe {
        let text = format!(
            "{} of {} routed experts per token, {} shared, width {}, from layer {} on",
            moe.choice.top_k,
            moe.n_routed_experts,
            moe.n_shared_experts,
            moe.moe_intermediate_size,
            moe.first_k_dense_replace
        );
        rows.push(("experts", text));
    }
    rows.extend([
        ("vocabulary", config.vocab_size.to_string()),
        ("positions", config.max_position_embeddings.to_string()),
        (
            "parameters",
            format!(
                "{} in total, {} active per token",
                parameters.total, parameters.active
            ),
        ),
        ("KV cache", cache(config)),
    ]);
    for (dtype, stored) in stored(folder)? {
        let DtypeTotal { count, bytes } = stored;
        rows.push(("tensors", format!("{count} {dtype}, {bytes} bytes")));
    }
    rows.extend(notable(folder, config, audit));
    Ok(rows)
}

/// Tensors that are more or less than the config's.
fn notable(folder: &Folder, config: &ModelConfig, audit: &Audit) -> Vec<(&'static str, String)> {
    let mut rows = vec![];
    if !audit.mtp.is_empty() {
        rows.push(("MTP layer", listed(&audit.mtp)));
    }
    if !audit.unknown.is_empty() {
        rows.push(("unknown", listed(&audit.unknown)));
    }
    if !audit.missing.is_empty() {
        rows.push(("missing", listed(&audit.missing)));
    }
    if let Some(problem) = problem(folder, config) {
        rows.push(("cannot run", problem));
    }
    if !folder.unindexed().is_empty() {
        let names = folder.unindexed().iter().map(|t| t.name.to_string());
        rows.push(("unindexed", listed(&names.collect::<Vec<_>>())));
    }
    rows
}

/// Why the tensors are not those of a model of this config, if they are not.
fn problem(folder: &Folder, config: &ModelConfig) -> Option<String> {
    let complete = load::expect_complete(folder, config);
    complete.err().map(|error| error.to_string())
}

/// KV-cache bytes per token, by data type.
fn cache(config: &ModelConfig) -> String {
    let of = |cache_type| {
        let bytes = Cache::bytes_per_token(config, cache_type);
        format!("{bytes} in {}", CacheType::name(cache_type))
    };
    format!("bytes per token: {}", CacheType::ALL.map(of).join(", "))
}

fn cache_bytes(config: &ModelConfig) -> Value {
    let of = |cache_type| {
        let bytes = Cache::bytes_per_token(config, cache_type);
        (CacheType::name(cache_type).to_owned(), bytes.into())
    };
    Value::Object(CacheType::ALL.into_iter().map(of).collect())
}

fn attention(config: &ModelConfig) -> String {
    let heads = config.num_attention_heads;
    match &config.attention {
        AttentionConfig::Mla(mla) => format!(
            "MLA, {heads} heads, KV latent {} + {} for RoPE, query latent {}",
            mla.kv_lora_rank,
            mla.qk_rope_head_dim,
            mla.q_lora_rank
                .map_or_else(|| "none".to_owned(), |rank| rank.to_string())
        ),
        AttentionConfig::Gqa(gqa) => format!(
            "GQA, {heads} query heads, {} KV heads, width {}",
            gqa.num_key_value_heads, gqa.head_dim
        ),
    }
}

fn table(rows: &[(&str, String)]) -> String {
    let lines: Vec<String> = rows
        .iter()
        .map(|(label, text)| format!("{label:<12}{text}"))
        .collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn open(name: &str) -> (Folder, ModelConfig) {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
        let folder = Folder::open(&goldens.join(name)).unwrap();
        let config = load::read_config(&folder).unwrap();
        (folder, config)
    }

    #[test]
    fn parameters_are_those_of_the_files() {
        for name in ["deepseek_v2_lite", "deepseek_v2_group", "llama_distill"] {
            let (folder, config) = open(name);
            let numbers = |tensor: &str| -> u64 {
                let shape = folder.tensor(tensor).unwrap().shape;
                shape.iter().map(|axis| *axis as u64).product()
            };
            let total: u64 = load::audit(&folder)
                .unwrap()
                .used
                .iter()
                .map(|tensor| numbers(tensor))
                .sum();
            let found = parameters(&config);
            assert_eq!(found.total, total, "{name}");
            // An expert has three matrices.
            let inactive = config.moe.as_ref().map_or(0, |moe| {
                let layers = (0..config.num_hidden_layers).filter(|layer| moe.is_moe_layer(*layer));
                let expert = 3 * config.hidden_size * moe.moe_intermediate_size;
                layers.count() * (moe.n_routed_experts - moe.choice.top_k) * expert
            });
            assert_eq!(found.total - found.active, inactive as u64, "{name}");
        }
    }

    #[test]
    fn the_cache_of_latent_attention_is_one_row_a_layer() {
        let (_, config) = open("deepseek_v3");
        let AttentionConfig::Mla(mla) = &config.attention else {
            panic!("latent attention")
        };
        let width = mla.kv_lora_rank + mla.qk_rope_head_dim;
        let expected = [width * 4, width * 2, width * 2, width.div_ceil(32) * 34];
        let found = CacheType::ALL.map(|form| Cache::bytes_per_token(&config, form));
        assert_eq!(
            found,
            expected.map(|bytes| bytes * config.num_hidden_layers)
        );
    }
}
