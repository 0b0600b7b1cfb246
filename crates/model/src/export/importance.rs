//! The importance matrix of a model: for each column of a weight, the mean square of the inputs that it multiplies.
//!
//! Rounding a weight well means rounding the columns with large inputs well. The model itself measures the inputs on rows of
//! data, or they come from a file of llama.cpp's `llama-imatrix`.
//!
//! Source: ggml-org/llama.cpp: tools/imatrix/imatrix.cpp.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};
use checkpoint::{Folder, Gguf, GgufLayout, GgufTensor, RowOrder};
use kernels::device::{read, read_ints};
use kernels::{Compute, Direction, ExpertBank};

use crate::Error;
use crate::decoder::Model;
use crate::decoder::visit::ModuleRef;
use crate::forward::context::ForwardContext;
use crate::forward::recorder::{RecordedInput, Recorder};
use crate::keys::{Module, PROJECTIONS, ParamKey, keys};
use crate::modules::experts::{ExpertWeights, down_input};
use crate::modules::linear::Weight;

/// With this many tokens an expert's own inputs alone determine its importance; with fewer, its layer's inputs have the missing
/// share. A mean of n squares of normal values has a relative error of √(2 / n), here a quarter: little compared with the
/// differences between columns.
const ENOUGH_TOKENS: f64 = 32.0;
/// The least importance of a column, relative to the mean: an input that was always 0 in the data may be another elsewhere.
const LEAST: f64 = 1e-12;

/// The importance of the columns of matrices.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Importance {
    /// By the tensor's name in a GGUF, for its one matrix or for several in a row.
    columns: BTreeMap<String, Vec<f32>>,
    /// Tokens that were measured.
    pub tokens: usize,
    /// Routed experts, all layers together.
    pub experts: usize,
    /// Routed experts with too few tokens to count alone.
    pub rare_experts: usize,
}

/// The sums of one matrix's inputs.
#[derive(Clone, Default)]
struct ColumnSums {
    squares: Vec<f64>,
    tokens: f64,
}

impl ColumnSums {
    fn add(&mut self, squares: &[f32], tokens: usize) {
        self.squares.resize(squares.len(), 0.0);
        let pairs = self.squares.iter_mut().zip(squares);
        pairs.for_each(|(sum, new)| *sum += f64::from(*new));
        self.tokens += tokens as f64;
    }

    fn mean(&self) -> impl Iterator<Item = f64> {
        self.squares.iter().map(|sum| sum / self.tokens.max(1.0))
    }
}

impl Importance {
    /// Measures the inputs of a frozen model's weights on rows of ids. `folder` is the model's; `progress` gets the number of rows
    /// done.
    ///
    /// # Errors
    /// If the model has no GGUF form, or an input is not finite.
    pub fn measure(
        folder: &Folder,
        model: &Model,
        rows: &[&[u32]],
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self, Error> {
        let mut collected = Collected::of(model);
        let device: Device = model.model.norm.weight.val().device();
        for (number, row) in rows.iter().enumerate() {
            let ids: Vec<i32> = row.iter().map(|id| *id as i32).collect();
            let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, row.len()]), &device);
            let mut recorder = Recorder::of_inputs();
            let mut ctx = ForwardContext::recorded(Compute::F32, &mut recorder);
            let hidden = model.hidden(ids, &mut ctx);
            let hidden = hidden.reshape([row.len(), model.config.hidden_size]);
            model.record_head(&hidden, &ctx);
            for input in recorder.take_inputs() {
                collected.add(input);
            }
            progress(number + 1);
        }
        let json = model.config.to_json();
        let layout = GgufLayout::of(&folder.config_path(), &json)?;
        let mut importance = Self {
            tokens: rows.iter().map(|row| row.len()).sum(),
            ..Self::default()
        };
        for tensor in layout.tensors(&keys(&model.config)) {
            importance.insert(&tensor.name, &collected.take(&tensor))?;
        }
        Ok(importance)
    }

    /// Reads what `llama-imatrix` wrote as a GGUF.
    ///
    /// # Errors
    /// If the file is no such GGUF, or its numbers do not fit one another.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let file = Gguf::open(path)?;
        if file.metadata("general.type").and_then(|kind| kind.as_str()) != Some("imatrix") {
            let problem = "expected `general.type` to be imatrix, as llama-imatrix writes it";
            return Err(file.malformed(problem.into()).into());
        }
        let mut importance = Self::default();
        for tensor in file.tensors() {
            let Some(name) = tensor.name.strip_suffix(".in_sum2") else {
                continue;
            };
            let of_counts = format!("{name}.counts");
            let counts = file.tensors().find(|tensor| *tensor.name == *of_counts);
            let (squares, counts) = match counts {
                Some(counts) => (tensor.to_f32()?, counts.to_f32()?),
                None => (tensor.to_f32()?, vec![]),
            };
            let fits = !counts.is_empty() && squares.len().is_multiple_of(counts.len());
            if !fits {
                let (n, of) = (squares.len(), counts.len());
                let problem =
                    format!("tensor `{of_counts}`: expected a divisor of {n} counts, found {of}");
                return Err(file.malformed(problem).into());
            }
            let per_matrix = (squares.len() / counts.len()).max(1);
            let sums = squares.chunks(per_matrix).zip(&counts);
            let sums: Vec<ColumnSums> = sums
                .map(|(squares, tokens)| {
                    let mut sums = ColumnSums::default();
                    sums.add(squares, tokens.max(0.0) as usize);
                    sums
                })
                .collect();
            let most = counts.iter().fold(0f32, |most, n| most.max(*n));
            importance.tokens = importance.tokens.max(most as usize);
            importance.insert(name, &sums)?;
        }
        Ok(importance)
    }

    /// Adds the importance of a tensor's columns.
    fn insert(&mut self, name: &str, sums: &[ColumnSums]) -> Result<(), Error> {
        let total: f64 = sums.iter().map(|sums| sums.tokens).sum();
        if total == 0.0 {
            return Ok(());
        }
        let is_stack = name.contains("_exps.") && sums.len() > 1;
        let means: Vec<f64> = if is_stack {
            blended(sums, total)
        } else {
            sums.iter().flat_map(ColumnSums::mean).collect()
        };
        // Once for the three projections.
        if is_stack && name.contains("ffn_down") {
            let rare = sums.iter().filter(|sums| sums.tokens < ENOUGH_TOKENS);
            self.experts += sums.len();
            self.rare_experts += rare.count();
        }
        let mean = means.iter().sum::<f64>() / means.len().max(1) as f64;
        if !mean.is_finite() || means.iter().any(|mean| *mean < 0.0) {
            return Err(Error::Unsupported(format!(
                "importance of `{name}`: expected finite sums of squares, found others"
            )));
        }
        if mean > 0.0 {
            // By a power of two, which rounds nothing: encoders multiply these numbers with squares of weights.
            let unit = mean.log2().floor().exp2();
            let means = means.iter().map(|m| (m.max(LEAST * mean) / unit) as f32);
            self.columns.insert(name.into(), means.collect());
        }
        Ok(())
    }

    /// The importance of the columns of one of a tensor's matrices, if it is known.
    pub(crate) fn columns(&self, name: &str, matrix: usize, cols: usize) -> Option<&[f32]> {
        let columns = self.columns.get(name)?;
        match columns.len() == cols {
            true => Some(columns),
            false => columns.get(matrix * cols..(matrix + 1) * cols),
        }
    }

    /// The number of a GGUF's tensors whose importance is known.
    ///
    /// # Errors
    /// If it has other shapes, or if it is known of none of them.
    pub(crate) fn check(&self, tensors: &[GgufTensor]) -> Result<usize, Error> {
        let mut known = 0;
        for tensor in tensors {
            let (Some(columns), [matrices @ .., _, cols]) =
                (self.columns.get(&tensor.name), tensor.shape.as_slice())
            else {
                continue;
            };
            let expected = matrices.iter().product::<usize>() * cols;
            if ![expected, *cols].contains(&columns.len()) {
                return Err(Error::Unsupported(format!(
                    "importance of `{}`: expected {expected} columns, found {}: it belongs to another model",
                    tensor.name,
                    columns.len()
                )));
            }
            known += 1;
        }
        match known {
            0 => Err(Error::Unsupported(
                "importance: expected columns of the model's tensors, found those of no tensor"
                    .into(),
            )),
            known => Ok(known),
        }
    }
}

/// The means of a layer's experts. If an expert has few tokens, its layer's mean has a share.
fn blended(sums: &[ColumnSums], total: f64) -> Vec<f64> {
    let cols = sums.iter().map(|sums| sums.squares.len()).max();
    let mut layer_means = vec![0.0; cols.unwrap_or(0)];
    for sums in sums {
        let pairs = layer_means.iter_mut().zip(&sums.squares);
        pairs.for_each(|(sum, squares)| *sum += squares / total);
    }
    let blend = |sums: &ColumnSums| {
        let own = (sums.tokens / ENOUGH_TOKENS).min(1.0);
        let means = sums.mean().chain(std::iter::repeat(0.0));
        let blended = means.zip(&layer_means);
        blended
            .map(move |(mean, layer_means)| own * mean + (1.0 - own) * layer_means)
            .collect::<Vec<_>>()
    };
    sums.iter().flat_map(blend).collect()
}

/// The inputs of a model's weights, summed up.
struct Collected {
    /// Where a weight of the model is in memory, and its key; of a layer's experts the path.
    places: HashMap<usize, String>,
    /// By key; a split `kv_b_proj` by the keys of its two parts, with sums for each head.
    sums: HashMap<String, Vec<ColumnSums>>,
}

/// The key of the part of a split `kv_b_proj` that multiplies in a direction.
fn part_of_kv_b(key: &str, direction: Direction) -> String {
    let part = match direction {
        Direction::Transposed => Module::KvBKeys,
        Direction::Forward => Module::KvBValues,
    };
    let key = ParamKey::parse(key).map(|key| key.with_module(part));
    key.map_or(String::new(), |key| key.to_string())
}

impl Collected {
    fn of(model: &Model) -> Self {
        let mut places = HashMap::new();
        let place = |weight: &Weight, key: String| {
            let matrix = weight.frozen();
            matrix.map(|matrix| (Arc::as_ptr(matrix).addr(), key))
        };
        if model.lm_head.is_none() {
            let key = ParamKey::weight(None, Module::Embedding).to_string();
            places.extend(place(&model.model.embed_tokens.weight, key));
        }
        for (path, module) in model.modules() {
            match module {
                ModuleRef::Linear(linear) => {
                    places.extend(place(&linear.weight, format!("{path}.weight")));
                }
                ModuleRef::Experts(experts) => {
                    if let ExpertWeights::Frozen(frozen) = &experts.weights {
                        places.insert(Arc::as_ptr(&frozen.bank).addr(), path);
                    }
                }
            }
        }
        Self {
            places,
            sums: HashMap::new(),
        }
    }

    /// Waits for the device.
    fn add(&mut self, input: RecordedInput) {
        let (place, direction) = match &input {
            RecordedInput::Linear { matrix, .. } => (Arc::as_ptr(matrix).addr(), None),
            RecordedInput::PerHead {
                matrix, direction, ..
            } => (Arc::as_ptr(matrix).addr(), Some(*direction)),
            RecordedInput::Experts { bank, .. } => (Arc::as_ptr(bank).addr(), None),
        };
        let Some(path) = self.places.get(&place).cloned() else {
            return;
        };
        match input {
            RecordedInput::Linear {
                squares, tokens, ..
            }
            | RecordedInput::PerHead {
                squares, tokens, ..
            } => {
                let of_part = |direction| part_of_kv_b(&path, direction);
                let key = direction.map_or(path.clone(), of_part);
                let [matrices, cols] = squares.dims();
                let squares = read(squares);
                let sums = self.sums.entry(key).or_default();
                sums.resize(matrices, ColumnSums::default());
                let pairs = sums.iter_mut().zip(squares.chunks(cols.max(1)));
                pairs.for_each(|(sums, squares)| sums.add(squares, tokens));
            }
            RecordedInput::Experts { bank, x, ids } => self.add_experts(&path, &bank, x, ids),
        }
    }

    fn add_experts(&mut self, path: &str, bank: &ExpertBank, x: Tensor<2>, ids: Tensor<2, Int>) {
        let [_, top_k] = ids.dims();
        let ids = read_ints(ids);
        for expert in 0..bank.gate.len() {
            let choices = ids.chunks(top_k.max(1)).enumerate();
            let own = choices.filter(|(_, ids)| ids.contains(&(expert as i64)));
            let own: Vec<i32> = own.map(|(token, _)| token as i32).collect();
            if own.is_empty() {
                continue;
            }
            let tokens = Tensor::<1, Int>::from_ints(own.as_slice(), &x.device());
            let x = x.clone().select(0, tokens);
            let inner = down_input(bank, expert, x.clone());
            let squares = [x, inner].map(|x| read(x.powi_scalar(2).sum_dim(0)));
            for (projection, entered) in PROJECTIONS.into_iter().zip([0, 0, 1]) {
                let key = format!("{path}.{expert}.{projection}.weight");
                let sums = self.sums.entry(key).or_default();
                sums.resize(1, ColumnSums::default());
                sums[0].add(&squares[entered], own.len());
            }
        }
    }

    /// The sums of a GGUF's tensor, for each of its matrices.
    fn take(&mut self, tensor: &GgufTensor) -> Vec<ColumnSums> {
        let key = &tensor.keys[0];
        match tensor.rows {
            RowOrder::Keys { .. } => self.sums.remove(&part_of_kv_b(key, Direction::Transposed)),
            RowOrder::Values { .. } => self.sums.remove(&part_of_kv_b(key, Direction::Forward)),
            RowOrder::Same | RowOrder::Interleaved { .. } if tensor.keys.len() == 1 => {
                self.sums.remove(key)
            }
            RowOrder::Same | RowOrder::Interleaved { .. } => {
                let mut of_key = |key: &String| self.sums.remove(key)?.pop();
                let sums = tensor
                    .keys
                    .iter()
                    .map(|key| of_key(key).unwrap_or_default());
                Some(sums.collect())
            }
        }
        .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use checkpoint::{DType, GgufValue, GgufWriter, TensorSpec};

    use super::*;
    use crate::load::{Training, load};

    const ROW: [u32; 11] = [3, 17, 8, 3, 40, 5, 5, 91, 33, 2, 60];

    fn golden(name: &str) -> (Folder, Model) {
        let folder = Folder::open(&crate::goldens::path(name)).unwrap();
        let model = load(&folder, Training::Frozen, &Device::flex()).unwrap();
        (folder, model)
    }

    fn measured(name: &str, rows: &[&[u32]]) -> (Model, Importance) {
        let (folder, model) = golden(name);
        let importance = Importance::measure(&folder, &model, rows, &mut |_| {}).unwrap();
        (model, importance)
    }

    /// Equal up to a factor, as the unit is free.
    #[track_caller]
    fn assert_proportional(found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        let [sum, wanted] = [
            found.iter().map(|v| f64::from(*v)).sum::<f64>(),
            expected.iter().sum(),
        ];
        for (found, expected) in found.iter().zip(expected) {
            let [found, expected] = [f64::from(*found) / sum, expected / wanted];
            assert!((found - expected).abs() < 1e-5, "{found}, not {expected}");
        }
    }

    /// What enters the first layer is the norm of the embedding, which is made here again.
    #[test]
    fn columns_are_worth_the_mean_squares_of_their_inputs() {
        for (name, tensor) in [
            ("qwen2_distill", "blk.0.attn_q.weight"),
            ("deepseek_v3", "blk.0.attn_q_a.weight"),
        ] {
            let (model, importance) = measured(name, &[&ROW[..4], &ROW[4..]]);
            let Weight::Frozen(embedding) = &model.model.embed_tokens.weight else {
                unreachable!("the model is frozen")
            };
            let (values, cols) = (embedding.matrix.to_f32(), embedding.matrix.cols());
            let norm: Vec<f32> = model.model.layers[0]
                .input_layernorm
                .weight
                .val()
                .into_data()
                .iter()
                .collect();
            let mut expected = vec![0.0; cols];
            for id in ROW {
                let row = &values[id as usize * cols..(id as usize + 1) * cols];
                let squares = row.iter().map(|v| f64::from(*v).powi(2));
                let mean =
                    squares.sum::<f64>() / cols as f64 + f64::from(model.config.rms_norm_eps);
                for (sum, (value, gain)) in expected.iter_mut().zip(row.iter().zip(&norm)) {
                    *sum += f64::from(value * gain).powi(2) / mean;
                }
            }
            let found = importance.columns(tensor, 0, cols).unwrap();
            assert_proportional(found, &expected);
            assert_eq!(importance.tokens, ROW.len());
        }
    }

    /// Of so few tokens no expert gets enough, and some get none: those have their layer's columns.
    #[test]
    fn every_matrix_of_a_mixture_has_columns() {
        let (model, importance) = measured("deepseek_v3", &[&ROW]);
        let config = &model.config;
        let moe = config.moe.as_ref().unwrap();
        let (experts, inner) = (moe.n_routed_experts, moe.moe_intermediate_size);
        let layers = config.num_hidden_layers - moe.first_k_dense_replace;
        assert_eq!(importance.experts, layers * experts);
        assert_eq!(importance.rare_experts, layers * experts);
        let last = config.num_hidden_layers - 1;
        for (part, cols) in [("gate", config.hidden_size), ("down", inner)] {
            let name = format!("blk.{last}.ffn_{part}_exps.weight");
            let of = |expert| importance.columns(&name, expert, cols).unwrap();
            assert!((0..experts).all(|e| of(e).iter().all(|v| *v > 0.0)));
            assert!((1..experts).any(|expert| of(expert) != of(0)), "{name}");
            assert!(importance.columns(&name, experts, cols).is_none());
        }
        let heads = config.num_attention_heads;
        for (name, cols) in [("k_b", 16), ("v_b", 32)] {
            let name = format!("blk.0.attn_{name}.weight");
            let of = |head| importance.columns(&name, head, cols);
            assert!(of(heads - 1).is_some() && of(heads).is_none(), "{name}");
            assert_ne!(of(0), of(1), "{name}");
        }
        assert!(
            importance
                .columns("output.weight", 0, config.hidden_size)
                .is_some()
        );
        assert!(
            importance
                .columns("token_embd.weight", 0, config.hidden_size)
                .is_none()
        );
    }

    #[test]
    fn experts_with_few_tokens_count_with_their_layer() {
        let sums = |squares: [f64; 2], tokens: f64| ColumnSums {
            squares: squares.to_vec(),
            tokens,
        };
        let list = [
            sums([64.0, 128.0], 64.0),
            sums([40.0, 0.0], 8.0),
            ColumnSums::default(),
        ];
        let mut importance = Importance::default();
        let name = "blk.1.ffn_down_exps.weight";
        importance.insert(name, &list).unwrap();
        let layer = [104.0 / 72.0, 128.0 / 72.0];
        let quarter = [0.25 * 5.0 + 0.75 * layer[0], 0.75 * layer[1]];
        let expected = [[1.0, 2.0], quarter, layer].concat();
        assert_proportional(&importance.columns[name], &expected);
        assert_eq!((importance.rare_experts, importance.experts), (2, 3));
    }

    type ImatrixFile = (PathBuf, tempfile::TempDir);

    fn imatrix(kind: &str, tensors: &[(&str, &[usize], &[f32])]) -> ImatrixFile {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("imatrix.gguf");
        let specs = tensors.iter().map(|(name, shape, _)| TensorSpec {
            name: (*name).into(),
            dtype: DType::F32,
            shape: shape.to_vec(),
        });
        let specs: Vec<_> = specs.collect();
        let metadata = [("general.type".to_owned(), GgufValue::Text(kind.into()))];
        let mut writer = GgufWriter::create(&path, &metadata, &specs).unwrap();
        for (_, _, values) in tensors {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            writer.write(&bytes).unwrap();
        }
        writer.finish().unwrap();
        (path, folder)
    }

    #[test]
    fn files_of_llama_imatrix_are_read() {
        let (path, _folder) = imatrix(
            "imatrix",
            &[
                ("blk.0.attn_q.weight.in_sum2", &[1, 3], &[2.0, 4.0, 0.0]),
                ("blk.0.attn_q.weight.counts", &[1, 1], &[2.0]),
                (
                    "blk.1.ffn_up_exps.weight.in_sum2",
                    &[2, 2],
                    &[64.0, 0.0, 1.0, 3.0],
                ),
                ("blk.1.ffn_up_exps.weight.counts", &[2, 1], &[32.0, 0.0]),
            ],
        );
        let importance = Importance::read(&path).unwrap();
        let found = importance.columns("blk.0.attn_q.weight", 0, 3).unwrap();
        assert_proportional(&found[..2], &[1.0, 2.0]);
        assert!(found[2] > 0.0 && found[2] < 1e-9);
        assert!(
            importance
                .columns("blk.1.ffn_up_exps.weight", 1, 2)
                .is_some()
        );
        assert_eq!(importance.tokens, 32);
        for (kind, tensors, expected) in [
            ("model", &[][..], "general.type"),
            (
                "imatrix",
                &[("a.in_sum2", &[2][..], &[1.0, 1.0][..])][..],
                "counts",
            ),
            (
                "imatrix",
                &[
                    ("a.in_sum2", &[1][..], &[f32::NAN][..]),
                    ("a.counts", &[1], &[1.0]),
                ],
                "finite",
            ),
        ] {
            let (path, _folder) = imatrix(kind, tensors);
            let error = Importance::read(&path).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn importance_of_another_model_is_refused() {
        let tensor = |name: &str, shape: &[usize]| GgufTensor {
            name: name.into(),
            shape: shape.to_vec(),
            keys: vec!["k".into()],
            rows: RowOrder::Same,
        };
        let mut importance = Importance::default();
        let sums = ColumnSums {
            squares: vec![1.0; 6],
            tokens: 1.0,
        };
        importance.insert("a", &[sums]).unwrap();
        let check = |name: &str, shape: &[usize]| {
            let found = importance.check(&[tensor(name, shape)]);
            found.map_err(|error| error.to_string())
        };
        assert_eq!(check("a", &[5, 6]), Ok(1));
        assert_eq!(check("a", &[2, 5, 3]), Ok(1));
        assert!(check("a", &[5, 4]).unwrap_err().contains("another model"));
        assert!(check("b", &[5, 6]).unwrap_err().contains("no tensor"));
        // Several matrices of one set of columns, as older files have them.
        assert_eq!(check("a", &[2, 5, 6]), Ok(1));
        assert_eq!(importance.columns("a", 1, 6), importance.columns("a", 0, 6));
    }
}
