//! How Python writes values: `str`, `repr`, floats, white space.

use super::budget::Budget;
use super::value::{Seq, SeqKind, Value};
use super::{Error, Result};
use std::fmt::Write;

/// Python's `str.isspace` for one character.
pub fn is_space(char: char) -> bool {
    char.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&char)
}

/// `str(value)`.
pub(crate) fn text_of(value: &Value, budget: &Budget) -> Result<String> {
    let mut out = String::new();
    match value {
        Value::Str(text) | Value::Markup(text) => out.push_str(text),
        Value::Undefined(_) => {}
        other => write_repr(&mut out, other)?,
    }
    budget.text(out.len())?;
    Ok(out)
}

/// `repr(value)`.
pub(crate) fn repr_of(value: &Value, budget: &Budget) -> Result<String> {
    let mut out = String::new();
    write_repr(&mut out, value)?;
    budget.text(out.len())?;
    Ok(out)
}

fn write_repr(out: &mut String, value: &Value) -> Result<()> {
    match value {
        Value::Undefined(_) => out.push_str("Undefined"),
        Value::None => out.push_str("None"),
        Value::Bool(true) => out.push_str("True"),
        Value::Bool(false) => out.push_str("False"),
        // Writing into a `String` cannot fail.
        Value::Int(number) => _ = write!(out, "{number}"),
        Value::Huge(number) => out.push_str(number),
        Value::Float(number) => out.push_str(&float_text(*number)),
        Value::Str(text) => write_quoted(out, text),
        Value::Markup(text) => {
            out.push_str("Markup(");
            write_quoted(out, text);
            out.push(')');
        }
        Value::Seq(seq) => write_seq(out, seq)?,
        Value::Dict(dict) => {
            out.push('{');
            for (index, (key, value)) in dict.entries.iter().enumerate() {
                out.push_str(if index == 0 { "" } else { ", " });
                write_repr(out, key)?;
                out.push_str(": ");
                write_repr(out, value)?;
            }
            out.push('}');
        }
        Value::Iter(_) | Value::Namespace(_) | Value::Loop(_) | Value::Callable(_) => {
            return Err(Error::new(format!("cannot print a {}", value.kind())));
        }
    }
    Ok(())
}

fn write_seq(out: &mut String, seq: &Seq) -> Result<()> {
    let (open, close) = match seq.kind {
        SeqKind::List => ("[", "]"),
        SeqKind::Tuple if seq.items.len() == 1 => ("(", ",)"),
        SeqKind::Tuple => ("(", ")"),
        SeqKind::Range([start, stop, step]) => {
            _ = match step {
                1 => write!(out, "range({start}, {stop})"),
                step => write!(out, "range({start}, {stop}, {step})"),
            };
            return Ok(());
        }
        SeqKind::View(name) => {
            out.push_str(name);
            ("([", "])")
        }
    };
    out.push_str(open);
    for (index, item) in seq.items.iter().enumerate() {
        out.push_str(if index == 0 { "" } else { ", " });
        write_repr(out, item)?;
    }
    out.push_str(close);
    Ok(())
}

/// A string in the quotes that need the fewest escapes, single ones first.
pub(crate) fn write_quoted(out: &mut String, text: &str) {
    let quote = match text.contains('\'') && !text.contains('"') {
        true => '"',
        false => '\'',
    };
    out.push(quote);
    for char in text.chars() {
        match char {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            char if char == quote => out.extend(['\\', char]),
            char if is_printable(char) => out.push(char),
            char => {
                let code = u32::from(char);
                _ = match code {
                    ..=0xff => write!(out, "\\x{code:02x}"),
                    0x100..=0xffff => write!(out, "\\u{code:04x}"),
                    _ => write!(out, "\\U{code:08x}"),
                };
            }
        }
    }
    out.push(quote);
}

/// Python's `str.isprintable` for one character: neither control, format, separator, surrogate nor private use. Unassigned code
/// points, which change with every version of Unicode, count as printable here.
pub(crate) fn is_printable(char: char) -> bool {
    let code = u32::from(char);
    let hidden = [
        0..=0x1f,
        0x7f..=0xa0,
        0xad..=0xad,
        0x600..=0x605,
        0x61c..=0x61c,
        0x6dd..=0x6dd,
        0x70f..=0x70f,
        0x890..=0x891,
        0x8e2..=0x8e2,
        0x1680..=0x1680,
        0x180e..=0x180e,
        0x2000..=0x200f,
        0x2028..=0x202f,
        0x205f..=0x206f,
        0x3000..=0x3000,
        0xe000..=0xf8ff,
        0xfeff..=0xfeff,
        0xfff0..=0xfffb,
        0xfffe..=0xffff,
        0x110bd..=0x110bd,
        0x110cd..=0x110cd,
        0x13430..=0x1343f,
        0x1bca0..=0x1bca3,
        0x1d173..=0x1d17a,
        0xe0000..=0xe00ff,
        0xe01f0..=0x10ffff,
    ];
    !hidden.iter().any(|range| range.contains(&code))
}

/// `repr` of a float: the shortest digits that read back, with an exponent below 1e-4 and from 1e16.
pub(crate) fn float_text(number: f64) -> String {
    if !number.is_finite() {
        return non_finite(number).to_owned();
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    match (-4..16).contains(&exponent) || number == 0.0 {
        true => format!("{number:?}"),
        false => format!(
            "{digits}e{}{:02}",
            if exponent < 0 { '-' } else { '+' },
            exponent.abs()
        ),
    }
}

pub(crate) fn non_finite(number: f64) -> &'static str {
    match number {
        number if number.is_nan() => "nan",
        number if number > 0.0 => "inf",
        _ => "-inf",
    }
}

/// Whether a text has a letter of the one case and none of the other.
pub(crate) fn is_cased(text: &str, other: fn(char) -> bool, case: fn(char) -> bool) -> bool {
    text.chars().any(case) && !text.chars().any(other)
}
