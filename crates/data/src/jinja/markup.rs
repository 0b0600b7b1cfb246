//! Texts that are marked as safe for web pages, as Python's `Markup`.
//!
//! Chats are no web pages, and nothing is escaped by itself. But in `'<tools>' + (text | safe)`, Python escapes what is added to
//! the marked text, and a model was trained on what came out.

use super::arguments::CallValues;
use super::ast::Operator;
use super::budget::Budget;
use super::format::percent;
use super::operators;
use super::value::Value;
use super::{Error, Result, strings};
use std::sync::Arc;

/// The filters whose result is marked if their text is.
pub(super) const MARKING_FILTERS: [&str; 7] = [
    "string",
    "upper",
    "lower",
    "trim",
    "capitalize",
    "center",
    "reverse",
];
/// The filters that escape other texts than theirs, which is absent here.
pub(super) const ESCAPING_FILTERS: [&str; 4] = ["attr", "format", "indent", "truncate"];
/// The methods whose result is marked, or a list of marked texts.
const MARKING_METHODS: [&str; 19] = [
    "capitalize",
    "casefold",
    "expandtabs",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "strip",
    "swapcase",
    "title",
    "upper",
    "zfill",
];
/// The methods that escape what they are given, which is absent here.
const ESCAPING_METHODS: [&str; 6] = ["center", "format", "format_map", "join", "ljust", "rjust"];

pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            char => out.push(char),
        }
    }
    out
}

pub(super) fn unsupported(name: &str) -> Error {
    Error::new(format!(
        "'{name}' of a text that is marked as safe is not supported"
    ))
}

/// An operator of which at least one value is a marked text.
pub(super) fn arithmetic(
    operator: Operator,
    a: &Value,
    b: &Value,
    budget: &Budget,
) -> Result<Value> {
    match (operator, a, b) {
        (Operator::Add, Value::Str(_) | Value::Markup(_), Value::Str(_) | Value::Markup(_)) => {
            let joined = [safe(a), safe(b)].concat();
            budget.text(joined.len())?;
            Ok(Value::Markup(joined.into()))
        }
        (Operator::Modulo, Value::Markup(_), _) => Err(unsupported("%")),
        (Operator::Modulo, Value::Str(format), values) => percent(format, values, budget),
        // Any other one sees a text.
        _ => {
            let made = operators::arithmetic(operator, &a.unmarked(), &b.unmarked(), budget)?;
            Ok(match operator {
                Operator::Multiply => made.marked(),
                _ => made,
            })
        }
    }
}

/// A text as it is if it is marked, and otherwise escaped.
fn safe(value: &Value) -> String {
    match value {
        Value::Str(text) => escaped(text),
        other => other.as_str().unwrap_or_default().to_owned(),
    }
}

/// `text.name(values)`
pub(super) fn call(
    text: &str,
    name: &str,
    mut values: CallValues,
    budget: &Budget,
) -> Result<Value> {
    if ESCAPING_METHODS.contains(&name) {
        return Err(unsupported(name));
    }
    if let ("replace", Some(new @ Value::Str(_))) = (name, values.positional.get_mut(1)) {
        *new = Value::Markup(safe(new).into());
    }
    let made = strings::call(text, name, values, budget)?;
    match (MARKING_METHODS.contains(&name), &made) {
        (false, _) => Ok(made),
        (true, Value::Seq(seq)) => {
            Value::seq(seq.kind, seq.items.iter().map(Value::marked).collect())
        }
        (true, other) => Ok(other.marked()),
    }
}

impl Value {
    /// A text, marked; other values as they are.
    pub(super) fn marked(&self) -> Self {
        match self {
            Self::Str(text) => Self::Markup(Arc::clone(text)),
            other => other.clone(),
        }
    }

    /// A text without its mark; other values as they are.
    pub(super) fn unmarked(&self) -> Self {
        match self {
            Self::Markup(text) => Self::Str(Arc::clone(text)),
            other => other.clone(),
        }
    }
}
