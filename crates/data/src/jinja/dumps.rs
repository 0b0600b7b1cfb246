//! Python's `json.dumps`.

use super::budget::Budget;
use super::python::{float_text, non_finite};
use super::value::{SeqKind, Value};
use super::{Error, Result};
use std::fmt::Write;

/// The options of `json.dumps`.
#[derive(Debug)]
pub(crate) struct JsonStyle {
    pub(crate) ascii: bool,
    /// What a level is indented by; none for one line.
    pub(crate) indent: Option<String>,
    /// Between elements, and between a key and its value.
    pub(crate) separators: [String; 2],
    pub(crate) sorted: bool,
}

impl Default for JsonStyle {
    fn default() -> Self {
        Self {
            ascii: false,
            indent: None,
            separators: [", ", ": "].map(str::to_owned),
            sorted: false,
        }
    }
}

pub(crate) fn dumps(value: &Value, style: &JsonStyle, budget: &Budget) -> Result<String> {
    let mut writer = JsonWriter {
        out: String::new(),
        style,
        budget,
    };
    writer.value(value, 0)?;
    budget.text(writer.out.len())?;
    Ok(writer.out)
}

struct JsonWriter<'a> {
    out: String,
    style: &'a JsonStyle,
    budget: &'a Budget,
}

impl JsonWriter<'_> {
    fn value(&mut self, value: &Value, level: usize) -> Result<()> {
        match value {
            Value::Str(text) | Value::Markup(text) => self.string(text),
            Value::Seq(seq) if matches!(seq.kind, SeqKind::List | SeqKind::Tuple) => {
                self.out.push('[');
                for (index, item) in seq.items.iter().enumerate() {
                    self.between(index, level + 1)?;
                    self.value(item, level + 1)?;
                }
                self.close(']', seq.items.is_empty(), level)?;
            }
            Value::Dict(dict) => {
                let mut entries: Vec<&(Value, Value)> = dict.entries.iter().collect();
                if self.style.sorted {
                    sort_by_key(&mut entries)?;
                }
                self.out.push('{');
                for (index, (key, value)) in entries.iter().enumerate() {
                    self.between(index, level + 1)?;
                    match key {
                        Value::Str(text) | Value::Markup(text) => self.string(text),
                        Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) => {
                            let text = scalar(key).unwrap_or_default();
                            self.string(&text);
                        }
                        _ => {
                            return Err(Error::new(format!(
                                "keys must be str, int, float, bool or None, not {}",
                                key.kind()
                            )));
                        }
                    }
                    self.out.push_str(&self.style.separators[1]);
                    self.value(value, level + 1)?;
                }
                self.close('}', entries.is_empty(), level)?;
            }
            scalar_value => match scalar(scalar_value) {
                Some(text) => self.out.push_str(&text),
                None => {
                    return Err(Error::new(format!(
                        "Object of type {} is not JSON serializable",
                        value.kind()
                    )));
                }
            },
        }
        Ok(())
    }

    fn between(&mut self, index: usize, level: usize) -> Result<()> {
        if index > 0 {
            self.out.push_str(&self.style.separators[0]);
        }
        self.line(level)
    }

    fn close(&mut self, bracket: char, is_empty: bool, level: usize) -> Result<()> {
        if !is_empty {
            self.line(level)?;
        }
        self.out.push(bracket);
        Ok(())
    }

    fn line(&mut self, level: usize) -> Result<()> {
        if let Some(indent) = &self.style.indent {
            self.budget.text(indent.len().saturating_mul(level))?;
            self.out.push('\n');
            (0..level).for_each(|_| self.out.push_str(indent));
        }
        Ok(())
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for char in text.chars() {
            let short = match char {
                '"' => "\\\"",
                '\\' => "\\\\",
                '\n' => "\\n",
                '\r' => "\\r",
                '\t' => "\\t",
                '\u{8}' => "\\b",
                '\u{c}' => "\\f",
                char if char < ' ' || (self.style.ascii && !(' '..='~').contains(&char)) => {
                    for unit in char.encode_utf16(&mut [0; 2]) {
                        // Writing into a `String` cannot fail.
                        _ = write!(self.out, "\\u{unit:04x}");
                    }
                    continue;
                }
                char => {
                    self.out.push(char);
                    continue;
                }
            };
            self.out.push_str(short);
        }
        self.out.push('"');
    }
}

fn scalar(value: &Value) -> Option<String> {
    Some(match value {
        Value::None => "null".to_owned(),
        Value::Bool(flag) => flag.to_string(),
        Value::Int(number) => number.to_string(),
        Value::Huge(number) => number.to_string(),
        Value::Float(number) if number.is_finite() => float_text(*number),
        Value::Float(number) => match non_finite(*number) {
            "nan" => "NaN".to_owned(),
            infinity => infinity.replace("inf", "Infinity"),
        },
        _ => return None,
    })
}

fn sort_by_key(entries: &mut [&(Value, Value)]) -> Result<()> {
    let unordered = entries
        .windows(2)
        .any(|pair| pair[0].0.order(&pair[1].0).is_none());
    if unordered {
        return Err(Error::new("cannot sort keys of different types"));
    }
    entries.sort_by(|a, b| a.0.order(&b.0).unwrap_or(std::cmp::Ordering::Equal));
    Ok(())
}
