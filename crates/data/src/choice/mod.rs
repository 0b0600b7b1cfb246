//! Multiple-choice questions: a prompt and several continuations, one of them right.

mod choice_row;

use crate::columns::Columns;
use crate::error::{Error, Result};
use crate::file::{RowText, parse_line};
use crate::row::{continuation, messages, render_prompt};
use crate::sample::Sample;
use crate::table::Table;
use crate::tokenizer::{Bos, Tokenizer};
use choice_row::ChoiceRow;
use serde_json::Value;
use std::path::Path;

/// A question in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// For each choice, the prompt (not trained) and the choice (trained), without EOS. Samples that are too long lose the
    /// beginning of their prompt, which sets `truncated`.
    pub samples: Vec<Sample>,
    /// The text of each choice.
    pub texts: Vec<String>,
    /// The right choice, counted from 0.
    pub answer: usize,
}

/// Reads a file of multiple-choice rows: a prompt, choices, and which of them is right.
///
/// # Errors
/// If the file cannot be read, `max_length` is less than 2, or a row is malformed: no known keys, fewer than two
/// choices, an empty choice, a choice that is too long, an answer that is none of them, or messages without a chat template.
pub fn choices(
    path: &Path,
    tokenizer: &Tokenizer,
    columns: &Columns,
    max_length: usize,
) -> Result<Vec<Choice>> {
    if max_length < 2 {
        return Err(Error::MaxLength(max_length));
    }
    let read = |line: Result<RowText>| {
        let RowText { place, text, .. } = line?;
        let row = parse_line(&text).and_then(|value| ChoiceRow::parse(value, columns));
        row.and_then(|row| row.tokenize(tokenizer, max_length))
            .map_err(|problem| problem.at(path, place))
    };
    Table::open(path)?.map(read).collect()
}

impl ChoiceRow {
    fn tokenize(&self, tokenizer: &Tokenizer, max_length: usize) -> Result<Choice> {
        let (prompt, bos) = match &self.prompt {
            Value::String(prompt) => (prompt.clone(), Bos::Add),
            list => {
                let messages = messages("prompt", Some(list.clone()))?;
                (
                    render_prompt(&messages, tokenizer.chat_template())?,
                    Bos::Never,
                )
            }
        };
        let sample = |(index, choice): (usize, &String)| {
            let marked = continuation(&prompt, choice, bos, tokenizer)?;
            let tokens = marked.trained.iter().filter(|&&trained| trained).count();
            if tokens >= max_length {
                return Err(Error::ChoiceLength {
                    index,
                    tokens,
                    max_length,
                });
            }
            Ok(marked.last(max_length, tokenizer.bos_id()))
        };
        Ok(Choice {
            samples: self
                .choices
                .iter()
                .enumerate()
                .map(sample)
                .collect::<Result<_>>()?,
            texts: self.choices.clone(),
            answer: self.answer,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::tokenizer;

    const CHAT: &str = "{{ bos_token }}{{ messages[0].content }}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}";

    fn read(row: &str, max_length: usize) -> Result<Vec<Vec<(String, bool)>>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("task.jsonl");
        std::fs::write(&path, format!("\n{row}\n")).unwrap();
        let tokenizer = tokenizer(Some(CHAT), true);
        let place = folder.path().display().to_string();
        let questions = choices(&path, &tokenizer, &Columns::none(), max_length)
            .map_err(|p| p.to_string().replace(&place, "DIR"))?;
        Ok(questions[0]
            .samples
            .iter()
            .map(|sample| sample.spans(&tokenizer).unwrap())
            .collect())
    }

    #[test]
    fn only_the_choice_is_scored() {
        let check = |row: &str, max_length, expected: [[&str; 2]; 2]| {
            let expected = expected.map(|[prompt, choice]| {
                vec![(prompt.to_owned(), false), (choice.to_owned(), true)]
            });
            assert_eq!(read(row, max_length).unwrap(), expected, "{row}");
        };
        let plain = r#"{"prompt": "xyz:", "choices": [" the", " é"], "answer": 1}"#;
        check(
            plain,
            64,
            [
                ["<｜begin▁of▁sentence｜>xyz:", " the"],
                ["<｜begin▁of▁sentence｜>xyz:", " é"],
            ],
        );
        // The prompt gives way from its beginning, never the choice.
        check(
            plain,
            4,
            [
                ["<｜begin▁of▁sentence｜>z:", " the"],
                ["<｜begin▁of▁sentence｜>", " é"],
            ],
        );
        let chat =
            r#"{"prompt": [{"role": "user", "content": "q"}], "choices": ["a", "b"], "answer": 0}"#;
        let prompt = "<｜begin▁of▁sentence｜>q<｜Assistant｜>";
        check(chat, 64, [[prompt, "a"], [prompt, "b"]]);
    }

    #[test]
    fn malformed_questions_name_their_line() {
        let check = |row: &str, expected: &str| {
            let problem = read(row, 8).unwrap_err();
            assert!(
                problem.starts_with("DIR/task.jsonl:2: ") && problem.contains(expected),
                "{problem}"
            );
        };
        check("[]", "expected a JSON object, found a list");
        check(
            r#"{"prompt": "a", "choices": ["b", "c"]}"#,
            "an answer in `answer`, `answerKey`, `answer_idx`, `answer_index`, `gold` or `label`, found the keys {}",
        );
        check(
            r#"{"prompt": "a", "choices": ["b", "c"], "answer": -1}"#,
            "`answer` to be one of 2 choices, by its number from 0, letter or text, found -1",
        );
        check(
            r#"{"prompt": "a", "choices": ["b"], "answer": 0}"#,
            "at least two `choices`, found 1",
        );
        check(
            r#"{"prompt": "a", "choices": ["b", ""], "answer": 0}"#,
            "text in `choices[1]`, found an empty string",
        );
        check(
            r#"{"prompt": 1, "choices": ["b", "c"], "answer": 0}"#,
            "a list of messages in `prompt`, found 1",
        );
        check(
            r#"{"prompt": "a", "choices": ["b", "qzxjkvwq"], "answer": 0}"#,
            "choice 1 alone is 8 tokens, expected fewer than 8",
        );
    }
}
