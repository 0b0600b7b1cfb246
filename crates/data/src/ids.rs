//! A file of token ids: `{"input_ids": [[…], …]}`.

use crate::error::{Error, Result};
use crate::file::{describe, require_text};
use crate::row::integers;
use serde_json::Value;
use std::path::Path;

/// A hundred thousand sequences of a hundred tokens fit in it.
const MAX_IDS_BYTES: u64 = 64 << 20;

/// Reads rows of token ids, all of one length.
///
/// # Errors
/// If the file cannot be read or is not such an object, has no row, or a row is empty, differs in
/// length from the first, or holds anything but non-negative integers.
pub fn read_ids(path: &Path) -> Result<Vec<Vec<u32>>> {
    let malformed = |problem: Error| Error::malformed(path, problem.to_string());
    let text = require_text(path, MAX_IDS_BYTES)?;
    let mut value: Value = serde_json::from_str(&text)
        .map_err(|problem| Error::malformed(path, problem.to_string()))?;
    let rows = match value.get_mut("input_ids").map(Value::take) {
        Some(Value::Array(rows)) if !rows.is_empty() => rows,
        Some(Value::Array(_)) => {
            return Err(malformed(Error::schema(
                "a row of ids in `input_ids`",
                "none",
            )));
        }
        Some(other) => {
            return Err(malformed(Error::schema(
                "a list of rows in `input_ids`",
                describe(&other),
            )));
        }
        None => {
            return Err(malformed(Error::schema(
                "an object with `input_ids`",
                "none",
            )));
        }
    };

    let mut all: Vec<Vec<u32>> = Vec::with_capacity(rows.len());
    for (number, row) in rows.into_iter().enumerate() {
        let ids: Vec<u32> =
            integers(&format!("input_ids[{number}]"), Some(row)).map_err(malformed)?;
        let cols = all.first().map_or(ids.len(), Vec::len);
        if ids.is_empty() || ids.len() != cols {
            let expected = if cols == 0 {
                "at least one id".to_owned()
            } else {
                format!("{cols} ids, as in row 0,")
            };
            let problem = Error::schema(
                format!("{expected} in `input_ids[{number}]`"),
                ids.len().to_string(),
            );
            return Err(malformed(problem));
        }
        all.push(ids);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Vec<u32>>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let name = file.path().display().to_string();
        read_ids(file.path()).map_err(|problem| problem.to_string().replace(&name, "FILE"))
    }

    #[test]
    fn rows_of_one_length_are_read() {
        assert_eq!(
            read(r#"{"input_ids": [[1, 2], [3, 4294967295]]}"#).unwrap(),
            [[1, 2], [3, u32::MAX]]
        );
    }

    #[test]
    fn what_is_no_rectangle_of_ids_is_refused_with_its_place() {
        let check = |text: &str, expected: &str| {
            assert_eq!(read(text).unwrap_err(), format!("FILE: {expected}"))
        };
        check(
            r#"{"input_ids": [[1, 2], [3]]}"#,
            "expected 2 ids, as in row 0, in `input_ids[1]`, found 1",
        );
        check(
            r#"{"input_ids": [[1, 2], []]}"#,
            "expected 2 ids, as in row 0, in `input_ids[1]`, found 0",
        );
        check(
            r#"{"input_ids": [[]]}"#,
            "expected at least one id in `input_ids[0]`, found 0",
        );
        check(
            r#"{"input_ids": [[1], [-1]]}"#,
            "expected `input_ids[1][0]` to be a token id, found -1",
        );
        check(
            r#"{"input_ids": [[1.0]]}"#,
            "expected `input_ids[0][0]` to be a token id, found 1.0",
        );
        check(
            r#"{"input_ids": [[4294967296]]}"#,
            "expected `input_ids[0][0]` to be a token id, found 4294967296",
        );
        check(
            r#"{"input_ids": [1, 2]}"#,
            "expected a list of integers in `input_ids[0]`, found 1",
        );
        check(
            r#"{"input_ids": []}"#,
            "expected a row of ids in `input_ids`, found none",
        );
        check(
            r#"{"input_ids": 1}"#,
            "expected a list of rows in `input_ids`, found 1",
        );
        check("[[1]]", "expected an object with `input_ids`, found none");
        assert!(
            read("{")
                .unwrap_err()
                .starts_with("FILE: EOF while parsing")
        );
    }
}
