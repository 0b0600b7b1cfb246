//! Writing a model as a GGUF, rows at a time.
//!
//! Before the file gets its name it is opened again like any other file, and every matrix is compared with its source: by
//! names, shapes and values as the reader, not the writer, has them.

use std::path::Path;

use checkpoint::{
    DType, Folder, GgufLayout, GgufTensor, GgufValue, GgufWriter, RowOrder, TensorSpec,
};
use kernels::fp8::Scales;
use kernels::{Format, Ggml, Matrix, RopeLayout};
use rayon::prelude::*;

use super::faithful::relative_error;
use super::gguf_types::{TypesInUse, size_label};
use super::importance::Importance;
use super::merge::MergeReport;
use super::mix::{GgufType, Mix};
use crate::Error;
use crate::config::{AttentionConfig, Family, ModelConfig, RopeScaling};
use crate::keys::{ParamKey, keys};
use crate::load::{expect_complete, mtp_keys, read_config, read_matrix, read_tensor};

/// Values to encode at a time.
const PIECE: usize = 1 << 20;
/// Of the values. Rounding to two bits has an error below half of this; rows in another order differ by 1.4.
const LARGEST_ERROR: f64 = 0.8;

/// Writes a model as the GGUF `out`, whole or not at all. `tokenizer` is metadata that is added unchanged.
///
/// `progress` gets the tensors done and the tensors in all; each of the model's counts twice, once written and once checked.
/// Leaves out unknown tensors, and those for multi-token prediction unless the mix has them, like llama.cpp's converter.
///
/// # Errors
/// If a GGUF cannot describe the model, if reading or writing fails, or if the check finds other values
/// ([`Error::Unfaithful`]).
pub fn write_gguf(
    model: &Folder,
    mix: &Mix,
    tokenizer: Vec<(String, GgufValue)>,
    out: &Path,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<MergeReport, Error> {
    let mut config = read_config(model)?;
    expect_complete(model, &config)?;
    let keys = written_keys(model, mix, &mut config)?;
    check_config(&config)?;
    let json = config.to_json();
    let layout = GgufLayout::of(&model.config_path(), &json)?;
    let tensors = layout.tensors(&keys);
    let type_of = |tensor: &GgufTensor| mix.type_of(tensor, &config);
    let made = layout.made();
    let specs = tensors.iter().map(|tensor| TensorSpec {
        name: tensor.name.as_str().into(),
        dtype: type_of(tensor).dtype(),
        shape: tensor.shape.clone(),
    });
    let types = TypesInUse::of(mix, &tensors, &config);
    let specs: Vec<TensorSpec> = specs.chain(made.as_ref().map(spec_of_made)).collect();
    let importance = mix.importance.as_ref();
    let weighted = importance.map_or(Ok(0), |importance| importance.check(&tensors))?;
    let about = about(model, types.file_type(mix.scheme), size_label(&tensors));
    let metadata = layout.metadata().into_iter().chain(about).chain(tokenizer);
    let metadata: Vec<_> = metadata.collect();
    let mut writer = GgufWriter::create(out, &metadata, &specs)?;
    let (mut done, total) = (0, 2 * keys.len());
    let mut step = || {
        done += 1;
        progress(done.min(total), total);
    };
    for tensor in &tensors {
        for source in 0..tensor.keys.len() {
            let encoding = Encoding {
                tensor,
                format: type_of(tensor),
                importance,
                source,
            };
            write_tensor(model, &config, encoding, &mut writer)?;
            // The two parts of a split weight count as one.
            if !matches!(tensor.rows, RowOrder::Keys { .. }) {
                step();
            }
        }
    }
    if let Some((_, values)) = made {
        let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
        writer.write(&bytes)?;
    }
    writer.flush()?;
    let written = Folder::open(writer.path())?;
    let expected = ExpectedModel {
        model,
        config: &config,
        keys: &keys,
    };
    let mut report = expected.check(&written, &mut step)?;
    report.tensors = specs.len();
    report.weighted = weighted;
    (report.types, report.replaced) = (types.counts, types.replaced);
    report.bytes = specs.iter().map(bytes_of).sum();
    writer.finish()?;
    Ok(report)
}

/// The spec of a tensor that is made of the config.
fn spec_of_made((name, values): &(&'static str, Vec<f32>)) -> TensorSpec {
    TensorSpec {
        name: (*name).into(),
        dtype: DType::F32,
        shape: vec![values.len()],
    }
}

/// The keys and shapes to write. Removes modules for multi-token prediction from the config if the mix has none.
fn written_keys(
    model: &Folder,
    mix: &Mix,
    config: &mut ModelConfig,
) -> Result<Vec<(String, Vec<usize>)>, Error> {
    let mut keys = keys(config);
    if mix.mtp {
        keys.extend(mtp_keys(model, config)?);
    } else {
        config.num_nextn_predict_layers = 0;
    }
    Ok(keys)
}

/// The file's metadata about itself.
fn about(model: &Folder, file_type: u32, size_label: String) -> Vec<(String, GgufValue)> {
    /// Of ggml's blocks as they are now.
    const QUANTIZATION_VERSION: u32 = 2;
    let name = model.path().file_stem().unwrap_or_default();
    let entries = [
        ("type", GgufValue::Text("model".into())),
        ("name", GgufValue::Text(name.to_string_lossy().into_owned())),
        ("size_label", GgufValue::Text(size_label)),
        ("file_type", GgufValue::Count(file_type)),
        (
            "quantization_version",
            GgufValue::Count(QUANTIZATION_VERSION),
        ),
    ];
    let mut about = entries
        .map(|(key, value)| (format!("general.{key}"), value))
        .to_vec();
    let sampling = model.generation_config().map(GgufLayout::sampling);
    about.extend(sampling.unwrap_or_default());
    about.extend(carried(model, &about));
    about
}

/// What a source that is a GGUF says about itself, its origin and its license.
fn carried(model: &Folder, written: &[(String, GgufValue)]) -> Vec<(String, GgufValue)> {
    let entries = model.metadata().into_iter().flatten();
    let entries = entries.filter(|(key, _)| {
        let is_written = written.iter().any(|(known, _)| known == *key);
        let is_made = matches!(key.as_str(), "general.alignment" | "general.architecture");
        key.starts_with("general.") && !is_made && !is_written
    });
    let entries = entries.filter_map(|(key, value)| Some((key.clone(), GgufValue::of(value)?)));
    entries.collect()
}

fn bytes_of(spec: &TensorSpec) -> u64 {
    let values: usize = spec.shape.iter().product();
    (values / spec.dtype.block() * spec.dtype.size_bytes()) as u64
}

/// Refuses settings that have no key in a GGUF's metadata.
fn check_config(config: &ModelConfig) -> Result<(), Error> {
    let is_latent = matches!(config.attention, AttentionConfig::Mla(_));
    let problem = match (&config.rope.scaling, &config.moe) {
        (RopeScaling::Llama3 { .. }, _) if config.model_type != Family::Llama => {
            "Llama 3's rotary scaling in another family"
        }
        (RopeScaling::Yarn { .. }, _) if is_latent && has_other_amplitude(config) => {
            "an `attention_factor`, or an `mscale` that is not `mscale_all_dim`, in latent attention"
        }
        (
            RopeScaling::Yarn {
                truncate: false, ..
            },
            _,
        ) => "`truncate` false in its rotary scaling",
        (_, Some(moe)) if moe.moe_layer_freq != 1 => "dense layers between mixtures",
        (_, None) if is_latent => "latent attention without experts",
        _ if is_latent && config.rope.layout == RopeLayout::HalfSplit => {
            "half-split rotary pairs in latent attention"
        }
        _ => return Ok(()),
    };
    Err(Error::Unsupported(format!(
        "a GGUF cannot describe a model with {problem}"
    )))
}

/// Whether cosines and sines have another factor than a deepseek2's metadata imply.
fn has_other_amplitude(config: &ModelConfig) -> bool {
    let mut implied = config.rope.clone();
    if let RopeScaling::Yarn {
        mscale,
        mscale_all_dim,
        attention_factor,
        ..
    } = &mut implied.scaling
    {
        (*mscale, *attention_factor) = (*mscale_all_dim, None);
    }
    !is_close(implied.amplitude(), config.rope.amplitude())
}

/// Whether two factors are the same up to f32's rounding.
fn is_close(a: f64, b: f64) -> bool {
    (a / b - 1.0).abs() < 1e-6
}

/// One of a tensor's sources in the folder, and how its rows are written.
#[derive(Clone, Copy)]
struct Encoding<'a> {
    tensor: &'a GgufTensor,
    format: GgufType,
    importance: Option<&'a Importance>,
    /// The number of the source.
    source: usize,
}

/// Writes the part of a tensor that comes from one source.
fn write_tensor(
    model: &Folder,
    config: &ModelConfig,
    encoding: Encoding<'_>,
    writer: &mut GgufWriter,
) -> Result<(), Error> {
    let (tensor, source) = (encoding.tensor, encoding.source);
    let key = &tensor.keys[source];
    let shape = match (tensor.rows, tensor.shape.as_slice()) {
        (_, [len]) => {
            let vector = read_tensor(model, key, config)?;
            vector.expect_shape(&[*len])?;
            let values = vector.to_f32()?;
            let value = |place: usize| match tensor.rows {
                RowOrder::Interleaved { heads } => {
                    let rows = len / heads;
                    let head = place / rows;
                    values[head * rows + RowOrder::interleaved(place % rows, rows)]
                }
                _ => values[place],
            };
            let bytes = (0..*len).flat_map(|place| value(place).to_le_bytes());
            return Ok(writer.write(&bytes.collect::<Vec<_>>())?);
        }
        (RowOrder::Keys { .. } | RowOrder::Values { .. }, _) => whole_shape(key, config),
        (_, [.., rows, cols]) => [*rows, *cols],
        (_, []) => [1, 1],
    };
    let matrix = read_matrix(model, key, shape, config.fp8_block)?;
    for piece in 0..n_pieces(tensor.rows) {
        // A layer's experts are sources; the heads of a split weight are pieces of one source.
        let importance = encoding.importance.and_then(|importance| {
            importance.columns(&tensor.name, source + piece, *tensor.shape.last()?)
        });
        let rows = self::piece(&matrix, tensor.rows, piece);
        write_rows(&rows, encoding.format, importance, writer)?;
    }
    Ok(())
}

/// The shape of a weight that a GGUF splits by heads.
fn whole_shape(key: &str, config: &ModelConfig) -> [usize; 2] {
    let shape = ParamKey::parse(key).and_then(|key| key.shape(config));
    match shape.as_deref() {
        Some(&[rows, cols]) => [rows, cols],
        _ => [0, 0],
    }
}

fn n_pieces(rows: RowOrder) -> usize {
    match rows {
        RowOrder::Same => 1,
        RowOrder::Interleaved { heads }
        | RowOrder::Keys { heads, .. }
        | RowOrder::Values { heads, .. } => heads,
    }
}

/// Rows of a matrix in the order of a GGUF: all of them, or those of a head. It is a view if they are stored in that order.
fn piece(matrix: &Matrix, rows: RowOrder, head: usize) -> Matrix {
    let of_head = |heads: usize| {
        let per_head = matrix.rows() / heads;
        matrix.row_range(head * per_head..(head + 1) * per_head)
    };
    match (rows, matrix.split_kv_b()) {
        (RowOrder::Same, _) => matrix.clone(),
        (RowOrder::Interleaved { heads }, _) => {
            let head = of_head(heads);
            reordered(&head, [head.rows(), head.cols()], |place, col| {
                RowOrder::interleaved(place, head.rows()) * head.cols() + col
            })
        }
        (RowOrder::Keys { .. }, Some(split)) => split.keys(head),
        (RowOrder::Keys { heads, width }, None) => {
            let keys = of_head(heads).row_range(0..width);
            reordered(&keys, [keys.cols(), width], |row, col| {
                col * keys.cols() + row
            })
        }
        (RowOrder::Values { .. }, Some(split)) => split.values(head),
        (RowOrder::Values { heads, width }, None) => {
            let head = of_head(heads);
            head.row_range(head.rows() - width..head.rows())
        }
    }
}

/// A matrix of the given shape with the values of another in another order.
fn reordered(
    matrix: &Matrix,
    [rows, cols]: [usize; 2],
    place: impl Fn(usize, usize) -> usize,
) -> Matrix {
    let values = matrix.to_f32();
    let places = (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col)));
    let values: Vec<f32> = places.map(|(row, col)| values[place(row, col)]).collect();
    Matrix::from_f32(rows, cols, &values)
}

/// Writes the rows of a matrix in a type: its bytes if it has that type, else encoded rows, some at a time.
fn write_rows(
    matrix: &Matrix,
    format: GgufType,
    importance: Option<&[f32]>,
    writer: &mut GgufWriter,
) -> Result<(), Error> {
    let is_same = match (format, matrix.format()) {
        (GgufType::F32, Format::F32) | (GgufType::Bf16, Format::Bf16) => true,
        (GgufType::Ggml(Ggml::F16), Format::F16) => true,
        (GgufType::Ggml(wanted), Format::Ggml(found)) => wanted == *found,
        _ => false,
    };
    if is_same {
        return Ok(writer.write(matrix.bytes())?);
    }
    let (cols, dtype) = (matrix.cols(), format.dtype());
    let row_bytes = cols / dtype.block() * dtype.size_bytes();
    let rows_at_once = (PIECE / cols.max(1)).max(1);
    for start in (0..matrix.rows()).step_by(rows_at_once) {
        let n = rows_at_once.min(matrix.rows() - start);
        let mut bytes = vec![0; n * row_bytes];
        let rows = bytes.par_chunks_mut(row_bytes.max(1)).enumerate();
        rows.for_each_init(
            || vec![0.0; cols],
            |line, (i, out)| {
                matrix.decode(start + i..start + i + 1, 0..cols, line);
                format.encode(line, importance, out);
            },
        );
        writer.write(&bytes)?;
    }
    Ok(())
}

/// Whether two configs turn by the same angles and scale alike: a GGUF has the effect of the settings, not each one.
fn same_rope(config: &ModelConfig, other: &ModelConfig) -> bool {
    /// Divisors are written in f32.
    const ROUNDING: f32 = 1e-5;
    let dim = config.rope_dim();
    let [before, after] = [config, other].map(|config| config.rope.frequencies(dim));
    let mut pairs = before.iter().zip(&after);
    let [softmax, others] = [config, other].map(|config| match &config.attention {
        AttentionConfig::Mla(mla) => config.rope.softmax_scale(mla.qk_head_dim()),
        AttentionConfig::Gqa(_) => 1.0,
    });
    config.rope.layout == other.rope.layout
        && is_close(config.rope.amplitude(), other.rope.amplitude())
        && is_close(softmax.into(), others.into())
        && pairs.all(|(before, after)| (after / before - 1.0).abs() < ROUNDING)
}

/// What a written file has to hold.
struct ExpectedModel<'a> {
    model: &'a Folder,
    config: &'a ModelConfig,
    keys: &'a [(String, Vec<usize>)],
}

impl ExpectedModel<'_> {
    /// Compares every tensor of a written file with the model's.
    fn check(&self, written: &Folder, step: &mut dyn FnMut()) -> Result<MergeReport, Error> {
        let found = read_config(written)?;
        self.check_settings(&found)?;
        let (model, config) = (self.model, self.config);
        let mut report = MergeReport::default();
        for (key, shape) in self.keys {
            step();
            let &[rows, cols] = shape.as_slice() else {
                let [before, after] =
                    [model, written].map(|folder| read_tensor(folder, key, config));
                if before?.to_f32()? != after?.to_f32()? {
                    return Err(unfaithful(key, "the model's values", "others".into()));
                }
                continue;
            };
            let read = |folder| read_matrix(folder, key, [rows, cols], config.fp8_block);
            let error = relative_error(&read(model)?, None, &read(written)?);
            if error.is_nan() || error > LARGEST_ERROR {
                let found = format!("a matrix that differs by {error:.1e} of its magnitude");
                return Err(unfaithful(key, "the model's values, rounded", found));
            }
            report.errors.push((key.clone(), error));
        }
        Ok(report)
    }

    fn check_settings(&self, found: &ModelConfig) -> Result<(), Error> {
        let mut expected = self.config.clone();
        expected.fp8_scales = Scales::F32;
        expected.fp8_block = found.fp8_block;
        expected.initializer_range = found.initializer_range;
        if same_rope(&expected, found) {
            expected.rope = found.rope.clone();
        }
        if *found == expected {
            return Ok(());
        }
        let (expected, found) = (format!("{expected:?}"), format!("{found:?}"));
        Err(unfaithful("config", &expected, found))
    }
}

fn unfaithful(tensor: &str, expected: &str, found: String) -> Error {
    Error::Unfaithful {
        tensor: tensor.into(),
        expected: expected.into(),
        found,
    }
}
