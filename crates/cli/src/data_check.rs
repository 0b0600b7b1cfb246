//! `data check`: training data as the model sees it.

use std::cell::RefCell;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use data::{
    Corpus, DataFolder, ReadOptions, Repeats, RowFilter, Sample, SplitName, Survey, Tokenizer,
};

use crate::console::{Console, printable};
use crate::open::{end_ids, find, open_texts, token_cache};
use crate::rows::{ColumnArgs, note_unused};
use crate::train::{TOKENIZING, note_endless, note_reading};

/// Check training data and show it as the model sees it.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Data {
    Check(Args),
}

/// Check every row, count tokens and duplicates, and show the first samples with trained tokens marked.
///
/// Trained text is green on a terminal and in «quotes» elsewhere.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Data folder with a training, validation or test split (`train.jsonl`, `validation.csv`, `test.parquet`, …), or a file
    /// of rows.
    pub(crate) dir: PathBuf,
    /// Model that provides the tokenizer and the chat template: Hugging Face folder, GGUF file, or `org/name` in the
    /// local Hugging Face cache.
    #[arg(long)]
    pub(crate) model: String,
    #[command(flatten)]
    pub(crate) columns: ColumnArgs,
    /// Maximum sequence length, in tokens.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub(crate) max_length: usize,
    /// Number of samples to show per file.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(crate) rows: usize,
    /// Print JSON instead of a table and samples.
    #[arg(long)]
    pub(crate) json: bool,
}

/// How trained text is marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Marks {
    Color,
    Quotes,
}

/// Control characters that are shown as they are.
const LAYOUT: [char; 2] = ['\n', '\t'];

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let folder = find(&args.model)?;
    let (tokenizer, config) = open_texts(&folder)?;
    let vocab_size = match config {
        Some(config) => config.vocab_size,
        None => tokenizer
            .as_ref()
            .map(Tokenizer::vocab_size)
            .with_context(|| {
                let folder = folder.display();
                format!("{folder}: expected config.json or tokenizer.json, found neither")
            })?,
    };
    let data = DataFolder::open(&args.dir)?;
    note_unused(data.unused(), console);
    let splits = SplitName::ALL.map(|split| data.files(split));
    let splits: Vec<&[PathBuf]> = splits
        .into_iter()
        .filter(|files| !files.is_empty())
        .collect();
    if splits.is_empty() {
        let names = SplitName::ALL.map(|split| split.names().join(", "));
        let (dir, names) = (args.dir.display(), names.join(", "));
        bail!(
            "{dir}: expected .jsonl, .json, .csv or .parquet files of one of the names {names}, found none"
        );
    }

    let end_ids = end_ids(&folder, tokenizer.as_ref())?;
    let files: Vec<String> = splits.iter().map(|files| name(files, &args.dir)).collect();
    let mut corpora = Vec::new();
    for (files, name) in splits.into_iter().zip(&files) {
        let corpus = open_corpus(args, files, tokenizer.as_ref(), vocab_size, console)?;
        note_reading(name, &corpus, console);
        note_endless(&corpus, name, &end_ids, console)?;
        corpora.push(corpus);
    }
    let surveys = Survey::of(&corpora.iter().collect::<Vec<_>>());
    let checked: Vec<Checked<'_>> = files
        .iter()
        .zip(&corpora)
        .zip(surveys)
        .map(|((file, corpus), survey)| Checked {
            file,
            corpus,
            survey,
        })
        .collect();
    if args.json {
        let checked = checked.iter().map(Checked::to_json);
        let report = serde_json::json!({ "files": checked.collect::<Vec<_>>() });
        console.result(format_args!("{report:#}"));
        return Ok(ExitCode::SUCCESS);
    }
    console.result(table(&checked).trim_end());
    repeats(&checked)
        .iter()
        .for_each(|line| console.result(line));
    show(&checked, args.rows, tokenizer.as_ref(), console)?;
    Ok(ExitCode::SUCCESS)
}

/// The name of a split's only file in the folder, or of the first with the number of the others.
fn name(files: &[PathBuf], dir: &Path) -> String {
    let first = &files[0];
    let name = first.strip_prefix(dir).unwrap_or(first);
    // A file in place of a folder.
    let name = if name.as_os_str().is_empty() {
        first.as_path()
    } else {
        name
    };
    match files.len() {
        1 => name.display().to_string(),
        n => format!("{} and {} more", name.display(), n - 1),
    }
}

fn open_corpus(
    args: &Args,
    files: &[PathBuf],
    tokenizer: Option<&Tokenizer>,
    vocab_size: usize,
    console: &Console,
) -> anyhow::Result<Corpus> {
    let (cache, progress) = (token_cache(), console.progress(0, TOKENIZING));
    let progress = RefCell::new(progress);
    let reading = ReadOptions {
        tokenizer,
        max_length: args.max_length,
        vocab_size,
        filter: RowFilter::Any,
        columns: &args.columns.columns,
        cache: cache.as_deref(),
        progress: &|done, total| progress.borrow_mut().update_of(done / 1000, total / 1000),
    };
    let corpus = Corpus::open(files, reading);
    progress.into_inner().finish();
    Ok(corpus?)
}

/// A file and its survey.
struct Checked<'a> {
    file: &'a str,
    corpus: &'a Corpus,
    survey: Survey,
}

impl Checked<'_> {
    fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "file": self.file,
            "counts": self.corpus.counts,
            "survey": self.survey,
            "ignored_keys": self.corpus.ignored_keys,
            "notes": self.corpus.notes,
        })
    }
}

/// Repeated samples, one sentence per pair of files.
fn repeats(checked: &[Checked<'_>]) -> Vec<String> {
    let mut lines = Vec::new();
    let mut tell =
        |at: &Checked<'_>, found: &Repeats, there: &str| {
            let Some([sample, earlier]) = found.first else {
                return;
            };
            let (file, n) = (at.file, found.samples);
            lines.push(format!(
            "{file}: {n} {} earlier in {there}; the first is sample {}, equal to sample {} there",
            if n == 1 { "sample occurs" } else { "samples occur" },
            sample + 1,
            earlier + 1
        ));
        };
    for at in checked {
        tell(at, &at.survey.repeated, at.file);
        for (earlier, found) in checked.iter().zip(&at.survey.shared) {
            tell(at, found, earlier.file);
        }
    }
    lines
}

/// The first samples of each file, as the model sees them.
fn show(
    checked: &[Checked<'_>],
    rows: usize,
    tokenizer: Option<&Tokenizer>,
    console: &Console,
) -> anyhow::Result<()> {
    let marks = marks();
    for Checked { file, corpus, .. } in checked {
        for index in 0..rows.min(corpus.len()) {
            let sample = corpus.sample(index)?;
            let text = rendered(&sample, tokenizer, marks)?;
            let cut = if sample.truncated { ", truncated" } else { "" };
            console.result(format_args!("\n{file}, sample {}{cut}:\n{text}", index + 1));
        }
    }
    Ok(())
}

fn marks() -> Marks {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if std::io::stdout().is_terminal() && !no_color {
        Marks::Color
    } else {
        Marks::Quotes
    }
}

fn table(checked: &[Checked<'_>]) -> String {
    let header = [
        "file",
        "rows",
        "samples",
        "tokens",
        "trained",
        "median",
        "90 %",
        "99 %",
        "longest",
        "truncated",
        "untrained",
    ];
    let mut rows = vec![header.map(str::to_owned)];
    for checked in checked {
        let (counts, lengths) = (checked.corpus.counts, checked.survey.lengths);
        let numbers = [
            counts.rows,
            checked.survey.samples,
            counts.tokens,
            counts.trained_tokens,
            lengths.median as usize,
            lengths.p90 as usize,
            lengths.p99 as usize,
            lengths.max as usize,
            counts.truncated_rows,
            counts.untrained_samples,
        ];
        let mut row = header.map(|_| checked.file.to_owned());
        for (cell, number) in row[1..].iter_mut().zip(numbers) {
            *cell = number.to_string();
        }
        rows.push(row);
    }
    let mut text = String::new();
    for row in &rows {
        for (column, cell) in row.iter().enumerate() {
            let width = rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
            if column == 0 {
                text.push_str(&format!("{cell:width$}"));
            } else {
                text.push_str(&format!("  {cell:>width$}"));
            }
        }
        text.push('\n');
    }
    text
}

/// The text of a sample, or its ids without a tokenizer.
fn rendered(
    sample: &Sample,
    tokenizer: Option<&Tokenizer>,
    marks: Marks,
) -> anyhow::Result<String> {
    let spans = match tokenizer {
        Some(tokenizer) => sample.spans(tokenizer)?,
        None => id_spans(sample),
    };
    let spans = spans.iter().map(|(text, trained)| {
        let text = printable(text, &LAYOUT);
        match (trained, marks) {
            (false, _) => text,
            (true, Marks::Color) => format!("\u{1b}[32m{text}\u{1b}[0m"),
            (true, Marks::Quotes) => format!("«{text}»"),
        }
    });
    Ok(spans.collect())
}

fn id_spans(sample: &Sample) -> Vec<(String, bool)> {
    let pairs = sample.ids.iter().zip(&sample.trained);
    let pairs: Vec<(&u32, &bool)> = pairs.collect();
    pairs
        .chunk_by(|a, b| a.1 == b.1)
        .map(|run| {
            let ids = run.iter().map(|(id, _)| format!("{id} "));
            (ids.collect(), *run[0].1)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Sample {
        Sample {
            ids: vec![5, 6, 7, 8],
            trained: vec![false, true, true, false],
            trained_bytes: 0,
            truncated: false,
        }
    }

    #[test]
    fn trained_tokens_are_marked() {
        let check = |marks, expected: &str| {
            assert_eq!(rendered(&sample(), None, marks).unwrap(), expected);
        };
        check(Marks::Quotes, "5 «6 7 »8 ");
        check(Marks::Color, "5 \u{1b}[32m6 7 \u{1b}[0m8 ");
    }

    #[test]
    fn rows_cannot_steer_the_terminal() {
        assert_eq!(
            printable("é\u{1b}[2J\r\n\tx", &LAYOUT),
            "é\\u{1b}[2J\\r\n\tx"
        );
    }
}
