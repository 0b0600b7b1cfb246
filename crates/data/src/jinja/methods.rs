//! The attributes and methods of Python's values. Those that would change a list or a dictionary are absent, as in the sandbox.

use super::arguments::CallValues;
use super::budget::Budget;
use super::value::{Callable, Dict, Loop, Seq, SeqKind, Value};
use super::{Error, Result, markup, strings};
use std::rc::Rc;
use std::sync::Arc;

const SEQ_METHODS: [&str; 2] = ["count", "index"];
const DICT_METHODS: [&str; 5] = ["copy", "get", "items", "keys", "values"];
/// Methods that change a list or a dictionary.
const UNSAFE_METHODS: [&str; 11] = [
    "append",
    "clear",
    "extend",
    "insert",
    "pop",
    "popitem",
    "remove",
    "reverse",
    "setdefault",
    "sort",
    "update",
];

pub(super) fn is_method(value: &Value, name: &str) -> bool {
    match value {
        Value::Str(_) | Value::Markup(_) => strings::is_method(name),
        Value::Seq(seq) => match seq.kind {
            SeqKind::List => {
                SEQ_METHODS.contains(&name) || name == "copy" || UNSAFE_METHODS.contains(&name)
            }
            SeqKind::Tuple | SeqKind::Range(_) => SEQ_METHODS.contains(&name),
            SeqKind::View(_) => false,
        },
        Value::Dict(_) => DICT_METHODS.contains(&name) || UNSAFE_METHODS.contains(&name),
        Value::Float(_) => name == "is_integer",
        Value::Loop(_) => matches!(name, "cycle" | "changed"),
        _ => false,
    }
}

/// `value.name`: a method, a field, or the value of a key.
pub(super) fn attribute(value: &Value, name: &Arc<str>, budget: &Budget) -> Result<Value> {
    if is_method(value, name) {
        if UNSAFE_METHODS.contains(&&**name) {
            return Err(Error::new(format!(
                "access to attribute '{name}' of '{}' object is unsafe.",
                value.kind()
            )));
        }
        let method = Callable::Method(value.clone(), Arc::clone(name));
        return Ok(Value::Callable(Rc::new(method)));
    }
    budget.step()?;
    let found = match value {
        Value::Undefined(missing) => {
            return Err(Error::new(format!("'{missing}' is undefined")));
        }
        Value::Dict(dict) => dict.get_str(name).cloned(),
        Value::Namespace(fields) => {
            let fields = fields.borrow();
            let found = fields.iter().find(|(field, _)| field == name);
            found.map(|(_, value)| value.clone())
        }
        Value::Loop(state) => loop_field(state, name),
        _ => None,
    };
    Ok(found.unwrap_or_else(|| Value::Undefined(Arc::clone(name))))
}

fn loop_field(state: &Loop, name: &str) -> Option<Value> {
    let (index, length) = (state.index.get(), state.items.len());
    let number = |number: usize| Some(Value::Int(number as i128));
    let item = |index: Option<usize>, missing: &str| {
        let item = index.and_then(|index| state.items.get(index).cloned());
        Some(item.unwrap_or_else(|| Value::undefined(missing)))
    };
    match name {
        "index" => number(index + 1),
        "index0" => number(index),
        "revindex" => number(length - index),
        "revindex0" => number(length - index - 1),
        "length" => number(length),
        // Loops that call themselves are absent here.
        "depth" => number(1),
        "depth0" => number(0),
        "first" => Some(Value::Bool(index == 0)),
        "last" => Some(Value::Bool(index + 1 == length)),
        "previtem" => item(index.checked_sub(1), "there is no previous item"),
        "nextitem" => item(index.checked_add(1), "there is no next item"),
        _ => None,
    }
}

pub(super) fn call(
    budget: &Budget,
    value: &Value,
    name: &str,
    values: CallValues,
) -> Result<Value> {
    match value {
        Value::Str(text) => strings::call(text, name, values, budget),
        Value::Markup(text) => markup::call(text, name, values, budget),
        Value::Seq(seq) => sequence(seq, name, values, budget),
        Value::Dict(dict) => dictionary(value, dict, name, values),
        Value::Float(number) => {
            let [] = values.bind(name, [])?;
            Ok(Value::Bool(number.fract() == 0.0))
        }
        Value::Loop(state) if name == "cycle" => {
            let choices = values.positional;
            match choices.len() {
                0 => Err(Error::new("no items for cycling given")),
                n => Ok(choices[state.index.get() % n].clone()),
            }
        }
        Value::Loop(state) => {
            let mut last = state.last.borrow_mut();
            let changed = last.as_ref() != Some(&values.positional);
            *last = Some(values.positional);
            Ok(Value::Bool(changed))
        }
        other => Err(Error::new(format!(
            "'{}' has no method '{name}'",
            other.kind()
        ))),
    }
}

fn sequence(seq: &Seq, name: &str, values: CallValues, budget: &Budget) -> Result<Value> {
    budget.copy(seq.items.len())?;
    match name {
        "copy" => {
            let [] = values.bind(name, [])?;
            Value::list(seq.items.clone())
        }
        "count" => {
            let [value] = values.require(name, ["value"])?;
            Ok(Value::Int(
                seq.items.iter().filter(|item| **item == value).count() as i128,
            ))
        }
        _ => {
            let [value] = values.require(name, ["value"])?;
            let place = seq.items.iter().position(|item| *item == value);
            let place = place.ok_or_else(|| Error::new("the value is not in the list"))?;
            Ok(Value::Int(place as i128))
        }
    }
}

fn dictionary(value: &Value, dict: &Dict, name: &str, values: CallValues) -> Result<Value> {
    if name == "get" {
        let [key, default] = values.bind(name, ["key", "default"])?;
        let key = key.ok_or_else(|| Error::new("get expected at least 1 argument, got 0"))?;
        return Ok(dict.get(&key).cloned().or(default).unwrap_or(Value::None));
    }
    let [] = values.bind(name, [])?;
    let entries = dict.entries.iter();
    match name {
        "keys" => Value::seq(
            SeqKind::View("dict_keys"),
            entries.map(|(key, _)| key.clone()).collect(),
        ),
        "values" => Value::seq(
            SeqKind::View("dict_values"),
            entries.map(|(_, value)| value.clone()).collect(),
        ),
        "items" => {
            let pairs: Result<Vec<Value>> = entries
                .map(|(key, value)| Value::tuple(vec![key.clone(), value.clone()]))
                .collect();
            Value::seq(SeqKind::View("dict_items"), pairs?)
        }
        _ => Ok(value.clone()),
    }
}
