//! The names of columns: which column of a table is which key of a row.

use crate::error::{Error, Result};
use crate::row::{found_keys, row_keys};
use serde_json::{Map, Value};

/// Keys of rows, each with the name of the column that has it. Columns that are not named keep their names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Columns(Vec<(String, String)>);

/// Keys of rows of multiple choice.
const CHOICE_KEYS: [&str; 2] = ["choices", "answer"];

impl std::fmt::Display for Columns {
    /// `key=column,key=column`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let pairs = self.0.iter().map(|(key, column)| format!("{key}={column}"));
        f.write_str(&pairs.collect::<Vec<_>>().join(","))
    }
}

impl Columns {
    /// All columns keep their names.
    pub const fn none() -> Self {
        Self(Vec::new())
    }

    /// From pairs of a row's key and a column's name. A name with dots finds values inside of objects: `data.question`.
    ///
    /// # Errors
    /// If no row has such a key, or a key repeats.
    pub fn new(names: impl IntoIterator<Item = (String, String)>) -> Result<Self> {
        let mut columns = Self::default();
        for (key, column) in names {
            let mut known: Vec<&str> = row_keys().chain(CHOICE_KEYS).collect();
            if !known.contains(&key.as_str()) {
                known.sort_unstable();
                known.dedup();
                let hint = match nearest(&key, known.iter().copied()) {
                    Some(near) => format!("; did you mean `{near}`?"),
                    None => String::new(),
                };
                let expected = format!("keys of rows ({})", known.join(", "));
                return Err(Error::schema(expected, format!("`{key}`{hint}")));
            }
            if columns.keys().any(|other| other == key) {
                return Err(Error::schema(
                    "each key of a row once",
                    format!("`{key}` twice"),
                ));
            }
            columns.0.push((key, column));
        }
        Ok(columns)
    }

    /// Whether all columns keep their names.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The named keys of rows.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(key, _)| key.as_str())
    }

    /// The names of columns, each for one of [`keys`](Self::keys).
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(_, column)| column.as_str())
    }

    /// Gives the columns of a row the names of keys. A column that already has the name of another's key is dropped; its
    /// name is returned.
    ///
    /// # Errors
    /// If the row has no such column.
    pub(crate) fn rename(&self, row: &mut Map<String, Value>) -> Result<Vec<String>> {
        let found = self.0.iter().map(|(_, column)| {
            let value = find(row, column).cloned();
            value.ok_or_else(|| missing(column, row))
        });
        let values = found.collect::<Result<Vec<Value>>>()?;
        self.names().for_each(|column| drop(row.remove(column)));
        let mut dropped = Vec::new();
        for (key, value) in self.keys().zip(values) {
            if row
                .insert(key.to_owned(), value)
                .is_some_and(|old| !old.is_null())
            {
                dropped.push(key.to_owned());
            }
        }
        Ok(dropped)
    }
}

/// A column by its name, or else by the names of objects and the name in the innermost one.
fn find<'a>(row: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    if let Some(value) = row.get(name) {
        return Some(value);
    }
    let (first, rest) = name.split_once('.')?;
    match row.get(first)? {
        Value::Object(inner) => find(inner, rest),
        // A null object has null columns.
        Value::Null => Some(&Value::Null),
        _ => None,
    }
}

fn missing(column: &str, row: &Map<String, Value>) -> Error {
    let hint = match nearest(column, row.keys().map(String::as_str)) {
        Some(near) => format!("; did you mean `{near}`?"),
        None => String::new(),
    };
    let expected = format!("a column `{column}`, which `data.columns` names");
    Error::schema(expected, format!("{}{hint}", found_keys(row)))
}

/// The most similar name, if it is similar enough.
fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // Below it come words that share only a few letters; above it, every typo of one letter.
    const ALIKE: f64 = 0.8;
    const LONGEST: usize = 64;
    if name.len() > LONGEST {
        return None;
    }
    let candidates = candidates.filter(|candidate| candidate.len() <= LONGEST);
    let scored = candidates.map(|candidate| (strsim::jaro_winkler(name, candidate), candidate));
    let best = scored.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 >= ALIKE).then_some(best.1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn columns(names: &[(&str, &str)]) -> Result<Columns, String> {
        let owned = names
            .iter()
            .map(|(key, column)| ((*key).to_owned(), (*column).to_owned()));
        Columns::new(owned).map_err(|problem| problem.to_string())
    }

    fn renamed(names: &[(&str, &str)], row: Value) -> Result<(Value, Vec<String>), String> {
        let mut row = row.as_object().unwrap().clone();
        let dropped = columns(names)?.rename(&mut row);
        dropped
            .map(|dropped| (row.into(), dropped))
            .map_err(|problem| problem.to_string())
    }

    #[test]
    fn columns_get_the_names_of_keys() {
        let check = |names: &[(&str, &str)], row: Value, expected: Value, dropped: &[&str]| {
            let dropped = dropped.iter().map(|name| (*name).to_owned()).collect();
            assert_eq!(renamed(names, row).unwrap(), (expected, dropped));
        };
        let answers = [("prompt", "question"), ("completion", "data.answer.0")];
        let row = json!({"question": "q", "id": 1, "data": {"answer": {"0": "a"}}});
        let expected =
            json!({"id": 1, "data": {"answer": {"0": "a"}}, "prompt": "q", "completion": "a"});
        check(&answers, row, expected, &[]);
        // Two keys change places, and one column may be two keys.
        let swapped = [("prompt", "completion"), ("completion", "prompt")];
        check(
            &swapped,
            json!({"prompt": "a", "completion": "b"}),
            json!({"prompt": "b", "completion": "a"}),
            &[],
        );
        check(
            &[("prompt", "x"), ("completion", "x")],
            json!({"x": "a"}),
            json!({"prompt": "a", "completion": "a"}),
            &[],
        );
        check(
            &[("prompt", "question")],
            json!({"prompt": 1, "question": 2}),
            json!({"prompt": 2}),
            &["prompt"],
        );
        check(
            &[("prompt", "a.b")],
            json!({"a.b": 1, "a": {"b": 2}}),
            json!({"a": {"b": 2}, "prompt": 1}),
            &[],
        );
        check(
            &[("prompt", "a.b")],
            json!({"a": null}),
            json!({"a": null, "prompt": null}),
            &[],
        );
    }

    #[test]
    fn unknown_keys_and_absent_columns_are_refused_with_a_suggestion() {
        let problem = columns(&[("promt", "question")]).unwrap_err();
        assert!(
            problem.starts_with("expected keys of rows (answer, choices, chosen, "),
            "{problem}"
        );
        assert!(
            problem.ends_with("found `promt`; did you mean `prompt`?"),
            "{problem}"
        );
        let problem = columns(&[("text", "a"), ("text", "b")]).unwrap_err();
        assert_eq!(
            problem,
            "expected each key of a row once, found `text` twice"
        );
        let problem =
            renamed(&[("prompt", "qestion")], json!({"question": "", "b": 1})).unwrap_err();
        assert_eq!(
            problem,
            "expected a column `qestion`, which `data.columns` names, found the keys {b, question}; did you mean `question`?"
        );
        let problem = renamed(&[("prompt", "x.y")], json!({"x": [1]})).unwrap_err();
        assert!(problem.ends_with("found the keys {x}"), "{problem}");
    }
}
