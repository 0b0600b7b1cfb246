//! The keys of a `config.json`. Errors name the file, the key, the expected and the found value.

use std::path::Path;

use serde_json::Value;

use crate::Error;

/// A JSON object, to read keys with their types checked.
pub(super) struct Fields<'a> {
    pub(super) json: &'a Value,
    pub(super) file: &'a Path,
    pub(super) prefix: &'static str,
}

/// No size in a config may exceed this: it bounds every allocation made from one.
const LARGEST_SIZE: u64 = 1 << 24;

impl<'a> Fields<'a> {
    pub(super) fn has(&self, key: &str) -> bool {
        self.json.get(key).is_some_and(|value| !value.is_null())
    }

    pub(super) fn wrong(&self, key: &str, expected: &str) -> Error {
        let found = self.json.get(key).map_or_else(
            || "nothing".into(),
            |value| {
                let text = value.to_string();
                if text.chars().count() > 80 {
                    format!("{}…", text.chars().take(80).collect::<String>())
                } else {
                    text
                }
            },
        );
        let key = if self.prefix.is_empty() {
            key.into()
        } else {
            format!("{}.{key}", self.prefix)
        };
        Error::Config {
            file: self.file.into(),
            key,
            expected: expected.into(),
            found,
        }
    }

    pub(super) fn size(&self, key: &str) -> Result<usize, Error> {
        match self.json.get(key).and_then(Value::as_u64) {
            Some(size) if (1..=LARGEST_SIZE).contains(&size) => Ok(size as usize),
            _ => Err(self.wrong(key, "a whole number above 0")),
        }
    }

    pub(super) fn count_or(&self, key: &str, default: usize) -> Result<usize, Error> {
        if !self.has(key) {
            return Ok(default);
        }
        match self.json.get(key).and_then(Value::as_u64) {
            Some(count) if count <= LARGEST_SIZE => Ok(count as usize),
            _ => Err(self.wrong(key, "a whole number")),
        }
    }

    pub(super) fn number(&self, key: &str) -> Result<f64, Error> {
        self.json
            .get(key)
            .and_then(Value::as_f64)
            .filter(|n| n.is_finite())
            .ok_or_else(|| self.wrong(key, "a number"))
    }

    pub(super) fn number_or(&self, key: &str, default: f64) -> Result<f64, Error> {
        if self.has(key) {
            self.number(key)
        } else {
            Ok(default)
        }
    }

    pub(super) fn flag_or(&self, key: &str, default: bool) -> Result<bool, Error> {
        if !self.has(key) {
            return Ok(default);
        }
        self.json
            .get(key)
            .and_then(Value::as_bool)
            .ok_or_else(|| self.wrong(key, "true or false"))
    }

    pub(super) fn one_of_bools(&self, key: &str, only: bool) -> Result<(), Error> {
        if self.flag_or(key, only)? == only {
            Ok(())
        } else {
            Err(self.wrong(key, &only.to_string()))
        }
    }

    pub(super) fn text_or(&self, key: &str, default: &'a str) -> Result<&'a str, Error> {
        if !self.has(key) {
            return Ok(default);
        }
        self.json
            .get(key)
            .and_then(Value::as_str)
            .ok_or_else(|| self.wrong(key, "a text"))
    }

    pub(super) fn one_of<T: Copy>(&self, key: &str, choices: &[(&str, T)]) -> Result<T, Error> {
        let found = self.json.get(key).and_then(Value::as_str);
        let names = || {
            choices
                .iter()
                .map(|(name, _)| *name)
                .collect::<Vec<_>>()
                .join(", ")
        };
        choices
            .iter()
            .find(|(name, _)| Some(*name) == found)
            .map(|(_, value)| *value)
            .ok_or_else(|| match choices {
                [(only, _)] => self.wrong(key, only),
                _ => self.wrong(key, &format!("one of {}", names())),
            })
    }

    pub(super) fn one_of_or<T: Copy>(
        &self,
        key: &str,
        choices: &[(&str, T)],
        default: T,
    ) -> Result<T, Error> {
        if self.has(key) {
            self.one_of(key, choices)
        } else {
            Ok(default)
        }
    }

    pub(super) fn object(&self, key: &'static str) -> Result<Option<Self>, Error> {
        match self.json.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(json @ Value::Object(_)) => Ok(Some(Self {
                json,
                file: self.file,
                prefix: key,
            })),
            Some(_) => Err(self.wrong(key, "an object")),
        }
    }
}
