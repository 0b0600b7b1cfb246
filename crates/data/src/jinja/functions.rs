//! The functions of the environment.

use super::arguments::{CallValues, str_of};
use super::python::text_of;
use super::render::Renderer;
use super::value::{Callable, SeqKind, Value};
use super::{Error, Result, strftime};
use std::cell::Cell;
use std::rc::Rc;

/// Their names.
pub(super) const FUNCTIONS: [&str; 7] = [
    "range",
    "dict",
    "namespace",
    "cycler",
    "joiner",
    "raise_exception",
    "strftime_now",
];

/// The longest range, as in Jinja's sandbox.
const MAX_RANGE: usize = 100_000;

pub(super) fn call(renderer: &mut Renderer<'_>, name: &str, values: CallValues) -> Result<Value> {
    match name {
        "range" => range(renderer, values),
        "dict" => Value::dict(entries(renderer, values)?),
        "namespace" => {
            let entries = entries(renderer, values)?.into_iter();
            let fields = entries.map(|(name, value)| Ok((str_of(&name)?.into(), value)));
            renderer.namespace(fields.collect::<Result<_>>()?)
        }
        "cycler" if !values.positional.is_empty() => {
            Ok(callable(Callable::Cycler(values.positional, Cell::new(0))))
        }
        "joiner" => {
            let [separator] = values.bind(name, ["sep"])?;
            let separator = separator.unwrap_or_else(|| Value::str(", "));
            Ok(callable(Callable::Joiner(
                str_of(&separator)?.into(),
                Cell::new(false),
            )))
        }
        "raise_exception" => {
            let [message] = values.require(name, ["message"])?;
            Err(Error::new(text_of(&message, &renderer.budget)?))
        }
        "strftime_now" => {
            let [format] = values.require(name, ["format"])?;
            Ok(Value::str(strftime::now(str_of(&format)?)?))
        }
        other => Err(Error::new(format!("{other} cannot be called like this"))),
    }
}

fn callable(callable: Callable) -> Value {
    Value::Callable(Rc::new(callable))
}

/// The entries of `dict(…)`: of a dictionary or pairs, and by name.
fn entries(renderer: &Renderer<'_>, values: CallValues) -> Result<Vec<(Value, Value)>> {
    let CallValues { positional, named } = values;
    let mut entries = Vec::new();
    match positional.as_slice() {
        [] => {}
        [Value::Dict(dict)] => entries.extend(dict.entries.iter().cloned()),
        [pairs] => {
            for pair in pairs.elements(&renderer.budget)? {
                let pair = pair.elements(&renderer.budget)?;
                let Ok([key, value]) = <[Value; 2]>::try_from(pair) else {
                    return Err(Error::new("a dictionary is made of pairs"));
                };
                entries.push((key, value));
            }
        }
        _ => return Err(Error::new("expected at most one argument without a name")),
    }
    entries.extend(
        named
            .into_iter()
            .map(|(name, value)| (Value::Str(name), value)),
    );
    Ok(entries)
}

fn range(renderer: &Renderer<'_>, values: CallValues) -> Result<Value> {
    let mut bounds = Vec::new();
    for value in &values.positional {
        bounds.push(value.as_int().ok_or_else(|| {
            Error::new(format!(
                "'{}' object cannot be interpreted as an integer",
                value.kind()
            ))
        })?);
    }
    let (start, stop, step) = match (bounds.as_slice(), values.named.is_empty()) {
        ([stop], true) => (0, *stop, 1),
        ([start, stop], true) => (*start, *stop, 1),
        ([start, stop, step], true) if *step != 0 => (*start, *stop, *step),
        _ => {
            return Err(Error::new(
                "range takes one to three integers, the step not 0",
            ));
        }
    };
    let (mut items, mut at) = (Vec::new(), start);
    while (step > 0 && at < stop) || (step < 0 && at > stop) {
        if items.len() == MAX_RANGE {
            return Err(Error::new(format!(
                "Range too big. The sandbox blocks ranges larger than MAX_RANGE ({MAX_RANGE})."
            )));
        }
        items.push(Value::Int(at));
        at = at.saturating_add(step);
    }
    renderer.budget.copy(items.len())?;
    Value::seq(SeqKind::Range([start, stop, step]), items)
}
