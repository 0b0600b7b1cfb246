//! Jinja's tests: what may follow `is`.

use super::arguments::CallValues;
use super::ast::Comparator;
use super::budget::Budget;
use super::operators::{compare, contains};
use super::python::{is_cased, text_of};
use super::value::{SeqKind, Value};
use super::{Error, Result};

/// Whether `value is name`.
pub(super) fn holds(
    budget: &Budget,
    name: &str,
    value: &Value,
    values: CallValues,
) -> Result<bool> {
    if let Value::Markup(_) = value {
        return match name {
            "escaped" => Ok(true),
            _ => holds(budget, name, &value.unmarked(), values),
        };
    }
    if let Some(comparison) = comparison(name) {
        let [other] = values.require(name, ["other"])?;
        return compare(comparison, value, &other, budget);
    }
    let whole = |value: &Value| {
        value.as_int().ok_or_else(|| {
            Error::new(format!(
                "'is {name}' needs an integer, found '{}'",
                value.kind()
            ))
        })
    };
    match name {
        "in" => {
            let [seq] = values.require(name, ["seq"])?;
            return contains(&seq, value, budget);
        }
        "sameas" => {
            let [other] = values.require(name, ["other"])?;
            return Ok(value.kind() == other.kind() && *value == other);
        }
        "divisibleby" => {
            let [number] = values.require(name, ["num"])?;
            let number = whole(&number)?;
            return match number {
                0 => Err(Error::new("division by zero")),
                number => Ok(whole(value)? % number == 0),
            };
        }
        _ => {}
    }
    let [] = values.bind(name, [])?;
    match name {
        "odd" => Ok(whole(value)?.rem_euclid(2) == 1),
        "even" => Ok(whole(value)?.rem_euclid(2) == 0),
        "lower" => Ok(is_cased(
            &text_of(value, budget)?,
            char::is_uppercase,
            char::is_lowercase,
        )),
        "upper" => Ok(is_cased(
            &text_of(value, budget)?,
            char::is_lowercase,
            char::is_uppercase,
        )),
        _ => is_kind(name, value),
    }
}

/// Whether a value is of the type that a test names.
fn is_kind(name: &str, value: &Value) -> Result<bool> {
    Ok(match name {
        "defined" => !matches!(value, Value::Undefined(_)),
        "undefined" => matches!(value, Value::Undefined(_)),
        "none" => matches!(value, Value::None),
        "boolean" => matches!(value, Value::Bool(_)),
        "true" => matches!(value, Value::Bool(true)),
        "false" => matches!(value, Value::Bool(false)),
        "integer" => matches!(value, Value::Int(_) | Value::Huge(_)),
        "float" => matches!(value, Value::Float(_)),
        "number" => matches!(
            value,
            Value::Int(_) | Value::Huge(_) | Value::Float(_) | Value::Bool(_)
        ),
        "string" => matches!(value, Value::Str(_)),
        "mapping" => matches!(value, Value::Dict(_)),
        "sequence" => match value {
            Value::Seq(seq) => !matches!(seq.kind, SeqKind::View(_)),
            other => matches!(other, Value::Str(_) | Value::Dict(_) | Value::Undefined(_)),
        },
        "iterable" => matches!(
            value,
            Value::Str(_)
                | Value::Seq(_)
                | Value::Dict(_)
                | Value::Iter(_)
                | Value::Undefined(_)
                | Value::Loop(_)
        ),
        "callable" => matches!(value, Value::Callable(_) | Value::Undefined(_)),
        "escaped" => false,
        other => return Err(Error::new(format!("no test named '{other}'"))),
    })
}

fn comparison(name: &str) -> Option<Comparator> {
    Some(match name {
        "eq" | "equalto" => Comparator::Equal,
        "ne" => Comparator::NotEqual,
        "lt" | "lessthan" => Comparator::Less,
        "le" => Comparator::LessEqual,
        "gt" | "greaterthan" => Comparator::Greater,
        "ge" => Comparator::GreaterEqual,
        // In `select("==", 1)`.
        "==" => Comparator::Equal,
        "!=" => Comparator::NotEqual,
        "<" => Comparator::Less,
        "<=" => Comparator::LessEqual,
        ">" => Comparator::Greater,
        ">=" => Comparator::GreaterEqual,
        _ => return None,
    })
}
