//! The samples of one or more files, read from the disk on demand.
//!
//! Memory holds the place and the length of each sample, not its tokens: a data set may be larger than memory. Every row is
//! read and tokenized once at the start, so that a broken one is found before training, and the tokens go into the
//! [cache](crate::token_cache). Without a cache folder, a row is tokenized again for each of its samples that is read; rows of
//! files without lines are then kept in a temporary file, because nothing else says where one begins.

use crate::columns::Columns;
use crate::entry::{Counts, SampleEntry};
use crate::error::{Error, Result};
use crate::file::line_at;
use crate::notes::{RowNotes, add_notes};
use crate::reader::{IgnoredKeys, ReadOptions, RowFilter, RowReader, RowSamples, note_ignored};
use crate::row::Limits;
use crate::sample::Sample;
use crate::table::FileFormat;
use crate::token_cache::{CacheKey, CacheWriter, TokenCache};
use crate::tokenizer::Tokenizer;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// The samples of files, one file after the other.
#[derive(Debug)]
pub struct Corpus {
    files: Vec<CorpusFile>,
    /// Counts over all files, of the samples that stay and of all rows.
    pub counts: Counts,
    /// Number of samples that are left out because they, or the other answer of their pair, have no target. None are if
    /// all rows are accepted.
    pub left_out: usize,
    /// Unread keys of rows, each with the number of rows that have it.
    pub ignored_keys: BTreeMap<String, usize>,
    /// Sentences on what of the rows is not as it is written, such as a role that the chat template does not know.
    pub notes: BTreeSet<String>,
    /// Why tokens are not in the cache folder, if there is one and they are not.
    pub cache_problem: Option<String>,
}

/// One file.
#[derive(Debug)]
struct CorpusFile {
    path: PathBuf,
    entries: Vec<SampleEntry>,
    counts: Counts,
    left_out: usize,
    ignored_keys: IgnoredKeys,
    notes: RowNotes,
    key: CacheKey,
    source: TokenSource,
}

/// The source of tokens.
#[derive(Debug)]
enum TokenSource {
    Cache(TokenCache),
    Rows {
        /// Lines: the file itself, or a temporary one.
        file: Mutex<File>,
        tokenizer: Option<Box<Tokenizer>>,
        limits: Limits,
        columns: Columns,
    },
}

impl Corpus {
    /// Reads files as [`Split::open`](crate::Split::open) does, and remembers the places of the samples.
    ///
    /// # Errors
    /// As [`Split::open`](crate::Split::open), except that a single file may have no trained token if another has one. A cache
    /// that cannot be written is not an error; the reason is in `cache_problem`.
    pub fn open(paths: &[PathBuf], options: ReadOptions<'_>) -> Result<Self> {
        let size = |path: &PathBuf| path.metadata().map_or(0, |data| data.len());
        let total = paths.iter().map(size).sum();
        let mut corpus = Self {
            files: Vec::new(),
            counts: Counts::default(),
            left_out: 0,
            ignored_keys: IgnoredKeys::new(),
            notes: RowNotes::new(),
            cache_problem: None,
        };
        let unread = options.tokenizer.map(Tokenizer::unread_keys);
        for key in unread.unwrap_or_default() {
            let note = format!("tokenizer_config.json: the key `{key}` is not known, and not read");
            corpus.notes.insert(note);
        }
        let mut before = 0;
        for path in paths {
            let tell = |bytes| (options.progress)(before + bytes, total);
            let (mut file, problem) = CorpusFile::open(path, options, &tell)?;
            file.leave_out_untrained(options.filter);
            corpus.counts.add(file.counts);
            corpus.left_out += file.left_out;
            note_ignored(&mut corpus.ignored_keys, file.ignored_keys.clone());
            add_notes(&mut corpus.notes, &file.notes);
            corpus.cache_problem = corpus.cache_problem.or(problem);
            corpus.files.push(file);
            before += size(path);
        }
        if let (0, Some(path)) = (corpus.counts.trained_tokens, paths.first()) {
            return Err(Error::NothingTrained {
                path: path.clone(),
                rows: corpus.counts.rows,
            });
        }
        Ok(corpus)
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.files.iter().map(|file| file.entries.len()).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of samples in each file.
    pub fn samples_per_file(&self) -> Vec<usize> {
        self.files.iter().map(|file| file.entries.len()).collect()
    }

    /// The lengths of all samples, in tokens.
    pub fn lengths(&self) -> Vec<u32> {
        self.entries().map(|entry| entry.tokens).collect()
    }

    /// A hash of the tokens and marks of every sample. It differs for different samples, except with a chance of 2⁻⁶⁴.
    pub fn fingerprints(&self) -> impl Iterator<Item = u64> {
        self.entries().map(|entry| entry.fingerprint)
    }

    /// A text that identifies the data: rows, tokenizer, template and maximum length, and whether samples are left out.
    pub fn identity(&self) -> String {
        let all = CacheKey::of_all(self.files.iter().map(|file| file.key)).to_string();
        match self.left_out {
            0 => all,
            left_out => format!("{all}-{left_out}"),
        }
    }

    /// A sample, counted from 0 over all files.
    ///
    /// # Errors
    /// If the file or the cache can no longer be read, or was changed since it was opened.
    ///
    /// # Panics
    /// If `index` is out of range.
    pub fn sample(&self, index: usize) -> Result<Sample> {
        let mut index = index;
        for file in &self.files {
            match file.entries.get(index) {
                Some(entry) => return file.sample(entry),
                None => index -= file.entries.len(),
            }
        }
        panic!("{} samples more than there are", index + 1);
    }

    fn entries(&self) -> impl Iterator<Item = &SampleEntry> {
        self.files.iter().flat_map(|file| &file.entries)
    }
}

impl CorpusFile {
    /// Opens a file by its tokens in the cache, or reads it and puts them there. The second result says why that failed.
    fn open(
        path: &Path,
        options: ReadOptions<'_>,
        tell: &dyn Fn(u64),
    ) -> Result<(Self, Option<String>)> {
        let reader = RowReader::new(&options)?;
        let key = CacheKey::of(path, &reader)?;
        let cached = options.cache.map(|folder| folder.join(key.file_name()));
        if let Some(cache) = cached
            .as_deref()
            .and_then(|file| TokenCache::open(file, key))
        {
            return Ok((Self::cached(path, key, cache), None));
        }

        let mut index = FileIndex::default();
        let mut writer = cached.as_deref().map(CacheWriter::create);
        let is_lines = FileFormat::of(path)?.is_lines();
        let is_cached = matches!(writer, Some(Ok(_)));
        let mut spool = (!is_lines && !is_cached).then(Spool::new).transpose()?;
        reader.read(path, |mut row| {
            tell(row.text.end);
            if let Some(spool) = &mut spool {
                row.text.offset = spool.add(&row.text.text)?;
            }
            if let Some(Ok(open)) = &mut writer
                && let Err(problem) = open.add(&row)
            {
                writer = Some(Err(problem));
            }
            index.add(&row);
            Ok(())
        })?;
        let finish = |writer: CacheWriter| {
            writer.finish(key, &index.counts, &index.ignored_keys, &index.notes)
        };
        let finished = writer.map(|writer| writer.and_then(finish));
        let problem = match (finished, cached) {
            (Some(Ok(())), Some(file)) => match TokenCache::open(&file, key) {
                Some(cache) => return Ok((Self::cached(path, key, cache), None)),
                None => Some(format!("{}: cannot be read back", file.display())),
            },
            (Some(Err(problem)), Some(file)) => Some(format!("{}: {problem}", file.display())),
            _ => None,
        };
        if !is_lines && spool.is_none() {
            // The cache failed on the way, and nobody knows where the rows are.
            let options = ReadOptions {
                cache: None,
                ..options
            };
            return Ok((Self::open(path, options, tell)?.0, problem));
        }
        let source = TokenSource::Rows {
            file: Mutex::new(Spool::file(spool, path)?),
            tokenizer: options.tokenizer.cloned().map(Box::new),
            limits: reader.limits,
            columns: options.columns.clone(),
        };
        Ok((index.into_file(path, key, source), problem))
    }

    fn cached(path: &Path, key: CacheKey, mut cache: TokenCache) -> Self {
        Self {
            path: path.to_owned(),
            entries: std::mem::take(&mut cache.entries),
            counts: cache.counts,
            left_out: 0,
            ignored_keys: std::mem::take(&mut cache.ignored_keys),
            notes: std::mem::take(&mut cache.notes),
            key,
            source: TokenSource::Cache(cache),
        }
    }

    /// Leaves out samples without a target, and pairs with an answer that has none: they teach nothing, and a batch of
    /// them has no loss.
    fn leave_out_untrained(&mut self, filter: RowFilter) {
        let size = match filter {
            RowFilter::Samples => 1,
            RowFilter::Pairs => 2,
            RowFilter::Any => return,
        };
        let is_trained =
            |unit: &&[SampleEntry]| unit.iter().all(|sample| sample.trained_tokens > 0);
        let kept = self.entries.chunks(size).filter(is_trained);
        let kept: Vec<SampleEntry> = kept.flatten().copied().collect();
        self.left_out = self.entries.len() - kept.len();
        if self.left_out > 0 {
            self.counts.recount(&kept);
            self.entries = kept;
        }
    }

    fn sample(&self, entry: &SampleEntry) -> Result<Sample> {
        match &self.source {
            TokenSource::Cache(cache) => cache.sample(entry),
            TokenSource::Rows {
                file,
                tokenizer,
                limits,
                columns,
            } => {
                let changed = || Error::Changed {
                    path: self.path.clone(),
                };
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                let line = line_at(&mut file, &self.path, entry.offset)?;
                drop(file);
                let reader = RowReader {
                    tokenizer: tokenizer.as_deref(),
                    limits: *limits,
                    filter: RowFilter::Any,
                    columns,
                };
                let (samples, ..) = reader.row(&line).map_err(|_| changed())?;
                let sample = samples.into_iter().nth(entry.piece as usize);
                let same = |sample: &Sample| sample.fingerprint() == entry.fingerprint;
                sample.filter(same).ok_or_else(changed)
            }
        }
    }
}

/// A temporary file of lines. It has no name, and is gone when it is closed.
struct Spool {
    file: File,
    bytes: u64,
}

impl Spool {
    fn new() -> Result<Self> {
        let file = tempfile::tempfile().map_err(Self::failed)?;
        Ok(Self { file, bytes: 0 })
    }

    /// The file of lines to read a row from: the temporary one, or else the one at `path`.
    fn file(spool: Option<Self>, path: &Path) -> Result<File> {
        let file = spool.map_or_else(|| File::open(path), |spool| Ok(spool.file));
        file.map_err(|problem| Error::Read {
            path: path.to_owned(),
            problem,
        })
    }

    /// Appends a row; returns its offset.
    fn add(&mut self, row: &str) -> Result<u64> {
        let offset = self.bytes;
        // JSON as it was written may stand on several lines, and white space between its parts is all that can break them.
        let line = format!("{}\n", row.replace(['\n', '\r'], " "));
        self.file.write_all(line.as_bytes()).map_err(Self::failed)?;
        self.bytes += line.len() as u64;
        Ok(offset)
    }

    fn failed(problem: std::io::Error) -> Error {
        Error::Read {
            path: std::env::temp_dir(),
            problem,
        }
    }
}

/// The index of a file that is being read.
#[derive(Default)]
struct FileIndex {
    entries: Vec<SampleEntry>,
    counts: Counts,
    ignored_keys: IgnoredKeys,
    notes: RowNotes,
}

impl FileIndex {
    fn into_file(self, path: &Path, key: CacheKey, source: TokenSource) -> CorpusFile {
        CorpusFile {
            path: path.to_owned(),
            entries: self.entries,
            counts: self.counts,
            left_out: 0,
            ignored_keys: self.ignored_keys,
            notes: self.notes,
            key,
            source,
        }
    }

    fn add(&mut self, row: &RowSamples) {
        self.counts.add_row(&row.samples);
        note_ignored(
            &mut self.ignored_keys,
            row.ignored.iter().map(|key| (key.clone(), 1)),
        );
        add_notes(&mut self.notes, &row.notes);
        let entries = row.samples.iter().zip(0..);
        let entry = |(sample, piece)| SampleEntry {
            piece,
            ..SampleEntry::of(sample, row.text.offset)
        };
        self.entries.extend(entries.map(entry));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::Split;
    use crate::tokenizer::tests::tokenizer;
    use std::fs;

    const ROWS: &str = "{\"text\": \"qzxjkvw\"}\n\n{\"prompt\": \"é\", \"completion\": \"w\", \"id\": 3}\n\
        {\"input_ids\": [9, 8, 7, 6, 5], \"labels\": [-100, -100, -100, -100, 5]}";

    fn open(paths: &[PathBuf], cache: Option<&Path>, tokenized: &dyn Fn(u64, u64)) -> Corpus {
        let tokenizer = tokenizer(None, true);
        let options = ReadOptions {
            tokenizer: Some(&tokenizer),
            max_length: 4,
            vocab_size: 288,
            filter: RowFilter::Samples,
            columns: &Columns::default(),
            cache,
            progress: tokenized,
        };
        Corpus::open(paths, options).unwrap()
    }

    fn samples(corpus: &Corpus) -> Vec<Sample> {
        let samples = (0..corpus.len()).map(|index| corpus.sample(index).unwrap());
        samples.collect()
    }

    fn file(folder: &Path, name: &str, rows: &str) -> PathBuf {
        fs::write(folder.join(name), rows).unwrap();
        folder.join(name)
    }

    #[test]
    fn samples_are_those_of_the_split_from_rows_and_from_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path(), "train.jsonl", ROWS);
        let split = Split::open(&path, Some(&tokenizer(None, true)), 4, 288).unwrap();
        let cache = folder.path().join("cache");
        for cache in [None, Some(cache.as_path()), Some(&cache)] {
            let corpus = open(std::slice::from_ref(&path), cache, &|_, _| {});
            // The last row is cut before its only target.
            let (kept, left_out) = split.samples.split_at(4);
            assert_eq!((samples(&corpus).as_slice(), corpus.left_out), (kept, 1));
            let counts = Counts {
                tokens: split.counts.tokens - left_out[0].ids.len(),
                ..split.counts
            };
            assert_eq!(corpus.counts, counts);
            assert_eq!(
                corpus.ignored_keys,
                IgnoredKeys::from([("id".to_owned(), 1)])
            );
            assert_eq!(corpus.lengths(), [4, 4, 3, 4]);
            assert_eq!(corpus.cache_problem, None);
        }
        let two = open(&[path.clone(), path], Some(&cache), &|_, _| {});
        assert_eq!((two.len(), two.samples_per_file()), (8, vec![4, 4]));
        assert_eq!(two.sample(6).unwrap(), split.samples[2]);
        assert_eq!(two.counts.rows, 6);
    }

    #[test]
    fn a_pair_goes_with_either_answer_and_all_rows_stay_where_they_are_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        // Four tokens hold the whole of the second pair, and none of the first one's answers.
        let rows = "{\"prompt\": \"qzxjkv\", \"chosen\": \"w\", \"rejected\": \"q\"}\n\
                    {\"prompt\": \"q\", \"chosen\": \"w\", \"rejected\": \"z\"}\n";
        let path = file(folder.path(), "train.jsonl", rows);
        let tokenizer = tokenizer(None, true);
        let open = |filter| {
            let options = ReadOptions {
                tokenizer: Some(&tokenizer),
                max_length: 4,
                vocab_size: 288,
                filter,
                columns: &Columns::default(),
                cache: None,
                progress: &|_, _| {},
            };
            Corpus::open(std::slice::from_ref(&path), options).unwrap()
        };
        let (all, pairs) = (open(RowFilter::Any), open(RowFilter::Pairs));
        assert_eq!((all.len(), all.left_out), (4, 0));
        assert_eq!((pairs.len(), pairs.left_out), (2, 2));
        assert_eq!(samples(&pairs), samples(&all)[2..]);
        assert_eq!(pairs.counts.rows, 2);
        assert_ne!(pairs.identity(), all.identity());
    }

    #[test]
    fn rows_are_tokenized_once_until_something_changes() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path(), "train.jsonl", ROWS);
        let cache = folder.path().join("cache");
        let tokenizes = |path: &PathBuf| {
            let told = std::cell::Cell::new((0, 0));
            let corpus = open(std::slice::from_ref(path), Some(&cache), &|done, total| {
                told.set((done, total));
            });
            assert_eq!(corpus.sample(0).unwrap().ids.len(), 4);
            (told.get(), corpus.identity())
        };
        let size = ROWS.len() as u64;
        let (told, identity) = tokenizes(&path);
        assert_eq!(told, (size, size));
        assert_eq!(tokenizes(&path), ((0, 0), identity.clone()));
        // The name of the file does not matter, its content does.
        let moved = file(folder.path(), "other.jsonl", ROWS);
        assert_eq!(tokenizes(&moved), ((0, 0), identity.clone()));
        let changed = file(folder.path(), "train.jsonl", &ROWS.replace("qz", "zq"));
        let (told, other) = tokenizes(&changed);
        assert_eq!(told.0, size);
        assert_ne!(other, identity);
    }

    #[test]
    fn damaged_caches_are_made_again_or_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path(), "train.jsonl", ROWS);
        let cache = folder.path().join("cache");
        let paths = std::slice::from_ref(&path);
        let expected = samples(&open(paths, Some(&cache), &|_, _| {}));
        let entry = fs::read_dir(&cache)
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path();
        let whole = fs::read(&entry).unwrap();
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 1);
        for cut in [0, 7, 20, whole.len() / 2, whole.len() - 1] {
            fs::write(&entry, &whole[..cut]).unwrap();
            assert_eq!(
                samples(&open(paths, Some(&cache), &|_, _| {})),
                expected,
                "{cut}"
            );
        }
        // The index is checked when the cache is opened, tokens when they are read.
        let mut damaged = whole.clone();
        let last = damaged.len() - 60;
        damaged[last] ^= 1;
        fs::write(&entry, &damaged).unwrap();
        assert_eq!(samples(&open(paths, Some(&cache), &|_, _| {})), expected);
        let mut damaged = whole;
        damaged[17] ^= 1;
        fs::write(&entry, &damaged).unwrap();
        let problem = open(paths, Some(&cache), &|_, _| {}).sample(0).unwrap_err();
        let problem = problem.to_string();
        assert!(problem.contains("delete it"), "{problem}");
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_noted() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path(), "train.jsonl", ROWS);
        let corpus = open(
            std::slice::from_ref(&path),
            Some(&path.join("no")),
            &|_, _| {},
        );
        assert!(corpus.cache_problem.is_some());
        let (first, last) = (corpus.sample(0).unwrap(), corpus.sample(3).unwrap());
        assert_ne!(first, last);
        file(folder.path(), "train.jsonl", &ROWS.replace("qz", "zq"));
        let problem = corpus.sample(0).unwrap_err().to_string();
        assert!(problem.contains("changed while it was in use"), "{problem}");
    }
}
