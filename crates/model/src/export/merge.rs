//! Merging an adapter into its base, one tensor at a time.
//!
//! The output is a folder like the base's: same shards, same names, MTP layers and unknown tensors carried along. Without a
//! format every tensor keeps its own, and those that the adapter leaves alone keep their bytes; block FP8 and ggml's blocks
//! become bf16. In f32, f16 and bf16 there are no block scales; in FP8 the weights without an update keep their bytes, and the
//! others get fresh scales. Before the folder gets its name it is opened again and compared with base plus adapter (`faithful.rs`).

use std::collections::BTreeMap;
use std::path::Path;

use checkpoint::{DType, Folder, FolderWriter, TensorSpec};
use kernels::Matrix;
use rayon::prelude::*;

use super::companions::copy_companions;
use super::hf_fp8::BlockFp8;
use super::weight_format::{WeightFormat, dtype_of, encode, exported_config};
use crate::Error;
use crate::adapt::{AdapterWeights, WeightUpdate};
use crate::config::ModelConfig;
use crate::keys::{EMBEDDING, HEAD, is_scale, scale_key, weight_of_scale};
use crate::load::{expect_complete, read_config, read_matrix, read_tensor, weight_names};
use crate::precision::{PrecisionClass, is_lowered};

/// What a merge did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MergeReport {
    /// Tensors written.
    pub tensors: usize,
    /// Those that carry an update.
    pub adapted: usize,
    /// Tensors of the adapter that went into them: all that it has, each once.
    pub folded: usize,
    /// Those with the base's bytes.
    pub kept: usize,
    /// Whether the output head got weights of its own: the base's is the embedding.
    pub untied: bool,
    /// Bytes of tensors written.
    pub bytes: u64,
    /// Tensors of a GGUF that were rounded by an importance matrix.
    pub weighted: usize,
    /// The types of a GGUF's matrices, and how many have each; the most frequent first.
    pub types: Vec<(String, usize)>,
    /// Types that do not fit the width of rows, the types in their place, and how many matrices of a GGUF it concerns.
    pub replaced: Vec<(String, String, usize)>,
    /// Largest error of the check, relative to the sum of the magnitudes of a row. None for a GGUF: such a sum does not bound the
    /// rounding of its blocks.
    pub largest_error: Option<f32>,
    /// The error of each matrix that was written anew: root mean square of the differences from its source, relative to that
    /// of the values.
    pub errors: Vec<(String, f64)>,
}

/// Writes `base` with `adapter` merged into it to the new folder `out`, whole or not at all.
///
/// `progress` gets the tensors done and the tensors in all; each counts twice, once written and once checked.
///
/// Without a format every tensor keeps its own.
///
/// # Errors
/// If the base lacks a tensor of its config, the adapter updates modules the base lacks or of other widths, reading or writing
/// fails, or the check finds a difference beyond rounding ([`Error::Unfaithful`]).
pub fn merge(
    base: &Folder,
    adapter: &AdapterWeights,
    format: impl Into<Option<WeightFormat>>,
    out: &Path,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<MergeReport, Error> {
    let config = read_config(base)?;
    adapter.expect_fit(&config)?;
    Merger::new(base, config, Some(adapter), format.into())?.write(out, progress)
}

/// A merge, or a conversion, at work.
pub(super) struct Merger<'a> {
    pub(super) base: &'a Folder,
    adapter: Option<&'a AdapterWeights>,
    /// None keeps the format of every tensor.
    format: Option<WeightFormat>,
    /// How weights become FP8, if they do.
    fp8: Option<BlockFp8>,
    config: ModelConfig,
    pub(super) report: MergeReport,
    /// How often each weight that the adapter changes was written.
    written: BTreeMap<String, usize>,
}

/// A tensor of the output, and the name of its source in the base.
struct MergedTensor {
    spec: TensorSpec,
    source: String,
    part: OutputPart,
}

/// The form of a merged tensor.
#[derive(Clone, Copy, PartialEq)]
enum OutputPart {
    /// The same bytes.
    Copy,
    /// The values, in the format of the spec.
    Values,
    /// FP8 codes.
    Codes,
    /// Their scales. In a file they come long before the codes, so both are made from scratch.
    Scales,
}

impl MergedTensor {
    /// The name of its weight, which may be another than that of its source.
    fn key(&self) -> &str {
        match self.part {
            OutputPart::Scales => weight_of_scale(&self.spec.name),
            _ => &self.spec.name,
        }
    }

    /// Whether it is the one output of a weight that is counted.
    fn is_weight(&self) -> bool {
        self.part != OutputPart::Scales && !is_scale(&self.spec.name)
    }
}

impl<'a> Merger<'a> {
    pub(super) fn new(
        base: &'a Folder,
        config: ModelConfig,
        adapter: Option<&'a AdapterWeights>,
        format: Option<WeightFormat>,
    ) -> Result<Self, Error> {
        expect_complete(base, &config)?;
        let fp8 = match format {
            Some(WeightFormat::Fp8) => Some(BlockFp8::of(Some(base), &config)?),
            _ => None,
        };
        let is_tied = config.tie_word_embeddings && !base.contains(&format!("{HEAD}.weight"));
        let untied = is_tied && adapter.is_some_and(AdapterWeights::unties);
        Ok(Self {
            base,
            adapter,
            format,
            fp8,
            config,
            report: MergeReport {
                largest_error: Some(0.0),
                untied,
                ..MergeReport::default()
            },
            written: BTreeMap::new(),
        })
    }

    /// Writes the output folder, checks it, and gives it its name.
    pub(super) fn write(
        mut self,
        out: &Path,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<MergeReport, Error> {
        let mut writer = FolderWriter::create(out)?;
        let total = 2 * self.outputs_of(self.base.names()).len();
        let mut done = 0;
        let mut step = || {
            done += 1;
            progress(done, total);
        };
        for (file, names) in self.base.shards() {
            let names = self.outputs_of(names);
            if !names.is_empty() {
                self.write_shard(&mut writer, file, &names, &mut step)?;
            }
        }
        writer.write_index()?;
        let mut config = exported_config(self.base.config(), self.stated_format(), self.fp8);
        if self.report.untied {
            config["tie_word_embeddings"] = false.into();
        }
        writer.write_json("config.json", &config)?;
        copy_companions(self.base, &mut writer)?;
        self.expect_folded()?;
        self.check(&Folder::open(writer.path())?, &mut step)?;
        writer.finish()?;
        Ok(self.report)
    }

    /// The format in the output's config.
    fn stated_format(&self) -> Option<WeightFormat> {
        let embedding = self.base.stored(&format!("{EMBEDDING}.weight")).ok();
        let has_blocks = self.base.metadata().is_some() || self.config_has_scales();
        match (self.format, embedding) {
            (None, Some(tensor)) if has_blocks => match dtype_of(None, tensor.dtype) {
                DType::F32 => Some(WeightFormat::F32),
                DType::F16 => Some(WeightFormat::F16),
                _ => Some(WeightFormat::Bf16),
            },
            (format, _) => format,
        }
    }

    fn config_has_scales(&self) -> bool {
        self.base.config().get("quantization_config").is_some() || self.base.names().any(is_scale)
    }

    /// The tensors that come of some names of the base, each with the name of its source: no block scales, a split weight
    /// once, and a head of its own in spite of a tied embedding.
    pub(super) fn outputs_of<'n>(
        &self,
        names: impl IntoIterator<Item = &'n str>,
    ) -> Vec<(String, String)> {
        let embedding = format!("{EMBEDDING}.weight");
        let mut outputs = Vec::new();
        for name in weight_names(names) {
            outputs.push((name.to_string(), name.to_string()));
            if self.report.untied && *name == *embedding {
                outputs.push((format!("{HEAD}.weight"), name.into_owned()));
            }
        }
        outputs
    }

    fn write_shard(
        &mut self,
        writer: &mut FolderWriter,
        file: &str,
        names: &[(String, String)],
        step: &mut dyn FnMut(),
    ) -> Result<(), Error> {
        let mut outputs = Vec::new();
        for (name, source) in names {
            outputs.extend(self.outputs(name, source)?);
        }
        let specs: Vec<_> = outputs.iter().map(|output| output.spec.clone()).collect();
        let mut failure = None;
        let written = writer.add_shard(file, &specs, |i| {
            if !is_scale(&outputs[i].spec.name) {
                step();
            }
            self.bytes(&outputs[i]).map_err(|error| {
                let cause = error.to_string().into();
                failure = Some(error);
                checkpoint::Error::Produce {
                    tensor: outputs[i].source.as_str().into(),
                    cause,
                }
            })
        });
        match failure {
            Some(error) => Err(error),
            None => Ok(written?),
        }
    }

    /// What a tensor of the base becomes under some name: itself, or codes and scales.
    fn outputs(&self, name: &str, source: &str) -> Result<Vec<MergedTensor>, Error> {
        let tensor = self.tensor(source)?;
        let output = |spec, source: &str, part| MergedTensor {
            spec,
            source: source.into(),
            part,
        };
        let (is_fp8, is_changed) = (tensor.dtype == DType::F8E4M3, self.changes(name));
        if let Some(fp8) = self.fp8
            && (is_fp8 || is_lowered(name))
        {
            if is_fp8 && !is_changed {
                let scales = self.base.tensor(&scale_key(name))?;
                let of_scales = output(scales.spec(), &scales.name, OutputPart::Copy);
                return Ok(vec![
                    output(tensor.spec(), name, OutputPart::Copy),
                    of_scales,
                ]);
            }
            let [codes, scales] = fp8.specs(name, matrix_shape(name, &tensor.shape)?);
            return Ok(vec![
                output(codes, source, OutputPart::Codes),
                output(scales, source, OutputPart::Scales),
            ]);
        }
        let spec = TensorSpec {
            name: name.into(),
            ..tensor.spec()
        };
        if !is_changed && self.keeps_bytes(&tensor) {
            return Ok(vec![output(spec, source, OutputPart::Copy)]);
        }
        let dtype = dtype_of(self.format, tensor.dtype);
        let spec = TensorSpec { dtype, ..spec };
        Ok(vec![output(spec, source, OutputPart::Values)])
    }

    /// Whether a tensor without an update is copied: it has the format already, is no float, or is F32 on purpose among
    /// narrower weights.
    fn keeps_bytes(&self, tensor: &checkpoint::Tensor) -> bool {
        match tensor.dtype {
            found @ (DType::F16 | DType::BF16) => dtype_of(self.format, found) == found,
            DType::F8E4M3 => false,
            DType::F32 => {
                let is_small = tensor.shape.len() == 1
                    || PrecisionClass::of(&tensor.name) == PrecisionClass::Router;
                is_small || dtype_of(self.format, DType::F32) == DType::F32
            }
            other => other.block() == 1,
        }
    }

    pub(super) fn update(&self, name: &str) -> Option<WeightUpdate> {
        self.adapter?.update(name.strip_suffix(".weight")?)
    }

    /// Whether the adapter changes a weight.
    pub(super) fn changes(&self, name: &str) -> bool {
        self.update(name).is_some() || self.replaces(name)
    }

    /// Whether the adapter has other values, or other rows, than the base for a weight.
    fn replaces(&self, name: &str) -> bool {
        self.adapter.is_some_and(|adapter| {
            let has_rows = adapter.token_rows().is_some() && is_embedding(name);
            has_rows || adapter.replacement(name).is_some()
        })
    }

    /// One output tensor's bytes.
    fn bytes(&mut self, output: &MergedTensor) -> Result<bytes::Bytes, Error> {
        let (tensor, name) = (self.tensor(&output.source)?, output.key());
        let bytes: bytes::Bytes = match (output.part, self.fp8) {
            (OutputPart::Codes, Some(fp8)) => {
                let shape = matrix_shape(name, &tensor.shape)?;
                fp8.encode(&self.values(name, &tensor)?, shape).codes.into()
            }
            (OutputPart::Scales, Some(fp8)) => {
                let shape = matrix_shape(name, &tensor.shape)?;
                fp8.scale_bytes(&fp8.encode(&self.values(name, &tensor)?, shape).scales)
            }
            (OutputPart::Values, _) => {
                let values = self.values(name, &tensor)?;
                expect_range(name, &values, output.spec.dtype)?;
                encode(output.spec.dtype, &values).into()
            }
            _ => tensor.bytes,
        };
        if output.is_weight() {
            self.report.tensors += 1;
            self.report.kept += usize::from(output.part == OutputPart::Copy);
            if self.changes(name) {
                self.report.adapted += 1;
                *self.written.entry(name.to_owned()).or_default() += 1;
            }
        }
        self.report.bytes += bytes.len() as u64;
        Ok(bytes)
    }

    /// Checks that every weight that the adapter changes was written, and once.
    fn expect_folded(&mut self) -> Result<(), Error> {
        let Some(adapter) = self.adapter else {
            return Ok(());
        };
        for key in adapter.changed_keys() {
            let found = self.written.get(&key).copied().unwrap_or(0);
            if found != 1 {
                return Err(Error::Unfaithful {
                    tensor: key,
                    expected: "the adapter merged in once".into(),
                    found: format!("{found} times"),
                });
            }
        }
        self.report.folded = adapter.n_tensors();
        Ok(())
    }

    /// A tensor's values under some name, updated.
    fn values(&self, name: &str, tensor: &checkpoint::Tensor) -> Result<Vec<f32>, Error> {
        let mut values = self.values_before(name, tensor)?;
        if let Some(update) = self.update(name) {
            let [width, out] = update.widths();
            tensor.expect_shape(&[out, width])?;
            let rows = values.par_chunks_mut(width).enumerate();
            rows.for_each(|(row, values)| update.apply(row, values));
        }
        Ok(values)
    }

    /// The values that an update is added to: the base's, or the adapter's where it has others.
    pub(super) fn values_before(
        &self,
        name: &str,
        tensor: &checkpoint::Tensor,
    ) -> Result<Vec<f32>, Error> {
        if let Some(new) = self.adapter.and_then(|adapter| adapter.replacement(name)) {
            tensor.expect_shape(&new.shape)?;
            return Ok(new.values.clone());
        }
        let is_coded = tensor.dtype == DType::F8E4M3 || tensor.dtype.block() > 1;
        let mut values = if is_coded {
            let shape = matrix_shape(&tensor.name, &tensor.shape)?;
            self.matrix(self.base, &tensor.name, shape)?.to_f32()
        } else {
            tensor.to_f32()?
        };
        if let Some(rows) = self.adapter.and_then(AdapterWeights::token_rows)
            && is_embedding(name)
        {
            rows.put(&mut values, self.config.hidden_size);
        }
        Ok(values)
    }

    pub(super) fn tensor(&self, name: &str) -> Result<checkpoint::Tensor, Error> {
        read_tensor(self.base, name, &self.config)
    }

    pub(super) fn matrix(
        &self,
        folder: &Folder,
        name: &str,
        shape: [usize; 2],
    ) -> Result<Matrix, Error> {
        read_matrix(folder, name, shape, self.config.fp8_block)
    }

    /// The matrix that an update is added to.
    pub(super) fn matrix_before(
        &self,
        name: &str,
        tensor: &checkpoint::Tensor,
    ) -> Result<Matrix, Error> {
        let shape = matrix_shape(name, &tensor.shape)?;
        if self.replaces(name) {
            let values = self.values_before(name, tensor)?;
            return Ok(Matrix::from_f32(shape[0], shape[1], &values));
        }
        self.matrix(self.base, &tensor.name, shape)
    }
}

fn is_embedding(name: &str) -> bool {
    name.strip_suffix(".weight") == Some(EMBEDDING)
}

/// Refuses values that a format would make infinite.
fn expect_range(name: &str, values: &[f32], dtype: DType) -> Result<(), Error> {
    /// From here on f16 rounds to infinity.
    const F16_END: f32 = 65520.0;
    let is_beyond = |value: &&f32| value.is_finite() && value.abs() >= F16_END;
    match values.iter().find(is_beyond) {
        Some(value) if dtype == DType::F16 => Err(Error::Unsupported(format!(
            "tensor `{name}`: expected numbers that f16 holds, up to 65504, found {value}; write `--dtype bf16` or f32"
        ))),
        _ => Ok(()),
    }
}

pub(super) fn matrix_shape(name: &str, shape: &[usize]) -> Result<[usize; 2], Error> {
    shape.try_into().map_err(|_| {
        let found = format!("tensor `{name}`: expected a matrix, found shape {shape:?}");
        Error::Unsupported(found)
    })
}
