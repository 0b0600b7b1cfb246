//! Which kind of row a JSON object is: recognized from its keys.

use crate::error::{Error, Result};
use serde_json::{Map, Value};

/// The kinds of rows, by the keys that make them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
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
struct Keys {
    kind: Kind,
    /// All of these make the kind.
    required: &'static [&'static str],
    /// These may be there.
    optional: &'static [&'static str],
    /// Keys of other kinds that published data sets have beside it, and that say the same again.
    repeated: &'static [&'static str],
}

const KINDS: [Keys; 7] = [
    Keys {
        kind: Kind::Text,
        required: &["text"],
        optional: &[],
        repeated: &[],
    },
    Keys {
        kind: Kind::Completion,
        required: &["prompt", "completion"],
        optional: &["tools"],
        repeated: &[],
    },
    Keys {
        kind: Kind::Messages,
        required: &["messages"],
        optional: &["tools"],
        repeated: &[],
    },
    Keys {
        kind: Kind::Ids,
        required: &["input_ids"],
        optional: &["labels"],
        repeated: &[],
    },
    Keys {
        kind: Kind::Instruction,
        required: &["instruction", "output"],
        optional: &["input", "system"],
        repeated: &["text"],
    },
    Keys {
        kind: Kind::Conversations,
        required: &["conversations"],
        optional: &["system", "tools"],
        repeated: &[],
    },
    Keys {
        kind: Kind::Pair,
        required: &["chosen", "rejected"],
        optional: &["prompt", "tools"],
        repeated: &["messages"],
    },
];

impl Keys {
    fn claims(&self, row: &Map<String, Value>) -> bool {
        self.required.iter().all(|key| row.contains_key(*key))
    }

    fn reads(&self, key: &str) -> bool {
        self.required.contains(&key) || self.optional.contains(&key)
    }
}

impl Kind {
    /// The kind of a row, which loses the keys that nothing reads; their names come back too.
    ///
    /// A row that could be of two kinds is refused rather than guessed at.
    pub(crate) fn of(row: &mut Map<String, Value>) -> Result<(Self, Vec<String>)> {
        let is_ours = |key: &str| KINDS.iter().any(|keys| keys.reads(key));
        let unread = |keys: &Keys| {
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

/// All kinds, for a message: `?` marks what may be left out.
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

    fn of(row: Value) -> Result<(Kind, Vec<String>), String> {
        let Value::Object(mut row) = row else {
            panic!("a row is an object")
        };
        Kind::of(&mut row).map_err(|problem| problem.to_string())
    }

    #[test]
    fn rows_are_known_by_their_keys_and_what_nothing_reads_is_named() {
        let check = |row: Value, kind, ignored: &[&str]| {
            let ignored = ignored.iter().map(|key| (*key).to_owned()).collect();
            assert_eq!(of(row.clone()).unwrap(), (kind, ignored), "{row}");
        };
        check(json!({"text": ""}), Kind::Text, &[]);
        check(json!({"id": 1, "text": ""}), Kind::Text, &["id"]);
        let alpaca = json!({"instruction": "", "input": "", "output": "", "text": ""});
        check(alpaca, Kind::Instruction, &["text"]);
        let rated =
            json!({"prompt": "", "chosen": [], "rejected": [], "messages": [], "score_chosen": 1});
        check(rated, Kind::Pair, &["messages", "score_chosen"]);
        check(
            json!({"conversations": [], "tools": ""}),
            Kind::Conversations,
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
