//! Jinja's filters for texts and numbers, with Hugging Face's `tojson`; those for lists are in `sequences.rs`.

mod regex;
mod sequences;

use crate::jinja::arguments::{CallValues, int_or, str_of, str_or};
use crate::jinja::budget::Budget;
use crate::jinja::dumps::{JsonStyle, dumps};
use crate::jinja::format::{percent, rounded};
use crate::jinja::python::{is_space, text_of};
use crate::jinja::render::Renderer;
use crate::jinja::value::Value;
use crate::jinja::{Error, Result, Syntax, markup, methods, strings};
use std::cmp::Ordering;

pub(crate) use regex::PythonRegex;

/// `value | name(values)`
pub(super) fn apply(
    renderer: &mut Renderer<'_>,
    name: &str,
    value: Value,
    values: CallValues,
) -> Result<Value> {
    match (name, &value) {
        ("safe" | "e" | "escape" | "forceescape", _) => {
            mark(name, &value, values, &renderer.budget)
        }
        ("d" | "default", _) => or_default(value, values),
        (_, Value::Markup(_)) if markup::ESCAPING_FILTERS.contains(&name) => {
            Err(markup::unsupported(name))
        }
        (_, Value::Markup(_)) => {
            let made = of_unmarked(renderer, name, value.unmarked(), values)?;
            Ok(match markup::MARKING_FILTERS.contains(&name) {
                true => made.marked(),
                false => made,
            })
        }
        _ => of_unmarked(renderer, name, value, values),
    }
}

/// The text of a value, marked as safe, by all filters but `safe` after it is made so.
fn mark(name: &str, value: &Value, values: CallValues, budget: &Budget) -> Result<Value> {
    let [] = values.bind(name, [])?;
    let text = text_of(value, budget)?;
    let made = match (name, value) {
        ("safe", _) | ("e" | "escape", Value::Markup(_)) => text,
        _ => markup::escaped(&text),
    };
    budget.text(made.len())?;
    Ok(Value::Markup(made.into()))
}

/// A filter of anything but a text that is marked as safe.
fn of_unmarked(
    renderer: &mut Renderer<'_>,
    name: &str,
    value: Value,
    values: CallValues,
) -> Result<Value> {
    if sequences::SEQUENCE_FILTERS.contains(&name) {
        return sequences::apply(renderer, name, value, values);
    }
    let budget = &renderer.budget;
    match name {
        "attr" => {
            let [name] = values.require(name, ["name"])?;
            let name = str_of(&name)?;
            // Only attributes, never keys.
            match methods::is_method(&value, name) {
                true => methods::attribute(&value, &name.into(), budget),
                false => Ok(Value::undefined(name)),
            }
        }
        "abs" => {
            let [] = values.bind(name, [])?;
            match &value {
                Value::Float(number) => Ok(Value::Float(number.abs())),
                other => Ok(Value::Int(int_or(Some(other), 0)?.abs())),
            }
        }
        "int" => int(&value, values),
        "float" => {
            let [default] = values.bind(name, ["default"])?;
            Ok(match float(&value)? {
                Some(number) => Value::Float(number),
                None => default.unwrap_or(Value::Float(0.0)),
            })
        }
        "round" => round(&value, values),
        "tojson" => Ok(Value::str(dumps(&value, &json_style(values)?, budget)?)),
        "format" => {
            let format = text_of(&value, budget)?;
            let values = match values {
                CallValues { positional, named } if named.is_empty() => Value::tuple(positional)?,
                CallValues { named, .. } => Value::dict(
                    named
                        .into_iter()
                        .map(|(name, value)| (Value::Str(name), value))
                        .collect(),
                )?,
            };
            percent(&format, &values, budget)
        }
        "indent" => indent(&value, values, budget),
        "regex_replace" if renderer.tree.syntax == Syntax::Harness => {
            regex_replace(&value, values, budget)
        }
        _ => {
            let text = text_of(&value, budget)?;
            texts(name, &text, values, budget)
        }
    }
}

/// A value, or what stands for one that is missing.
fn or_default(value: Value, values: CallValues) -> Result<Value> {
    let [default, boolean] = values.bind("default", ["default_value", "boolean"])?;
    let is_missing = match boolean.is_some_and(|flag| flag.is_true()) {
        true => !value.is_true(),
        false => matches!(value, Value::Undefined(_)),
    };
    Ok(match is_missing {
        true => default.unwrap_or_else(|| Value::str("")),
        false => value,
    })
}

/// The harness's own filter: Python's `re.sub`.
fn regex_replace(value: &Value, values: CallValues, budget: &Budget) -> Result<Value> {
    let name = "regex_replace";
    let [pattern, by, count] = values.bind(name, ["pattern", "repl", "count"])?;
    let (Some(pattern), Some(by)) = (pattern, by) else {
        return Err(Error::new(
            "regex_replace needs the arguments 'pattern' and 'repl'",
        ));
    };
    let count = usize::try_from(int_or(count.as_ref(), 0)?);
    let count = count.map_err(|_| Error::new("regex_replace: the count is below 0"))?;
    let problem = |problem: String| Error::new(format!("{name}: {problem}"));
    let regex = PythonRegex::new(str_of(&pattern)?).map_err(problem)?;
    let made = regex.replace(str_of(value)?, str_of(&by)?, count);
    let made = made.map_err(problem)?;
    budget.text(made.len())?;
    Ok(Value::Str(made.into()))
}

/// The filters that make a text of a value first.
fn texts(name: &str, text: &str, values: CallValues, budget: &Budget) -> Result<Value> {
    let made = match name {
        "replace" => {
            let [old, new, count] = values.bind(name, ["old", "new", "count"])?;
            let (Some(old), Some(new)) = (old, new) else {
                return Err(Error::new("replace needs the arguments 'old' and 'new'"));
            };
            let (old, new) = (text_of(&old, budget)?, text_of(&new, budget)?);
            let count = match count {
                Some(Value::None) | None => -1,
                Some(count) => int_or(Some(&count), -1)?,
            };
            strings::replace(text, [&old, &new], count, budget)?
        }
        "trim" => {
            let [chars] = values.bind(name, ["chars"])?;
            strings::strip(text, chars.as_ref(), [true, true])?.to_owned()
        }
        "center" => {
            let [width] = values.bind(name, ["width"])?;
            let width = int_or(width.as_ref(), 80)?;
            strings::centered(text, width, ' ', budget)?
        }
        "truncate" => return truncate(text, values),
        "urlencode" => url_encoded(text),
        _ => {
            let [] = values.bind(name, [])?;
            match name {
                "string" => text.to_owned(),
                "upper" => text.to_uppercase(),
                "lower" => text.to_lowercase(),
                "capitalize" => strings::capitalized(text),
                "title" => title(text),
                "wordcount" => {
                    let is_word = |char: char| char.is_alphanumeric() || char == '_';
                    let words = text
                        .split(|char| !is_word(char))
                        .filter(|word| !word.is_empty());
                    return Ok(Value::Int(words.count() as i128));
                }
                other => return Err(Error::new(format!("no filter named '{other}'"))),
            }
        }
    };
    budget.text(made.len())?;
    Ok(Value::str(made))
}

fn json_style(values: CallValues) -> Result<JsonStyle> {
    let parameters = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let [ascii, indent, separators, sorted] = values.bind("tojson", parameters)?;
    let mut style = JsonStyle {
        ascii: ascii.is_some_and(|flag| flag.is_true()),
        sorted: sorted.is_some_and(|flag| flag.is_true()),
        ..JsonStyle::default()
    };
    match indent {
        None | Some(Value::None) => {}
        Some(Value::Str(text)) => style.indent = Some(text.to_string()),
        Some(width) => {
            // Wider than any layout; a larger number only eats memory.
            let width = int_or(Some(&width), 0)?.clamp(0, 1024);
            style.indent = Some(" ".repeat(usize::try_from(width).unwrap_or(0)));
        }
    }
    if style.indent.is_some() {
        style.separators[0] = ",".to_owned();
    }
    match separators {
        None | Some(Value::None) => {}
        Some(Value::Seq(pair)) if pair.items.len() == 2 => {
            style.separators = [
                str_of(&pair.items[0])?.to_owned(),
                str_of(&pair.items[1])?.to_owned(),
            ];
        }
        Some(_) => return Err(Error::new("'separators' of tojson must be two strings")),
    }
    Ok(style)
}

/// A number in a text, as Python's `int` and `float` read it.
fn number_in(text: &str) -> Option<String> {
    let text = text.trim_matches(is_space);
    let doubled = text.contains("__") || text.starts_with('_') || text.ends_with('_');
    (!doubled).then(|| text.replace('_', ""))
}

fn int(value: &Value, values: CallValues) -> Result<Value> {
    let [default, base] = values.bind("int", ["default", "base"])?;
    if let Value::Undefined(name) = value {
        return Err(Error::new(format!("'{name}' is undefined")));
    }
    let base = u32::try_from(int_or(base.as_ref(), 10)?).unwrap_or(0);
    let whole = match value {
        Value::Str(text) => number_in(text).and_then(|text| integer_in(&text, base)),
        Value::Huge(_) => return Ok(value.clone()),
        other => other.as_int().map(Value::Int),
    };
    if matches!(value, Value::Float(number) if number.is_infinite()) {
        return Err(Error::new("cannot convert float infinity to integer"));
    }
    let whole = match whole {
        None => float(value)?
            .filter(|number| number.is_finite())
            .map(whole_of),
        whole => whole,
    };
    Ok(whole.or(default).unwrap_or(Value::Int(0)))
}

/// The whole part of a number, with every digit.
fn whole_of(number: f64) -> Value {
    Value::number(&format!("{:.0}", number.trunc()))
}

fn integer_in(text: &str, base: u32) -> Option<Value> {
    let (sign, digits) = match text.as_bytes().first()? {
        b'-' => ("-", &text[1..]),
        b'+' => ("", &text[1..]),
        _ => ("", text),
    };
    let prefix = match base {
        16 => "0x",
        8 => "0o",
        2 => "0b",
        _ => "",
    };
    let lower = digits.to_ascii_lowercase();
    let digits = lower.strip_prefix(prefix).unwrap_or(&lower);
    if digits.is_empty() || !(2..=36).contains(&base) || !digits.chars().all(|c| c.is_digit(base)) {
        return None;
    }
    match i128::from_str_radix(&format!("{sign}{digits}"), base) {
        Ok(number) => Some(Value::Int(number)),
        Err(_) if base == 10 => Some(Value::number(&format!("{sign}{digits}"))),
        Err(_) => None,
    }
}

fn float(value: &Value) -> Result<Option<f64>> {
    Ok(match value {
        Value::Undefined(name) => return Err(Error::new(format!("'{name}' is undefined"))),
        Value::Str(text) => number_in(text).and_then(|text| {
            let is_plain = !text
                .chars()
                .any(|c| c.is_ascii_alphabetic() && !matches!(c, 'e' | 'E'));
            let unsigned = text.trim_start_matches(['+', '-']).to_ascii_lowercase();
            let named = matches!(unsigned.as_str(), "inf" | "infinity" | "nan");
            (is_plain || named).then(|| text.parse().ok())?
        }),
        other => other.as_float(),
    })
}

fn round(value: &Value, values: CallValues) -> Result<Value> {
    let [precision, method] = values.bind("round", ["precision", "method"])?;
    let (precision, method) = (
        int_or(precision.as_ref(), 0)?,
        str_or(method.as_ref(), "common")?,
    );
    let precision = i32::try_from(precision.clamp(-308, 308)).unwrap_or(0);
    let number = match (value, method) {
        // Python rounds integers to integers.
        (Value::Int(_) | Value::Bool(_), "common") => {
            return rounded_integer(int_or(Some(value), 0)?, precision);
        }
        (Value::Huge(_), "common") if precision >= 0 => return Ok(value.clone()),
        (Value::Huge(_), "common") => return Err(Error::new(HUGE_ROUNDED)),
        (other, _) => other.as_float().ok_or_else(|| {
            Error::new(format!("cannot round a value of type '{}'", other.kind()))
        })?,
    };
    let scale = 10f64.powi(precision);
    Ok(Value::Float(match method {
        "common" => rounded(number, precision),
        "ceil" => (number * scale).ceil() / scale,
        "floor" => (number * scale).floor() / scale,
        _ => return Err(Error::new("method must be common, ceil or floor")),
    }))
}

const HUGE_ROUNDED: &str = "cannot round integers of more than 127 bits";

/// `round(number, precision)`: to the even one of two that are as near.
fn rounded_integer(number: i128, precision: i32) -> Result<Value> {
    let Some(scale) = 10_i128.checked_pow(precision.min(0).unsigned_abs()) else {
        return Ok(Value::Int(0));
    };
    let rest = number.rem_euclid(scale);
    let below = number.div_euclid(scale);
    let rounds_up = match rest.cmp(&(scale - rest)) {
        Ordering::Equal => below % 2 != 0,
        order => order.is_gt(),
    };
    let rounded = (below + i128::from(rounds_up)).checked_mul(scale);
    let rounded = rounded.ok_or_else(|| Error::new(HUGE_ROUNDED))?;
    Ok(Value::Int(rounded))
}

fn indent(value: &Value, values: CallValues, budget: &Budget) -> Result<Value> {
    let [width, first, blank] = values.bind("indent", ["width", "first", "blank"])?;
    let text = str_of(value)?;
    let [first, blank] = [first, blank].map(|flag| flag.is_some_and(|flag| flag.is_true()));
    let indention = match width {
        Some(Value::Str(text)) => text.to_string(),
        width => {
            let width = int_or(width.as_ref(), 4)?.clamp(0, 1024);
            " ".repeat(usize::try_from(width).unwrap_or(0))
        }
    };
    let text = format!("{text}\n");
    let lines = strings::split_lines(&text, false);
    budget.text(text.len() + indention.len().saturating_mul(lines.len()))?;
    let mut out = String::new();
    for (index, line) in lines.iter().enumerate() {
        if index > 0 {
            out.push('\n');
        }
        if (index == 0 && first) || (index > 0 && (blank || !line.is_empty())) {
            out.push_str(&indention);
        }
        out.push_str(line);
    }
    Ok(Value::str(out))
}

/// Jinja's own title case: of words after blanks, `-`, `(`, `{`, `[` and `<`.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut begins = true;
    for char in text.chars() {
        match begins {
            true => out.extend(char.to_uppercase()),
            false => out.extend(char.to_lowercase()),
        }
        begins = is_space(char) || matches!(char, '-' | '(' | '{' | '[' | '<');
    }
    out
}

fn url_encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' | b'/' => {
                out.push(char::from(byte));
            }
            byte => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

fn truncate(text: &str, values: CallValues) -> Result<Value> {
    let parameters = ["length", "killwords", "end", "leeway"];
    let [length, kill_words, end, leeway] = values.bind("truncate", parameters)?;
    let end = str_or(end.as_ref(), "...")?.to_owned();
    let whole = |value: i128| usize::try_from(value).unwrap_or(0);
    let length = whole(int_or(length.as_ref(), 255)?);
    let leeway = whole(int_or(leeway.as_ref(), 5)?);
    let (chars, end_chars) = (text.chars().count(), end.chars().count());
    if length < end_chars {
        return Err(Error::new(format!(
            "expected length >= {end_chars}, got {length}"
        )));
    }
    if chars <= length.saturating_add(leeway) {
        return Ok(Value::str(text));
    }
    let kept: String = text.chars().take(length - end_chars).collect();
    if kill_words.is_some_and(|flag| flag.is_true()) {
        return Ok(Value::str(kept + &end));
    }
    let words = kept
        .rsplit_once(' ')
        .map_or(kept.as_str(), |(words, _)| words);
    Ok(Value::str(format!("{words}{end}")))
}
