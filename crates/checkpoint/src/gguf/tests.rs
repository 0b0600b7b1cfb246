//! Files are written here by hand, byte by byte: what is read is compared with what was meant.

use std::fs;

use tempfile::TempDir;

use super::*;
use crate::Folder;

/// A GGUF in the making.
#[derive(Clone, Default)]
pub(crate) struct Draft {
    pub(crate) metadata: Vec<(String, u32, Vec<u8>)>,
    /// Name, dimensions from the innermost out, type, bytes.
    pub(crate) tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

pub(crate) fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

impl Draft {
    pub(crate) fn set(&mut self, key: &str, kind: u32, value: Vec<u8>) -> &mut Self {
        self.metadata.retain(|known| known.0 != key);
        self.metadata.push((key.into(), kind, value));
        self
    }

    fn tensor(&mut self, name: &str, dims: &[u64], kind: u32, bytes: Vec<u8>) -> &mut Self {
        self.tensors.push((name.into(), dims.to_vec(), kind, bytes));
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = [GGUF_MAGIC, &3u32.to_le_bytes()].concat();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.metadata {
            out.extend(text(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut data = vec![];
        for (name, dims, kind, bytes) in &self.tensors {
            out.extend(text(name));
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(DEFAULT_ALIGNMENT), 0);
        }
        out.resize(out.len().next_multiple_of(DEFAULT_ALIGNMENT), 0);
        out.extend(data);
        out
    }

    fn write(&self, name: &str) -> (TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, self.bytes()).unwrap();
        (folder, path)
    }
}

/// A llama of one layer: two query heads and one key head of width four, hidden width four.
fn llama() -> Draft {
    let mut draft = Draft::default();
    draft.set("general.architecture", 8, text("llama"));
    for (key, value) in [
        ("embedding_length", 4u32),
        ("feed_forward_length", 6),
        ("block_count", 1),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("attention.key_length", 4),
        ("context_length", 64),
    ] {
        draft.set(&format!("llama.{key}"), 4, value.to_le_bytes().to_vec());
    }
    let eps = 1e-5f32.to_le_bytes().to_vec();
    draft.set("llama.attention.layer_norm_rms_epsilon", 6, eps);
    let numbered = |n: usize| f32s(&(0..n).map(|i| i as f32).collect::<Vec<_>>());
    draft.tensor("token_embd.weight", &[4, 5], 0, numbered(20));
    draft.tensor("output_norm.weight", &[4], 0, numbered(4));
    draft.tensor("blk.0.attn_q.weight", &[4, 8], 0, numbered(32));
    draft.tensor("blk.0.attn_k.weight", &[4, 4], 0, numbered(16));
    draft.tensor("blk.0.attn_v.weight", &[4, 4], 0, numbered(16));
    draft.tensor("blk.0.ffn_down.weight", &[6, 4], 1, vec![0; 48]);
    draft.tensor("blk.0.other.weight", &[3], 24, vec![1, 2, 3]);
    draft
}

/// A deepseek2 of one layer with a mixture of two experts, as today's converter writes it.
fn deepseek() -> Draft {
    let mut draft = Draft::default();
    draft.set("general.architecture", 8, text("deepseek2"));
    for (key, value) in [
        ("embedding_length", 4u32),
        ("feed_forward_length", 6),
        ("block_count", 1),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("attention.key_length", 8),
        ("attention.value_length", 6),
        ("attention.key_length_mla", 5),
        ("attention.value_length_mla", 4),
        ("attention.kv_lora_rank", 6),
        ("rope.dimension_count", 2),
        ("context_length", 64),
        ("leading_dense_block_count", 0),
        ("expert_feed_forward_length", 3),
        ("expert_count", 2),
        ("expert_used_count", 1),
        ("expert_shared_count", 1),
        ("expert_gating_func", 2),
        ("rope.scaling.original_context_length", 16),
    ] {
        draft.set(&format!("deepseek2.{key}"), 4, value.to_le_bytes().to_vec());
    }
    for (key, value) in [
        ("attention.layer_norm_rms_epsilon", 1e-6f32),
        ("expert_weights_scale", 2.5),
        ("rope.scaling.factor", 40.0),
        ("rope.scaling.yarn_log_multiplier", 0.0707),
    ] {
        draft.set(&format!("deepseek2.{key}"), 6, value.to_le_bytes().to_vec());
    }
    draft.set("deepseek2.rope.scaling.type", 8, text("yarn"));
    let numbered = |n: usize| f32s(&(0..n).map(|i| i as f32).collect::<Vec<_>>());
    draft.tensor("token_embd.weight", &[4, 5], 0, numbered(20));
    draft.tensor("blk.0.attn_q.weight", &[4, 10], 0, numbered(40));
    draft.tensor("blk.0.attn_k_b.weight", &[3, 6, 2], 0, numbered(36));
    draft.tensor("blk.0.attn_v_b.weight", &[6, 4, 2], 0, numbered(48));
    draft.tensor("blk.0.exp_probs_b.bias", &[2], 0, numbered(2));
    draft.tensor("blk.0.ffn_gate_up_exps.weight", &[4, 6, 2], 0, numbered(48));
    draft.tensor("blk.0.ffn_down_exps.weight", &[3, 4, 2], 0, numbered(24));
    draft.tensor("blk.1.nextn.eh_proj.weight", &[8, 4], 0, numbered(32));
    draft
}

#[test]
fn a_deepseek_opens_with_its_config_and_an_experts_tensors_each() {
    let (_folder, path) = deepseek().write("m.gguf");
    let model = Folder::open(&path).unwrap();
    let expected = serde_json::json!({
        "model_type": "deepseek_v3", "hidden_act": "silu", "hidden_size": 4, "intermediate_size": 6,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "vocab_size": 5, "tie_word_embeddings": true,
        "rope_theta": 10000.0, "q_lora_rank": null, "kv_lora_rank": 6, "qk_nope_head_dim": 3,
        "qk_rope_head_dim": 2, "v_head_dim": 4, "first_k_dense_replace": 0, "moe_intermediate_size": 3,
        "n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1, "norm_topk_prob": false,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "n_group": 1, "topk_group": 1, "architectures": ["DeepseekV3ForCausalLM"],
        "rope_scaling": {
            "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 16,
            "mscale": 0.707, "mscale_all_dim": 0.707,
        },
    });
    assert_eq!(*model.config(), expected);
    let expert = |n: usize, projection: &str| {
        let key = format!("model.layers.0.mlp.experts.{n}.{projection}.weight");
        let tensor = model.tensor(&key).unwrap();
        (tensor.shape.clone(), tensor.to_f32().unwrap()[0])
    };
    assert_eq!(expert(1, "gate_proj"), (vec![3, 4], 24.0));
    assert_eq!(expert(1, "up_proj"), (vec![3, 4], 36.0));
    assert_eq!(expert(1, "down_proj"), (vec![4, 3], 12.0));
    for key in [
        "model.layers.0.mlp.gate.e_score_correction_bias",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_b_proj.weight",
        "model.layers.1.eh_proj.weight",
    ] {
        assert!(model.contains(key), "{key}");
    }
}

/// A file of 2024: heads' widths under the plain keys, no gating function, no groups.
#[test]
fn an_older_deepseek_is_a_v2() {
    let mut draft = deepseek();
    let older = ["_mla", "gating", "log_multiplier"];
    draft
        .metadata
        .retain(|entry| !older.iter().any(|word| entry.0.contains(word)));
    refuse(
        &draft,
        "expected 2 (sigmoid) beside the tensor `blk.0.exp_probs_b.bias`",
    );
    draft
        .tensors
        .retain(|tensor| !tensor.0.contains("exp_probs"));
    let (_folder, path) = draft.write("m.gguf");
    let config = Folder::open(&path).unwrap().config().clone();
    assert_eq!(config["model_type"], "deepseek_v2");
    assert_eq!(config["topk_method"], "greedy");
    assert_eq!([&config["qk_nope_head_dim"], &config["v_head_dim"]], [6, 6]);
    assert!(config["rope_scaling"].get("mscale").is_none());
    draft.set("deepseek2.expert_group_count", 4, vec![2, 0, 0, 0]);
    let (_folder, path) = draft.write("m.gguf");
    let config = Folder::open(&path).unwrap().config().clone();
    assert_eq!(config["topk_method"], "group_limited_greedy");
}

#[test]
fn malformed_deepseeks_are_refused() {
    let with = |key: &str, value: u32| {
        let mut draft = deepseek();
        draft.set(&format!("deepseek2.{key}"), 4, value.to_le_bytes().to_vec());
        draft
    };
    refuse(
        &with("expert_count", 3),
        "expected the matrices of 3 experts",
    );
    refuse(
        &with("expert_count", 0),
        "expected the matrices of 0 experts",
    );
    refuse(
        &with("expert_gating_func", 4),
        "`deepseek2.expert_gating_func`: expected 1 (softmax) or 2 (sigmoid), found 4",
    );
    refuse(
        &with("rope.dimension_count", 6),
        "expected heads wider than the 6 features that are turned, found 5",
    );
    let mut lacks = deepseek();
    lacks
        .metadata
        .retain(|entry| entry.0 != "deepseek2.attention.kv_lora_rank");
    refuse(
        &lacks,
        "expected a key `deepseek2.attention.kv_lora_rank`, found none",
    );
    let mut odd = deepseek();
    odd.tensor("blk.2.ffn_gate_up_exps.weight", &[4, 5, 2], 0, vec![0; 160]);
    refuse(&odd, "found shape [2, 5, 4]");
    let mut flat = deepseek();
    flat.tensor("blk.2.ffn_up_exps.weight", &[4, 6], 0, vec![0; 96]);
    refuse(&flat, "found shape [6, 4]");
    let mut text_ = deepseek();
    text_.set("deepseek2.rope.dimension_count", 8, text("two"));
    refuse(&text_, "expected a whole number, found");
    let mut huge = deepseek();
    let count = u32::MAX.to_le_bytes().to_vec();
    huge.set("deepseek2.expert_count", 4, count);
    huge.tensors.retain(|tensor| !tensor.0.contains("exps"));
    huge.tensor(
        "blk.0.ffn_up_exps.weight",
        &[0, 6, u64::from(u32::MAX)],
        0,
        vec![],
    );
    refuse(&huge, "1 to 4096");
    let mut empty = with("expert_count", 4096);
    empty.tensors.retain(|tensor| !tensor.0.contains("exps"));
    empty.tensor("blk.0.ffn_up_exps.weight", &[0, 6, 4096], 0, vec![]);
    refuse(&empty, "found shape [4096, 6, 0]");
}

fn refuse(draft: &Draft, expected: &str) {
    let (_folder, path) = draft.write("m.gguf");
    let error = Folder::open(&path).unwrap_err().to_string();
    assert!(
        error.contains(expected),
        "expected {expected:?} in {error:?}"
    );
    assert!(error.contains("m.gguf"), "{error}");
}

#[test]
fn a_gguf_opens_as_the_folder_it_was_made_from() {
    let mut draft = llama();
    let eos = 2u32.to_le_bytes().to_vec();
    draft.set("tokenizer.ggml.eos_token_id", 4, eos);
    draft.set("llama.rope.freq_base", 6, 1e5f32.to_le_bytes().to_vec());
    let (_folder, path) = draft.write("m.gguf");
    let model = Folder::open(&path).unwrap();
    assert_eq!(
        *model.config(),
        serde_json::json!({
            "model_type": "llama", "hidden_act": "silu", "hidden_size": 4, "intermediate_size": 6,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "vocab_size": 5, "tie_word_embeddings": true,
            "rope_theta": 1e5, "eos_token_id": 2, "architectures": ["LlamaForCausalLM"],
        })
    );
    assert_eq!(model.config_path(), path);
    assert_eq!(
        model.names().collect::<Vec<_>>(),
        [
            "blk.0.other.weight",
            "model.embed_tokens.weight",
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.0.self_attn.k_proj.weight",
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.self_attn.v_proj.weight",
            "model.norm.weight",
        ]
    );
    let down = model.tensor("model.layers.0.mlp.down_proj.weight").unwrap();
    assert_eq!(
        (down.dtype, down.shape.as_slice()),
        (DType::F16, &[4, 6][..])
    );
    assert_eq!(model.metadata().unwrap()["llama.block_count"], 1);
    assert_eq!(model.shards()[0].0, "model.safetensors");
}

/// A bias of one module of one layer is enough: llama.cpp takes the others for zero.
#[test]
fn the_biases_of_a_llama_are_read_and_absent_ones_are_zeros() {
    let mut draft = llama();
    let bias = f32s(&[0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    draft.tensor("blk.0.attn_q.bias", &[8], 0, bias);
    let (_folder, path) = draft.write("m.gguf");
    let model = Folder::open(&path).unwrap();
    assert_eq!(model.config()["attention_bias"], true);
    assert!(model.config().get("mlp_bias").is_none());
    let values = |module: &str| {
        let name = format!("model.layers.0.self_attn.{module}.bias");
        model.tensor(&name).unwrap().to_f32().unwrap()
    };
    assert_eq!(values("q_proj"), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    assert_eq!(values("k_proj"), [0.0; 4]);
    assert_eq!(values("v_proj"), [0.0; 4]);
}

/// A key, the number of its type, its value, and what the refusal says.
type RefusedKey = (&'static str, u32, Vec<u8>, &'static str);

fn float(n: f32) -> Vec<u8> {
    n.to_le_bytes().to_vec()
}

fn count(n: u32) -> Vec<u8> {
    n.to_le_bytes().to_vec()
}

/// Values of keys that are read, and that no model here has.
fn refused_keys() -> Vec<RefusedKey> {
    vec![
        (
            "llama.logit_scale",
            6,
            float(0.5),
            "expected 0 or 1, found 0.5",
        ),
        (
            "llama.attention.causal",
            7,
            vec![0],
            "expected true, found false",
        ),
        ("llama.expert_count", 4, count(8), "expected 0, found 8"),
        (
            "llama.attention.sliding_window",
            4,
            count(16),
            "expected 0, found 16",
        ),
        (
            "llama.rope.dimension_count",
            4,
            count(2),
            "expected 4, found 2",
        ),
        (
            "llama.attention.value_length",
            4,
            count(2),
            "expected 4, found 2",
        ),
        ("llama.vocab_size", 4, count(6), "expected 5, found 6"),
        (
            "llama.rope.freq_base",
            8,
            text("x"),
            "expected a number, found",
        ),
        (
            "llama.rope.scaling.type",
            8,
            text("longrope"),
            "none, linear or yarn",
        ),
        (
            "general.type",
            8,
            text("adapter"),
            "expected \"model\", found",
        ),
        (
            "general.quantization_version",
            4,
            count(1),
            "expected 2, found 1",
        ),
    ]
}

#[test]
fn keys_that_cannot_be_obeyed_are_refused() {
    for (key, kind, value, expected) in refused_keys() {
        let mut draft = llama();
        draft.set(key, kind, value);
        refuse(&draft, &format!("`{key}`: "));
        refuse(&draft, expected);
    }
}

/// What changes nothing is passed over, the rest is named.
#[test]
fn keys_without_a_meaning_are_named() {
    let mut draft = llama();
    for (key, value) in [
        ("general.name", "x"),
        ("general.base_model.0.name", "x"),
        ("general.license.link", "x"),
        ("llama.novelty", "x"),
        ("quantize.imatrix.file", "x"),
        ("someone.note", "x"),
        ("tokenizer.ggml.novelty", "x"),
    ] {
        draft.set(key, 8, text(value));
    }
    draft.set("general.sampling.temp", 6, float(0.5));
    draft.set("general.sampling.top_k", 5, count(20));
    let (_folder, path) = draft.write("m.gguf");
    let model = Folder::open(&path).unwrap();
    assert_eq!(model.unknown_metadata(), ["llama.novelty", "someone.note"]);
    let expected = serde_json::json!({"temperature": 0.5, "top_k": 20, "do_sample": true});
    assert_eq!(model.generation_config(), Some(&expected));
}

#[test]
fn rotary_scaling_of_every_type_is_read() {
    let scaling = |entries: &[(&str, u32, Vec<u8>)]| {
        let mut draft = llama();
        for (key, kind, value) in entries {
            draft.set(&format!("llama.rope.{key}"), *kind, value.clone());
        }
        let (_folder, path) = draft.write("m.gguf");
        Folder::open(&path)
            .unwrap()
            .config()
            .get("rope_scaling")
            .cloned()
    };
    let number = |n: f32| n.to_le_bytes().to_vec();
    let linear = serde_json::json!({"rope_type": "linear", "factor": 4.0});
    // Without a type it is linear, as is the older key.
    assert_eq!(
        scaling(&[("scaling.factor", 6, number(4.0))]).unwrap(),
        linear
    );
    assert_eq!(
        scaling(&[("scale_linear", 6, number(4.0))]).unwrap(),
        linear
    );
    let none = ("scaling.type", 8, text("none"));
    assert_eq!(scaling(&[none, ("scaling.factor", 6, number(4.0))]), None);
    let yarn = ("scaling.type", 8, text("yarn"));
    let found = scaling(&[
        yarn,
        ("scaling.factor", 6, number(4.0)),
        ("scaling.attn_factor", 6, number(2.0)),
        ("scaling.yarn_beta_fast", 6, number(8.0)),
    ])
    .unwrap();
    let factor = found["attention_factor"].as_f64().unwrap();
    assert!((factor - 2.0 * (0.1 * 4f64.ln() + 1.0)).abs() < 1e-6);
    assert_eq!(found["beta_fast"], 8.0);
}

/// RowOrder 0, 1, 2, 3 of a head are stored as 0, 2, 1, 3: first of the first half, first of the second.
#[test]
fn the_rows_of_queries_and_keys_are_put_back() {
    let (_folder, path) = llama().write("m.gguf");
    let model = Folder::open(&path).unwrap();
    let rows = |part: &str| {
        let key = format!("model.layers.0.self_attn.{part}_proj.weight");
        let values = model.tensor(&key).unwrap().to_f32().unwrap();
        values
            .chunks(4)
            .map(|row| row[0] as usize / 4)
            .collect::<Vec<_>>()
    };
    assert_eq!(rows("q"), [0, 2, 1, 3, 4, 6, 5, 7]);
    assert_eq!(rows("k"), [0, 2, 1, 3]);
    assert_eq!(rows("v"), [0, 1, 2, 3]);
    let mut qwen = llama();
    qwen.metadata
        .retain(|entry| entry.0 == "general.architecture");
    for (key, kind, value) in llama().metadata {
        qwen.set(&key.replace("llama.", "qwen2."), kind, value);
    }
    qwen.set("general.architecture", 8, text("qwen2"));
    let (_folder, path) = qwen.write("q.gguf");
    let model = Folder::open(&path).unwrap();
    let values = model
        .tensor("model.layers.0.self_attn.k_proj.weight")
        .unwrap();
    assert_eq!(values.to_f32().unwrap()[4], 4.0);
}

#[test]
fn blocks_are_counted_by_the_row() {
    let mut draft = llama();
    draft.tensor("blk.0.ffn_up.weight", &[64, 3], 3, vec![7; 2 * 3 * 20]);
    let (_folder, path) = draft.write("m.gguf");
    let model = Folder::open(&path).unwrap();
    let up = model.tensor("model.layers.0.mlp.up_proj.weight").unwrap();
    assert_eq!((up.dtype, up.bytes.len()), (DType::Q4_1, 120));
    let mut torn = llama();
    torn.tensor("blk.0.ffn_up.weight", &[48, 2], 3, vec![7; 60]);
    refuse(&torn, "Q4_1 of an impossible shape [2, 48]");
}

#[test]
fn every_kind_of_value_is_read() {
    let mut draft = llama();
    let list = |kind: u32, n: u64, values: Vec<u8>| {
        [&kind.to_le_bytes()[..], &n.to_le_bytes(), &values].concat()
    };
    draft.set("a", 9, list(8, 2, [text("x"), text("ä")].concat()));
    draft.set("b", 9, list(6, 2, f32s(&[0.1, -2.0])));
    draft.set("c", 1, vec![0xFE]);
    draft.set("d", 7, vec![1]);
    draft.set("e", 10, u64::MAX.to_le_bytes().to_vec());
    draft.set("f", 6, f32::NAN.to_le_bytes().to_vec());
    draft.set("g", 12, 0.1f64.to_le_bytes().to_vec());
    let (_folder, path) = draft.write("m.gguf");
    let model = Folder::open(&path).unwrap();
    let found = model.metadata().unwrap();
    let expected = serde_json::json!({
        "a": ["x", "ä"], "b": [0.1, -2.0], "c": -2, "d": true, "e": u64::MAX, "f": null, "g": 0.1,
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(found[key], *value, "{key}");
    }
}

#[test]
fn a_split_model_is_opened_by_its_first_part() {
    let number = |n: u16| n.to_le_bytes().to_vec();
    let mut first = llama();
    first
        .set("split.count", 2, number(2))
        .set("split.no", 2, number(0));
    let mut second = Draft::default();
    second
        .set("split.count", 2, number(2))
        .set("split.no", 2, number(1));
    second.tensor("blk.0.attn_norm.weight", &[4], 0, f32s(&[1.0; 4]));
    let (folder, path) = first.write("m-00001-of-00002.gguf");
    let absent = Folder::open(&path).unwrap_err().to_string();
    assert!(absent.contains("m-00002-of-00002.gguf"), "{absent}");
    let other = folder.path().join("m-00002-of-00002.gguf");
    fs::write(&other, second.bytes()).unwrap();
    let model = Folder::open(&path).unwrap();
    assert!(model.contains("model.layers.0.input_layernorm.weight"));
    assert_eq!(model.shards().len(), 2);

    let error = |path: &Path| Folder::open(path).unwrap_err().to_string();
    assert!(error(&other).contains("expected the first part of a split model, found part 2"));
    fs::write(&other, first.bytes()).unwrap();
    assert!(error(&path).contains("expected `split.no` 1, found 0"));
    second.tensor("output_norm.weight", &[4], 0, f32s(&[1.0; 4]));
    fs::write(&other, second.bytes()).unwrap();
    assert!(error(&path).contains("tensor `model.norm.weight`"));
    let renamed = folder.path().join("m.gguf");
    fs::rename(&path, &renamed).unwrap();
    assert!(error(&renamed).contains("expected a name that ends in `-00001-of-00002.gguf`"));
}

#[test]
fn malformed_files_are_refused() {
    let with = |key: &str, kind: u32, value: &[u8]| {
        let mut draft = llama();
        draft.set(key, kind, value.to_vec());
        draft
    };
    refuse(&with("x", 13, &[]), "key `x`: unknown type 13");
    refuse(
        &with("x", 9, &[9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
        "found one of lists",
    );
    refuse(
        &with("x", 9, &[[8, 0, 0, 0].as_slice(), &[0xFF; 8]].concat()),
        "`x`: expected at most",
    );
    refuse(&with("x", 8, &[0xFF; 8]), "`x`: expected at most");
    refuse(
        &with(
            "x",
            8,
            &[[1u8, 0, 0, 0, 0, 0, 0, 0].as_slice(), &[0xFF]].concat(),
        ),
        "expected UTF-8",
    );
    refuse(
        &with("general.alignment", 4, &[7, 0, 0, 0]),
        "expected a power of two from 8 on, found 7",
    );
    refuse(
        &with("general.architecture", 8, &text("mamba")),
        "expected one of llama, qwen2, deepseek2, found mamba",
    );
    let mut lacks = llama();
    lacks
        .metadata
        .retain(|entry| entry.0 != "llama.block_count");
    refuse(&lacks, "expected a key `llama.block_count`, found none");
}

#[test]
fn malformed_descriptions_are_refused() {
    let mut twice = llama();
    twice.metadata.push(twice.metadata[1].clone());
    refuse(&twice, "appears twice");
    let mut twice = llama();
    twice.tensors.push(twice.tensors[0].clone());
    refuse(&twice, "tensor `token_embd.weight` appears twice");
    let tensor = |dims: &[u64], kind: u32| {
        let mut draft = llama();
        draft.tensor("t", dims, kind, vec![0; 8]);
        draft
    };
    refuse(&tensor(&[2], 99), "ggml type 99");
    refuse(
        &tensor(&[1, 1, 1, 1, 1], 0),
        "expected at most 4 dimensions, found 5",
    );
    refuse(&tensor(&[u64::MAX, u64::MAX], 0), "impossible shape");
    refuse(&tensor(&[1 << 40], 0), "as its header says, found");
    let mut headless = llama();
    headless
        .tensors
        .retain(|tensor| tensor.0 != "token_embd.weight");
    refuse(
        &headless,
        "expected a tensor `token_embd.weight`, found none",
    );
    let mut stretched = llama();
    stretched.tensor("rope_freqs.weight", &[1], 0, vec![0; 4]);
    refuse(&stretched, "what Llama 3 divides frequencies by");
    let mut long = llama();
    long.tensor("rope_freqs.weight", &[2], 0, vec![0; 8]);
    refuse(&long, "expected 1 values, half of what is turned, found 2");
    let mut odd = llama();
    odd.set("llama.attention.head_count", 4, 3u32.to_le_bytes().to_vec());
    let (_folder, path) = odd.write("m.gguf");
    let error = Folder::open(&path)
        .unwrap()
        .tensor("model.layers.0.self_attn.q_proj.weight");
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("expected 3 heads of an even number of rows, found 8 rows"),
        "{error}"
    );
}

/// Every beginning of a file, and every file with a byte changed, is read or refused, never more.
#[test]
fn no_damage_breaks_the_reader() {
    [llama(), deepseek()].iter().for_each(damage);
}

fn damage(draft: &Draft) {
    let (folder, path) = draft.write("m.gguf");
    let whole = fs::read(&path).unwrap();
    let path = folder.path().join("damaged.gguf");
    let open = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        Folder::open(&path)
    };
    for len in 0..whole.len() {
        assert!(
            open(&whole[..len]).is_err() || whole.len() - len < DEFAULT_ALIGNMENT,
            "{len}"
        );
    }
    for at in 0..whole.len().min(1500) {
        for value in [0, 0x7F, 0xFF] {
            let mut damaged = whole.clone();
            damaged[at] = value;
            if let Ok(model) = open(&damaged) {
                model.names().for_each(|name| _ = model.tensor(name));
            }
        }
    }
}
