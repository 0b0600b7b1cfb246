//! `data check`: training data as the model will see it.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use data::{Sample, Split, Tokenizer};

use crate::console::Console;
use crate::open::{find, open_tokenizer, read_config};

/// What to do with data.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Data {
    /// Check every row, count tokens, and show the first rows with their trained tokens marked.
    Check(Args),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder with `train.jsonl`, `valid.jsonl`, `test.jsonl`, or some of them.
    pub(crate) dir: PathBuf,
    /// Hugging Face folder, or `org/name` in the local Hugging Face cache: its tokenizer and chat template are used.
    #[arg(long)]
    pub(crate) model: String,
    /// Longest sequence, in tokens.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub(crate) max_length: usize,
    /// How many samples of each file to show.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(crate) rows: usize,
}

/// How trained text is told from the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Marks {
    Color,
    Quotes,
}

const FILES: [&str; 3] = ["train.jsonl", "valid.jsonl", "test.jsonl"];

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let folder = find(&args.model)?;
    let tokenizer = open_tokenizer(&folder)?;
    let vocab_size = match read_config(&folder)? {
        Some(config) => config.vocab_size,
        None => tokenizer
            .as_ref()
            .map(Tokenizer::vocab_size)
            .with_context(|| {
                let folder = folder.display();
                format!("{folder}: expected config.json or tokenizer.json, found neither")
            })?,
    };
    let present = |file: &&str| args.dir.join(file).exists();
    let files: Vec<&str> = FILES.into_iter().filter(present).collect();
    if files.is_empty() {
        let (dir, names) = (args.dir.display(), FILES.join(", "));
        bail!("{dir}: expected one of {names}, found none");
    }

    let mut splits = Vec::new();
    for file in files {
        let path = args.dir.join(file);
        let split = Split::open(&path, tokenizer.as_ref(), args.max_length, vocab_size)?;
        splits.push((file, split));
    }
    console.result(table(&splits).trim_end());
    let marks = marks();
    for (file, split) in &splits {
        for (sample_idx, sample) in split.samples.iter().take(args.rows).enumerate() {
            let text = rendered(sample, tokenizer.as_ref(), marks)?;
            console.result(format_args!("\n{file}, sample {}:\n{text}", sample_idx + 1));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn marks() -> Marks {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if std::io::stdout().is_terminal() && !no_color {
        Marks::Color
    } else {
        Marks::Quotes
    }
}

fn table(splits: &[(&str, Split)]) -> String {
    let header = [
        "file",
        "rows",
        "samples",
        "tokens",
        "trained",
        "longest",
        "cut",
        "nothing trained",
    ];
    let mut rows = vec![header.map(str::to_owned)];
    for (file, split) in splits {
        let counts = split.counts;
        let lengths = split.samples.iter().map(|sample| sample.ids.len());
        let numbers = [
            counts.rows,
            split.samples.len(),
            counts.tokens,
            counts.trained_tokens,
            lengths.max().unwrap_or(0),
            counts.truncated_rows,
            counts.untrained_samples,
        ];
        let [a, b, c, d, e, f, g] = numbers.map(|number| number.to_string());
        rows.push([(*file).to_owned(), a, b, c, d, e, f, g]);
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

/// The text of a sample, or its ids where there is no tokenizer.
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
        let text = printable(text);
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

/// Text without what would steer a terminal: the rows are anybody's.
fn printable(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() && !matches!(character, '\n' | '\t') {
            safe.extend(character.escape_default());
        } else {
            safe.push(character);
        }
    }
    safe
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
        assert_eq!(printable("é\u{1b}[2J\r\n\tx"), "é\\u{1b}[2J\\r\n\tx");
    }
}
