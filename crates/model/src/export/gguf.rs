//! Writing a model as a GGUF, rows at a time.
//!
//! Before the file gets its name it is opened again as anyone would open it, and every matrix is compared with what it was
//! made of: by names, shapes and values that went through the reader and not through what wrote them.

use std::path::Path;

use checkpoint::{
    DType, Folder, GgufLayout, GgufTensor, GgufValue, GgufWriter, RowOrder, TensorSpec,
};
use kernels::fp8::Scales;
use kernels::{Format, Ggml, Matrix, RopeLayout};
use rayon::prelude::*;

use super::importance::Importance;
use super::mix::{GgufType, Mix};
use crate::Error;
use crate::config::{AttentionConfig, Family, ModelConfig, RopeScaling};
use crate::merge::{MergeReport, relative_error};
use crate::weights::{keys, mtp_keys, read_config, read_matrix, read_tensor};

/// Values that are encoded at a time.
const PIECE: usize = 1 << 20;
/// Rounding to two bits leaves less than half of this, relative to the values; rows in another order differ by 1.4.
const LARGEST_ERROR: f64 = 0.8;

/// Writes a model as the GGUF `out`, whole or not at all. `tokenizer` is metadata that is added as it is.
///
/// `progress` is told tensors done and tensors in all; each of the model's is seen twice, written and checked. Tensors that
/// nobody knows are left out, and those for multi-token prediction unless the mix has them, as llama.cpp's converter does.
///
/// # Errors
/// If a GGUF cannot say what the model computes, reading or writing fails, or the check finds other values
/// ([`Error::Unfaithful`]).
pub fn write_gguf(
    model: &Folder,
    mix: &Mix,
    tokenizer: Vec<(String, GgufValue)>,
    out: &Path,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<MergeReport, Error> {
    let mut config = read_config(model)?;
    let keys = chosen(model, mix, &mut config)?;
    check_config(&config)?;
    let json = config.to_json();
    let layout = GgufLayout::of(&model.config_path(), &json)?;
    let tensors = layout.tensors(&keys);
    let of = |tensor: &GgufTensor| mix.type_of(&tensor.name, &tensor.shape, &config);
    let specs = tensors.iter().map(|tensor| TensorSpec {
        name: tensor.name.as_str().into(),
        dtype: of(tensor).dtype(),
        shape: tensor.shape.clone(),
    });
    let made = layout.made();
    let of_made = made.iter().map(|(name, values)| TensorSpec {
        name: (*name).into(),
        dtype: DType::F32,
        shape: vec![values.len()],
    });
    let specs: Vec<TensorSpec> = specs.chain(of_made).collect();
    let importance = mix.importance.as_ref();
    let weighted = importance.map_or(Ok(0), |importance| importance.check(&tensors))?;
    let mut metadata = layout.metadata();
    metadata.extend(about(model, mix));
    metadata.extend(tokenizer);
    let mut writer = GgufWriter::create(out, &metadata, &specs)?;
    let (mut done, total) = (0, 2 * keys.len());
    let mut step = || {
        done += 1;
        progress(done.min(total), total);
    };
    for tensor in &tensors {
        for number in 0..tensor.keys.len() {
            let encoding = Encoding {
                of: of(tensor),
                importance,
                first: number,
            };
            write_tensor(model, &config, (tensor, encoding), &mut writer)?;
            // Of two halves one counts.
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
    let mut report = check((model, &config, &keys), &written, &mut step)?;
    report.tensors = specs.len();
    report.weighted = weighted;
    report.bytes = specs.iter().map(bytes_of).sum();
    writer.finish()?;
    Ok(report)
}

/// The keys and shapes of what is written. Modules for multi-token prediction that are not, the config has no more.
fn chosen(
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

/// What the file says about itself.
fn about(model: &Folder, mix: &Mix) -> Vec<(String, GgufValue)> {
    /// Of ggml's blocks as they are now.
    const QUANTIZATION_VERSION: u32 = 2;
    let name = model.path().file_stem().unwrap_or_default();
    let entries = [
        ("type", GgufValue::Text("model".into())),
        ("name", GgufValue::Text(name.to_string_lossy().into_owned())),
        ("file_type", GgufValue::Count(mix.scheme.file_type())),
        (
            "quantization_version",
            GgufValue::Count(QUANTIZATION_VERSION),
        ),
    ];
    entries
        .map(|(key, value)| (format!("general.{key}"), value))
        .to_vec()
}

fn bytes_of(spec: &TensorSpec) -> u64 {
    let values: usize = spec.shape.iter().product();
    (values / spec.dtype.block() * spec.dtype.size_bytes()) as u64
}

/// Refuses what has no key in a GGUF's metadata.
fn check_config(config: &ModelConfig) -> Result<(), Error> {
    let is_latent = matches!(config.attention, AttentionConfig::Mla(_));
    let problem = match (&config.rope.scaling, &config.moe) {
        (RopeScaling::Llama3 { .. }, _) if config.model_type != Family::Llama => {
            "Llama 3's stretched rotary positions and is no llama"
        }
        (
            RopeScaling::Yarn {
                mscale,
                mscale_all_dim,
                ..
            },
            _,
        ) if mscale != mscale_all_dim => "an `mscale` that is not `mscale_all_dim`",
        (_, Some(moe)) if moe.moe_layer_freq != 1 => "dense layers between mixtures",
        (_, None) if is_latent => "latent attention without experts",
        _ if is_latent && config.rope.layout == RopeLayout::HalfSplit => {
            "rotary pairs in halves of a latent head"
        }
        _ => return Ok(()),
    };
    Err(Error::Unsupported(format!(
        "a GGUF cannot say that a model has {problem}"
    )))
}

/// How rows of a tensor are written.
#[derive(Clone, Copy)]
struct Encoding<'a> {
    of: GgufType,
    importance: Option<&'a Importance>,
    /// Which of the tensor's sources they are of.
    first: usize,
}

/// Writes what a tensor has of one of the folder's.
fn write_tensor(
    model: &Folder,
    config: &ModelConfig,
    (tensor, encoding): (&GgufTensor, Encoding<'_>),
    writer: &mut GgufWriter,
) -> Result<(), Error> {
    let key = &tensor.keys[encoding.first];
    let shape = match (tensor.rows, tensor.shape.as_slice()) {
        (_, [len]) => {
            let vector = read_tensor(model, key, config)?;
            vector.expect_shape(&[*len])?;
            let bytes = vector.to_f32()?.into_iter().flat_map(f32::to_le_bytes);
            return Ok(writer.write(&bytes.collect::<Vec<_>>())?);
        }
        (RowOrder::Keys { .. } | RowOrder::Values { .. }, _) => up_projection(config),
        (_, [.., rows, cols]) => [*rows, *cols],
        (_, []) => [1, 1],
    };
    let matrix = read_matrix(model, key, shape, config.fp8_block)?;
    for piece in 0..n_pieces(tensor.rows) {
        // A layer's experts are sources, the heads of a half are pieces of one.
        let importance = encoding.importance.and_then(|importance| {
            importance.columns(&tensor.name, encoding.first + piece, *tensor.shape.last()?)
        });
        let rows = self::piece(&matrix, tensor.rows, piece);
        write_rows(&rows, encoding.of, importance, writer)?;
    }
    Ok(())
}

/// The shape of a whole `kv_b_proj`.
fn up_projection(config: &ModelConfig) -> [usize; 2] {
    match &config.attention {
        AttentionConfig::Mla(mla) => [
            config.num_attention_heads * (mla.qk_nope_head_dim + mla.v_head_dim),
            mla.kv_lora_rank,
        ],
        AttentionConfig::Gqa(_) => [0, 0],
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

/// RowOrder of a matrix as they follow one another in a GGUF: all, or those of a head. What is stored that way already is a
/// view of it.
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
        (RowOrder::Keys { .. }, Some(halves)) => halves.keys(head),
        (RowOrder::Keys { heads, width }, None) => {
            let keys = of_head(heads).row_range(0..width);
            reordered(&keys, [keys.cols(), width], |row, col| {
                col * keys.cols() + row
            })
        }
        (RowOrder::Values { .. }, Some(halves)) => halves.values(head),
        (RowOrder::Values { heads, width }, None) => {
            let head = of_head(heads);
            head.row_range(head.rows() - width..head.rows())
        }
    }
}

/// A matrix of the given shape whose values are those of another at other places.
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

/// Writes the rows of a matrix in a type: its bytes where it is of that type, else some rows encoded at a time.
fn write_rows(
    matrix: &Matrix,
    of: GgufType,
    importance: Option<&[f32]>,
    writer: &mut GgufWriter,
) -> Result<(), Error> {
    let is_same = match (of, matrix.format()) {
        (GgufType::F32, Format::F32) | (GgufType::Bf16, Format::Bf16) => true,
        (GgufType::Ggml(Ggml::F16), Format::F16) => true,
        (GgufType::Ggml(wanted), Format::Ggml(found)) => wanted == *found,
        _ => false,
    };
    if is_same {
        return Ok(writer.write(matrix.bytes())?);
    }
    let (cols, dtype) = (matrix.cols(), of.dtype());
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
                of.encode(line, importance, out);
            },
        );
        writer.write(&bytes)?;
    }
    Ok(())
}

/// Whether two configs stretch rotary positions as Llama 3 does and alike: a GGUF says what the settings do, and not each.
fn same_stretch(config: &ModelConfig, other: &ModelConfig) -> bool {
    /// Divisors are written in f32.
    const ROUNDING: f32 = 1e-5;
    let is_llama3 =
        |config: &ModelConfig| matches!(config.rope.scaling, RopeScaling::Llama3 { .. });
    let AttentionConfig::Gqa(gqa) = &config.attention else {
        return false;
    };
    let [before, after] = [config, other].map(|config| config.rope.frequencies(gqa.head_dim));
    let mut pairs = before.iter().zip(&after);
    is_llama3(config)
        && is_llama3(other)
        && pairs.all(|(before, after)| (after / before - 1.0).abs() < ROUNDING)
}

/// Compares every tensor of a written file with the model's.
fn check(
    (model, config, keys): (&Folder, &ModelConfig, &[(String, Vec<usize>)]),
    written: &Folder,
    step: &mut dyn FnMut(),
) -> Result<MergeReport, Error> {
    let unfaithful = |tensor: &str, expected: &str, found: String| Error::Unfaithful {
        tensor: tensor.into(),
        expected: expected.into(),
        found,
    };
    let mut expected = config.clone();
    expected.fp8_scales = Scales::F32;
    let found = read_config(written)?;
    expected.fp8_block = found.fp8_block;
    expected.initializer_range = found.initializer_range;
    if same_stretch(&expected, &found) {
        expected.rope.scaling = found.rope.scaling.clone();
    }
    if found != expected {
        let (expected, found) = (format!("{expected:?}"), format!("{found:?}"));
        return Err(unfaithful("config", &expected, found));
    }
    let mut report = MergeReport::default();
    for (key, shape) in keys {
        step();
        let &[rows, cols] = shape.as_slice() else {
            let [before, after] = [model, written].map(|folder| read_tensor(folder, key, config));
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
