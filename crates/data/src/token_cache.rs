//! The token cache: a file's rows in tokens, for the next run.
//!
//! The name of a cache file is a hash of everything that its content depends on: the rows, the names of columns, the
//! tokenizer with its chat template, and the limits. So it is never out of date, and may be deleted at any time. It is written to a temporary sibling
//! and renamed when it is complete.
//!
//! Layout, little-endian: the magic; the samples' tokens as `u32`, with bit 31 for a trained token; one record per sample
//! (fingerprint `u64`, tokens, trained tokens, trained bytes and whether it was truncated, `u32` each); the rest as JSON; its
//! length as `u64`; SHA-256 of records and JSON. A sample's tokens are checked against its fingerprint when they are read.

use crate::entry::{Counts, SampleEntry};
use crate::error::{Error, Result};
use crate::notes::RowNotes;
use crate::reader::{IgnoredKeys, RowReader, RowSamples};
use crate::sample::{Sample, id_and_mark, word};
use crate::table::FileFormat;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Changes with the layout, and with the samples that rows become.
const CACHE_MAGIC: &[u8; 16] = b"moeforge tokens3";
const RECORD_BYTES: u64 = 24;
const FOOTER_BYTES: u64 = 8 + 32;
/// Counts, names of keys, and notes.
const MAX_JSON_BYTES: u64 = 16 << 20;

/// A hash of everything that a file's tokens depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CacheKey([u8; 32]);

impl CacheKey {
    /// # Errors
    /// If the file cannot be read.
    pub(crate) fn of(path: &Path, reader: &RowReader<'_>) -> Result<Self> {
        let read = |problem| Error::Read {
            path: path.to_owned(),
            problem,
        };
        let mut hash = Sha256::new();
        hash.update(CACHE_MAGIC);
        hash.update(
            reader
                .tokenizer
                .map_or([0; 32], |tokenizer| *tokenizer.identity()),
        );
        hash.update((reader.limits.max_length as u64).to_le_bytes());
        hash.update((reader.limits.vocab_size as u64).to_le_bytes());
        hash.update([reader.filter as u8]);
        // What the same bytes would be under another name, and columns under other ones.
        let format = FileFormat::of(path)?;
        if !(format.is_lines() && reader.columns.is_empty()) {
            hash.update(format!("{format:?} {:?}\n", reader.columns));
        }
        let mut file = File::open(path).map_err(read)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer).map_err(read)? {
                0 => return Ok(Self(hash.finalize().into())),
                n => hash.update(&buffer[..n]),
            }
        }
    }

    /// One key of several.
    pub(crate) fn of_all(keys: impl Iterator<Item = Self>) -> Self {
        let mut hash = Sha256::new();
        keys.for_each(|key| hash.update(key.0));
        Self(hash.finalize().into())
    }

    pub(crate) fn file_name(&self) -> String {
        format!("{self}.tokens")
    }
}

impl fmt::Display for CacheKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Half of it suffices to tell any two files apart.
        self.0[..16]
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The part of a cache file after its samples.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Summary {
    key: [u8; 32],
    samples: u64,
    counts: Counts,
    ignored_keys: IgnoredKeys,
    notes: RowNotes,
}

/// A cache file, open.
#[derive(Debug)]
pub(crate) struct TokenCache {
    path: PathBuf,
    file: Mutex<File>,
    pub(crate) entries: Vec<SampleEntry>,
    pub(crate) counts: Counts,
    pub(crate) ignored_keys: IgnoredKeys,
    pub(crate) notes: RowNotes,
}

impl TokenCache {
    /// None if there is no such file or it is malformed: then it is made again.
    pub(crate) fn open(path: &Path, key: CacheKey) -> Option<Self> {
        let mut file = File::open(path).ok()?;
        let size = file.metadata().ok()?.len();
        let mut magic = [0; 16];
        file.read_exact(&mut magic).ok()?;
        let footer = size.checked_sub(FOOTER_BYTES)?;
        file.seek(SeekFrom::Start(footer)).ok()?;
        let (mut json_bytes, mut expected) = ([0; 8], [0; 32]);
        file.read_exact(&mut json_bytes).ok()?;
        file.read_exact(&mut expected).ok()?;
        let json_bytes = u64::from_le_bytes(json_bytes);
        if &magic != CACHE_MAGIC || json_bytes > MAX_JSON_BYTES {
            return None;
        }
        let json_start = footer.checked_sub(json_bytes)?;
        file.seek(SeekFrom::Start(json_start)).ok()?;
        let mut json = vec![0; usize::try_from(json_bytes).ok()?];
        file.read_exact(&mut json).ok()?;
        let summary: Summary = serde_json::from_slice(&json).ok()?;
        let records = summary.samples.checked_mul(RECORD_BYTES)?;
        let start = json_start.checked_sub(records)?;
        if summary.key != key.0 {
            return None;
        }

        file.seek(SeekFrom::Start(start)).ok()?;
        let mut hash = Sha256::new();
        let mut reader = BufReader::new(&mut file);
        let mut entries = Vec::with_capacity(usize::try_from(summary.samples).ok()?);
        let mut offset = CACHE_MAGIC.len() as u64;
        for _ in 0..summary.samples {
            let mut record = [0; RECORD_BYTES as usize];
            reader.read_exact(&mut record).ok()?;
            hash.update(record);
            let entry = entry(&record, offset);
            offset += 4 * u64::from(entry.tokens);
            entries.push(entry);
        }
        hash.update(&json);
        if offset != start || <[u8; 32]>::from(hash.finalize()) != expected {
            return None;
        }
        Some(Self {
            path: path.to_owned(),
            file: Mutex::new(file),
            entries,
            counts: summary.counts,
            ignored_keys: summary.ignored_keys,
            notes: summary.notes,
        })
    }

    /// # Errors
    /// If the file cannot be read, or the tokens are not the written ones.
    pub(crate) fn sample(&self, entry: &SampleEntry) -> Result<Sample> {
        let mut bytes = vec![0; 4 * entry.tokens as usize];
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let read = file
            .seek(SeekFrom::Start(entry.offset))
            .and_then(|_| file.read_exact(&mut bytes));
        drop(file);
        read.map_err(|problem| Error::Read {
            path: self.path.clone(),
            problem,
        })?;
        let (words, _) = bytes.as_chunks::<4>();
        let words = words.iter().map(|bytes| u32::from_le_bytes(*bytes));
        let sample = Sample {
            ids: words.clone().map(|word| id_and_mark(word).0).collect(),
            trained: words.map(|word| id_and_mark(word).1).collect(),
            trained_bytes: entry.trained_bytes as usize,
            truncated: entry.truncated,
        };
        if sample.fingerprint() != entry.fingerprint {
            return Err(Error::TokenCache {
                path: self.path.clone(),
            });
        }
        Ok(sample)
    }
}

fn record(entry: &SampleEntry) -> [u8; RECORD_BYTES as usize] {
    let mut bytes = [0; RECORD_BYTES as usize];
    bytes[..8].copy_from_slice(&entry.fingerprint.to_le_bytes());
    let numbers = [
        entry.tokens,
        entry.trained_tokens,
        entry.trained_bytes,
        u32::from(entry.truncated),
    ];
    for (bytes, number) in bytes[8..].chunks_mut(4).zip(numbers) {
        bytes.copy_from_slice(&number.to_le_bytes());
    }
    bytes
}

fn entry(record: &[u8; RECORD_BYTES as usize], offset: u64) -> SampleEntry {
    let (words, _) = record.as_chunks::<4>();
    let word = |i: usize| u32::from_le_bytes(words[i]);
    SampleEntry {
        offset,
        fingerprint: u64::from(word(0)) | u64::from(word(1)) << 32,
        tokens: word(2),
        trained_tokens: word(3),
        trained_bytes: word(4),
        piece: 0,
        truncated: word(5) != 0,
    }
}

/// A cache file that is being written.
#[derive(Debug)]
pub(crate) struct CacheWriter {
    path: PathBuf,
    unfinished: Unfinished,
    file: BufWriter<File>,
    records: Vec<u8>,
}

/// A file that is removed unless it is completed.
#[derive(Debug)]
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        // After the rename there is none. If removing fails, the leftover is never read.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl CacheWriter {
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(path.parent().unwrap_or(Path::new("")))?;
        let unfinished = path.with_extension(format!("{}.unfinished", std::process::id()));
        let mut file = BufWriter::new(File::create(&unfinished)?);
        let unfinished = Unfinished(unfinished);
        file.write_all(CACHE_MAGIC)?;
        Ok(Self {
            path: path.to_owned(),
            unfinished,
            file,
            records: Vec::new(),
        })
    }

    pub(crate) fn add(&mut self, row: &RowSamples) -> io::Result<()> {
        for sample in &row.samples {
            for (&id, &trained) in sample.ids.iter().zip(&sample.trained) {
                self.file.write_all(&word(id, trained).to_le_bytes())?;
            }
            self.records.extend(record(&SampleEntry::of(sample, 0)));
        }
        Ok(())
    }

    pub(crate) fn finish(
        mut self,
        key: CacheKey,
        counts: &Counts,
        ignored_keys: &IgnoredKeys,
        notes: &RowNotes,
    ) -> io::Result<()> {
        let summary = Summary {
            key: key.0,
            samples: self.records.len() as u64 / RECORD_BYTES,
            counts: *counts,
            ignored_keys: ignored_keys.clone(),
            notes: notes.clone(),
        };
        let json = serde_json::to_vec(&summary)?;
        let hash = Sha256::new()
            .chain_update(&self.records)
            .chain_update(&json);
        self.file.write_all(&self.records)?;
        self.file.write_all(&json)?;
        self.file.write_all(&(json.len() as u64).to_le_bytes())?;
        self.file.write_all(&hash.finalize())?;
        let file = self
            .file
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        std::fs::rename(&self.unfinished.0, &self.path)
    }
}
