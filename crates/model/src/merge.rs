//! Folding an adapter into its base, one tensor at a time.
//!
//! The output is a folder like the base's: same shards, same names, MTP layers and unknown tensors carried along; block
//! scales are gone, since nothing is FP8 any more. Before it is called good it is opened again and every weight is
//! compared with base plus adapter by another way: not the sum of matrices, but the products of both with a vector of
//! random signs.

use std::path::Path;

use checkpoint::{DType, Folder, FolderWriter, TensorSpec};
use half::bf16;
use kernels::Matrix;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

use crate::Error;
use crate::adapter::{AdapterWeights, Pair};
use crate::config::ModelConfig;
use crate::export::{copy_companions, exported_config};
use crate::weights::{is_scale, keys, read_config, read_matrix};

/// The number format of a merged model's weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MergedDType {
    /// Single precision.
    F32,
    /// bfloat16; what the base keeps in F32 stays F32.
    Bf16,
}

impl MergedDType {
    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }

    /// The name in `config.json`.
    fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
        }
    }

    /// Largest relative error of rounding one value to this format, with room for f32 sums.
    fn rounding(self) -> f32 {
        match self {
            Self::F32 => 1e-6,
            Self::Bf16 => 1.0 / 256.0,
        }
    }

    fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
            Self::Bf16 => values
                .iter()
                .flat_map(|value| bf16::from_f32(*value).to_le_bytes())
                .collect(),
        }
    }
}

/// What a merge did.
#[derive(Clone, Debug, PartialEq)]
pub struct MergeReport {
    /// Tensors written.
    pub tensors: usize,
    /// Those that carry an update.
    pub adapted: usize,
    /// Bytes of tensors written.
    pub bytes: u64,
    /// Largest error of the check, relative to the sum of the magnitudes of a row.
    pub largest_error: f32,
}

/// Writes `base` with `adapter` folded in to the new folder `out`, whole or not at all.
///
/// `progress` is told tensors done and tensors in all; each is seen twice, written and checked.
///
/// # Errors
/// If the adapter updates modules the base lacks or of other widths, reading or writing fails, or the check finds a
/// difference beyond rounding ([`Error::Unfaithful`]).
pub fn merge(
    base: &Folder,
    adapter: &AdapterWeights,
    dtype: MergedDType,
    out: &Path,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<MergeReport, Error> {
    let config = read_config(base)?;
    let weights: std::collections::BTreeSet<String> =
        keys(&config).into_iter().map(|(key, _)| key).collect();
    if let Some(module) = adapter
        .modules()
        .into_iter()
        .find(|module| !weights.contains(&format!("{module}.weight")))
    {
        return Err(adapter.unfit(
            &module,
            "a module of the model".into(),
            "an adapter for another model".into(),
        ));
    }
    let mut merger = Merger {
        base,
        adapter,
        dtype,
        config,
        report: MergeReport {
            tensors: 0,
            adapted: 0,
            bytes: 0,
            largest_error: 0.0,
        },
    };
    let mut writer = FolderWriter::create(out)?;
    let total = 2 * base.names().filter(|name| !is_scale(name)).count();
    let mut done = 0;
    let mut step = || {
        done += 1;
        progress(done, total);
    };
    for (file, names) in base.shards() {
        let names: Vec<&str> = names.into_iter().filter(|name| !is_scale(name)).collect();
        if !names.is_empty() {
            merger.write_shard(&mut writer, file, &names, &mut step)?;
        }
    }
    writer.write_index()?;
    writer.write_json(
        "config.json",
        &exported_config(base.config(), dtype.torch_name()),
    )?;
    copy_companions(base.path(), &mut writer)?;
    merger.check(&Folder::open(writer.path())?, &mut step)?;
    writer.finish()?;
    Ok(merger.report)
}

struct Merger<'a> {
    base: &'a Folder,
    adapter: &'a AdapterWeights,
    dtype: MergedDType,
    config: ModelConfig,
    report: MergeReport,
}

impl Merger<'_> {
    fn write_shard(
        &mut self,
        writer: &mut FolderWriter,
        file: &str,
        names: &[&str],
        step: &mut dyn FnMut(),
    ) -> Result<(), Error> {
        let specs = names.iter().map(|name| {
            let tensor = self.base.tensor(name)?;
            let dtype = if self.keeps_bytes(&tensor) {
                tensor.dtype
            } else {
                self.dtype.dtype()
            };
            Ok(TensorSpec {
                name: tensor.name,
                dtype,
                shape: tensor.shape,
            })
        });
        let specs = specs.collect::<Result<Vec<_>, Error>>()?;
        let mut failure = None;
        let written = writer.add_shard(file, &specs, |i| {
            step();
            self.bytes(names[i]).map_err(|error| {
                let cause = error.to_string().into();
                failure = Some(error);
                checkpoint::Error::Produce {
                    tensor: names[i].into(),
                    cause,
                }
            })
        });
        match failure {
            Some(error) => Err(error),
            None => Ok(written?),
        }
    }

    /// Whether a tensor is copied: it is no float, or F32 on purpose amid narrower weights.
    fn keeps_bytes(&self, tensor: &checkpoint::Tensor) -> bool {
        let adapted = self.update(&tensor.name).is_some();
        match tensor.dtype {
            DType::F16 | DType::BF16 | DType::F8E4M3 => false,
            DType::F32 => self.dtype == MergedDType::F32 || (!adapted && tensor.shape.len() == 1),
            _ => true,
        }
    }

    fn update(&self, name: &str) -> Option<Pair> {
        self.adapter.update(name.strip_suffix(".weight")?)
    }

    /// One output tensor's bytes.
    fn bytes(&mut self, name: &str) -> Result<bytes::Bytes, Error> {
        let (tensor, update) = (self.base.tensor(name)?, self.update(name));
        self.report.tensors += 1;
        self.report.adapted += usize::from(update.is_some());
        let bytes = if update.is_none() && self.keeps_bytes(&tensor) {
            tensor.bytes
        } else {
            let mut values = match tensor.dtype {
                DType::F8E4M3 => self.matrix(self.base, name, &tensor.shape)?.to_f32(),
                _ => tensor.to_f32()?,
            };
            if let Some(update) = update {
                add_update(&mut values, &update, &tensor)?;
            }
            self.dtype.encode(&values).into()
        };
        self.report.bytes += bytes.len() as u64;
        Ok(bytes)
    }

    fn matrix(&self, folder: &Folder, name: &str, shape: &[usize]) -> Result<Matrix, Error> {
        let shape = shape.try_into().map_err(|_| {
            Error::Unsupported(format!(
                "tensor `{name}`: expected a matrix, found shape {shape:?}"
            ))
        })?;
        read_matrix(folder, name, shape, self.config.fp8_block)
    }

    /// Compares every matrix of the output with base plus adapter.
    fn check(&mut self, merged: &Folder, step: &mut dyn FnMut()) -> Result<(), Error> {
        for name in self.base.names().filter(|name| !is_scale(name)) {
            step();
            let (before, after) = (self.base.tensor(name)?, merged.tensor(name)?);
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
                if after.bytes != self.dtype.encode(&before.to_f32()?) {
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
        let errors = (0..base.rows()).into_par_iter().map(|row| {
            let added = update
                .as_ref()
                .map_or(0.0, |u| dot(&u.b[row * u.rank..(row + 1) * u.rank], &low));
            let mut line = vec![0.0; base.cols()];
            merged.decode(row..row + 1, 0..base.cols(), &mut line);
            let magnitude: f32 =
                line.iter().map(|value| value.abs()).sum::<f32>() + f32::MIN_POSITIVE;
            (base.dot(row, &signs) + added - merged.dot(row, &signs)).abs() / magnitude
        });
        // NaN compares as larger than anything: a merge that makes NaN is not faithful.
        let largest = errors.reduce(|| 0.0, |a, b| if a > b || a.is_nan() { a } else { b });
        let limit = self.dtype.rounding() + 1e-6 * (base.cols() as f32).sqrt();
        if largest.is_nan() || largest > limit {
            let expected = format!("base plus adapter within {limit:.1e} of a row's magnitude");
            return Err(Error::Unfaithful {
                tensor: name.into(),
                expected,
                found: format!("{largest:.1e}"),
            });
        }
        self.report.largest_error = self.report.largest_error.max(largest);
        Ok(())
    }
}

/// `w += scale · b · a`.
fn add_update(values: &mut [f32], update: &Pair, tensor: &checkpoint::Tensor) -> Result<(), Error> {
    let [width, out] = update.widths();
    tensor.expect_shape(&[out, width])?;
    values
        .par_chunks_mut(width)
        .zip(update.b.par_chunks(update.rank))
        .for_each(|(row, b)| {
            for (b, a) in b.iter().zip(update.a.chunks(width)) {
                row.iter_mut()
                    .zip(a)
                    .for_each(|(w, a)| *w += update.scale * b * a);
            }
        });
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
