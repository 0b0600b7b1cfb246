//! Rows that a verb measures a model on, and what is noted about rows that are read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::bail;
use data::{Columns, DataFolder, ReadOptions, RowFilter, Split, SplitName, Tokenizer};

use crate::console::{Console, printable};

/// Names of columns.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ColumnArgs {
    /// Columns that are not called as the keys of rows are: `prompt=question,completion=answer`.
    #[arg(
        long,
        value_name = "KEY=COLUMN,…",
        value_parser = parse_columns,
        default_value = "",
        hide_default_value = true
    )]
    pub(crate) columns: Columns,
}

fn parse_columns(text: &str) -> Result<Columns, String> {
    let pairs = text.split(',').filter(|pair| !pair.is_empty());
    let pairs = pairs.map(|pair| {
        let (key, column) = pair
            .split_once('=')
            .ok_or_else(|| format!("expected KEY=COLUMN, found `{pair}`"))?;
        Ok((key.trim().to_owned(), column.trim().to_owned()))
    });
    let pairs = pairs.collect::<Result<Vec<_>, String>>()?;
    Columns::new(pairs).map_err(|problem| problem.to_string())
}

/// A split of a data folder.
#[derive(Clone, Copy)]
pub(crate) struct SplitRows<'a> {
    /// The folder, or a file in place of one.
    pub(crate) path: &'a Path,
    pub(crate) split: SplitName,
    pub(crate) columns: &'a Columns,
    pub(crate) console: &'a Console,
}

impl SplitRows<'_> {
    /// Reads all of it.
    pub(crate) fn read(
        &self,
        tokenizer: Option<&Tokenizer>,
        max_length: usize,
        vocab_size: usize,
    ) -> anyhow::Result<Split> {
        let files = self.files()?;
        let options = ReadOptions {
            tokenizer,
            max_length,
            vocab_size,
            filter: RowFilter::Samples,
            columns: self.columns,
            cache: None,
            progress: &|_, _| {},
        };
        let split = Split::of(&files, options)?;
        note_ignored(&split.ignored_keys, self.console);
        note_changed(&split.notes, self.console);
        Ok(split)
    }

    /// The files that it is in.
    pub(crate) fn files(&self) -> anyhow::Result<Vec<PathBuf>> {
        let Self { path, split, .. } = self;
        if path.is_file() {
            return Ok(vec![path.to_path_buf()]);
        }
        let folder = DataFolder::open(path)?;
        let files = folder.files(*split);
        if files.is_empty() {
            let names = split.names();
            bail!(
                "{}: expected a {split} split (`{}.jsonl`, `.json`, `.csv` or `.parquet`), found none",
                path.display(),
                names[0]
            );
        }
        Ok(files.to_vec())
    }
}

/// Notes keys of rows that are not read.
pub(crate) fn note_ignored(keys: &BTreeMap<String, usize>, console: &Console) {
    if keys.is_empty() {
        return;
    }
    let names = keys.iter().map(|(key, rows)| {
        let s = if *rows == 1 { "" } else { "s" };
        format!("{} ({rows} row{s})", printable(key, &[]))
    });
    let names: Vec<String> = names.collect();
    console.note(format_args!("ignored keys in rows: {}", names.join(", ")));
}

/// Notes what of the rows is not as they have it.
pub(crate) fn note_changed(notes: &BTreeSet<String>, console: &Console) {
    for note in notes {
        console.note(format_args!("{}", printable(note, &[])));
    }
}

/// Notes files of data folders that belong to no split.
pub(crate) fn note_unused(files: &[PathBuf], console: &Console) {
    if files.is_empty() {
        return;
    }
    let names: Vec<String> = files
        .iter()
        .map(|file| file.display().to_string())
        .collect();
    console.note(format_args!(
        "not read, because their names are of no split: {}",
        printable(&names.join(", "), &[])
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_pairs() {
        let names = [("prompt", "question"), ("completion", "data.answer")];
        let names = names.map(|(key, column)| (key.to_owned(), column.to_owned()));
        let expected = Columns::new(names).unwrap();
        let found = parse_columns("prompt=question, completion=data.answer");
        assert_eq!(found, Ok(expected));
        assert_eq!(parse_columns(""), Ok(Columns::none()));
        assert_eq!(
            parse_columns("prompt").unwrap_err(),
            "expected KEY=COLUMN, found `prompt`"
        );
        let problem = parse_columns("promt=question").unwrap_err();
        assert!(problem.ends_with("did you mean `prompt`?"), "{problem}");
    }
}
