//! Writing an adapter as a GGUF, which llama.cpp loads together with a base.
//!
//! Each updated tensor of the base has two tensors in the file, its factors; those of stacked tensors are stacked. A single
//! alpha holds for all of them: the rest of a module's scale goes into its second factor.
//!
//! Source: ggml-org/llama.cpp: convert_lora_to_gguf.py, src/llama-adapter.cpp, src/llama-graph.cpp (`build_lora_mm`).

use std::path::Path;

use checkpoint::{
    DType, Folder, GgufLayout, GgufTensor, GgufValue, GgufWriter, RowOrder, TensorSpec,
};

use crate::Error;
use crate::adapt::{AdapterWeights, WeightUpdate};
use crate::config::{AttentionConfig, ModelConfig};
use crate::keys::{EMBEDDING, HEAD, keys};
use crate::load::{expect_complete, read_config};

/// Tensors of a deepseek2 whose updates llama.cpp does not apply.
const WITHOUT_EFFECT: [&str; 7] = [
    "attn_q.",
    "attn_q_a.",
    "attn_q_b.",
    "attn_kv_a_mqa.",
    "attn_k_b.",
    "attn_v_b.",
    "output.",
];

/// What was written.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraGgufReport {
    /// Tensors of the base that have an update.
    pub tensors: usize,
    /// Bytes of the factors.
    pub bytes: u64,
    /// Tensors whose update llama.cpp loads and does not apply when it runs the base.
    pub ignored: Vec<String>,
}

/// Writes an adapter as the GGUF `out`, in f32, for a base that [`super::gguf::write_gguf`] or llama.cpp's converter makes
/// from `model`. `keep_ignored` writes updates, too, that llama.cpp applies only when it merges them.
///
/// # Errors
/// If the adapter is not the model's or has a part that llama.cpp's adapters lack, if it has updates that llama.cpp would
/// ignore and `keep_ignored` is false, or if writing fails.
pub fn write_lora_gguf(
    model: &Folder,
    adapter: &AdapterWeights,
    keep_ignored: bool,
    out: &Path,
) -> Result<LoraGgufReport, Error> {
    let config = read_config(model)?;
    expect_complete(model, &config)?;
    let json = config.to_json();
    let layout = GgufLayout::of(&model.config_path(), &json)?;
    let tensors = updated(adapter, &config, &layout)?;
    let ignored: Vec<String> = tensors
        .iter()
        .filter(|(tensor, _)| is_ignored(&tensor.name, &config))
        .map(|(tensor, _)| tensor.name.clone())
        .collect();
    if let (Some(first), false) = (ignored.first(), keep_ignored) {
        return Err(Error::Unsupported(format!(
            "llama.cpp runs a DeepSeek without the updates of {} of its tensors (`{first}`, …): merge the adapter and quantize \
             the result, train on `o_proj`, `mlp` and `experts` alone, or write them anyway with `--keep-ignored`",
            ignored.len()
        )));
    }
    let pairs = || tensors.iter().flat_map(|(_, pairs)| pairs.iter().flatten());
    let alpha = pairs().map(|pair| pair.scale * pair.rank as f32);
    let alpha = alpha.clone().find(|alpha| *alpha != 0.0).unwrap_or(1.0);
    let factors = tensors.iter().map(|(tensor, pairs)| {
        let factors = GgufFactors::of(tensor, pairs, alpha, &config);
        (tensor.name.as_str(), factors)
    });
    let factors: Vec<(&str, GgufFactors)> = factors.collect();
    let specs: Vec<TensorSpec> = factors.iter().flat_map(|f| f.1.specs(f.0)).collect();
    let mut writer = GgufWriter::create(out, &metadata(model, &layout, alpha), &specs)?;
    let mut bytes = 0;
    for values in factors.iter().flat_map(|(_, f)| [&f.a, &f.b]) {
        let encoded: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        writer.write(&encoded)?;
        bytes += encoded.len() as u64;
    }
    writer.finish()?;
    Ok(LoraGgufReport {
        tensors: factors.len(),
        bytes,
        ignored,
    })
}

fn metadata(model: &Folder, layout: &GgufLayout<'_>, alpha: f32) -> Vec<(String, GgufValue)> {
    let of_base = layout.metadata().into_iter();
    let mut metadata: Vec<_> = of_base
        .filter(|(key, _)| key == "general.architecture")
        .collect();
    let name = model.path().file_stem().unwrap_or_default();
    let name = format!("adapter for {}", name.to_string_lossy());
    let entries = [
        ("general.type", GgufValue::Text("adapter".into())),
        ("general.name", GgufValue::Text(name)),
        ("adapter.type", GgufValue::Text("lora".into())),
        ("adapter.lora.alpha", GgufValue::Number(alpha)),
    ];
    metadata.extend(entries.map(|(key, value)| (key.to_owned(), value)));
    metadata
}

fn is_ignored(name: &str, config: &ModelConfig) -> bool {
    let part = name
        .strip_prefix("blk.")
        .and_then(|rest| rest.split_once('.'));
    let part = part.map_or(name, |(_, part)| part);
    let is_latent = matches!(config.attention, AttentionConfig::Mla(_));
    is_latent
        && WITHOUT_EFFECT
            .iter()
            .any(|ignored| part.starts_with(ignored))
}

/// The updated tensors of the base, each with the updates of its sources.
type UpdatedTensors = Vec<(GgufTensor, Vec<Option<WeightUpdate>>)>;

fn updated(
    adapter: &AdapterWeights,
    config: &ModelConfig,
    layout: &GgufLayout<'_>,
) -> Result<UpdatedTensors, Error> {
    adapter.expect_fit(config)?;
    expect_factors(adapter, config)?;
    let keys = keys(config);
    let tensors = layout.tensors(&keys).into_iter().map(|tensor| {
        let update = |key: &String| adapter.update(key.strip_suffix(".weight")?);
        let pairs: Vec<_> = tensor.keys.iter().map(update).collect();
        (tensor, pairs)
    });
    Ok(tensors
        .filter(|(_, pairs)| pairs.iter().any(Option::is_some))
        .collect())
}

/// Refuses what llama.cpp's adapters cannot hold.
fn expect_factors(adapter: &AdapterWeights, config: &ModelConfig) -> Result<(), Error> {
    let has_magnitude = |module: &String| {
        let update = adapter.update(module);
        update.is_some_and(|update| update.magnitude.is_some())
    };
    let (modules, tied) = (adapter.modules(), config.tie_word_embeddings);
    let named = |name: &str| modules.iter().find(|module| *module == name);
    let (module, what) = if let Some(module) = modules.iter().find(|module| has_magnitude(module)) {
        (module.as_str(), "magnitudes of DoRA")
    } else if let Some(module) = named(EMBEDDING) {
        (module.as_str(), "update of the embedding")
    } else if let Some(module) = named(HEAD).filter(|_| tied) {
        (
            module.as_str(),
            "update of a head that is tied to the embedding",
        )
    } else if let Some(key) = adapter.replaced_keys().next() {
        (key, "whole weights (`modules_to_save`)")
    } else if adapter.token_rows().is_some() {
        (EMBEDDING, "rows of tokens (`trainable_token_indices`)")
    } else {
        return Ok(());
    };
    Err(Error::Unsupported(format!(
        "`{module}`: llama.cpp's adapters have no {what}; merge the adapter instead"
    )))
}

/// The factors of one tensor of the base: values, and shapes from the outermost dimension in.
struct GgufFactors {
    a: Vec<f32>,
    b: Vec<f32>,
    shapes: [Vec<usize>; 2],
}

impl GgufFactors {
    /// If experts have updates of several ranks, or none, the largest rank holds for all, and missing values are 0.
    fn of(
        tensor: &GgufTensor,
        pairs: &[Option<WeightUpdate>],
        alpha: f32,
        config: &ModelConfig,
    ) -> Self {
        let rank = pairs
            .iter()
            .flatten()
            .map(|pair| pair.rank)
            .max()
            .unwrap_or(0);
        let &[ref stack @ .., out, width] = tensor.shape.as_slice() else {
            unreachable!("updated tensors are matrices or stacks of them")
        };
        let mut factors = Self {
            a: Vec::new(),
            b: Vec::new(),
            shapes: [vec![rank, width], vec![out, rank]].map(|shape| [stack, &shape].concat()),
        };
        for pair in pairs {
            let Some(pair) = pair else {
                factors.a.resize(factors.a.len() + rank * width, 0.0);
                factors.b.resize(factors.b.len() + out * rank, 0.0);
                continue;
            };
            let pair = padded(pair, rank, pair.scale * rank as f32 / alpha);
            factors.add(&pair, tensor.rows, config);
        }
        factors
    }

    /// Adds the factors of a source, with the rows in the order of the tensor.
    fn add(&mut self, pair: &WeightUpdate, rows: RowOrder, config: &ModelConfig) {
        let rank = pair.rank;
        let [_, out] = pair.widths();
        let row = |row: usize| &pair.b[row * rank..(row + 1) * rank];
        let per_head = out / config.num_attention_heads;
        match rows {
            RowOrder::Same => {
                self.a.extend(&pair.a);
                self.b.extend(&pair.b);
            }
            RowOrder::Interleaved { heads } => {
                self.a.extend(&pair.a);
                let per_head = out / heads;
                for place in 0..out {
                    let (head, place) = (place / per_head, place % per_head);
                    self.b
                        .extend(row(head * per_head + RowOrder::interleaved(place, per_head)));
                }
            }
            // Transposed: the second factor of a head's rows becomes the first.
            RowOrder::Keys { heads, width } => {
                for head in 0..heads {
                    let rows = head * per_head..head * per_head + width;
                    for i in 0..rank {
                        self.a.extend(rows.clone().map(|at| row(at)[i]));
                    }
                    let latent = pair.a.len() / rank;
                    for col in 0..latent {
                        self.b.extend((0..rank).map(|i| pair.a[i * latent + col]));
                    }
                }
            }
            RowOrder::Values { heads, width } => {
                for head in 0..heads {
                    self.a.extend(&pair.a);
                    let end = (head + 1) * per_head;
                    (end - width..end).for_each(|at| self.b.extend(row(at)));
                }
            }
        }
    }

    fn specs(&self, name: &str) -> [TensorSpec; 2] {
        let spec = |ending: &str, shape: &Vec<usize>| TensorSpec {
            name: format!("{name}.lora_{ending}").into(),
            dtype: DType::F32,
            shape: shape.clone(),
        };
        [spec("a", &self.shapes[0]), spec("b", &self.shapes[1])]
    }
}

/// The same update with a larger rank, its second factor multiplied by a number.
fn padded(pair: &WeightUpdate, rank: usize, factor: f32) -> WeightUpdate {
    let [width, _] = pair.widths();
    let mut a = pair.a.clone();
    a.resize(rank * width, 0.0);
    let row = |row: &[f32]| {
        let row = row.iter().map(|b| b * factor);
        let zeros = std::iter::repeat_n(0.0, rank - pair.rank);
        row.chain(zeros).collect::<Vec<_>>()
    };
    WeightUpdate {
        a,
        b: pair.b.chunks(pair.rank).flat_map(row).collect(),
        rank,
        ..pair.clone()
    }
}

#[cfg(test)]
mod tests {
    use checkpoint::{Adapter, Gguf};

    use super::*;
    use crate::goldens;

    fn open(model: &str, adapter: &str) -> (Folder, AdapterWeights) {
        let folder = Folder::open(&goldens::path(model)).unwrap();
        let adapter = Adapter::open(&goldens::path(model).join(adapter)).unwrap();
        let adapter = AdapterWeights::read(&adapter, &read_config(&folder).unwrap()).unwrap();
        (folder, adapter)
    }

    fn written(model: &str, adapter: &str) -> (Gguf, AdapterWeights, LoraGgufReport) {
        let (folder, weights) = open(model, adapter);
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("a.gguf");
        let report = write_lora_gguf(&folder, &weights, true, &out).unwrap();
        (Gguf::open(&out).unwrap(), weights, report)
    }

    /// What llama.cpp adds to a matrix of the base, `[out, in]`: `alpha / rank · b · a`.
    fn added(gguf: &Gguf, name: &str, matrix: usize) -> Vec<f32> {
        let alpha = gguf
            .metadata("adapter.lora.alpha")
            .unwrap()
            .as_f64()
            .unwrap() as f32;
        let [(a, [rank, width]), (b, [out, _])] = ["a", "b"].map(|factor| {
            let name = format!("{name}.lora_{factor}");
            let tensor = gguf.tensors().find(|tensor| *tensor.name == *name).unwrap();
            let [.., rows, cols] = tensor.shape[..] else {
                panic!("{name}")
            };
            let values = tensor.to_f32().unwrap();
            (
                values[matrix * rows * cols..][..rows * cols].to_vec(),
                [rows, cols],
            )
        });
        let of = |row: usize, col: usize| {
            let terms = (0..rank).map(|i| b[row * rank + i] * a[i * width + col]);
            alpha / rank as f32 * terms.sum::<f32>()
        };
        (0..out * width)
            .map(|at| of(at / width, at % width))
            .collect()
    }

    /// What an update adds to a row of its weight.
    fn expected(adapter: &AdapterWeights, module: &str, row: usize) -> Vec<f32> {
        let pair = adapter.update(module).unwrap();
        let mut values = vec![0.0; pair.widths()[0]];
        pair.apply(row, &mut values);
        values
    }

    #[track_caller]
    fn assert_close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        assert!(expected.iter().any(|value| *value != 0.0));
        let mut pairs = found.iter().zip(expected);
        assert!(pairs.all(|(found, expected)| (found - expected).abs() < 1e-6));
    }

    #[test]
    fn updates_of_matrices_and_experts_are_the_adapters() {
        for adapter in ["adapter_peft", "adapter_classic", "adapter_rslora"] {
            let (gguf, weights, report) = written("deepseek_v3", adapter);
            assert!(report.tensors > 3, "{adapter}");
            let modules = weights.modules();
            for module in modules.iter().filter(|module| module.contains(".experts.")) {
                let parts: Vec<&str> = module.split('.').collect();
                let projection = parts[6].strip_suffix("_proj").unwrap();
                let name = format!("blk.{}.ffn_{projection}_exps.weight", parts[2]);
                let found = added(&gguf, &name, parts[5].parse().unwrap());
                let width = weights.update(module).unwrap().widths()[0];
                assert_close(&found[..width], &expected(&weights, module, 0));
            }
            let module = "model.layers.0.mlp.down_proj";
            if modules.iter().any(|known| known == module) {
                let found = added(&gguf, "blk.0.ffn_down.weight", 0);
                let width = weights.update(module).unwrap().widths()[0];
                assert_close(&found[width..2 * width], &expected(&weights, module, 1));
            }
        }
    }

    #[test]
    fn halves_have_the_updates_of_their_rows() {
        let module = "model.layers.1.self_attn.kv_b_proj";
        let (folder, adapter) = open("deepseek_v3", "adapter_classic");
        assert!(adapter.update(module).is_some());
        let config = read_config(&folder).unwrap();
        let AttentionConfig::Mla(mla) = &config.attention else {
            panic!("a DeepSeek")
        };
        let (gguf, ..) = written("deepseek_v3", "adapter_classic");
        let (nope, v, rank) = (mla.qk_nope_head_dim, mla.v_head_dim, mla.kv_lora_rank);
        for head in 0..config.num_attention_heads {
            let first = head * (nope + v);
            let keys = added(&gguf, "blk.1.attn_k_b.weight", head);
            let column: Vec<f32> = (0..rank).map(|at| keys[at * nope + 2]).collect();
            assert_close(&column, &expected(&adapter, module, first + 2));
            let values = added(&gguf, "blk.1.attn_v_b.weight", head);
            let row = &values[3 * rank..4 * rank];
            assert_close(row, &expected(&adapter, module, first + nope + 3));
        }
    }

    /// Rows of queries lie as the base's do.
    #[test]
    fn rows_of_a_llama_are_interleaved_and_ranks_are_padded() {
        let config = read_config(&Folder::open(&goldens::path("llama_distill")).unwrap()).unwrap();
        let pair = |rank: usize, out: usize| WeightUpdate {
            a: vec![1.0; rank * 2],
            b: (0..out * rank).map(|i| (i / rank) as f32).collect(),
            rank,
            alpha: 1.0,
            scale: 0.5,
            magnitude: None,
        };
        let mut factors = GgufFactors {
            a: vec![],
            b: vec![],
            shapes: [vec![], vec![]],
        };
        factors.add(&pair(1, 8), RowOrder::Interleaved { heads: 2 }, &config);
        assert_eq!(factors.b, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        let stack = GgufTensor {
            name: "blk.0.ffn_up_exps.weight".into(),
            shape: vec![3, 2, 2],
            keys: vec![String::new(); 3],
            rows: RowOrder::Same,
        };
        let pairs = [Some(pair(1, 2)), None, Some(pair(2, 2))];
        let factors = GgufFactors::of(&stack, &pairs, 1.0, &config);
        assert_eq!(factors.shapes, [vec![3, 2, 2], vec![3, 2, 2]]);
        // Of the first: the factor is 0.5 · 2 / 1.
        assert_eq!(factors.a[..4], [1.0, 1.0, 0.0, 0.0]);
        assert_eq!(factors.b[..4], [0.0, 0.0, 1.0, 0.0]);
        assert_eq!(factors.a[4..8], [0.0; 4]);
        assert_eq!(factors.b[8..], [0.0, 0.0, 1.0, 1.0]);
    }

    #[test]
    fn what_llama_cpp_does_not_add_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("a.gguf");
        for (model, adapter, expected) in [
            ("deepseek_v3", "adapter_classic", "--keep-ignored"),
            ("qwen2_distill", "adapter_dora", "magnitudes of DoRA"),
        ] {
            let (folder, adapter) = open(model, adapter);
            let error = write_lora_gguf(&folder, &adapter, false, &out).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
        let (folder, _) = open("qwen2_distill", "adapter_rslora");
        let (_, other) = open("deepseek_v3", "adapter_classic");
        let error = write_lora_gguf(&folder, &other, false, &out).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("expected an update of [64, 176]"),
            "{error}"
        );
        assert!(!out.exists());
    }
}
