//! The rows of files as the `datasets` package gives them: one type for each column, and null where a row has no value.
//!
//! Source: huggingface/datasets: src/datasets/packaged_modules/{json,csv}, which read with Arrow and pandas.

use std::path::{Path, PathBuf};

use serde_json::{Map, Number, Value};

use crate::file::{describe, parse_line};
use crate::table::{Table, file_type};
use crate::task::task_row::TaskRow;
use crate::{Error, Result};

/// Texts of a table that stand for no value.
const NOTHING: [&str; 18] = [
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan",
];

/// The rows of files, which are one table.
///
/// # Errors
/// If a file cannot be read, a column has values of several types, or there is no row.
pub(super) fn read_rows(files: &[PathBuf]) -> Result<Vec<TaskRow>> {
    let mut rows = Vec::new();
    for file in files {
        rows.extend(rows_of(file)?);
    }
    let Some(first) = files.first().filter(|_| rows.is_empty()) else {
        let mut values: Vec<&mut Map<String, Value>> = rows.iter_mut().collect();
        unify_columns(&mut values, "")
            .map_err(|problem| Error::malformed(&files[0], problem.to_string()))?;
        return Ok(rows.into_iter().map(TaskRow::new).collect());
    };
    Err(Error::malformed(
        first,
        "expected at least one row, found none",
    ))
}

fn rows_of(file: &Path) -> Result<Vec<Map<String, Value>>> {
    let mut rows = Vec::new();
    for row in Table::open(file)? {
        let row = row?;
        let value = match parse_line(&row.text).map_err(|problem| problem.at(file, row.place))? {
            Value::Object(value) => value,
            other => {
                let problem = Error::schema("a JSON object", describe(&other));
                return Err(problem.at(file, row.place));
            }
        };
        rows.push(value);
    }
    let has_texts_only = file_type(file).is_some_and(|kind| kind == "csv" || kind == "tsv");
    if has_texts_only {
        type_columns(&mut rows);
    }
    Ok(rows)
}

/// Gives the columns of a table of texts the types that pandas reads from them.
fn type_columns(rows: &mut [Map<String, Value>]) {
    let names: Vec<String> = rows
        .first()
        .into_iter()
        .flat_map(Map::keys)
        .cloned()
        .collect();
    for name in names {
        let mut column: Vec<&mut Value> = rows
            .iter_mut()
            .filter_map(|row| row.get_mut(&name))
            .collect();
        for value in &mut column {
            if value
                .as_str()
                .is_some_and(|text| NOTHING.contains(&text) || text == "null")
            {
                **value = Value::Null;
            }
        }
        let texts = || column.iter().filter_map(|value| value.as_str());
        let n_texts = texts().count();
        let read: Option<fn(&str) -> Option<Value>> = if n_texts == 0 {
            None
        } else if texts().all(|text| boolean(text).is_some()) && n_texts == column.len() {
            Some(boolean)
        } else if texts().all(|text| integer(text).is_some()) && n_texts == column.len() {
            Some(integer)
        } else if texts().all(|text| float(text).is_some()) {
            Some(float)
        } else {
            None
        };
        if let Some(read) = read {
            for value in column {
                if let Some(typed) = value.as_str().and_then(read) {
                    *value = typed;
                }
            }
        }
    }
}

fn boolean(text: &str) -> Option<Value> {
    match text {
        "True" | "TRUE" | "true" => Some(true.into()),
        "False" | "FALSE" | "false" => Some(false.into()),
        _ => None,
    }
}

fn integer(text: &str) -> Option<Value> {
    text.trim().parse::<i64>().ok().map(Value::from)
}

fn float(text: &str) -> Option<Value> {
    let text = text.trim();
    let is_number = text.bytes().any(|byte| byte.is_ascii_digit());
    let number = text.parse().ok().filter(|_| is_number)?;
    Number::from_f64(number).map(Value::Number)
}

/// Gives all rows the same columns, null where one has none, and each column one type.
fn unify_columns(rows: &mut [&mut Map<String, Value>], path: &str) -> Result<()> {
    let mut names: Vec<String> = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for name in rows.iter().flat_map(|row| row.keys()) {
        if seen.insert(name.clone()) {
            names.push(name.clone());
        }
    }
    for name in names {
        let column = rows
            .iter_mut()
            .map(|row| row.entry(name.clone()).or_insert(Value::Null));
        let path = if path.is_empty() {
            name.clone()
        } else {
            format!("{path}.{name}")
        };
        unify(&mut column.collect::<Vec<_>>(), &path)?;
    }
    Ok(())
}

/// Gives values one type: numbers are all floats if one is, objects have the same keys.
fn unify(values: &mut [&mut Value], path: &str) -> Result<()> {
    let mut present = values.iter().filter(|value| !value.is_null());
    let Some(first) = present.next() else {
        return Ok(());
    };
    let kind = std::mem::discriminant(&**first);
    if let Some(other) = present.find(|value| std::mem::discriminant(&***value) != kind) {
        let found = format!("{} and {}", describe(first), describe(other));
        return Err(Error::schema(
            format!("values of one type in column `{path}`"),
            found,
        ));
    }
    match first {
        Value::Number(_) => {
            let is_float = |value: &&mut Value| value.as_number().is_some_and(Number::is_f64);
            if values.iter().any(is_float) {
                for value in values {
                    if let Some(number) = value.as_f64().and_then(Number::from_f64) {
                        **value = Value::Number(number);
                    }
                }
            }
            Ok(())
        }
        Value::Array(_) => {
            let items = values.iter_mut().filter_map(|value| value.as_array_mut());
            unify(
                &mut items.flatten().collect::<Vec<_>>(),
                &format!("{path}[]"),
            )
        }
        Value::Object(_) => {
            let objects = values.iter_mut().filter_map(|value| value.as_object_mut());
            unify_columns(&mut objects.collect::<Vec<_>>(), path)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(name: &str, text: &str) -> Result<Vec<Value>, String> {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join(name);
        std::fs::write(&file, text).unwrap();
        let rows = read_rows(&[file]).map_err(|problem| {
            problem
                .to_string()
                .replace(&place.path().display().to_string(), "DIR")
        })?;
        Ok(rows
            .into_iter()
            .map(|row| Value::Object(row.values().clone()))
            .collect())
    }

    #[test]
    fn columns_have_one_type_and_null_where_nothing_is() {
        let rows = read(
            "a.jsonl",
            "{\"a\": 1, \"c\": {\"x\": [1]}}\n{\"a\": 2.5, \"b\": \"t\", \"c\": {\"x\": [0.5], \"y\": true}}\n{\"c\": null}\n",
        );
        assert_eq!(
            rows.unwrap(),
            [
                json!({"a": 1.0, "c": {"x": [1.0], "y": null}, "b": null}),
                json!({"a": 2.5, "b": "t", "c": {"x": [0.5], "y": true}}),
                json!({"c": null, "a": null, "b": null}),
            ]
        );
        let rows = read(
            "a.csv",
            "n,f,b,t,gap,none\n1,1.5,True,x,1,\n-2,2,false,NA,,NULL\n",
        );
        assert_eq!(
            rows.unwrap(),
            [
                json!({"n": 1, "f": 1.5, "b": true, "t": "x", "gap": 1.0, "none": null}),
                json!({"n": -2, "f": 2.0, "b": false, "t": null, "gap": null, "none": null}),
            ]
        );
    }

    #[test]
    fn columns_of_several_types_and_files_without_rows_are_refused() {
        assert_eq!(
            read("a.jsonl", "{\"a\": {\"b\": 1}}\n{\"a\": {\"b\": \"x\"}}\n").unwrap_err(),
            "DIR/a.jsonl: expected values of one type in column `a.b`, found 1 and a string"
        );
        assert_eq!(
            read("a.jsonl", "\n").unwrap_err(),
            "DIR/a.jsonl: expected at least one row, found none"
        );
        assert_eq!(
            read("a.jsonl", "{}\n[1]\n").unwrap_err(),
            "DIR/a.jsonl:2: expected a JSON object, found a list"
        );
    }
}
