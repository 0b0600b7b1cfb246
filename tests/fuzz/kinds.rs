//! The kinds of untrusted files, and what reads them: here, and in `fuzz/`.

use std::fs;
use std::path::{Path, PathBuf};

use checkpoint::{
    Adapter, DType, Folder, GgufLayout, GgufValue, GgufWriter, Tensor, TensorSpec,
    write_safetensors,
};
use data::{
    Bos, DataFolder, ItemLimits, Special, Split, SplitName, TaskChat, TaskDataset, TaskIndex,
    Tokenizer, TokenizerFiles,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::mutation::{Dice, mutated, mutated_json};

/// What a kind of file is called, what lies next to it, and what reads it. Where that finds an error, all is well: what it
/// must not do is panic, hang, or take much more memory than there are bytes.
#[derive(Clone, Copy)]
pub(crate) struct Kind {
    /// The file that is not to be trusted.
    pub(crate) file: &'static str,
    /// Memory in bytes that reading it may take, however small it is.
    memory: usize,
    /// Writes a valid one, and the files that are read with it.
    write: fn(&Path),
    /// Gives nothing where it found an error.
    read: fn(&Path) -> Option<()>,
}

const ANY_FILE: usize = 64 << 10;
/// Where a tokenizer of known patterns is made.
const ANY_TOKENIZER: usize = 4 << 20;
/// Where regular expressions of the file are compiled.
const ANY_PATTERNS: usize = 64 << 20;
/// Of rows. One of 16 MiB, which a few bytes of a table may repeat, takes that as values of JSON.
const ANY_ROWS: usize = 512 << 20;
/// Memory for each byte: one of a list in a GGUF becomes a value of 32, in a list that doubles as it grows.
const PER_BYTE: usize = 100;

const GGUF: Kind = Kind {
    file: "model.gguf",
    memory: ANY_TOKENIZER,
    write: write_gguf,
    read: |folder| read_model(&folder.join("model.gguf")),
};
const SAFETENSORS: Kind = Kind {
    file: "model.safetensors",
    memory: ANY_FILE,
    write: write_model,
    read: read_model,
};
const CONFIG: Kind = Kind {
    file: "config.json",
    ..SAFETENSORS
};
const INDEX: Kind = Kind {
    file: "model.safetensors.index.json",
    memory: ANY_FILE,
    write: write_shards,
    read: read_model,
};
const TOKENIZER: Kind = Kind {
    file: "tokenizer.json",
    memory: ANY_PATTERNS,
    write: write_tokenizer,
    read: read_tokenizer,
};
/// With every kind of step.
const TOKENIZER_STEPS: Kind = Kind {
    file: "tokenizer.json",
    memory: ANY_PATTERNS,
    write: write_tokenizer_steps,
    read: read_tokenizer,
};
const TOKENIZER_CONFIG: Kind = Kind {
    file: "tokenizer_config.json",
    ..TOKENIZER
};
const ADAPTER: Kind = Kind {
    file: "adapter_config.json",
    memory: ANY_FILE,
    write: write_adapter,
    read: read_adapter,
};
const ADAPTER_NOTES: Kind = Kind {
    file: "moeforge.json",
    ..ADAPTER
};
const MLX_ADAPTER: Kind = Kind {
    file: "adapter_config.json",
    memory: ANY_FILE,
    write: write_mlx_adapter,
    read: read_adapter,
};

const JSON_LINES: Kind = Kind {
    file: "train.jsonl",
    memory: ANY_FILE,
    write: |folder| write_rows(folder, "train.jsonl", IDS),
    read: read_rows,
};
const JSON_LIST: Kind = Kind {
    file: "train.json",
    memory: ANY_FILE,
    write: |folder| write_rows(folder, "train.json", &json_list()),
    read: read_rows,
};
const CSV: Kind = Kind {
    file: "train.csv",
    memory: ANY_FILE,
    write: |folder| write_rows(folder, "train.csv", CSV_ROWS),
    read: read_rows,
};
const GZIP: Kind = Kind {
    file: "train.jsonl.gz",
    memory: ANY_ROWS,
    write: |folder| {
        write_rows(
            folder,
            "train.jsonl.gz",
            include_bytes!("../goldens/tables/ids.jsonl.gz"),
        )
    },
    read: read_rows,
};
const ZSTD: Kind = Kind {
    file: "train.jsonl.zst",
    memory: ANY_ROWS,
    write: |folder| {
        write_rows(
            folder,
            "train.jsonl.zst",
            include_bytes!("../goldens/tables/ids.jsonl.zst"),
        )
    },
    read: read_rows,
};
const PARQUET: Kind = Kind {
    file: "train.parquet",
    memory: ANY_ROWS,
    write: |folder| {
        write_rows(
            folder,
            "train.parquet",
            include_bytes!("../goldens/tables/nested.parquet"),
        )
    },
    read: read_rows,
};
/// The encodings that pyarrow does not choose by itself.
const PARQUET_DELTA: Kind = Kind {
    write: |folder| {
        write_rows(
            folder,
            "train.parquet",
            include_bytes!("../goldens/tables/delta.parquet"),
        )
    },
    ..PARQUET
};

/// A task of the evaluation harness, asked about rows.
const TASK: Kind = Kind {
    file: "task.yaml",
    memory: ANY_PATTERNS,
    write: |folder| {
        write_rows(folder, "task.yaml", TASK_TEXT);
        write_rows(folder, "rows.jsonl", TASK_ROWS);
    },
    read: read_tasks,
};
/// The card of the data set of a task, which says where its splits are.
const DATASET_CARD: Kind = Kind {
    file: "README.md",
    write: |folder| {
        let task = String::from_utf8_lossy(TASK_TEXT);
        let (_, rest) = task.split_once("test_split").unwrap();
        let place = format!("dataset_path: {:?}\ndataset_name: small\n", folder);
        let task = format!("task: capitals\n{place}test_split{rest}");
        write_rows(folder, "task.yaml", task.as_bytes());
        write_rows(folder, "rows.jsonl", TASK_ROWS);
        write_rows(folder, "README.md", CARD_TEXT);
    },
    ..TASK
};

/// All of them, by the names of libFuzzer's targets.
pub(crate) const ALL: [(&str, Kind); 19] = [
    ("json_lines", JSON_LINES),
    ("json_list", JSON_LIST),
    ("csv", CSV),
    ("gzip", GZIP),
    ("zstd", ZSTD),
    ("parquet", PARQUET),
    ("parquet_delta", PARQUET_DELTA),
    ("gguf", GGUF),
    ("safetensors", SAFETENSORS),
    ("config", CONFIG),
    ("index", INDEX),
    ("tokenizer", TOKENIZER),
    ("tokenizer_steps", TOKENIZER_STEPS),
    ("tokenizer_config", TOKENIZER_CONFIG),
    ("adapter", ADAPTER),
    ("adapter_notes", ADAPTER_NOTES),
    ("mlx_adapter", MLX_ADAPTER),
    ("task", TASK),
    ("dataset_card", DATASET_CARD),
];

/// A folder in which one file is put in place of another again and again.
pub(crate) struct Place {
    kind: Kind,
    folder: TempDir,
    /// Bytes of the files that are read with it.
    other_bytes: usize,
}

impl Place {
    /// # Panics
    /// If no kind has that name.
    pub(crate) fn new(name: &str) -> Self {
        let (_, kind) = ALL.into_iter().find(|known| known.0 == name).unwrap();
        let folder = tempfile::tempdir().unwrap();
        (kind.write)(folder.path());
        let files = fs::read_dir(folder.path()).unwrap();
        let sizes = files.map(|file| file.unwrap().metadata().unwrap().len() as usize);
        let all: usize = sizes.sum();
        let own = folder.path().join(kind.file).metadata().unwrap().len() as usize;
        Self {
            kind,
            folder,
            other_bytes: all - own,
        }
    }

    /// Where the file is.
    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join(self.kind.file)
    }

    pub(crate) fn put(&self, bytes: &[u8]) {
        fs::write(self.path(), bytes).unwrap();
    }

    /// Memory in bytes that reading a file of this size may take.
    pub(crate) fn bound(&self, bytes: usize) -> usize {
        self.kind.memory + PER_BYTE * (bytes + self.other_bytes)
    }

    /// Changes a valid file as a seed decides.
    pub(crate) fn mutated(&self, valid: &[u8], seed: u64) -> Vec<u8> {
        let mut dice = Dice::new(seed);
        match self.kind.file.ends_with(".json") && seed.is_multiple_of(2) {
            true => mutated_json(valid, &mut dice),
            false => mutated(valid, &mut dice),
        }
    }

    /// Whether no error was found.
    pub(crate) fn read(&self) -> bool {
        (self.kind.read)(self.folder.path()).is_some()
    }
}

/// Opens a model and looks at all of it: each tensor, and the tokenizer that a GGUF has.
fn read_model(path: &Path) -> Option<()> {
    let model = Folder::open(path).ok()?;
    for name in model.names() {
        if let Ok(tensor) = model.tensor(name) {
            let _ = tensor.to_f32();
        }
    }
    if let Some(metadata) = model.metadata() {
        let files = TokenizerFiles::of_metadata(path, metadata).ok()??;
        tokenize(&Tokenizer::new(&files).ok()?);
    }
    Some(())
}

const IDS: &[u8] = include_bytes!("../goldens/tables/ids.jsonl");
const CSV_ROWS: &[u8] = b"input_ids,labels,\"a \"\"b\"\"\"\r\n\"[1, 2, 3]\",\"[-100, 2, 3]\",x\r\n\"[4,5]\",,\"y\nz\"\n";

fn json_list() -> Vec<u8> {
    let rows = String::from_utf8_lossy(IDS).trim_end().replace('\n', ",\n");
    format!("{{\"data\": [{rows}]}}").into_bytes()
}

fn write_rows(folder: &Path, name: &str, rows: &[u8]) {
    fs::write(folder.join(name), rows).unwrap();
}

/// Reads a training split of tokens, which need no tokenizer.
fn read_rows(folder: &Path) -> Option<()> {
    let data = DataFolder::open(folder).ok()?;
    let [file] = data.files(SplitName::Train) else {
        return None;
    };
    let split = Split::open(file, None, 16, 1000).ok()?;
    (split.samples.len() > 1).then_some(())
}

const TASK_TEXT: &[u8] = br#"task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
fewshot_split: test
num_fewshot: 1
description: "About {{ country | upper }}.\n\n"
output_type: generate_until
doc_to_text: |-
  {% for c in choices %}{{ loop.index }}. {{ c }}
  {% endfor %}Question: what is the capital of {{ country }}?
doc_to_target: "{{ choices[answer] }}"
gen_prefix: "The"
fewshot_config:
  sampler: first_n
  doc_to_text: "{{ country | regex_replace('(a)', '\\\\1\\\\1') }}"
generation_kwargs: {until: ["\n", "."], do_sample: false, max_gen_toks: 9}
repeats: 2
filter_list:
  - name: strict
    filter: [{function: regex, regex_pattern: "(?<=is )(\\w+)", group_select: -1}, {function: majority_vote}, {function: take_first}]
  - name: loose
    filter: [{function: lowercase}, {function: map, mapping_dict: {rome: 1}, default_value: x}, {function: take_first}]
metric_list:
  - {metric: exact_match, ignore_case: true, regexes_to_ignore: [",", "[0-9]+$"]}
  - {metric: chrf}
metadata: {version: 1.0}
"#;
const TASK_ROWS: &[u8] = br#"{"country": "Italy", "choices": ["Rome", "Milan"], "answer": 0}
{"country": "Ghana", "choices": ["Kumasi", "Accra"], "answer": 1}
{"country": "Peru", "choices": ["Lima", "Cusco"], "answer": 0}
"#;
const CARD_TEXT: &[u8] = b"---\nlicense: mit\nconfigs:\n- config_name: small\n  default: true\n  data_files:\n  - split: test\n    path: [\"rows*.jsonl\"]\n- config_name: other\n  data_files: other.csv\n---\n# Rows\n";

/// Reads the tasks of a folder, asks about their rows, and filters an answer.
fn read_tasks(folder: &Path) -> Option<()> {
    let tasks = TaskIndex::open(folder).ok()?.set("*").ok()??;
    for task in tasks.tasks {
        let dataset = TaskDataset::find(&task.dataset, &task.file, None).ok()?;
        let items = task.items(&dataset, ItemLimits::default(), &TaskChat::default());
        for item in items.ok()?.items {
            for filter in &task.filters {
                let answers = ["The capital is Rome".to_owned(), "rome".to_owned()];
                let _ = filter.apply(&answers, &item.row);
            }
        }
    }
    Some(())
}

fn read_tokenizer(folder: &Path) -> Option<()> {
    tokenize(&Tokenizer::open(folder).ok()?);
    Some(())
}

fn tokenize(tokenizer: &Tokenizer) {
    for text in [
        "",
        "a",
        "Mixture of experts, 1.5e3 \u{4e13}\u{5bb6}\n\t<|x|>",
    ] {
        if let Ok(ids) = tokenizer.encode(text, Bos::Add) {
            let _ = tokenizer.decode(&ids, Special::Keep);
        }
    }
    let _ = tokenizer.decode(&[0, 7, u32::MAX], Special::Skip);
}

fn read_adapter(folder: &Path) -> Option<()> {
    for tensor in Adapter::open(folder).ok()?.tensors() {
        let _ = tensor.to_f32();
    }
    Some(())
}

fn write_tokenizer(folder: &Path) {
    let tokenizer = include_str!("../goldens/deepseek_v2_lite/tokenizer.json");
    fs::write(folder.join("tokenizer.json"), tokenizer).unwrap();
    let config = include_str!("../goldens/deepseek_v2_lite/tokenizer_config.json");
    fs::write(folder.join("tokenizer_config.json"), config).unwrap();
}

/// Steps that no real tokenizer has together.
fn write_tokenizer_steps(folder: &Path) {
    let replace = |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
    let split = |pattern: Value, behavior: &str| json!({"type": "Split", "pattern": pattern, "behavior": behavior, "invert": false});
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let space = json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "first", "split": true});
    let normalizers = json!([
        {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": false},
        {"type": "NFKD"}, {"type": "NFC"}, {"type": "Lowercase"}, {"type": "Nmt"}, {"type": "StripAccents"},
        {"type": "Strip", "strip_left": true, "strip_right": true}, {"type": "Prepend", "prepend": "\u{2581}"},
        replace(json!({"String": " "}), "\u{2581}"), replace(json!({"Regex": "a(?!b)"}), "b"), {"type": "ByteLevel"},
    ]);
    let pre_tokenizers = json!([
        {"type": "BertPreTokenizer"}, {"type": "Whitespace"}, {"type": "WhitespaceSplit"}, {"type": "UnicodeScripts"},
        {"type": "CharDelimiterSplit", "delimiter": "x"}, {"type": "Punctuation", "behavior": "Isolated"},
        {"type": "Digits", "individual_digits": true}, {"type": "FixedLength", "length": 5},
        split(json!({"Regex": "\\s+(?!\\S)|\\p{L}+"}), "Isolated"), split(json!({"String": "e"}), "MergedWithPrevious"),
        space, bytes,
    ]);
    let decoders = json!([
        replace(json!({"String": "\u{2581}"}), " "), {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}, {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "WordPiece", "prefix": "##", "cleanup": true}, space, bytes,
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true},
    ]);
    let template = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    });
    let added = |id: u32, content: &str, special: bool| {
        json!({
            "id": id, "content": content, "single_word": !special, "lstrip": !special, "rstrip": !special,
            "normalized": !special, "special": special,
        })
    };
    let tokenizer = json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"},
        "added_tokens": [added(0, "<s>", true), added(1, "of", false)],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
        "post_processor": {"type": "Sequence", "processors": [template, bytes]},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<s>", "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": {"<s>": 0, "of": 1, "a": 2, "b": 3, "ab": 4, "<0x0A>": 5}, "merges": [["a", "b"]],
        },
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

/// A config of the smallest mixture of experts.
fn config() -> Value {
    json!({
        "model_type": "deepseek_v3", "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "vocab_size": 5,
        "max_position_embeddings": 64, "rope_theta": 10000.0, "q_lora_rank": null, "kv_lora_rank": 6,
        "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 4, "first_k_dense_replace": 1,
        "moe_intermediate_size": 3, "n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": true, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 1,
    })
}

fn tensor(name: &str, dtype: DType, shape: &[usize]) -> Tensor {
    let size = shape.iter().product::<usize>() / dtype.block() * dtype.size_bytes();
    let bytes: Vec<u8> = (0..size).map(|i| (i * 37) as u8).collect();
    Tensor::new(name, dtype, shape, bytes.into()).unwrap()
}

fn tensors() -> Vec<Tensor> {
    vec![
        tensor("model.embed_tokens.weight", DType::F32, &[5, 4]),
        tensor("model.norm.weight", DType::BF16, &[4]),
        tensor(
            "model.layers.0.self_attn.q_proj.weight",
            DType::F8E4M3,
            &[10, 4],
        ),
        tensor(
            "model.layers.0.self_attn.q_proj.weight_scale_inv",
            DType::F32,
            &[1, 1],
        ),
        tensor(
            "model.layers.1.mlp.experts.0.gate_proj.weight",
            DType::F16,
            &[3, 4],
        ),
        tensor(
            "model.layers.1.mlp.experts.1.gate_proj.weight",
            DType::F16,
            &[3, 4],
        ),
    ]
}

fn write_model(folder: &Path) {
    fs::write(folder.join("config.json"), config().to_string()).unwrap();
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    write_safetensors(&folder.join("model.safetensors"), &tensors(), &metadata).unwrap();
}

fn write_shards(folder: &Path) {
    fs::write(folder.join("config.json"), config().to_string()).unwrap();
    let mut map = serde_json::Map::new();
    for (i, part) in tensors().chunks(3).enumerate() {
        let name = format!("model-{i}.safetensors");
        write_safetensors(&folder.join(&name), part, &[].into()).unwrap();
        map.extend(
            part.iter()
                .map(|tensor| (tensor.name.to_string(), name.clone().into())),
        );
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    fs::write(
        folder.join("model.safetensors.index.json"),
        index.to_string(),
    )
    .unwrap();
}

/// Stacked experts, blocks, multi-token prediction, and a tokenizer.
fn write_gguf(folder: &Path) {
    let config = config();
    let file = folder.join("model.gguf");
    let mut metadata = GgufLayout::of(&file, &config).unwrap().metadata();
    write_tokenizer(folder);
    let tokenizer = TokenizerFiles::open(folder).unwrap();
    let keys = tokenizer.to_metadata(320, Some("gpt-2")).unwrap();
    let keys = keys
        .into_iter()
        .map(|(key, value)| (key, GgufValue::of(&value).unwrap()));
    metadata.extend(keys);
    let tensors = [
        tensor("token_embd.weight", DType::F32, &[5, 4]),
        tensor("blk.0.attn_q.weight", DType::Q8_0, &[2, 32]),
        tensor("blk.0.attn_kv_a_mqa.weight", DType::Iq4Nl, &[2, 32]),
        tensor("blk.1.ffn_down_exps.weight", DType::F16, &[2, 4, 3]),
        tensor("blk.1.ffn_gate_up_exps.weight", DType::F32, &[2, 6, 4]),
        tensor("blk.2.nextn.eh_proj.weight", DType::F16, &[4, 8]),
        tensor("output_norm.weight", DType::F32, &[4]),
    ];
    let specs: Vec<TensorSpec> = tensors.iter().map(Tensor::spec).collect();
    let mut writer = GgufWriter::create(&file, &metadata, &specs).unwrap();
    for tensor in &tensors {
        writer.write(&tensor.bytes).unwrap();
    }
    writer.finish().unwrap();
}

fn write_adapter(folder: &Path) {
    let config = include_str!("../goldens/deepseek_v3/adapter_peft/adapter_config.json");
    fs::write(folder.join("adapter_config.json"), config).unwrap();
    let key =
        |part: &str| format!("base_model.model.model.layers.0.self_attn.o_proj.lora_{part}.weight");
    let tensors = [
        tensor(&key("A"), DType::F32, &[2, 4]),
        tensor(&key("B"), DType::F32, &[4, 2]),
    ];
    write_safetensors(
        &folder.join("adapter_model.safetensors"),
        &tensors,
        &[].into(),
    )
    .unwrap();
    let notes = json!({"trained_for": "q4_k_m", "experts_share": "A"});
    fs::write(folder.join("moeforge.json"), notes.to_string()).unwrap();
}

fn write_mlx_adapter(folder: &Path) {
    let config = include_str!("../goldens/deepseek_v2_lite/adapter_mlx/adapter_config.json");
    fs::write(folder.join("adapter_config.json"), config).unwrap();
    let tensors = [tensor(
        "model.layers.0.self_attn.o_proj.lora_a",
        DType::F32,
        &[4, 2],
    )];
    write_safetensors(&folder.join("adapters.safetensors"), &tensors, &[].into()).unwrap();
}
