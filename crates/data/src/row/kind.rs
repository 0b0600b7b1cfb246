//! The kind of a row, recognized by its keys.

use crate::error::{Error, Result};
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
    /// Keys of other kinds that published data sets have in such rows, with the same content again.
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
        repeated: &[],
    },
    RowKeys {
        kind: RowKind::Messages,
        required: &["messages"],
        optional: &["tools"],
        repeated: &[],
    },
    RowKeys {
        kind: RowKind::Ids,
        required: &["input_ids"],
        optional: &["labels"],
        repeated: &[],
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
        repeated: &[],
    },
    RowKeys {
        kind: RowKind::Pair,
        required: &["chosen", "rejected"],
        optional: &["prompt", "tools"],
        repeated: &["messages"],
    },
];

impl RowKeys {
    fn claims(&self, row: &Map<String, Value>) -> bool {
        self.required.iter().all(|key| row.contains_key(*key))
    }

    fn reads(&self, key: &str) -> bool {
        self.required.contains(&key) || self.optional.contains(&key)
    }
}

impl RowKind {
    /// The kind of a row, and the names of its unread keys, which are removed.
    ///
    /// A row that could be of two kinds is refused.
    pub(crate) fn of(row: &mut Map<String, Value>) -> Result<(Self, Vec<String>)> {
        let is_ours = |key: &str| KINDS.iter().any(|keys| keys.reads(key));
        let unread = |keys: &RowKeys| {
            let read = |key: &String| keys.reads(key);
            let names = row.keys().filter(|key| !read(key));
            names.cloned().collect::<Vec<_>>()
        };
        let mut fitting = KINDS.iter().filter(|keys| {
            let repeated = |key: &String| keys.repeated.contains(&key.as_str());
            keys.claims(row)
                && unread(keys)
                    .iter()
                    .all(|key| repeated(key) || !is_ours(key))
        });
        let (Some(keys), None) = (fitting.next(), fitting.next()) else {
            let mut found: Vec<&str> = row.keys().map(String::as_str).collect();
            found.sort_unstable();
            let found = format!("the keys {{{}}}", found.join(", "));
            return Err(Error::schema(accepted(), found));
        };
        let ignored = unread(keys);
        row.retain(|key, _| keys.reads(key));
        Ok((keys.kind, ignored))
    }
}

/// All kinds, for a message: `?` marks optional keys.
fn accepted() -> String {
    let kinds = KINDS.iter().map(|keys| {
        let optional = keys.optional.iter().map(|key| format!("{key}?"));
        let all: Vec<String> = keys
            .required
            .iter()
            .map(|key| (*key).to_owned())
            .chain(optional)
            .collect();
        format!("{{{}}}", all.join(", "))
    });
    let kinds: Vec<String> = kinds.collect();
    format!("one of the rows {}", kinds.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(row: Value) -> Result<(RowKind, Vec<String>), String> {
        let Value::Object(mut row) = row else {
            panic!("a row is an object")
        };
        RowKind::of(&mut row).map_err(|problem| problem.to_string())
    }

    #[test]
    fn rows_are_known_by_their_keys_and_unread_keys_are_named() {
        let check = |row: Value, kind, ignored: &[&str]| {
            let ignored = ignored.iter().map(|key| (*key).to_owned()).collect();
            assert_eq!(of(row.clone()).unwrap(), (kind, ignored), "{row}");
        };
        check(json!({"text": ""}), RowKind::Text, &[]);
        check(json!({"id": 1, "text": ""}), RowKind::Text, &["id"]);
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
    fn rows_of_no_kind_or_of_two_are_refused() {
        for (row, keys) in [
            (json!({}), "{}"),
            (json!({"txt": ""}), "{txt}"),
            (json!({"text": "", "prompt": ""}), "{prompt, text}"),
            (json!({"text": "", "messages": []}), "{messages, text}"),
            (json!({"chosen": ""}), "{chosen}"),
        ] {
            let problem = of(row).unwrap_err();
            assert!(
                problem
                    .starts_with("expected one of the rows {text}, {prompt, completion, tools?}, ")
            );
            assert!(
                problem.ends_with(&format!("found the keys {keys}")),
                "{problem}"
            );
        }
    }
}
