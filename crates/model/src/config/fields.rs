//! The keys of a `config.json`. Errors name the file, the key, the expected and the found value.
//!
//! Code that reads a key obeys it: the keys that were read are recorded, so that the rest can be named, and no list
//! of known keys can differ from what the code reads.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use crate::Error;

/// The paths of keys that were read, and of objects whose keys are read one by one.
#[derive(Debug, Default)]
pub(super) struct Asked {
    keys: RefCell<BTreeSet<String>>,
    objects: RefCell<BTreeSet<String>>,
}

/// A JSON object, to read keys with their types checked.
#[derive(Clone)]
pub(super) struct Fields<'a> {
    json: &'a Value,
    pub(super) file: &'a Path,
    prefix: &'static str,
    asked: &'a Asked,
}

/// No size in a config may exceed this: it bounds every allocation made from one.
const LARGEST_SIZE: u64 = 1 << 24;

impl<'a> Fields<'a> {
    pub(super) fn new(json: &'a Value, file: &'a Path, asked: &'a Asked) -> Self {
        Self {
            json,
            file,
            prefix: "",
            asked,
        }
    }

    fn path(&self, key: &str) -> String {
        if self.prefix.is_empty() {
            key.into()
        } else {
            format!("{}.{key}", self.prefix)
        }
    }

    /// The value of a key, which counts as obeyed from here on. Null is as good as no key.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.asked.keys.borrow_mut().insert(self.path(key));
        self.json.get(key).filter(|value| !value.is_null())
    }

    /// The value of a key, without obeying it.
    pub(super) fn peek(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    /// Whether there is a value. Does not obey it.
    pub(super) fn has(&self, key: &str) -> bool {
        self.peek(key).is_some()
    }

    /// Whether the key is there, if only as null. Does not obey it.
    pub(super) fn mentions(&self, key: &str) -> bool {
        self.json.get(key).is_some()
    }

    /// Counts keys as obeyed that have no effect here, whatever they say.
    pub(super) fn without_effect(&self, keys: &[&str]) {
        for key in keys {
            _ = self.get(key);
        }
    }

    /// The keys that have a value, with it.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&'a str, &'a Value)> + use<'a> {
        let entries = self.json.as_object().into_iter().flatten();
        let entries = entries.filter(|(_, value)| !value.is_null());
        entries.map(|(key, value)| (key.as_str(), value))
    }

    /// The paths and values that nothing read, except `harmless` keys.
    pub(super) fn rest(&self, harmless: &[&[&str]]) -> Vec<(String, Value)> {
        let mut rest = Vec::new();
        for (key, value) in self.entries() {
            let path = self.path(key);
            if self.asked.objects.borrow().contains(&path) {
                let inner = value.as_object().into_iter().flatten();
                rest.extend(inner.filter_map(|(key, value)| {
                    let path = format!("{path}.{key}");
                    let is_asked = value.is_null() || self.asked.keys.borrow().contains(&path);
                    (!is_asked).then(|| (path, value.clone()))
                }));
            } else if !self.asked.keys.borrow().contains(&path) {
                rest.push((path, value.clone()));
            }
        }
        rest.retain(|(path, _)| !harmless.iter().any(|keys| keys.contains(&path.as_str())));
        rest
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
        Error::Config {
            file: self.file.into(),
            key: self.path(key),
            expected: expected.into(),
            found,
        }
    }

    pub(super) fn size(&self, key: &str) -> Result<usize, Error> {
        match self.get(key).and_then(Value::as_u64) {
            Some(size) if (1..=LARGEST_SIZE).contains(&size) => Ok(size as usize),
            _ => Err(self.wrong(key, "a whole number above 0")),
        }
    }

    pub(super) fn count_or(&self, key: &str, default: usize) -> Result<usize, Error> {
        match self.get(key).map(Value::as_u64) {
            None => Ok(default),
            Some(Some(count)) if count <= LARGEST_SIZE => Ok(count as usize),
            Some(_) => Err(self.wrong(key, "a whole number")),
        }
    }

    pub(super) fn number(&self, key: &str) -> Result<f64, Error> {
        self.get(key)
            .and_then(Value::as_f64)
            .filter(|n| n.is_finite())
            .ok_or_else(|| self.wrong(key, "a number"))
    }

    pub(super) fn number_or(&self, key: &str, default: f64) -> Result<f64, Error> {
        match self.get(key) {
            Some(_) => self.number(key),
            None => Ok(default),
        }
    }

    pub(super) fn positive(&self, key: &str) -> Result<f64, Error> {
        match self.get(key).and_then(Value::as_f64) {
            Some(number) if number > 0.0 && number.is_finite() => Ok(number),
            _ => Err(self.wrong(key, "a number above 0")),
        }
    }

    pub(super) fn positive_or(&self, key: &str, default: f64) -> Result<f64, Error> {
        match self.get(key) {
            Some(_) => self.positive(key),
            None => Ok(default),
        }
    }

    pub(super) fn flag_or(&self, key: &str, default: bool) -> Result<bool, Error> {
        match self.get(key).map(Value::as_bool) {
            None => Ok(default),
            Some(flag) => flag.ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    /// Refuses any value of a key but these; no value is fine.
    pub(super) fn only(&self, key: &str, values: &[Value]) -> Result<(), Error> {
        /// 1 and 1.0 are the same.
        fn same(a: &Value, b: &Value) -> bool {
            a == b || a.as_f64().is_some_and(|a| Some(a) == b.as_f64())
        }
        match self.get(key) {
            Some(found) if !values.iter().any(|value| same(value, found)) => {
                let names = values.iter().map(Value::to_string);
                Err(self.wrong(key, &names.collect::<Vec<_>>().join(" or ")))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn text_or(&self, key: &str, default: &'a str) -> Result<&'a str, Error> {
        match self.get(key).map(Value::as_str) {
            None => Ok(default),
            Some(text) => text.ok_or_else(|| self.wrong(key, "a text")),
        }
    }

    pub(super) fn one_of<T: Copy>(&self, key: &str, choices: &[(&str, T)]) -> Result<T, Error> {
        let found = self.get(key).and_then(Value::as_str);
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
        match self.get(key) {
            Some(_) => self.one_of(key, choices),
            None => Ok(default),
        }
    }

    /// An object whose keys are read one by one; none if it is absent or empty.
    pub(super) fn object(&self, key: &'static str) -> Result<Option<Self>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(object)) if object.is_empty() => Ok(None),
            Some(json @ Value::Object(_)) => {
                self.asked.objects.borrow_mut().insert(self.path(key));
                let prefix = key;
                Ok(Some(Self {
                    json,
                    prefix,
                    ..self.clone()
                }))
            }
            Some(_) => Err(self.wrong(key, "an object")),
        }
    }
}
