//! The kind of a row, recognized by its keys.
//!
//! What a row has besides is named, once for a file. It is refused where it says how the row is meant: marks of bad answers,
//! pictures, the system prompt or tools of a chat that has them elsewhere.

use crate::error::{Error, Result};
use crate::file::describe;
use serde_json::{Map, Value};

/// The kinds of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowKind {
    Text,
    Completion,
    Messages,
    Ids,
    /// Stanford Alpaca's keys.
    Instruction,
    /// ShareGPT's keys.
    Conversations,
    Pair,
}

/// The keys of a kind.
struct RowKeys {
    kind: RowKind,
    /// A row of this kind has all of these.
    required: &'static [&'static str],
    /// A row may have these.
    optional: &'static [&'static str],
    /// Keys that make a row of another kind, but in published data sets have the content of such a row again.
    repeated: &'static [&'static str],
}

const KINDS: [RowKeys; 7] = [
    RowKeys {
        kind: RowKind::Text,
        required: &["text"],
        optional: &[],
        repeated: &[],
    },
    RowKeys {
        kind: RowKind::Completion,
        required: &["prompt", "completion"],
        optional: &["tools"],
        repeated: &["text"],
    },
    RowKeys {
        kind: RowKind::Messages,
        required: &["messages"],
        optional: &["tools"],
        repeated: &["text"],
    },
    RowKeys {
        kind: RowKind::Ids,
        required: &["input_ids"],
        optional: &["labels"],
        repeated: &["text"],
    },
    RowKeys {
        kind: RowKind::Instruction,
        required: &["instruction", "output"],
        optional: &["input", "system", "history", "tools"],
        repeated: &["text"],
    },
    RowKeys {
        kind: RowKind::Conversations,
        required: &["conversations"],
        optional: &["system", "tools"],
        repeated: &["text"],
    },
    RowKeys {
        kind: RowKind::Pair,
        required: &["chosen", "rejected"],
        optional: &["prompt", "tools"],
        repeated: &["messages", "text"],
    },
];

/// What a row has besides the keys that are read.
const ATTACHMENTS: [&str; 6] = ["image", "images", "video", "videos", "audio", "audios"];
/// Marks of single answers as good or bad.
const LABELS: [&str; 2] = ["label", "kto_tag"];
/// Keys that other kinds of chats read, and one that other programs hand to the template.
const OF_CHATS: [&str; 4] = ["system", "tools", "history", "chat_template_kwargs"];

/// Columns of questions and answers in published tables, which say nothing of how the two are joined.
const QUESTIONS: [&str; 6] = [
    "question",
    "query",
    "problem",
    "instruction",
    "input",
    "prompt",
];
const ANSWERS: [&str; 7] = [
    "answer",
    "response",
    "output",
    "solution",
    "target",
    "generation",
    "completion",
];

impl RowKeys {
    fn claims(&self, row: &Map<String, Value>) -> bool {
        self.required.iter().all(|key| row.contains_key(*key))
    }

    fn reads(&self, key: &str) -> bool {
        self.required.contains(&key) || self.optional.contains(&key)
    }

    /// Whether a row of both kinds is one of this kind.
    fn covers(&self, other: &Self) -> bool {
        let known = |key: &&str| self.reads(key) || self.repeated.contains(key);
        other.required.iter().all(known)
    }

    fn is_chat(&self) -> bool {
        !matches!(self.kind, RowKind::Text | RowKind::Ids)
    }

    /// Refuses an unread key that says how the others are meant.
    fn refuse(&self, key: &str, value: &Value) -> Result<()> {
        if LABELS.contains(&key) && is_mark(value) && self.is_chat() && self.kind != RowKind::Pair {
            let expected = format!(
                "no `{key}`, because good and bad single answers are not learned from (keep the rows with good \
                 answers and drop the column, or make pairs {{prompt, chosen, rejected}} for `train.loss = \"dpo\"`)"
            );
            return Err(Error::schema(expected, format!("`{key}` {value}")));
        }
        if self.is_chat()
            && !is_blank(value)
            && (ATTACHMENTS.contains(&key) || OF_CHATS.contains(&key))
        {
            let expected = format!("no `{key}` in a row {}", self.shown());
            return Err(Error::schema(expected, describe(value)));
        }
        Ok(())
    }

    /// The keys for a message: `?` marks optional ones.
    fn shown(&self) -> String {
        let required = self.required.iter().map(|key| (*key).to_owned());
        let optional = self.optional.iter().map(|key| format!("{key}?"));
        let all: Vec<String> = required.chain(optional).collect();
        format!("{{{}}}", all.join(", "))
    }
}

impl RowKind {
    /// The kind of a row, and the names of its unread keys, which are removed. A key whose value is null is none.
    ///
    /// Only kinds that read all of the `named` keys are considered.
    ///
    /// # Errors
    /// If the row could be of two kinds, is of none, or has an unread key that would change what is learned from it.
    pub(crate) fn of(row: &mut Map<String, Value>, named: &[&str]) -> Result<(Self, Vec<String>)> {
        row.retain(|_, value| !value.is_null());
        let claims = |keys: &&RowKeys| keys.claims(row) && named.iter().all(|key| keys.reads(key));
        let claiming: Vec<&RowKeys> = KINDS.iter().filter(claims).collect();
        let is_covered = |keys: &RowKeys| {
            let others = claiming.iter().filter(|other| other.kind != keys.kind);
            others.clone().any(|other| other.covers(keys))
        };
        let mut fitting = claiming.iter().filter(|keys| !is_covered(keys));
        let keys = match (fitting.next(), fitting.next()) {
            (Some(keys), None) => *keys,
            (Some(one), Some(other)) => return Err(ambiguous(one, other, row)),
            _ => return Err(unknown(row)),
        };
        let mut ignored = Vec::new();
        for (key, value) in row.iter().filter(|(key, _)| !keys.reads(key)) {
            keys.refuse(key, value)?;
            ignored.push(key.clone());
        }
        row.retain(|key, _| keys.reads(key));
        Ok((keys.kind, ignored))
    }

    /// Every key that some kind reads.
    pub(crate) fn keys() -> impl Iterator<Item = &'static str> {
        KINDS
            .iter()
            .flat_map(|keys| keys.required.iter().chain(keys.optional).copied())
    }
}

/// Whether a value says yes or no, as JSON and as tables have it.
fn is_mark(value: &Value) -> bool {
    match value {
        Value::Bool(_) | Value::Number(_) => true,
        Value::String(text) => {
            let marks = ["true", "false", "0", "1"];
            marks.contains(&text.to_ascii_lowercase().as_str())
        }
        _ => false,
    }
}

/// Whether a value says nothing.
fn is_blank(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// The keys of a row for a message.
pub(crate) fn found_keys(row: &Map<String, Value>) -> String {
    // Enough for a person to look at; a hostile row may have millions.
    const MOST: usize = 40;
    let mut found: Vec<&str> = row.keys().map(String::as_str).collect();
    found.sort_unstable();
    let more = if found.len() > MOST { ", …" } else { "" };
    found.truncate(MOST);
    format!("the keys {{{}{more}}}", found.join(", "))
}

fn ambiguous(one: &RowKeys, other: &RowKeys, row: &Map<String, Value>) -> Error {
    let key = one.required[0];
    let expected = format!(
        "a row {} or a row {}, not both (`data.columns = {{ {key} = \"{key}\" }}` chooses the first)",
        one.shown(),
        other.shown()
    );
    Error::schema(expected, found_keys(row))
}

fn unknown(row: &Map<String, Value>) -> Error {
    let kinds: Vec<String> = KINDS.iter().map(RowKeys::shown).collect();
    let find = |names: &[&'static str]| names.iter().find(|name| row.contains_key(**name)).copied();
    let hint = match (find(&QUESTIONS), find(&ANSWERS)) {
        _ if ["choices", "options", "endings"]
            .iter()
            .any(|key| row.contains_key(*key)) =>
        {
            "; rows of multiple choice are for `eval --tasks`".to_owned()
        }
        (Some(question), Some(answer)) => format!(
            "; `data.columns = {{ prompt = \"{question}\", completion = \"{answer}\" }}` reads them"
        ),
        _ if row.is_empty() => String::new(),
        _ => "; `data.columns` names columns that are called otherwise".to_owned(),
    };
    let expected = format!("one of the rows {}", kinds.join(", "));
    Error::schema(expected, format!("{}{hint}", found_keys(row)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(row: Value) -> Result<(RowKind, Vec<String>), String> {
        let Value::Object(mut row) = row else {
            panic!("a row is an object")
        };
        RowKind::of(&mut row, &[]).map_err(|problem| problem.to_string())
    }

    #[test]
    fn rows_are_known_by_their_keys_and_unread_keys_are_named() {
        let check = |row: Value, kind, ignored: &[&str]| {
            let ignored = ignored.iter().map(|key| (*key).to_owned()).collect();
            assert_eq!(of(row.clone()).unwrap(), (kind, ignored), "{row}");
        };
        check(json!({"text": ""}), RowKind::Text, &[]);
        check(json!({"id": 1, "text": ""}), RowKind::Text, &["id"]);
        // Null columns of a table do not count, and are not worth a word.
        let union = json!({"text": null, "messages": [], "prompt": null, "completion": null});
        check(union, RowKind::Messages, &[]);
        let ultrachat = json!({"prompt": "", "prompt_id": "", "messages": [], "source": null});
        check(ultrachat, RowKind::Messages, &["prompt", "prompt_id"]);
        let rendered =
            json!({"prompt": "", "completion": "", "text": "", "images": [], "system": ""});
        check(rendered, RowKind::Completion, &["text", "images", "system"]);
        let other = json!({"input_ids": [], "attention_mask": [], "text": ""});
        check(other, RowKind::Ids, &["attention_mask", "text"]);
        check(
            json!({"text": "", "label": 1, "image": "x"}),
            RowKind::Text,
            &["label", "image"],
        );
        check(
            json!({"messages": [], "label": "physics"}),
            RowKind::Messages,
            &["label"],
        );
        let alpaca = json!({"instruction": "", "input": "", "output": "", "text": ""});
        check(alpaca, RowKind::Instruction, &["text"]);
        let rated =
            json!({"prompt": "", "chosen": [], "rejected": [], "messages": [], "score_chosen": 1});
        check(rated, RowKind::Pair, &["messages", "score_chosen"]);
        check(
            json!({"conversations": [], "tools": ""}),
            RowKind::Conversations,
            &[],
        );
    }

    #[test]
    fn rows_of_no_kind_are_refused_with_a_way_out() {
        let check = |row: Value, expected: &str| {
            let problem = of(row).unwrap_err();
            let start = "expected one of the rows {text}, {prompt, completion, tools?}, ";
            assert!(problem.starts_with(start), "{problem}");
            assert!(problem.ends_with(expected), "{problem}");
        };
        check(json!({}), "found the keys {}");
        check(
            json!({"txt": ""}),
            "{txt}; `data.columns` names columns that are called otherwise",
        );
        check(
            json!({"prompt": "", "completion": null}),
            "{prompt}; `data.columns` names columns that are called otherwise",
        );
        let hint = "{answer, question}; `data.columns = { prompt = \"question\", completion = \"answer\" }` reads them";
        check(json!({"question": "", "answer": ""}), hint);
        let choices = json!({"question": "", "choices": [], "answer": 0});
        check(
            choices,
            "{answer, choices, question}; rows of multiple choice are for `eval --tasks`",
        );
    }

    #[test]
    fn rows_of_two_kinds_are_refused_with_both_and_may_be_chosen() {
        let both = json!({"prompt": "", "completion": "", "messages": []});
        assert_eq!(
            of(both.clone()).unwrap_err(),
            "expected a row {prompt, completion, tools?} or a row {messages, tools?}, not both \
             (`data.columns = { prompt = \"prompt\" }` chooses the first), found the keys {completion, messages, prompt}"
        );
        let mut row = both.as_object().unwrap().clone();
        let (kind, ignored) = RowKind::of(&mut row, &["messages"]).unwrap();
        assert_eq!(kind, RowKind::Messages);
        assert_eq!(ignored, ["prompt", "completion"]);
        let problem = of(json!({"messages": [], "conversations": []})).unwrap_err();
        assert!(
            problem.contains("{messages, tools?} or a row {conversations, "),
            "{problem}"
        );
    }

    #[test]
    fn keys_that_change_the_meaning_of_a_row_are_refused() {
        let check = |row: Value, expected: &str| {
            let problem = of(row).unwrap_err();
            assert!(problem.contains(expected), "{problem}");
        };
        for label in [json!(true), json!(false), json!(0), json!("False")] {
            let row = json!({"prompt": "", "completion": "", "label": label});
            check(
                row,
                "good and bad single answers are not learned from (keep",
            );
            let row = json!({"messages": [], "label": label});
            check(row, &format!("found `label` {label}"));
        }
        check(
            json!({"conversations": [], "kto_tag": true}),
            "no `kto_tag`",
        );
        let row = json!({"messages": [], "images": ["a.png"]});
        check(
            row,
            "expected no `images` in a row {messages, tools?}, found a list",
        );
        check(
            json!({"messages": [], "system": "Be brief."}),
            "no `system` in a row",
        );
        let row = json!({"messages": [], "chat_template_kwargs": {"enable_thinking": false}});
        check(row, "no `chat_template_kwargs`");
    }
}
