//! The training rows of a run: their files, their packing, and the order of batches.

use std::path::{Path, PathBuf};

use data::{
    Batch, Corpus, DataFolder, Packing, ReadOptions, Sample, SampleOrder, Shuffle, SplitName,
    collate, collate_rows,
};
use kernels::Segments;
use serde::{Deserialize, Serialize};

use crate::recipe::forecast::BatchShape;
use crate::recipe::{Loss, Recipe};
use crate::{Error, Result};

/// A file of training rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataFile {
    /// The last name of its path.
    pub name: String,
    /// The SHA-256 of its bytes, in hexadecimal.
    pub sha256: String,
}

impl DataFile {
    fn of(path: &Path) -> Result<Self> {
        let name = path.file_name().unwrap_or_default();
        Ok(Self {
            name: name.to_string_lossy().into_owned(),
            sha256: checkpoint::sha256(path)?,
        })
    }
}

/// The training rows, and batches of them by number.
#[derive(Debug)]
pub struct Dataset {
    /// The samples.
    pub corpus: Corpus,
    /// Their files, in order.
    pub(crate) files: Vec<DataFile>,
    /// Files in the recipe's folders that belong to no split.
    pub unused_files: Vec<PathBuf>,
    packing: Packing,
    order: SampleOrder,
    batch_size: usize,
    /// Whether a row of the packing is the two answers of a pair, which become two rows of the batch.
    is_paired: bool,
}

impl Dataset {
    /// Opens the training splits of a recipe's folders.
    ///
    /// # Errors
    /// If no folder has one, a folder with a weight has none, or a file cannot be used.
    pub(crate) fn open(recipe: &Recipe, options: ReadOptions<'_>) -> Result<Self> {
        let data = folders(recipe)?;
        let files = training_files(recipe, &data)?;
        let paths = files.concat();
        let corpus = Corpus::open(&paths, options)?;
        let shuffle = if recipe.train.shuffle {
            Shuffle::Seeded
        } else {
            Shuffle::FileOrder
        };
        // Weighted folders share no rows, so that each has exactly its share.
        let counts = match recipe.data.weights {
            Some(_) => samples_per_folder(&corpus, &files),
            None => vec![corpus.len()],
        };
        let is_paired = recipe.train.loss == Loss::Dpo;
        let lengths = corpus.lengths();
        let (mut packing, mut rows, mut first) = (Packing::none(0), Vec::new(), 0);
        for n_samples in counts {
            let folder = match recipe.data.packing {
                _ if is_paired => Packing::pairs(n_samples),
                true => {
                    Packing::best_fit(&lengths[first..first + n_samples], recipe.data.max_length)
                }
                false => Packing::none(n_samples),
            };
            rows.push(folder.n_rows());
            packing.append(&folder, first);
            first += n_samples;
        }
        let (n_rows, seed) = (packing.n_rows(), recipe.train.seed);
        let mut order = match &recipe.data.weights {
            Some(weights) => {
                let parts = recipe
                    .data
                    .path
                    .iter()
                    .cloned()
                    .zip(rows.iter().zip(weights));
                let idle = parts.filter(|(_, (rows, weight))| **rows == 0 && **weight > 0.0);
                let folders: Vec<PathBuf> = idle.map(|(folder, _)| folder).collect();
                if !folders.is_empty() {
                    return Err(Error::NoWeightedRows { folders });
                }
                SampleOrder::mixed(&rows, weights, seed, shuffle)
            }
            None => SampleOrder::new(n_rows, seed, shuffle),
        };
        if recipe.data.group_by_length {
            order = order.grouped_by_length(lengths, recipe.train.batch_size);
        }
        let files = paths.iter().map(|path| DataFile::of(path));
        Ok(Self {
            corpus,
            files: files.collect::<Result<_>>()?,
            unused_files: data.iter().flat_map(DataFolder::unused).cloned().collect(),
            packing,
            order,
            batch_size: recipe.train.batch_size,
            is_paired,
        })
    }

    /// Rows in an epoch: samples, packed rows of samples, or pairs.
    pub fn rows(&self) -> usize {
        self.order.epoch_len()
    }

    /// The largest micro-batch that there can be.
    pub fn largest_batch(&self) -> BatchShape {
        let lengths = self.corpus.lengths();
        let of_row = |row: usize| -> u64 {
            let samples = self.packing.row(row).into_iter();
            let lengths = samples.map(|i| u64::from(lengths[i]));
            // Both answers of a pair are rows.
            match self.is_paired {
                true => lengths.max().unwrap_or(0),
                false => lengths.sum(),
            }
        };
        let longest = (0..self.packing.n_rows()).map(of_row).max().unwrap_or(0);
        let rows = self.batch_size * if self.is_paired { 2 } else { 1 };
        let counts = self.corpus.counts;
        let share = counts.trained_tokens as f64 / counts.tokens.max(1) as f64;
        BatchShape {
            rows: rows as u64,
            seq: longest,
            trained_tokens: (rows as f64 * longest as f64 * share).ceil() as u64,
        }
    }

    /// Micro-batch number `number`, counted from 0 over the whole run.
    pub(crate) fn batch(&mut self, number: u64, pad_id: u32) -> Result<Batch> {
        let rows = self.order.batch(number, self.batch_size);
        let rows = rows.into_iter().map(|row| {
            let samples = self.packing.row(row);
            let samples = samples.into_iter().map(|i| self.corpus.sample(i));
            samples.collect::<data::Result<Vec<Sample>>>()
        });
        let rows = rows.collect::<data::Result<Vec<_>>>()?;
        if self.is_paired {
            let answers: Vec<&Sample> = rows.iter().flatten().collect();
            return Ok(collate(&answers, pad_id));
        }
        let rows: Vec<Vec<&Sample>> = rows.iter().map(|row| row.iter().collect()).collect();
        let rows: Vec<&[&Sample]> = rows.iter().map(Vec::as_slice).collect();
        Ok(collate_rows(&rows, pad_id))
    }
}

/// Opens the validation split of every folder of a recipe; none if there are none.
pub(crate) fn validation(recipe: &Recipe, options: ReadOptions<'_>) -> Result<Option<Corpus>> {
    let data = folders(recipe)?;
    let files = data
        .iter()
        .map(|folder| folder.files(SplitName::Validation));
    let files: Vec<PathBuf> = files.flatten().cloned().collect();
    if files.is_empty() {
        return Ok(None);
    }
    Ok(Some(Corpus::open(&files, options)?))
}

/// The files of each folder's training split.
fn training_files<'a>(recipe: &Recipe, data: &'a [DataFolder]) -> Result<Vec<&'a [PathBuf]>> {
    let files = data.iter().map(|folder| folder.files(SplitName::Train));
    let files: Vec<&[PathBuf]> = files.collect();
    let paths = recipe.data.path.iter().zip(&files);
    let lacking = paths.filter(|(_, files)| files.is_empty());
    let folders: Vec<PathBuf> = lacking.map(|(path, _)| path.clone()).collect();
    let all_needed = recipe.data.weights.is_some();
    if folders.len() == files.len() || (all_needed && !folders.is_empty()) {
        return Err(Error::NoTrainingData { folders });
    }
    Ok(files)
}

fn samples_per_folder(corpus: &Corpus, files: &[&[PathBuf]]) -> Vec<usize> {
    let mut samples = corpus.samples_per_file().into_iter();
    let of_folder = |files: &&[PathBuf]| samples.by_ref().take(files.len()).sum();
    files.iter().map(of_folder).collect()
}

fn folders(recipe: &Recipe) -> data::Result<Vec<DataFolder>> {
    let paths = recipe.data.path.iter();
    paths.map(|path| DataFolder::open(path)).collect()
}

/// The boundaries in a batch that attention does not cross.
pub(crate) fn segments(batch: &Batch) -> Segments {
    if batch.is_packed() {
        Segments::packed(batch.starts.clone())
    } else {
        Segments::whole()
    }
}
