//! Whole files as samples, in memory.

use crate::columns::Columns;
use crate::entry::Counts;
use crate::error::{Error, Result};
use crate::notes::add_notes;
use crate::reader::{ReadOptions, RowFilter, RowReader, note_ignored};
use crate::row::PreferencePair;
use crate::sample::Sample;
use crate::tokenizer::Tokenizer;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// A split of a data folder, in memory.
#[derive(Clone, Debug)]
pub struct Split {
    /// The samples in the order of the file. A long `text` row becomes several.
    pub samples: Vec<Sample>,
    /// Counts over the file.
    pub counts: Counts,
    /// Unread keys of rows, each with the number of rows that have it.
    pub ignored_keys: BTreeMap<String, usize>,
    /// Sentences on what of the rows is not as it is written, such as a role that the chat template does not know.
    pub notes: BTreeSet<String>,
}

/// A file of preference rows, in memory.
#[derive(Clone, Debug)]
pub struct Pairs {
    /// Chosen and rejected in turn.
    split: Split,
}

impl Pairs {
    /// Reads a file of rows with `chosen` and `rejected`, strings or lists of messages. A row has a `prompt`, or both answers
    /// begin with the same messages or text. The answers are trained, with their end token; the rest is as for
    /// [`Split::open`].
    ///
    /// # Errors
    /// As [`Split::open`]; also if a row is not a pair.
    pub fn open(
        path: &Path,
        tokenizer: Option<&Tokenizer>,
        max_length: usize,
        vocab_size: usize,
    ) -> Result<Self> {
        let options = ReadOptions {
            filter: RowFilter::Pairs,
            ..whole(tokenizer, max_length, vocab_size)
        };
        let split = Split::of(&[path.to_path_buf()], options)?;
        Ok(Self { split })
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.split.samples.len() / 2
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Counts over the file; a pair counts as two samples.
    pub fn counts(&self) -> Counts {
        self.split.counts
    }

    /// A pair, counted from 0.
    ///
    /// # Errors
    /// If the file can no longer be read.
    ///
    /// # Panics
    /// If `index` is out of range.
    pub fn pair(&self, index: usize) -> Result<PreferencePair> {
        let sample = |which: usize| self.split.samples[2 * index + which].clone();
        Ok(PreferencePair {
            chosen: sample(0),
            rejected: sample(1),
        })
    }
}

impl Split {
    /// Reads a file.
    ///
    /// Each line is one JSON object, and its keys say which kind of row it is:
    ///
    /// | row | tokens | trained |
    /// |---|---|---|
    /// | `text` | the text and EOS; if too long, consecutive pieces that share one token | all |
    /// | `prompt`, `completion` (strings) | both joined, and EOS | completion and EOS |
    /// | `prompt` (messages), `completion` (messages or string) | the chat template's | the assistant's turns of the completion, with their end token |
    /// | `messages`, optional `tools` | the chat template's | all turns of the assistant, with their end token |
    /// | `instruction`, `output`, optional `input`, `system` (Alpaca) | the chat template's | the output, with its end token |
    /// | `conversations` of `from` and `value`, optional `system`, `tools` (ShareGPT) | the chat template's | all turns of the assistant, with their end token |
    /// | `input_ids`, optional `labels` | as given | where `labels` (in the place of the token, as in Hugging Face) is not −100 |
    ///
    /// `text` and `prompt` strings begin with a BOS if the model was trained with one. The first token of a sample is never
    /// trained. Rows other than `text` are truncated at the right.
    ///
    /// A turn with a thought (`reasoning_content`, or `<think>…</think>` in its content) that the template drops is trained in a
    /// separate sample that ends with the thought and the turn. A message with a `weight` of 0 is not trained. Other keys are
    /// not read; their names are in `ignored_keys`.
    ///
    /// `tokenizer` may be `None` if all rows are `input_ids`. `vocab_size` is the model's.
    ///
    /// # Errors
    /// If the file cannot be read, a row is malformed (the first in the file is named), a token id
    /// is not below `vocab_size`, `max_length` is less than 2, or no token is trained.
    pub fn open(
        path: &Path,
        tokenizer: Option<&Tokenizer>,
        max_length: usize,
        vocab_size: usize,
    ) -> Result<Self> {
        let options = whole(tokenizer, max_length, vocab_size);
        Self::of(&[path.to_path_buf()], options)
    }

    /// Reads files one after the other. Caches nothing and tells no progress.
    ///
    /// # Errors
    /// As [`Split::open`].
    pub fn of(paths: &[PathBuf], options: ReadOptions<'_>) -> Result<Self> {
        let reader = RowReader::new(&options)?;
        let mut split = Self {
            samples: Vec::new(),
            counts: Counts::default(),
            ignored_keys: BTreeMap::new(),
            notes: BTreeSet::new(),
        };
        for path in paths {
            reader.read(path, |row| {
                split.counts.add_row(&row.samples);
                split.samples.extend(row.samples);
                add_notes(&mut split.notes, &row.notes);
                note_ignored(
                    &mut split.ignored_keys,
                    row.ignored.into_iter().map(|key| (key, 1)),
                );
                Ok(())
            })?;
        }
        if let (0, Some(path)) = (split.counts.trained_tokens, paths.first()) {
            return Err(Error::NothingTrained {
                path: path.clone(),
                rows: split.counts.rows,
            });
        }
        Ok(split)
    }
}

/// Options for reading a file as it is.
fn whole(tokenizer: Option<&Tokenizer>, max_length: usize, vocab_size: usize) -> ReadOptions<'_> {
    const NO_NAMES: &Columns = &Columns::none();
    ReadOptions {
        tokenizer,
        max_length,
        vocab_size,
        filter: RowFilter::Samples,
        columns: NO_NAMES,
        cache: None,
        progress: &|_, _| {},
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::tokenizer;

    fn open(text: &str, max_length: usize) -> Result<Split, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.jsonl");
        std::fs::write(&path, text).unwrap();
        let place = folder.path().display().to_string();
        let split = Split::open(&path, Some(&tokenizer(None, true)), max_length, 288);
        split.map_err(|problem| problem.to_string().replace(&place, "DIR"))
    }

    #[test]
    fn rows_keep_their_order_and_are_counted() {
        let text = "{\"text\": \"qzxj\"}\n\n{\"input_ids\": [9, 8, 7, 6, 5], \"labels\": [-100, -100, -100, -100, 5]}\n\
                    {\"prompt\": \"é\", \"completion\": \"w\"}\n";
        let split = open(text, 4).unwrap();
        let ids: Vec<usize> = split
            .samples
            .iter()
            .map(|sample| sample.ids.len())
            .collect();
        assert_eq!(ids, [4, 3, 4, 4]);
        let expected = Counts {
            rows: 3,
            tokens: 15,
            trained_tokens: 6,
            trained_bytes: 5,
            truncated_rows: 2,
            untrained_samples: 1,
        };
        assert_eq!(split.counts, expected);
    }

    #[test]
    fn the_first_bad_line_is_named() {
        let rows = "{\"text\": \"a\"}\n\n{\"txt\": \"a\"}\nnonsense\n";
        let problem = open(rows, 8).unwrap_err();
        assert!(
            problem.starts_with("DIR/train.jsonl:3: expected one of the rows {text}, "),
            "{problem}"
        );
        assert!(problem.contains("found the keys {txt}; "), "{problem}");
    }

    /// The texts of both answers, `[…]` around what is trained.
    fn pair(row: &serde_json::Value) -> Result<[String; 2], String> {
        const CHAT: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}\
            {% if add_generation_prompt %}<assistant>{% endif %}";
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), row.to_string()).unwrap();
        let tokenizer = tokenizer(Some(CHAT), false);
        let pairs =
            Pairs::open(file.path(), Some(&tokenizer), 99, 288).map_err(|p| p.to_string())?;
        assert_eq!((pairs.len(), pairs.counts().rows), (1, 1));
        let pair = pairs.pair(0).unwrap();
        Ok([&pair.chosen, &pair.rejected].map(|sample| {
            let spans = sample.spans(&tokenizer).unwrap();
            let show = |(text, trained)| if trained { format!("[{text}]") } else { text };
            spans.into_iter().map(show).collect()
        }))
    }

    #[test]
    fn preferences_are_two_answers_to_one_prompt() {
        let check = |row: serde_json::Value, expected: [&str; 2]| {
            assert_eq!(pair(&row).unwrap(), expected, "{row}");
        };
        let eos = "<｜end▁of▁sentence｜>";
        let ends = |texts: [&str; 2]| texts.map(|text| format!("{text}{eos}]"));
        let [chosen, rejected] = ends(["q:[x", "q:[zw"]);
        let expected = [chosen.as_str(), rejected.as_str()];
        check(
            serde_json::json!({"prompt": "q:", "chosen": "x", "rejected": "zw"}),
            expected,
        );
        check(
            serde_json::json!({"chosen": "q:x", "rejected": "q:zw"}),
            expected,
        );

        let user = serde_json::json!({"role": "user", "content": "q"});
        let says = |text| serde_json::json!({"role": "assistant", "content": text});
        let expected = ["<user>q<assistant>[x]", "<user>q<assistant>[zw]"];
        let whole = |text| serde_json::json!([user, says(text)]);
        check(
            serde_json::json!({"chosen": whole("x"), "rejected": whole("zw")}),
            expected,
        );
        check(
            serde_json::json!({"prompt": "q", "chosen": whole("x"), "rejected": whole("zw"), "score_chosen": 1}),
            expected,
        );
        check(
            serde_json::json!({"prompt": [user], "chosen": [says("x")], "rejected": [says("zw")]}),
            expected,
        );
        check(
            serde_json::json!({"prompt": [user], "chosen": "x", "rejected": "zw"}),
            expected,
        );
    }

    #[test]
    fn pairs_and_other_rows_are_not_taken_for_each_other() {
        let problem = pair(&serde_json::json!({"text": "a"})).unwrap_err();
        assert!(problem.ends_with(
            "expected a preference row {chosen, rejected, prompt?}, found another kind of row"
        ));
        let problem = open(r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#, 8).unwrap_err();
        assert!(
            problem.contains("found a preference row {chosen, rejected}"),
            "{problem}"
        );
        let apart = serde_json::json!({
            "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "rejected": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "b"}]});
        let problem = pair(&apart).unwrap_err();
        assert!(
            problem.contains("to begin with the same messages, found none in common"),
            "{problem}"
        );
    }

    #[test]
    fn a_file_that_trains_nothing_is_refused() {
        let masked = "{\"input_ids\": [5, 6], \"labels\": [5, -100]}";
        for (rows, n) in [("", 0), (masked, 1)] {
            let problem = open(rows, 8).unwrap_err();
            let expected = format!(
                "DIR/train.jsonl: no token to train on in {n} rows; each is masked, or cut"
            );
            assert!(problem.starts_with(&expected), "{problem}");
        }
        assert!(
            open("{\"text\": \"a\"}", 1)
                .unwrap_err()
                .contains("at least 2 tokens, found 1")
        );
    }
}
