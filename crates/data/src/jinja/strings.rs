//! The methods of Python's strings.

use super::arguments::{CallValues, int_or, str_of, str_or};
use super::budget::Budget;
use super::python::{is_cased, is_printable, is_space};
use super::value::Value;
use super::{Error, Result};

const STR_METHODS: [&str; 42] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
];
const MORE_STR_METHODS: [&str; 2] = ["upper", "zfill"];

pub(super) fn is_method(name: &str) -> bool {
    STR_METHODS.contains(&name) || MORE_STR_METHODS.contains(&name)
}

/// `text.name(values)`
pub(super) fn call(text: &str, name: &str, values: CallValues, budget: &Budget) -> Result<Value> {
    budget.copy(text.len() / 8)?;
    match name {
        "join" => {
            let [elements] = values.require(name, ["iterable"])?;
            return join(text, &elements, budget);
        }
        "split" | "rsplit" | "splitlines" | "partition" | "rpartition" => {
            return split(text, name, values, budget);
        }
        "startswith" | "endswith" | "find" | "rfind" | "index" | "rindex" | "count" => {
            return search(text, name, values);
        }
        "strip" | "lstrip" | "rstrip" => {
            let [chars] = values.bind(name, ["chars"])?;
            let sides = [name != "rstrip", name != "lstrip"];
            return Ok(Value::str(strip(text, chars.as_ref(), sides)?));
        }
        "removeprefix" | "removesuffix" => {
            let [part] = values.require(name, ["part"])?;
            let part = str_of(&part)?;
            let rest = match name {
                "removeprefix" => text.strip_prefix(part),
                _ => text.strip_suffix(part),
            };
            return Ok(Value::str(rest.unwrap_or(text)));
        }
        "replace" => {
            let [old, new, count] = values.bind(name, ["old", "new", "count"])?;
            let (Some(old), Some(new)) = (old, new) else {
                return Err(Error::new("replace expected at least 2 arguments"));
            };
            let count = int_or(count.as_ref(), -1)?;
            let made = replace(text, [str_of(&old)?, str_of(&new)?], count, budget)?;
            return Ok(Value::str(made));
        }
        "center" | "ljust" | "rjust" | "zfill" | "expandtabs" => {
            return widened(text, name, values, budget);
        }
        _ => {}
    }
    if name.starts_with("is") {
        let [] = values.bind(name, [])?;
        return Ok(Value::Bool(is_kind(text, name)));
    }
    budget.text(text.len())?;
    let [] = values.bind(name, [])?;
    Ok(Value::str(match name {
        "lower" => text.to_lowercase(),
        "casefold" => text.to_lowercase().replace('ß', "ss"),
        "upper" => text.to_uppercase(),
        "capitalize" => capitalized(text),
        "title" => titled(text),
        "swapcase" => text.chars().map(swapped).collect(),
        other => {
            return Err(Error::new(format!(
                "the method '{other}' of strings is not supported"
            )));
        }
    }))
}

fn swapped(char: char) -> String {
    match char.is_uppercase() {
        true => char.to_lowercase().collect(),
        false => char.to_uppercase().collect(),
    }
}

pub(super) fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_uppercase().collect::<String>() + &chars.as_str().to_lowercase(),
        None => String::new(),
    }
}

/// Python's title case: of runs of letters.
fn titled(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut in_word = false;
    for char in text.chars() {
        match in_word {
            true => out.extend(char.to_lowercase()),
            false => out.extend(char.to_uppercase()),
        }
        in_word = char.is_uppercase() || char.is_lowercase();
    }
    out
}

fn is_kind(text: &str, name: &str) -> bool {
    let all = |holds: fn(char) -> bool| !text.is_empty() && text.chars().all(holds);
    match name {
        "isalnum" => all(char::is_alphanumeric),
        "isalpha" => all(char::is_alphabetic),
        "isascii" => text.is_ascii(),
        "isdecimal" | "isdigit" | "isnumeric" => all(char::is_numeric),
        "islower" => is_cased(text, char::is_uppercase, char::is_lowercase),
        "isupper" => is_cased(text, char::is_lowercase, char::is_uppercase),
        "isprintable" => text.chars().all(is_printable),
        "isspace" => all(is_space),
        "istitle" => text.chars().any(char::is_uppercase) && titled(text) == text,
        _ => false,
    }
}

/// A text without characters at its beginning and its end: white space, or those of a text.
pub(super) fn strip<'t>(text: &'t str, chars: Option<&Value>, sides: [bool; 2]) -> Result<&'t str> {
    let chars = match chars {
        None | Some(Value::None) => None,
        Some(chars) => Some(str_of(chars)?),
    };
    let goes = |char: char| chars.map_or(is_space(char), |chars| chars.contains(char));
    let [start, end] = sides;
    let text = if start {
        text.trim_start_matches(goes)
    } else {
        text
    };
    Ok(if end {
        text.trim_end_matches(goes)
    } else {
        text
    })
}

/// The first `count` occurrences replaced, all if it is negative.
pub(super) fn replace(
    text: &str,
    [old, new]: [&str; 2],
    count: i128,
    budget: &Budget,
) -> Result<String> {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    let found = match old.is_empty() {
        true => text.chars().count() + 1,
        false => text.matches(old).count(),
    };
    budget.text(text.len() + found.min(count).saturating_mul(new.len()))?;
    Ok(text.replacen(old, new, count))
}

fn search(text: &str, name: &str, values: CallValues) -> Result<Value> {
    let [part, start, end] = values.bind(name, ["sub", "start", "end"])?;
    let part = part.ok_or_else(|| Error::new(format!("{name} needs an argument")))?;
    let [start, end] =
        [start, end].map(|bound| bound.filter(|bound| !matches!(bound, Value::None)));
    let chars = text.chars().count() as i128;
    let from_end = |bound: i128| if bound < 0 { bound + chars } else { bound }.clamp(0, chars);
    let (start, end) = (
        from_end(int_or(start.as_ref(), 0)?),
        from_end(int_or(end.as_ref(), chars)?),
    );
    let place = |char: i128| {
        let mut places = text.char_indices().map(|(at, _)| at);
        let char = usize::try_from(char).unwrap_or(0);
        places.nth(char).unwrap_or(text.len())
    };
    let (from, to) = (place(start), place(end.max(start)));
    let within = &text[from..to];
    let found_at = |at: Option<usize>| match at {
        Some(at) => Ok(Value::Int(text[..from + at].chars().count() as i128)),
        None if name.ends_with("index") => Err(Error::new("substring not found")),
        None => Ok(Value::Int(-1)),
    };
    if let (Value::Seq(parts), "startswith" | "endswith") = (&part, name) {
        let mut parts = parts.items.iter().filter_map(Value::as_str);
        let holds = |part: &str| match name {
            "startswith" => within.starts_with(part),
            _ => within.ends_with(part),
        };
        return Ok(Value::Bool(parts.any(holds)));
    }
    let part = str_of(&part)?;
    match name {
        "startswith" => Ok(Value::Bool(within.starts_with(part))),
        "endswith" => Ok(Value::Bool(within.ends_with(part))),
        "find" | "index" => found_at(within.find(part)),
        "rfind" | "rindex" => found_at(within.rfind(part)),
        _ => Ok(Value::Int(within.matches(part).count() as i128)),
    }
}

fn split(text: &str, name: &str, values: CallValues, budget: &Budget) -> Result<Value> {
    let strings = |parts: Vec<&str>| -> Vec<Value> { parts.into_iter().map(Value::str).collect() };
    if name == "splitlines" {
        let [keep] = values.bind(name, ["keepends"])?;
        let keep = keep.is_some_and(|keep| keep.is_true());
        return Value::list(strings(split_lines(text, keep)));
    }
    if name.ends_with("partition") {
        let [separator] = values.require(name, ["sep"])?;
        let separator = str_of(&separator)?;
        if separator.is_empty() {
            return Err(Error::new("empty separator"));
        }
        let parts = match name {
            "partition" => text.split_once(separator),
            _ => text.rsplit_once(separator),
        };
        return Value::tuple(strings(match parts {
            Some((before, after)) => vec![before, separator, after],
            None if name == "partition" => vec![text, "", ""],
            None => vec!["", "", text],
        }));
    }
    let [separator, most] = values.bind(name, ["sep", "maxsplit"])?;
    let most = usize::try_from(int_or(most.as_ref(), -1)?).unwrap_or(usize::MAX - 1);
    let parts = match separator {
        None | Some(Value::None) => split_space(text, most, name == "rsplit"),
        Some(separator) => {
            let separator = str_of(&separator)?;
            if separator.is_empty() {
                return Err(Error::new("empty separator"));
            }
            match name {
                "split" => text.splitn(most + 1, separator).collect(),
                _ => {
                    let mut parts: Vec<&str> = text.rsplitn(most + 1, separator).collect();
                    parts.reverse();
                    parts
                }
            }
        }
    };
    budget.copy(parts.len().saturating_mul(4))?;
    Value::list(strings(parts))
}

/// Words between white space; after `most` splits the rest stays whole.
fn split_space(text: &str, most: usize, from_end: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let trimmed = |text| match from_end {
        false => str::trim_start_matches(text, is_space),
        true => str::trim_end_matches(text, is_space),
    };
    let mut rest = trimmed(text);
    while !rest.is_empty() {
        let cut = match from_end {
            _ if parts.len() == most => None,
            false => rest.find(is_space).map(|at| rest.split_at(at)),
            true => rest
                .char_indices()
                .rfind(|(_, char)| is_space(*char))
                .map(|(at, char)| {
                    let (before, word) = rest.split_at(at + char.len_utf8());
                    (word, before)
                }),
        };
        let (part, more) = cut.unwrap_or((rest, ""));
        parts.push(part);
        rest = trimmed(more);
    }
    if from_end {
        parts.reverse();
    }
    parts
}

/// Lines as Python has them: several characters end one.
pub(super) fn split_lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let ends = |char: char| {
        matches!(
            char,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'
                ..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let Some(at) = rest.find(ends) else {
            lines.push(rest);
            break;
        };
        let end = match rest[at..].starts_with("\r\n") {
            true => at + 2,
            false => at + rest[at..].chars().next().map_or(1, char::len_utf8),
        };
        lines.push(&rest[..if keep_ends { end } else { at }]);
        rest = &rest[end..];
    }
    lines
}

fn widened(text: &str, name: &str, values: CallValues, budget: &Budget) -> Result<Value> {
    if name == "expandtabs" {
        let [size] = values.bind(name, ["tabsize"])?;
        let size = usize::try_from(int_or(size.as_ref(), 8)?.clamp(0, 64)).unwrap_or(0);
        budget.text(text.len() + text.matches('\t').count() * size)?;
        let (mut out, mut column) = (String::new(), 0);
        for char in text.chars() {
            if char == '\t' {
                let spaces = if size == 0 { 0 } else { size - column % size };
                out.push_str(&" ".repeat(spaces));
                column += spaces;
            } else {
                out.push(char);
                column = if matches!(char, '\n' | '\r') {
                    0
                } else {
                    column + 1
                };
            }
        }
        return Ok(Value::str(out));
    }
    let [width, fill] = values.bind(name, ["width", "fillchar"])?;
    let width = int_or(width.as_ref(), -1)?;
    let fill = str_or(fill.as_ref(), " ")?;
    let mut chars = fill.chars();
    let (Some(fill), None) = (chars.next(), chars.next()) else {
        return Err(Error::new(
            "The fill character must be exactly one character long",
        ));
    };
    if name == "zfill" {
        let (sign, digits) = match text.starts_with(['+', '-']) {
            true => text.split_at(1),
            false => ("", text),
        };
        let digits = padded(digits, width - sign.len() as i128, ['0', '>'], budget)?;
        return Ok(Value::str(format!("{sign}{digits}")));
    }
    let align = match name {
        "ljust" => '<',
        "rjust" => '>',
        _ => return Ok(Value::str(centered(text, width, fill, budget)?)),
    };
    Ok(Value::str(padded(text, width, [fill, align], budget)?))
}

/// `text.center(width, fill)`: of an odd number of characters, the last one is on the left if the width is odd.
pub(super) fn centered(text: &str, width: i128, fill: char, budget: &Budget) -> Result<String> {
    let length = text.chars().count() as i128;
    let missing = (width - length).max(0);
    let left = missing / 2 + (missing & width & 1);
    let text = padded(text, length + left, [fill, '>'], budget)?;
    padded(&text, width, [fill, '<'], budget)
}

/// A text filled up to a width: `<` on its right, `>` on its left, `^` on both sides.
pub(super) fn padded(
    text: &str,
    width: i128,
    [fill, align]: [char; 2],
    budget: &Budget,
) -> Result<String> {
    let missing = (width - text.chars().count() as i128).max(0);
    let missing = usize::try_from(missing).unwrap_or(usize::MAX);
    budget.text(
        text.len()
            .saturating_add(missing.saturating_mul(fill.len_utf8())),
    )?;
    let left = match align {
        '<' => 0,
        '>' => missing,
        _ => missing / 2,
    };
    let fill = |count: usize| std::iter::repeat_n(fill, count).collect::<String>();
    Ok(format!("{}{text}{}", fill(left), fill(missing - left)))
}

fn join(separator: &str, elements: &Value, budget: &Budget) -> Result<Value> {
    let mut out = String::new();
    for (index, element) in elements.elements(budget)?.iter().enumerate() {
        let Some(text) = element.as_str() else {
            return Err(Error::new(format!(
                "sequence item {index}: expected str instance, {} found",
                element.kind()
            )));
        };
        budget.text(separator.len() + text.len())?;
        out.push_str(if index == 0 { "" } else { separator });
        out.push_str(text);
    }
    Ok(Value::str(out))
}
