//! Multiple-choice questions: a prompt and several continuations, one of them right.

use crate::error::{Error, Result};
use crate::file::{JsonLine, JsonLines, describe, parse_line};
use crate::row::{continuation, messages, render_prompt};
use crate::sample::Sample;
use crate::tokenizer::{Bos, Tokenizer};
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;

/// A line of a multiple-choice file.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChoiceRow {
    /// A string, continued as it is; or a list of messages, rendered with the chat template.
    pub prompt: Value,
    /// The continuations, spaces included.
    pub choices: Vec<String>,
    /// The right choice, counted from 0.
    pub answer: usize,
}

/// A question in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// For each choice, the prompt (not trained) and the choice (trained), without EOS. Samples that are too long lose the
    /// beginning of their prompt, which sets `truncated`.
    pub samples: Vec<Sample>,
    /// UTF-8 bytes of each choice.
    pub choice_bytes: Vec<usize>,
    /// The right choice, counted from 0.
    pub answer: usize,
}

/// Reads a JSON-lines file of [`ChoiceRow`]s.
///
/// # Errors
/// If the file cannot be read, `max_length` is less than 2, or a row is malformed: fewer than two
/// choices, an empty choice, a choice that is too long, an answer out of range, or messages without a chat template.
pub fn choices(path: &Path, tokenizer: &Tokenizer, max_length: usize) -> Result<Vec<Choice>> {
    if max_length < 2 {
        return Err(Error::MaxLength(max_length));
    }
    let read = |line: Result<JsonLine>| {
        let JsonLine { number, text, .. } = line?;
        let row = parse_line(&text).and_then(ChoiceRow::parse);
        row.and_then(|row| row.tokenize(tokenizer, max_length))
            .map_err(|problem| problem.at(path, number))
    };
    JsonLines::open(path)?.map(read).collect()
}

impl ChoiceRow {
    fn parse(value: Value) -> Result<Self> {
        if !value.is_object() {
            return Err(Error::schema("a JSON object", describe(&value)));
        }
        let row: Self = serde_json::from_value(value).map_err(|problem| {
            Error::schema("a row {prompt, choices, answer}", problem.to_string())
        })?;
        if row.choices.len() < 2 {
            return Err(Error::schema(
                "at least two `choices`",
                row.choices.len().to_string(),
            ));
        }
        if row.answer >= row.choices.len() {
            let expected = format!(
                "`answer` to be the index of one of {} choices",
                row.choices.len()
            );
            return Err(Error::schema(expected, row.answer.to_string()));
        }
        if let Some(index) = row.choices.iter().position(String::is_empty) {
            return Err(Error::schema(
                format!("text in `choices[{index}]`"),
                "an empty string",
            ));
        }
        Ok(row)
    }

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
            choice_bytes: self.choices.iter().map(String::len).collect(),
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
        let questions = choices(&path, &tokenizer, max_length)
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
            "missing field `answer`",
        );
        check(
            r#"{"prompt": "a", "choices": ["b", "c"], "answer": -1}"#,
            "expected a row {prompt, choices, answer}",
        );
        check(
            r#"{"prompt": "a", "choices": ["b", "c"], "answer": 2}"#,
            "the index of one of 2 choices, found 2",
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
