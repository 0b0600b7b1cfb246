//! Python's two ways to format: `'%s' % value` and `'{}'.format(value)`.

use super::arguments::{CallValues, int_or};
use super::budget::Budget;
use super::methods::attribute;
use super::python::{float_text, non_finite, repr_of, text_of};
use super::render::Renderer;
use super::strings::padded;
use super::value::{SeqKind, Value};
use super::{Error, Result};
use std::iter::Peekable;
use std::str::Chars;

/// The widest field and the most digits.
const MAX_WIDTH: usize = 1 << 16;

/// What stands between a `%` or a `:` and the letter of a conversion.
#[derive(Debug, Default)]
struct Spec {
    fill: Option<char>,
    align: Option<char>,
    /// The sign of positive numbers: `+`, a space, or none.
    sign: Option<char>,
    alternate: bool,
    zero: bool,
    width: usize,
    /// `,` or `_` between thousands.
    grouping: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

/// `round(number, digits)`: correctly, to the even digit where a number is halfway.
pub(super) fn rounded(number: f64, digits: i32) -> f64 {
    match usize::try_from(digits) {
        Ok(digits) => format!("{number:.digits$}").parse().unwrap_or(number),
        Err(_) => {
            let scale = 10f64.powi(-digits);
            (number / scale).round_ties_even() * scale
        }
    }
}

fn number(chars: &mut Peekable<Chars<'_>>) -> Result<Option<usize>> {
    let mut found = None;
    while let Some(digit) = chars.peek().and_then(|char| char.to_digit(10)) {
        chars.next();
        let value = found.unwrap_or(0) * 10 + digit as usize;
        if value > MAX_WIDTH {
            return Err(Error::new(format!(
                "a width of more than {MAX_WIDTH} in a format"
            )));
        }
        found = Some(value);
    }
    Ok(found)
}

/// `format % values`
pub(super) fn percent(format: &str, values: &Value, budget: &Budget) -> Result<Value> {
    let by_place = match values {
        Value::Seq(seq) if seq.kind == SeqKind::Tuple => seq.items.clone(),
        other => vec![other.clone()],
    };
    let mut by_place = by_place.into_iter();
    let (mut out, mut used_names) = (String::new(), matches!(values, Value::Dict(_)));
    let mut chars = format.chars().peekable();
    while let Some(char) = chars.next() {
        if char != '%' {
            out.push(char);
            continue;
        }
        let named = match chars.next_if_eq(&'(') {
            Some(_) => Some(value_by_name(&mut chars, values)?),
            None => None,
        };
        used_names |= named.is_some();
        let mut spec = flags(&mut chars);
        let mut star = |chars: &mut Peekable<Chars<'_>>| match chars.next_if_eq(&'*') {
            None => number(chars),
            Some(_) => {
                let width = int_or(by_place.next().as_ref(), 0)?;
                let width = usize::try_from(width)
                    .ok()
                    .filter(|width| *width <= MAX_WIDTH);
                width
                    .map(Some)
                    .ok_or_else(|| Error::new("a width of a format is out of range"))
            }
        };
        spec.width = star(&mut chars)?.unwrap_or(0);
        if chars.next_if_eq(&'.').is_some() {
            spec.precision = Some(star(&mut chars)?.unwrap_or(0));
        }
        while chars.next_if(|char| "hlL".contains(*char)).is_some() {}
        spec.kind = chars.next();
        if spec.kind == Some('%') {
            out.push('%');
            continue;
        }
        let value = match named {
            Some(value) => value,
            None => by_place
                .next()
                .ok_or_else(|| Error::new("not enough arguments for format string"))?,
        };
        let text = converted(&value, &mut spec, budget)?;
        budget.text(text.len())?;
        out.push_str(&text);
    }
    if by_place.next().is_some() && !used_names {
        return Err(Error::new(
            "not all arguments converted during string formatting",
        ));
    }
    Ok(Value::str(out))
}

/// The value of `(name)`, after its first bracket.
fn value_by_name(chars: &mut Peekable<Chars<'_>>, values: &Value) -> Result<Value> {
    let name: String = chars.by_ref().take_while(|char| *char != ')').collect();
    let Value::Dict(dict) = values else {
        return Err(Error::new("format requires a mapping"));
    };
    let found = dict.get_str(&name).cloned();
    found.ok_or_else(|| Error::new(format!("no key '{name}' to format")))
}

fn flags(chars: &mut Peekable<Chars<'_>>) -> Spec {
    let mut spec = Spec::default();
    while let Some(flag) = chars.next_if(|char| "-+ #0".contains(*char)) {
        match flag {
            '-' => spec.align = Some('<'),
            '#' => spec.alternate = true,
            '0' => spec.zero = true,
            // `+` counts more than a space.
            sign if spec.sign != Some('+') => spec.sign = Some(sign),
            _ => {}
        }
    }
    spec
}

/// A conversion of `%`.
fn converted(value: &Value, spec: &mut Spec, budget: &Budget) -> Result<String> {
    let kind = spec.kind.ok_or_else(|| Error::new("incomplete format"))?;
    let text = match kind {
        's' | 'r' | 'a' | 'c' => {
            spec.zero = false;
            let text = match (kind, value) {
                ('s', _) => text_of(value, budget)?,
                ('c', Value::Int(code)) => {
                    let char = u32::try_from(*code).ok().and_then(char::from_u32);
                    char.ok_or_else(|| Error::new("%c arg not in range"))?
                        .to_string()
                }
                ('c', _) => text_of(value, budget)?,
                _ => repr_of(value, budget)?,
            };
            let text = match spec.precision {
                Some(most) => text.chars().take(most).collect(),
                None => text,
            };
            return aligned(&text, spec, '>', budget);
        }
        'd' | 'i' | 'u' => {
            if let Value::Float(number) = value {
                spec.kind = Some('d');
                return number_text(&Value::Int(number.trunc() as i128), spec, budget);
            }
            spec.kind = Some('d');
            value
        }
        'x' | 'X' | 'o' | 'e' | 'E' | 'f' | 'F' | 'g' | 'G' => value,
        other => {
            return Err(Error::new(format!(
                "unsupported format character '{other}'"
            )));
        }
    };
    if "dxXo".contains(spec.kind.unwrap_or('d'))
        && text.as_int().is_none()
        && !matches!(text, Value::Huge(_))
    {
        return Err(Error::new(format!(
            "%{kind} format: a real number is required, not {}",
            value.kind()
        )));
    }
    number_text(text, spec, budget)
}

/// A number by its conversion, with sign, grouping and width.
fn number_text(value: &Value, spec: &Spec, budget: &Budget) -> Result<String> {
    let kind = spec.kind.unwrap_or('d');
    let (negative, digits) = match (kind, value) {
        ('d' | 'n', Value::Huge(text)) => (
            text.starts_with('-'),
            text.trim_start_matches('-').to_owned(),
        ),
        ('d' | 'x' | 'X' | 'o' | 'b' | 'n', whole) => {
            let number = int_or(Some(whole), 0)?;
            let digits = number.unsigned_abs();
            let prefix = |prefix: &'static str| if spec.alternate { prefix } else { "" };
            let text = match kind {
                'x' => format!("{}{digits:x}", prefix("0x")),
                'X' => format!("{}{digits:X}", prefix("0X")),
                'o' => format!("{}{digits:o}", prefix("0o")),
                'b' => format!("{}{digits:b}", prefix("0b")),
                _ => digits.to_string(),
            };
            let least = spec.precision.unwrap_or(0).saturating_sub(text.len());
            (number < 0, "0".repeat(least) + &text)
        }
        (kind, other) => {
            let number = other
                .as_float()
                .ok_or_else(|| Error::new(format!("must be real number, not {}", other.kind())))?;
            (
                number.is_sign_negative() && !number.is_nan(),
                float_digits(number.abs(), kind, spec),
            )
        }
    };
    let sign = match (negative, spec.sign) {
        (true, _) => "-".to_owned(),
        (false, Some(sign @ ('+' | ' '))) => sign.to_string(),
        _ => String::new(),
    };
    let digits = match spec.grouping {
        Some(separator) => grouped(&digits, separator),
        None => digits,
    };
    if spec.zero && spec.align.is_none() {
        let width = spec.width.saturating_sub(sign.len()) as i128;
        return Ok(sign + &padded(&digits, width, ['0', '>'], budget)?);
    }
    aligned(&(sign + &digits), spec, '>', budget)
}

/// The digits of a float that is not negative.
fn float_digits(number: f64, kind: char, spec: &Spec) -> String {
    if !number.is_finite() {
        let text = non_finite(number).to_owned();
        let percent = if kind == '%' { "%" } else { "" };
        return match kind.is_ascii_uppercase() {
            true => text.to_uppercase(),
            false => text + percent,
        };
    }
    let precision = spec.precision.unwrap_or(6);
    match kind {
        'f' | 'F' => format!("{number:.precision$}"),
        '%' => format!("{:.precision$}%", number * 100.0),
        'e' | 'E' => exponential(number, precision, kind),
        _ => {
            // `g`: significant digits, without zeros at the end.
            let significant = precision.max(1);
            let rounded = format!("{number:.*e}", significant - 1);
            let exponent: i32 = rounded
                .split_once('e')
                .and_then(|(_, exponent)| exponent.parse().ok())
                .unwrap_or(0);
            let letter = if kind == 'G' { 'E' } else { 'e' };
            let most = i32::try_from(significant).unwrap_or(i32::MAX);
            if (-4..most).contains(&exponent) {
                let decimals = usize::try_from(most - 1 - exponent).unwrap_or(0);
                shortened(format!("{number:.decimals$}"), spec.alternate)
            } else {
                let text = exponential(number, significant - 1, letter);
                match text.split_once(letter) {
                    Some((digits, exponent)) => {
                        let digits = shortened(digits.to_owned(), spec.alternate);
                        format!("{digits}{letter}{exponent}")
                    }
                    None => text,
                }
            }
        }
    }
}

/// Digits without zeros at the end of the decimals.
fn shortened(digits: String, keep: bool) -> String {
    match digits.contains('.') && !keep {
        true => digits
            .trim_end_matches('0')
            .trim_end_matches('.')
            .to_owned(),
        false => digits,
    }
}

fn exponential(number: f64, precision: usize, letter: char) -> String {
    let text = format!("{number:.precision$e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let (sign, exponent) = match exponent.strip_prefix('-') {
        Some(exponent) => ('-', exponent),
        None => ('+', exponent),
    };
    format!("{digits}{letter}{sign}{exponent:0>2}")
}

/// Whole digits with a separator between thousands.
fn grouped(digits: &str, separator: char) -> String {
    let whole = digits
        .find(|char: char| !char.is_ascii_digit())
        .unwrap_or(digits.len());
    let mut out = String::new();
    for (index, digit) in digits[..whole].chars().enumerate() {
        if index > 0 && (whole - index) % 3 == 0 {
            out.push(separator);
        }
        out.push(digit);
    }
    out + &digits[whole..]
}

fn aligned(text: &str, spec: &Spec, default: char, budget: &Budget) -> Result<String> {
    let align = [spec.fill.unwrap_or(' '), spec.align.unwrap_or(default)];
    padded(text, spec.width as i128, align, budget)
}

/// `format.format(…)` and `format.format_map(…)`.
pub(super) fn format_method(
    renderer: &Renderer<'_>,
    format: &str,
    name: &str,
    mut values: CallValues,
) -> Result<Value> {
    if name == "format_map" {
        let [mapping] = values.require(name, ["mapping"])?;
        let Value::Dict(dict) = mapping else {
            return Err(Error::new("format_map needs a dictionary"));
        };
        values = CallValues::default();
        for (key, value) in &dict.entries {
            values
                .named
                .push((text_of(key, &renderer.budget)?.into(), value.clone()));
        }
    }
    let (mut out, mut next) = (String::new(), 0);
    let mut rest = format;
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at]);
        let brace = &rest[at..at + 1];
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix(brace) {
            out.push_str(brace);
            rest = after;
            continue;
        }
        // Fields within the specification are rare and absent here.
        let Some((field, after)) = rest.split_once('}').filter(|_| brace == "{") else {
            return Err(Error::new("expected matching braces in a format"));
        };
        rest = after;
        let (field, spec) = field.split_once(':').unwrap_or((field, ""));
        let (field, conversion) = field.split_once('!').unwrap_or((field, ""));
        let value = field_value(renderer, field, &values, &mut next)?;
        let text = match conversion {
            "" => formatted(&value, spec, &renderer.budget)?,
            "s" => formatted(
                &Value::str(text_of(&value, &renderer.budget)?),
                spec,
                &renderer.budget,
            )?,
            "r" => formatted(
                &Value::str(repr_of(&value, &renderer.budget)?),
                spec,
                &renderer.budget,
            )?,
            other => {
                return Err(Error::new(format!(
                    "unknown conversion '{other}' in a format"
                )));
            }
        };
        renderer.budget.text(text.len())?;
        out.push_str(&text);
    }
    Ok(Value::str(out + rest))
}

/// The value of a field such as `0`, `name`, `name.key` or `name[0]`.
fn field_value(
    renderer: &Renderer<'_>,
    field: &str,
    values: &CallValues,
    next: &mut usize,
) -> Result<Value> {
    let end = field.find(['.', '[']).unwrap_or(field.len());
    let (first, mut path) = field.split_at(end);
    let missing = || Error::new(format!("no value for '{first}' in a format"));
    let mut value = match first.parse::<usize>() {
        Ok(place) => values.positional.get(place),
        Err(_) if first.is_empty() => {
            *next += 1;
            values.positional.get(*next - 1)
        }
        Err(_) => {
            let mut named = values.named.iter();
            named
                .find(|(name, _)| &**name == first)
                .map(|(_, value)| value)
        }
    }
    .cloned()
    .ok_or_else(missing)?;
    while !path.is_empty() {
        if let Some(rest) = path.strip_prefix('.') {
            let end = rest.find(['.', '[']).unwrap_or(rest.len());
            value = attribute(&value, &rest[..end].into(), &renderer.budget)?;
            path = &rest[end..];
        } else {
            let (key, rest) = path[1..].split_once(']').ok_or_else(missing)?;
            let index = key.parse().map_or_else(|_| Value::str(key), Value::Int);
            value = renderer.item(&value, &index)?;
            path = rest;
        }
    }
    Ok(value)
}

/// The part of a field after its colon.
fn spec_of(text: &str) -> Result<Spec> {
    let mut spec = Spec::default();
    let mut chars = text.chars().peekable();
    let second = text.chars().nth(1);
    if second.is_some_and(|char| "<>^=".contains(char)) {
        spec.fill = chars.next();
    }
    spec.align = chars.next_if(|char| "<>^=".contains(*char));
    spec.sign = chars.next_if(|char| "+- ".contains(*char));
    spec.alternate = chars.next_if_eq(&'#').is_some();
    spec.zero = chars.next_if_eq(&'0').is_some();
    spec.width = number(&mut chars)?.unwrap_or(0);
    spec.grouping = chars.next_if(|char| ",_".contains(*char));
    if chars.next_if_eq(&'.').is_some() {
        spec.precision = number(&mut chars)?;
    }
    spec.kind = chars.next();
    if spec.align == Some('=') {
        (spec.align, spec.zero) = (None, true);
    }
    match chars.next() {
        None => Ok(spec),
        Some(_) => Err(Error::new(format!("Invalid format specifier '{text}'"))),
    }
}

/// `format(value, spec)`
fn formatted(value: &Value, text: &str, budget: &Budget) -> Result<String> {
    if text.is_empty() {
        return text_of(value, budget);
    }
    let mut spec = spec_of(text)?;
    match value {
        Value::Int(_) | Value::Huge(_) | Value::Bool(_) => {
            spec.kind.get_or_insert('d');
            number_text(value, &spec, budget)
        }
        Value::Float(number) if spec.kind.is_none() && spec.precision.is_none() => {
            // As `str` has it.
            let sign = match (number.is_sign_negative(), spec.sign) {
                (true, _) => "-",
                (false, Some('+')) => "+",
                _ => "",
            };
            let digits = float_text(number.abs());
            let digits = match spec.grouping {
                Some(separator) => grouped(&digits, separator),
                None => digits,
            };
            aligned(&format!("{sign}{digits}"), &spec, '>', budget)
        }
        Value::Float(_) => {
            spec.kind.get_or_insert('g');
            number_text(value, &spec, budget)
        }
        other => {
            if spec.kind.is_some_and(|kind| kind != 's') {
                let kind = other.kind();
                return Err(Error::new(format!(
                    "Unknown format code for a value of type '{kind}'"
                )));
            }
            let text = text_of(other, budget)?;
            let text = match spec.precision {
                Some(most) => text.chars().take(most).collect(),
                None => text,
            };
            aligned(&text, &spec, '<', budget)
        }
    }
}
