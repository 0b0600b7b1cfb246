//! A row of a multiple-choice file, in the forms in which published tasks have them.
//!
//! - The question: `prompt`, or `question`, `question_stem`, `query`, `ctx`, `goal`.
//! - The choices: a list in `choices`, `options` or `endings`; an object of letters and texts; ARC's object of the lists `text`
//!   and `label`; or a column for each: `A`, `B`, … or `sol1`, `sol2`.
//! - The right one: its number from 0, its letter, the label that the row gives it, or its text.

use crate::columns::Columns;
use crate::error::{Error, Result};
use crate::file::describe;
use crate::row::found_keys;
use serde_json::{Map, Value};

/// A question with its choices.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ChoiceRow {
    /// A string, continued as it is; or a list of messages, rendered with the chat template.
    pub(crate) prompt: Value,
    /// The continuations, spaces included.
    pub(crate) choices: Vec<String>,
    /// The right choice, counted from 0.
    pub(crate) answer: usize,
}

const QUESTION_KEYS: [&str; 6] = [
    "prompt",
    "question",
    "question_stem",
    "query",
    "ctx",
    "goal",
];
const CHOICE_LISTS: [&str; 3] = ["choices", "options", "endings"];
const ANSWER_KEYS: [&str; 6] = [
    "answer",
    "answerKey",
    "answer_idx",
    "answer_index",
    "gold",
    "label",
];
const LETTERS: [&str; 10] = ["A", "B", "C", "D", "E", "F", "G", "H", "I", "J"];
const SOLUTIONS: [&str; 2] = ["sol1", "sol2"];

/// What a question's row may have besides: where it comes from, and why the answer is right.
const ORIGIN_KEYS: [&str; 32] = [
    "id",
    "_id",
    "idx",
    "ind",
    "index",
    "uid",
    "question_id",
    "source",
    "source_id",
    "src",
    "dataset",
    "split",
    "split_type",
    "subject",
    "subject_name",
    "topic",
    "topic_name",
    "category",
    "subcategory",
    "level",
    "difficulty",
    "grade",
    "year",
    "language",
    "explanation",
    "exp",
    "rationale",
    "cot_content",
    "activity_label",
    "meta_info",
    // The two parts of HellaSwag's `ctx`.
    "ctx_a",
    "ctx_b",
];

/// The choices, and the labels that the row gives them.
struct Choices {
    texts: Vec<String>,
    labels: Vec<String>,
}

impl ChoiceRow {
    pub(crate) fn parse(value: Value, columns: &Columns) -> Result<Self> {
        let Value::Object(mut row) = value else {
            return Err(Error::schema("a JSON object", describe(&value)));
        };
        columns.rename(&mut row)?;
        row.retain(|_, value| !value.is_null());
        let is_named = |key: &str| columns.keys().any(|named| named == key);
        let (question, mut prompt) = one_of(&mut row, &QUESTION_KEYS, "a question", &is_named)?;
        let (list, Choices { mut texts, labels }) = choices(&mut row, &is_named)?;
        check_texts(list, &texts)?;
        let answer = answer(&mut row, &texts, &labels, &is_named)?;
        row.retain(|key, _| !ORIGIN_KEYS.contains(&key.as_str()));
        if !row.is_empty() {
            let expected = "a question, its choices and its answer alone (`data.columns` names them; a text that the \
                question is about belongs to it)";
            return Err(Error::schema(expected, found_keys(&row)));
        }
        // Our own keys mean what they say; a question of others and its answer are separate texts.
        let is_own = question == "prompt" && list == "choices";
        if let (Value::String(text), false) = (&mut prompt, is_own) {
            let joined = text.ends_with(char::is_whitespace);
            for choice in texts
                .iter_mut()
                .filter(|choice| !joined && !choice.starts_with(char::is_whitespace))
            {
                choice.insert(0, ' ');
            }
        }
        Ok(Self {
            prompt,
            choices: texts,
            answer,
        })
    }
}

/// The value of the one key that a row has of several; of a named key, if one is named.
fn one_of(
    row: &mut Map<String, Value>,
    keys: &[&'static str],
    what: &str,
    is_named: &dyn Fn(&str) -> bool,
) -> Result<(&'static str, Value)> {
    let named = keys.iter().find(|key| is_named(key));
    let found: Vec<&str> = match named {
        Some(key) => vec![key],
        None => keys
            .iter()
            .copied()
            .filter(|key| row.contains_key(*key))
            .collect(),
    };
    let expected = || {
        let (last, others) = keys.split_last().unwrap_or((&"", &[]));
        let others: Vec<String> = others.iter().map(|key| format!("`{key}`")).collect();
        format!("{what} in {} or `{last}`", others.join(", "))
    };
    match found.as_slice() {
        [only] => {
            let key = keys
                .iter()
                .copied()
                .find(|key| key == only)
                .unwrap_or_default();
            let value = row
                .remove(key)
                .ok_or_else(|| Error::schema(expected(), found_keys(row)))?;
            Ok((key, value))
        }
        [] => Err(Error::schema(expected(), found_keys(row))),
        [one, other, ..] => Err(Error::schema(
            expected(),
            format!("both `{one}` and `{other}`"),
        )),
    }
}

fn choices(
    row: &mut Map<String, Value>,
    is_named: &dyn Fn(&str) -> bool,
) -> Result<(&'static str, Choices)> {
    for columns in [&LETTERS[..], &SOLUTIONS] {
        let present = columns
            .iter()
            .take_while(|key| row.contains_key(**key))
            .count();
        let has_list = CHOICE_LISTS.iter().any(|key| row.contains_key(*key));
        if present >= 2 && !has_list {
            let texts = columns[..present]
                .iter()
                .map(|key| text(key, row.remove(*key)));
            let labels = columns[..present].iter().map(|key| (*key).to_owned());
            let choices = Choices {
                texts: texts.collect::<Result<_>>()?,
                labels: labels.collect(),
            };
            return Ok((columns[0], choices));
        }
    }
    let (key, mut value) = one_of(row, &CHOICE_LISTS, "choices", is_named)?;
    // A cell of a table without lists has the JSON text of one.
    if let Some(list @ (Value::Array(_) | Value::Object(_))) = value
        .as_str()
        .and_then(|text| serde_json::from_str(text).ok())
    {
        value = list;
    }
    let choices = match value {
        Value::Object(mut object) if object.contains_key("text") => Choices {
            labels: texts(
                &format!("{key}.label"),
                object
                    .remove("label")
                    .unwrap_or_else(|| Value::Array(vec![])),
            )?,
            texts: texts(
                &format!("{key}.text"),
                object.remove("text").unwrap_or_default(),
            )?,
        },
        Value::Object(mut object) => {
            object.retain(|_, value| !value.is_null());
            let labels = object.keys().cloned().collect();
            let values = object
                .into_iter()
                .map(|(letter, value)| text(&format!("{key}.{letter}"), Some(value)));
            Choices {
                texts: values.collect::<Result<_>>()?,
                labels,
            }
        }
        list => Choices {
            texts: texts(key, list)?,
            labels: Vec::new(),
        },
    };
    Ok((key, choices))
}

fn check_texts(key: &str, texts: &[String]) -> Result<()> {
    if texts.len() < 2 {
        return Err(Error::schema(
            format!("at least two `{key}`"),
            texts.len().to_string(),
        ));
    }
    match texts.iter().position(String::is_empty) {
        Some(index) => Err(Error::schema(
            format!("text in `{key}[{index}]`"),
            "an empty string",
        )),
        None => Ok(()),
    }
}

fn texts(key: &str, value: Value) -> Result<Vec<String>> {
    let Value::Array(list) = value else {
        return Err(Error::schema(
            format!("a list of texts in `{key}`"),
            describe(&value),
        ));
    };
    let texts = list.into_iter().enumerate();
    texts
        .map(|(index, value)| text(&format!("{key}[{index}]"), Some(value)))
        .collect()
}

fn text(key: &str, value: Option<Value>) -> Result<String> {
    match value.unwrap_or_default() {
        Value::String(text) => Ok(text),
        other => Err(Error::schema(
            format!("a text in `{key}`"),
            describe(&other),
        )),
    }
}

/// The number of the right choice. A row may say it twice, the same both times.
fn answer(
    row: &mut Map<String, Value>,
    choices: &[String],
    labels: &[String],
    is_named: &dyn Fn(&str) -> bool,
) -> Result<usize> {
    let present: Vec<&str> = ANSWER_KEYS
        .into_iter()
        .filter(|key| row.contains_key(*key))
        .collect();
    if present.len() < 2 || present.iter().any(|key| is_named(key)) {
        let (key, value) = one_of(row, &ANSWER_KEYS, "an answer", is_named)?;
        return index(key, &value, choices, labels);
    }
    let mut found = None;
    for key in present {
        let value = row.remove(key).unwrap_or_default();
        let index = index(key, &value, choices, labels)?;
        if found.is_some_and(|other| other != index) {
            let expected = format!("`{key}` to be the answer that the row's other keys give");
            return Err(Error::schema(expected, value.to_string()));
        }
        found = Some(index);
    }
    found.ok_or_else(|| Error::schema("an answer", "none"))
}

/// The number of the choice that a value means. What could mean two is refused.
fn index(key: &str, value: &Value, choices: &[String], labels: &[String]) -> Result<usize> {
    let unknown = || {
        let expected = format!(
            "`{key}` to be one of {} choices, by its number from 0, letter or text",
            choices.len()
        );
        let found = match value {
            Value::String(text) => format!("`{}`", text.chars().take(40).collect::<String>()),
            other => describe(other),
        };
        Error::schema(expected, found)
    };
    let number = |number: Option<u64>| {
        number
            .and_then(|n| usize::try_from(n).ok())
            .filter(|&n| n < choices.len())
    };
    let Value::String(text) = value else {
        return number(value.as_u64()).ok_or_else(unknown);
    };
    let text = text.trim();
    let position = |list: &[String]| list.iter().position(|entry| entry.trim() == text);
    let meanings = match position(labels) {
        Some(label) => [Some(label), None],
        None if labels.is_empty() => {
            let letter = LETTERS.iter().position(|letter| *letter == text);
            let counted = letter
                .filter(|&n| n < choices.len())
                .or_else(|| number(text.parse().ok()));
            [counted, position(choices)]
        }
        None => [None, position(choices)],
    };
    match meanings {
        [Some(one), Some(other)] if one != other => {
            let expected = format!("`{key}` to mean one choice");
            Err(Error::schema(
                expected,
                format!("`{text}`, which is a number or letter and the text of another choice"),
            ))
        }
        [Some(one), _] | [None, Some(one)] => Ok(one),
        [None, None] => Err(unknown()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(row: Value) -> Result<(String, Vec<String>, usize), String> {
        let row = ChoiceRow::parse(row, &Columns::none()).map_err(|problem| problem.to_string())?;
        Ok((
            row.prompt.as_str().unwrap_or("a list").to_owned(),
            row.choices,
            row.answer,
        ))
    }

    #[test]
    fn published_tasks_are_read() {
        let check = |row: Value, prompt: &str, choices: &[&str], answer: usize| {
            let choices = choices.iter().map(|choice| (*choice).to_owned()).collect();
            assert_eq!(
                parse(row.clone()).unwrap(),
                (prompt.to_owned(), choices, answer),
                "{row}"
            );
        };
        check(
            json!({"prompt": "1+1=", "choices": ["2", " 3"], "answer": 1, "id": 7}),
            "1+1=",
            &["2", " 3"],
            1,
        );
        let mmlu = json!({"question": "Q?", "subject": "x", "choices": ["a", "b"], "answer": 0});
        check(mmlu, "Q?", &[" a", " b"], 0);
        let arc = json!({"id": "x", "question": "Q?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]},
            "answerKey": "1"});
        check(arc, "Q?", &[" a", " b", " c"], 0);
        let hellaswag = json!({"ind": 1, "ctx": "He", "ctx_a": "", "ctx_b": "He", "endings": ["runs", "sits"],
            "label": "1", "source_id": "", "activity_label": ""});
        check(hellaswag, "He", &[" runs", " sits"], 1);
        let pro = json!({"question": "Q: ", "options": ["a", "b", "c"], "answer": "C", "answer_index": 2, "category": ""});
        check(pro, "Q: ", &["a", "b", "c"], 2);
        let columns =
            json!({"question": "Q?", "A": "x", "B": "y", "C": "z", "D": null, "answer": "B"});
        check(columns, "Q?", &[" x", " y", " z"], 1);
        let medical = json!({"question": "Q?", "options": {"A": "x", "B": "y"}, "answer_idx": "B", "answer": "y"});
        check(medical, "Q?", &[" x", " y"], 1);
        check(
            json!({"goal": "G", "sol1": "x", "sol2": "y", "label": 1}),
            "G",
            &[" x", " y"],
            1,
        );
        let cell = json!({"question": "Q?", "choices": "[\"x\", \"y\"]", "answer": "0"});
        check(cell, "Q?", &[" x", " y"], 0);
        check(
            json!({"question": "Q?", "choices": ["Oslo", "Rome"], "answer": "Rome"}),
            "Q?",
            &[" Oslo", " Rome"],
            1,
        );
    }

    #[test]
    fn columns_have_other_names() {
        let names = [
            ("prompt", "stem"),
            ("choices", "texts"),
            ("answer", "label"),
        ];
        let names = names.map(|(key, column)| (key.to_owned(), column.to_owned()));
        let columns = Columns::new(names).unwrap();
        let row = json!({"stem": "Q", "texts": ["a", "b"], "label": 1});
        let row = ChoiceRow::parse(row, &columns).unwrap();
        assert_eq!(
            (row.choices, row.answer),
            (vec!["a".to_owned(), "b".to_owned()], 1)
        );
    }

    #[test]
    fn what_is_not_known_or_could_mean_two_things_is_refused() {
        let check = |row: Value, expected: &str| {
            let problem = parse(row).unwrap_err();
            assert!(problem.contains(expected), "{problem}");
        };
        check(
            json!({"choices": ["a", "b"], "answer": 0}),
            "a question in `prompt`, `question`, ",
        );
        check(
            json!({"question": "", "prompt": ""}),
            "found both `prompt` and `question`",
        );
        check(
            json!({"question": "Q"}),
            "choices in `choices`, `options` or `endings`, found the keys {}",
        );
        let with = |key: &str, value: Value| {
            let mut row = json!({"question": "Q", "choices": ["x", "y"], "answer": 0});
            row[key] = value;
            row
        };
        check(with("article", json!("A")), "found the keys {article}");
        check(
            with("choices", json!("x, y")),
            "a list of texts in `choices`, found a string",
        );
        check(
            with("choices", json!(["x", 1])),
            "a text in `choices[1]`, found 1",
        );
        for answer in [
            json!(2),
            json!(-1),
            json!("C"),
            json!("z"),
            json!(""),
            json!([0]),
        ] {
            check(
                with("answer", answer),
                "`answer` to be one of 2 choices, by its number from 0, letter or text, found",
            );
        }
        check(
            with("label", json!(1)),
            "`label` to be the answer that the row's other keys give, found 1",
        );
        let letters = json!({"question": "Q", "choices": ["B", "A"], "answer": "A"});
        check(letters, "`answer` to mean one choice, found `A`");
        let numbers = json!({"question": "Q", "choices": ["1", "2"], "answer": "1"});
        check(numbers, "a number or letter and the text of another choice");
        let labels = json!({"question": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "1"});
        check(labels, "`answerKey` to be one of 2 choices");
    }
}
