//! Merging an adapter into its base, one tensor at a time.
//!
//! The output is a folder like the base's: same shards, same names, MTP layers and unknown tensors carried along. In f32
//! and bf16 there are no block scales; in FP8 the weights without an update keep their bytes, and the others get fresh
//! scales. Before the folder gets its name it is opened again, and every weight is compared with base plus adapter in another
//! way: by the products of both with a vector of random signs instead of the sum of matrices.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::Path;

use checkpoint::{DType, Folder, FolderWriter, TensorSpec};
use kernels::{Format, Matrix};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

use super::companions::copy_companions;
use super::hf_fp8::BlockFp8;
use super::weight_format::{WeightFormat, exported_config};
use crate::Error;
use crate::adapt::{AdapterWeights, WeightUpdate};
use crate::config::ModelConfig;
use crate::keys::{is_scale, keys, scale_key};
use crate::load::{read_config, read_matrix, read_tensor, weight_names};
use crate::precision::{PrecisionClass, is_lowered};

/// What a merge did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MergeReport {
    /// Tensors written.
    pub tensors: usize,
    /// Those that carry an update.
    pub adapted: usize,
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
/// # Errors
/// If the adapter updates modules the base lacks or of other widths, reading or writing fails, or the check finds a
/// difference beyond rounding ([`Error::Unfaithful`]).
pub fn merge(
    base: &Folder,
    adapter: &AdapterWeights,
    format: WeightFormat,
    out: &Path,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<MergeReport, Error> {
    let config = read_config(base)?;
    let weights: BTreeSet<String> = keys(&config).into_iter().map(|(key, _)| key).collect();
    let mut modules = adapter.modules().into_iter();
    if let Some(module) = modules.find(|module| !weights.contains(&format!("{module}.weight"))) {
        return Err(adapter.unfit(
            &module,
            "a module of the model".into(),
            "an adapter for another model".into(),
        ));
    }
    Merger::new(base, config, Some(adapter), format)?.write(out, progress)
}

/// A merge, or a conversion, at work.
pub(super) struct Merger<'a> {
    base: &'a Folder,
    adapter: Option<&'a AdapterWeights>,
    format: WeightFormat,
    /// How weights become FP8, if they do.
    fp8: Option<BlockFp8>,
    config: ModelConfig,
    report: MergeReport,
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

impl<'a> Merger<'a> {
    pub(super) fn new(
        base: &'a Folder,
        config: ModelConfig,
        adapter: Option<&'a AdapterWeights>,
        format: WeightFormat,
    ) -> Result<Self, Error> {
        let fp8 = match format {
            WeightFormat::Fp8 => Some(BlockFp8::of(Some(base), &config)?),
            WeightFormat::F32 | WeightFormat::Bf16 => None,
        };
        Ok(Self {
            base,
            adapter,
            format,
            fp8,
            config,
            report: MergeReport {
                largest_error: Some(0.0),
                ..MergeReport::default()
            },
        })
    }

    /// Writes the output folder, checks it, and gives it its name.
    pub(super) fn write(
        mut self,
        out: &Path,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<MergeReport, Error> {
        let mut writer = FolderWriter::create(out)?;
        let total = 2 * weight_names(self.base.names()).len();
        let mut done = 0;
        let mut step = || {
            done += 1;
            progress(done, total);
        };
        for (file, names) in self.base.shards() {
            let names = weight_names(names);
            if !names.is_empty() {
                self.write_shard(&mut writer, file, &names, &mut step)?;
            }
        }
        writer.write_index()?;
        let config = exported_config(self.base.config(), self.format, self.fp8);
        writer.write_json("config.json", &config)?;
        copy_companions(self.base, &mut writer)?;
        self.check(&Folder::open(writer.path())?, &mut step)?;
        writer.finish()?;
        Ok(self.report)
    }

    fn write_shard(
        &mut self,
        writer: &mut FolderWriter,
        file: &str,
        names: &[Cow<'_, str>],
        step: &mut dyn FnMut(),
    ) -> Result<(), Error> {
        let mut outputs = Vec::new();
        for name in names {
            outputs.extend(self.outputs(name)?);
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

    /// What a tensor of the base becomes: itself, or codes and scales.
    fn outputs(&self, name: &str) -> Result<Vec<MergedTensor>, Error> {
        let tensor = self.tensor(name)?;
        let output = |spec, source: &str, part| MergedTensor {
            spec,
            source: source.into(),
            part,
        };
        let is_fp8 = tensor.dtype == DType::F8E4M3;
        if let Some(fp8) = self.fp8
            && (is_fp8 || is_lowered(name))
        {
            if is_fp8 && self.update(name).is_none() {
                let scales = self.base.tensor(&scale_key(name))?;
                let of_scales = output(scales.spec(), &scales.name, OutputPart::Copy);
                return Ok(vec![
                    output(tensor.spec(), name, OutputPart::Copy),
                    of_scales,
                ]);
            }
            let [codes, scales] = fp8.specs(name, matrix_shape(name, &tensor.shape)?);
            return Ok(vec![
                output(codes, name, OutputPart::Codes),
                output(scales, name, OutputPart::Scales),
            ]);
        }
        if self.update(name).is_none() && self.keeps_bytes(&tensor) {
            return Ok(vec![output(tensor.spec(), name, OutputPart::Copy)]);
        }
        let dtype = self.format.dtype();
        let spec = TensorSpec {
            dtype,
            ..tensor.spec()
        };
        Ok(vec![output(spec, name, OutputPart::Values)])
    }

    /// Whether a tensor is copied: it is no float, or is F32 on purpose among narrower weights.
    fn keeps_bytes(&self, tensor: &checkpoint::Tensor) -> bool {
        let adapted = self.update(&tensor.name).is_some();
        match tensor.dtype {
            DType::F16 | DType::BF16 | DType::F8E4M3 => false,
            DType::F32 => {
                let is_small = tensor.shape.len() == 1
                    || PrecisionClass::of(&tensor.name) == PrecisionClass::Router;
                self.format == WeightFormat::F32 || (!adapted && is_small)
            }
            other => other.block() == 1,
        }
    }

    fn update(&self, name: &str) -> Option<WeightUpdate> {
        self.adapter?.update(name.strip_suffix(".weight")?)
    }

    /// One output tensor's bytes.
    fn bytes(&mut self, output: &MergedTensor) -> Result<bytes::Bytes, Error> {
        let tensor = self.tensor(&output.source)?;
        let is_new = output.part != OutputPart::Scales && !is_scale(&output.source);
        self.report.tensors += usize::from(is_new);
        self.report.adapted += usize::from(is_new && self.update(&output.source).is_some());
        let bytes = match (output.part, self.fp8) {
            (OutputPart::Codes, Some(fp8)) => {
                let shape = matrix_shape(&output.source, &tensor.shape)?;
                fp8.encode(&self.values(&tensor)?, shape).codes.into()
            }
            (OutputPart::Scales, Some(fp8)) => {
                let shape = matrix_shape(&output.source, &tensor.shape)?;
                fp8.scale_bytes(&fp8.encode(&self.values(&tensor)?, shape).scales)
            }
            (OutputPart::Values, _) => self.format.encode(&self.values(&tensor)?).into(),
            _ => tensor.bytes,
        };
        self.report.bytes += bytes.len() as u64;
        Ok(bytes)
    }

    /// A tensor's values, updated.
    fn values(&self, tensor: &checkpoint::Tensor) -> Result<Vec<f32>, Error> {
        let is_coded = tensor.dtype == DType::F8E4M3 || tensor.dtype.block() > 1;
        let mut values = if is_coded {
            self.matrix(self.base, &tensor.name, &tensor.shape)?
                .to_f32()
        } else {
            tensor.to_f32()?
        };
        if let Some(update) = self.update(&tensor.name) {
            add_update(&mut values, &update, tensor)?;
        }
        Ok(values)
    }

    fn tensor(&self, name: &str) -> Result<checkpoint::Tensor, Error> {
        read_tensor(self.base, name, &self.config)
    }

    fn matrix(&self, folder: &Folder, name: &str, shape: &[usize]) -> Result<Matrix, Error> {
        let shape = matrix_shape(name, shape)?;
        read_matrix(folder, name, shape, self.config.fp8_block)
    }

    /// Compares every matrix of the output with base plus adapter.
    fn check(&mut self, merged: &Folder, step: &mut dyn FnMut()) -> Result<(), Error> {
        for name in weight_names(self.base.names()) {
            step();
            let name = &*name;
            let (before, after) = (self.tensor(name)?, merged.tensor(name)?);
            after.expect_shape(&before.shape)?;
            if after.dtype == before.dtype && self.update(name).is_none() {
                if after.bytes != before.bytes {
                    return Err(Error::Unfaithful {
                        tensor: name.into(),
                        expected: "the base's bytes".into(),
                        found: "others".into(),
                    });
                }
            } else if before.shape.len() == 1 {
                if after.bytes != self.format.encode(&before.to_f32()?) {
                    let expected = format!("the base's values in {}", after.dtype);
                    return Err(Error::Unfaithful {
                        tensor: name.into(),
                        expected,
                        found: "others".into(),
                    });
                }
            } else if before.shape.len() == 2 {
                self.check_matrix(name, &before, merged)?;
            }
        }
        Ok(())
    }

    fn check_matrix(
        &mut self,
        name: &str,
        before: &checkpoint::Tensor,
        merged: &Folder,
    ) -> Result<(), Error> {
        let (base, merged) = (
            self.matrix(self.base, name, &before.shape)?,
            self.matrix(merged, name, &before.shape)?,
        );
        let signs = random_signs(base.cols());
        let update = self.update(name);
        let low: Vec<f32> = update.as_ref().map_or(vec![], |u| {
            u.a.chunks(base.cols())
                .map(|a| u.scale * dot(a, &signs))
                .collect()
        });
        let line = |row: usize| {
            let mut line = vec![0.0; base.cols()];
            merged.decode(row..row + 1, 0..base.cols(), &mut line);
            line
        };
        let dora_scale = |row: usize| match &update {
            Some(update) if update.magnitude.is_some() => {
                let mut plain = vec![0.0; base.cols()];
                base.decode(row..row + 1, 0..base.cols(), &mut plain);
                update.dora_scale(row, &plain)
            }
            _ => 1.0,
        };
        // The error of each row, relative to the row's magnitude, and the part of it that rounding does not explain.
        let errors = (0..base.rows()).into_par_iter().map(|row| {
            let added = update
                .as_ref()
                .map_or(0.0, |u| dot(&u.b[row * u.rank..(row + 1) * u.rank], &low));
            let magnitude: f32 = line(row).iter().map(|value| value.abs()).sum();
            let expected = dora_scale(row) * (base.dot(row, &signs) + added);
            let difference = (expected - merged.dot(row, &signs)).abs();
            let allowed = allowed_error(&merged, row, magnitude);
            let magnitude = magnitude + f32::MIN_POSITIVE;
            [difference / magnitude, difference - allowed]
        });
        // NaN counts as the largest: a merge that makes NaN is not faithful.
        let larger = |a: f32, b: f32| if a > b || a.is_nan() { a } else { b };
        let [largest, excess] = errors.reduce(
            || [0.0, f32::NEG_INFINITY],
            |a, b| [larger(a[0], b[0]), larger(a[1], b[1])],
        );
        if largest.is_nan() || excess.is_nan() || excess > 0.0 {
            return Err(Error::Unfaithful {
                tensor: name.into(),
                expected: format!("base plus adapter, rounded to {}", merged.format().name()),
                found: format!("a row that differs by {largest:.1e} of its magnitude"),
            });
        }
        self.report.largest_error = self.report.largest_error.map(|known| known.max(largest));
        let error = relative_error(&base, update.as_ref(), &merged);
        self.report.errors.push((name.into(), error));
        Ok(())
    }
}

/// Root mean square of `merged − (base + update)`, relative to that of the sum.
pub(crate) fn relative_error(base: &Matrix, update: Option<&WeightUpdate>, merged: &Matrix) -> f64 {
    let width = base.cols();
    let squares = (0..base.rows()).into_par_iter().map(|row| {
        let [mut expected, mut found] = [vec![0.0; width], vec![0.0; width]];
        base.decode(row..row + 1, 0..width, &mut expected);
        merged.decode(row..row + 1, 0..width, &mut found);
        if let Some(update) = update {
            update.apply(row, &mut expected);
        }
        let square = |value: f32| f64::from(value) * f64::from(value);
        let pairs = expected.iter().zip(&found);
        let difference: f64 = pairs
            .map(|(expected, found)| square(expected - found))
            .sum();
        [
            difference,
            expected.iter().map(|value| square(*value)).sum(),
        ]
    });
    // Rows are collected first, so that the sum has one order.
    let squares: Vec<[f64; 2]> = squares.collect();
    let [difference, whole] = [0, 1].map(|i| squares.iter().map(|pair| pair[i]).sum::<f64>());
    if whole > 0.0 {
        (difference / whole).sqrt()
    } else {
        0.0
    }
}

/// The largest error of a row's sum that rounding explains: a share of each value, f32 sums, and the smallest step of a
/// block.
fn allowed_error(merged: &Matrix, row: usize, magnitude: f32) -> f32 {
    let relative = match merged.format() {
        Format::F32 => 1e-6,
        Format::F16 | Format::Bf16 => 1.0 / 256.0,
        Format::Fp8(_) => 1.0 / 16.0,
        // None is written.
        Format::Ggml(_) | Format::SplitKvB(_) | Format::Interleaved(_) => 0.0,
    };
    let sums = 1e-6 * (merged.cols() as f32).sqrt();
    (relative + sums) * magnitude + merged.smallest_half_steps(row)
}

fn matrix_shape(name: &str, shape: &[usize]) -> Result<[usize; 2], Error> {
    shape.try_into().map_err(|_| {
        let found = format!("tensor `{name}`: expected a matrix, found shape {shape:?}");
        Error::Unsupported(found)
    })
}

/// Updates a weight.
fn add_update(
    values: &mut [f32],
    update: &WeightUpdate,
    tensor: &checkpoint::Tensor,
) -> Result<(), Error> {
    let [width, out] = update.widths();
    tensor.expect_shape(&[out, width])?;
    let rows = values.par_chunks_mut(width).enumerate();
    rows.for_each(|(row, values)| update.apply(row, values));
    Ok(())
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn random_signs(n: usize) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(n as u64);
    (0..n)
        .map(|_| {
            if random.next_u32() & 1 == 0 {
                1.0
            } else {
                -1.0
            }
        })
        .collect()
}
