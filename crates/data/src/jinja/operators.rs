//! Python's operators, indices and slices.

use super::ast::{Comparator, Operator};
use super::budget::Budget;
use super::format::percent;
use super::markup;
use super::value::{Seq, SeqKind, Value};
use super::{Error, Result};
use std::cmp::Ordering;

/// The error of a value that has no operations.
fn undefined(value: &Value) -> Option<Error> {
    match value {
        Value::Undefined(name) => Some(Error::new(format!("'{name}' is undefined"))),
        _ => None,
    }
}

fn unsupported(symbol: &str, a: &Value, b: &Value) -> Error {
    undefined(a).or_else(|| undefined(b)).unwrap_or_else(|| {
        Error::new(format!(
            "unsupported operand types for {symbol}: '{}' and '{}'",
            a.kind(),
            b.kind()
        ))
    })
}

pub(super) fn arithmetic(
    operator: Operator,
    a: &Value,
    b: &Value,
    budget: &Budget,
) -> Result<Value> {
    match (operator, a, b) {
        (_, Value::Markup(_), _) | (_, _, Value::Markup(_)) => {
            markup::arithmetic(operator, a, b, budget)
        }
        (Operator::Add, Value::Str(a), Value::Str(b)) => {
            budget.text(a.len() + b.len())?;
            Ok(Value::str([&**a, &**b].concat()))
        }
        (Operator::Add, Value::Seq(a), Value::Seq(b)) if joinable(a, b) => {
            budget.copy(a.items.len() + b.items.len())?;
            Value::seq(a.kind, [&a.items[..], &b.items[..]].concat())
        }
        (Operator::Modulo, Value::Str(format), values) => percent(format, values, budget),
        (Operator::Multiply, repeated @ (Value::Str(_) | Value::Seq(_)), times)
        | (Operator::Multiply, times, repeated @ (Value::Str(_) | Value::Seq(_))) => {
            repeat(repeated, times, budget).unwrap_or_else(|| Err(unsupported("*", a, b)))
        }
        _ => numbers(operator, a, b),
    }
}

fn joinable(a: &Seq, b: &Seq) -> bool {
    a.kind == b.kind && matches!(a.kind, SeqKind::List | SeqKind::Tuple)
}

fn repeat(value: &Value, times: &Value, budget: &Budget) -> Option<Result<Value>> {
    let times = usize::try_from(times.as_int()?.max(0)).unwrap_or(usize::MAX);
    let length = |items: usize| items.saturating_mul(times);
    Some(match value {
        Value::Str(text) => budget
            .text(length(text.len()))
            .map(|()| Value::str(text.repeat(times))),
        Value::Seq(seq) if joinable(seq, seq) => budget
            .copy(length(seq.items.len()).saturating_mul(8))
            .and_then(|()| {
                let all = std::iter::repeat_n(&seq.items, times).flatten();
                Value::seq(seq.kind, all.cloned().collect())
            }),
        _ => return None,
    })
}

fn numbers(operator: Operator, a: &Value, b: &Value) -> Result<Value> {
    let symbol = match operator {
        Operator::Add => "+",
        Operator::Subtract => "-",
        Operator::Multiply => "*",
        Operator::Divide => "/",
        Operator::FloorDivide => "//",
        Operator::Modulo => "%",
        Operator::Power => "**",
    };
    if let (Some(a), Some(b)) = (a.as_int(), b.as_int()) {
        return integers(operator, a, b);
    }
    if matches!(a, Value::Huge(_)) || matches!(b, Value::Huge(_)) {
        return Err(Error::new(
            "cannot calculate with integers of more than 127 bits",
        ));
    }
    let (Some(x), Some(y)) = (a.as_float(), b.as_float()) else {
        return Err(unsupported(symbol, a, b));
    };
    floats(operator, x, y)
}

fn floats(operator: Operator, x: f64, y: f64) -> Result<Value> {
    let divides = matches!(
        operator,
        Operator::Divide | Operator::FloorDivide | Operator::Modulo
    );
    if divides && y == 0.0 {
        return Err(Error::new("division by zero"));
    }
    // The remainder has the divisor's sign.
    let modulo = || {
        let rest = x % y;
        match rest != 0.0 && (rest < 0.0) != (y < 0.0) {
            true => rest + y,
            false if rest == 0.0 => 0.0_f64.copysign(y),
            false => rest,
        }
    };
    Ok(Value::Float(match operator {
        Operator::Add => x + y,
        Operator::Subtract => x - y,
        Operator::Multiply => x * y,
        Operator::Divide => x / y,
        Operator::FloorDivide => ((x - modulo()) / y).round(),
        Operator::Modulo => modulo(),
        Operator::Power => x.powf(y),
    }))
}

fn integers(operator: Operator, a: i128, b: i128) -> Result<Value> {
    let divides = matches!(
        operator,
        Operator::Divide | Operator::FloorDivide | Operator::Modulo
    );
    if divides && b == 0 {
        return Err(Error::new("division by zero"));
    }
    let whole = match operator {
        Operator::Add => a.checked_add(b),
        Operator::Subtract => a.checked_sub(b),
        Operator::Multiply => a.checked_mul(b),
        Operator::Divide => return Ok(Value::Float(a as f64 / b as f64)),
        // Rounded down; the remainder has the divisor's sign.
        Operator::FloorDivide => a.checked_div(b).map(|quotient| {
            let rounds_up = a % b != 0 && (a < 0) != (b < 0);
            quotient - i128::from(rounds_up)
        }),
        Operator::Modulo => a.checked_rem(b).map(|rest| {
            let other_sign = rest != 0 && (rest < 0) != (b < 0);
            if other_sign { rest + b } else { rest }
        }),
        Operator::Power if b < 0 => return Ok(Value::Float((a as f64).powf(b as f64))),
        Operator::Power => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
    };
    let whole = whole.ok_or_else(|| Error::new("an integer of more than 127 bits"))?;
    Ok(Value::Int(whole))
}

pub(super) fn negate(value: &Value) -> Result<Value> {
    match value {
        Value::Float(number) => Ok(Value::Float(-number)),
        other => match other.as_int() {
            Some(number) => Ok(Value::Int(-number)),
            None => Err(undefined(other).unwrap_or_else(|| {
                Error::new(format!("bad operand type for unary -: '{}'", other.kind()))
            })),
        },
    }
}

pub(super) fn compare(
    comparison: Comparator,
    a: &Value,
    b: &Value,
    budget: &Budget,
) -> Result<bool> {
    let order = |symbol: &str| {
        let nan = || matches!((a.as_float(), b.as_float()), (Some(_), Some(_)));
        match a.order(b) {
            None if !nan() => Err(unsupported(symbol, a, b)),
            order => Ok(order),
        }
    };
    Ok(match comparison {
        Comparator::Equal => a == b,
        Comparator::NotEqual => a != b,
        Comparator::Less => order("<")? == Some(Ordering::Less),
        Comparator::LessEqual => order("<=")?.is_some_and(Ordering::is_le),
        Comparator::Greater => order(">")? == Some(Ordering::Greater),
        Comparator::GreaterEqual => order(">=")?.is_some_and(Ordering::is_ge),
        Comparator::In => contains(b, a, budget)?,
        Comparator::NotIn => !contains(b, a, budget)?,
    })
}

/// `item in container`
pub(super) fn contains(container: &Value, item: &Value, budget: &Budget) -> Result<bool> {
    if let (Some(text), Some(part)) = (container.as_str(), item.as_str()) {
        budget.copy(text.len() / 64)?;
        return Ok(text.contains(part));
    }
    match (container, item) {
        (Value::Str(_) | Value::Markup(_), other) => Err(undefined(other).unwrap_or_else(|| {
            Error::new(format!(
                "'in <string>' requires string as left operand, not {}",
                other.kind()
            ))
        })),
        (Value::Dict(dict), key) => {
            budget.copy(dict.entries.len())?;
            Ok(dict.get(key).is_some())
        }
        (Value::Seq(seq), item) => {
            budget.copy(seq.items.len())?;
            Ok(seq.items.contains(item))
        }
        (Value::Undefined(_) | Value::Iter(_), item) => {
            Ok(container.elements(budget)?.contains(item))
        }
        (other, _) => Err(Error::new(format!(
            "argument of type '{}' is not iterable",
            other.kind()
        ))),
    }
}

/// `value[index]`, undefined if there is none.
pub(super) fn item(value: &Value, index: &Value, budget: &Budget) -> Result<Value> {
    if let Some(problem) = undefined(value) {
        return Err(problem);
    }
    let found = match (value, index) {
        (Value::Markup(_), index) => {
            return item(&value.unmarked(), index, budget).map(|char| char.marked());
        }
        (Value::Dict(dict), key) => dict.get(key).cloned(),
        (Value::Seq(seq), index) => {
            let place = place(index, seq.items.len());
            place.and_then(|place| seq.items.get(place).cloned())
        }
        (Value::Str(text), index) => {
            budget.copy(text.len() / 8)?;
            let place = match text.is_ascii() {
                true => place(index, text.len()),
                false => place(index, text.chars().count()),
            };
            place.and_then(|place| match text.is_ascii() {
                true => text.get(place..=place).map(Value::str),
                false => text
                    .chars()
                    .nth(place)
                    .map(|char| Value::str(char.to_string())),
            })
        }
        _ => None,
    };
    Ok(found.unwrap_or_else(|| {
        let name = match index {
            Value::Str(name) => name.to_string(),
            other => other
                .as_int()
                .map_or_else(String::new, |index| index.to_string()),
        };
        Value::undefined(name)
    }))
}

/// A place in a sequence, counted from its end if negative.
fn place(index: &Value, length: usize) -> Option<usize> {
    let index = index.as_int()?;
    let from_end = if index < 0 { length as i128 } else { 0 };
    usize::try_from(index + from_end).ok()
}

/// `value[start:stop:step]`
pub(super) fn slice(value: &Value, bounds: &[Option<Value>; 3], budget: &Budget) -> Result<Value> {
    if let Some(problem) = undefined(value) {
        return Err(problem);
    }
    let mut whole = [None; 3];
    for (whole, bound) in whole.iter_mut().zip(bounds) {
        *whole = match bound {
            None | Some(Value::None) => None,
            Some(bound) => Some(
                bound
                    .as_int()
                    .ok_or_else(|| Error::new("slice indices must be integers or None"))?,
            ),
        };
    }
    match value {
        Value::Markup(_) => slice(&value.unmarked(), bounds, budget).map(|part| part.marked()),
        Value::Str(text) => {
            budget.copy(text.len() / 8)?;
            budget.text(text.len())?;
            if whole[2].is_none_or(|step| step == 1) && text.is_ascii() {
                let places = places(whole, text.len())?;
                let first = places.first().copied().unwrap_or(0);
                return Ok(Value::str(&text[first..first + places.len()]));
            }
            let chars: Vec<char> = text.chars().collect();
            let places = places(whole, chars.len())?;
            let text: String = places.into_iter().map(|place| chars[place]).collect();
            Ok(Value::str(text))
        }
        Value::Seq(seq) if !matches!(seq.kind, SeqKind::View(_)) => {
            budget.copy(seq.items.len())?;
            let places = places(whole, seq.items.len())?;
            let items: Vec<Value> = places
                .into_iter()
                .map(|place| seq.items[place].clone())
                .collect();
            let kind = match seq.kind {
                SeqKind::Range(_) => SeqKind::List,
                kind => kind,
            };
            Value::seq(kind, items)
        }
        // As an index that is not there.
        _ => Ok(Value::undefined("slice")),
    }
}

/// The places of a slice in a sequence.
fn places([start, stop, step]: [Option<i128>; 3], length: usize) -> Result<Vec<usize>> {
    let (length, step) = (length as i128, step.unwrap_or(1));
    if step == 0 {
        return Err(Error::new("slice step cannot be zero"));
    }
    let (lowest, highest) = if step > 0 {
        (0, length)
    } else {
        (-1, length - 1)
    };
    let bound = |bound: Option<i128>, default: i128| {
        let from_end = |bound: i128| {
            if bound < 0 {
                bound.saturating_add(length)
            } else {
                bound
            }
        };
        bound.map_or(default, |bound| from_end(bound).clamp(lowest, highest))
    };
    let (first, end) = match step > 0 {
        true => (bound(start, lowest), bound(stop, highest)),
        false => (bound(start, highest), bound(stop, lowest)),
    };
    let mut places = Vec::new();
    let mut place = first;
    while (step > 0 && place < end) || (step < 0 && place > end) {
        places.extend(usize::try_from(place));
        place = place.saturating_add(step);
    }
    Ok(places)
}
