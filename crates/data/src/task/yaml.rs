//! YAML as PyYAML reads it, with the line of every value.
//!
//! PyYAML follows YAML 1.1: a bare `yes`, `no`, `on` or `off` is a boolean, `012` is octal, `1:30` counts minutes, and `1e3` without
//! a point is a text. Anchors are copied where they are named; how much they may grow to is bounded.
//!
//! Sources: yaml/pyyaml: lib/yaml/resolver.py, lib/yaml/constructor.py.

use std::collections::HashMap;
use std::sync::LazyLock;

use granit_parser::{Event, Parser, ScalarStyle, Tag};
use regex::Regex;

/// Values of a file, copies of anchors counted. Real task files have hundreds.
const YAML_VALUES: usize = 1 << 20;

/// Bytes of a text that count as a value.
const BYTES_OF_VALUE: usize = 32;
/// Keys of a mapping. Real ones have up to some dozens.
const MOST_KEYS: usize = 1024;

/// A value with its line.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Yaml {
    pub(crate) value: YamlValue,
    /// Counted from 1.
    pub(crate) line: usize,
}

/// What a YAML file can hold.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum YamlValue {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    List(Vec<Yaml>),
    /// In the order of the file, each key once.
    Map(Vec<(String, Yaml)>),
    /// A text after a tag of its own, such as `!function`.
    Tagged(String, String),
}

/// What is wrong with a file, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct YamlError {
    pub(crate) problem: String,
    pub(crate) line: usize,
}

impl YamlError {
    pub(crate) fn new(line: usize, problem: impl Into<String>) -> Self {
        Self {
            problem: problem.into(),
            line,
        }
    }
}

type Result<T> = std::result::Result<T, YamlError>;

impl Yaml {
    /// Reads a file of one document.
    ///
    /// # Errors
    /// If it is no YAML, has another tag than on a text, or grows too large by its anchors.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let options = granit_parser::options! {
            block_scalar_eof_without_line_feed: true,
            emit_comments: false,
        };
        let mut builder = YamlBuilder::default();
        for next in Parser::new_from_str_with_options(text, options) {
            let (event, span) =
                next.map_err(|error| YamlError::new(error.marker().line(), error.info()))?;
            builder.take(event, span.start.line())?;
        }
        let empty = Self {
            value: YamlValue::Null,
            line: 1,
        };
        Ok(builder.root.unwrap_or(empty))
    }

    /// A text in its place.
    pub(crate) fn with_text(&self, text: &str) -> Self {
        Self {
            value: YamlValue::Text(text.into()),
            line: self.line,
        }
    }

    /// What kind of value it is, for an error.
    pub(crate) fn kind(&self) -> &'static str {
        match &self.value {
            YamlValue::Null => "nothing",
            YamlValue::Bool(_) => "a boolean",
            YamlValue::Int(_) => "an integer",
            YamlValue::Float(_) => "a number",
            YamlValue::Text(_) => "a text",
            YamlValue::List(_) => "a list",
            YamlValue::Map(_) => "a mapping",
            YamlValue::Tagged(..) => "a tagged text",
        }
    }
}

/// A list or mapping that is being read.
struct Open {
    value: YamlValue,
    line: usize,
    anchor: usize,
    /// The key that waits for its value.
    key: Option<Yaml>,
}

/// Makes values of events.
#[derive(Default)]
struct YamlBuilder {
    open: Vec<Open>,
    anchors: HashMap<usize, Yaml>,
    root: Option<Yaml>,
    documents: usize,
    values: usize,
}

impl YamlBuilder {
    fn take(&mut self, event: Event<'_>, line: usize) -> Result<()> {
        match event {
            Event::DocumentStart(..) => {
                self.documents += 1;
                if self.documents > 1 {
                    return Err(YamlError::new(line, "another document after the first"));
                }
            }
            Event::Scalar(text, style, anchor, tag) => {
                let value = scalar(&text, style, tag.as_deref(), line)?;
                self.put(Yaml { value, line }, anchor)?;
            }
            Event::SequenceStart(_, anchor, tag) => {
                self.start(YamlValue::List(Vec::new()), anchor, tag.as_deref(), line)?;
            }
            Event::MappingStart(_, anchor, tag) => {
                self.start(YamlValue::Map(Vec::new()), anchor, tag.as_deref(), line)?;
            }
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some(open) = self.open.pop() {
                    let (value, line) = (open.value, open.line);
                    self.put(Yaml { value, line }, open.anchor)?;
                }
            }
            Event::Alias(anchor) => {
                let copy = self.anchors.get(&anchor).cloned();
                let copy = copy.ok_or_else(|| {
                    YamlError::new(line, "an anchor that is named inside of its own value")
                })?;
                self.count(count(&copy), line)?;
                self.put(copy, 0)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn start(
        &mut self,
        value: YamlValue,
        anchor: usize,
        tag: Option<&Tag>,
        line: usize,
    ) -> Result<()> {
        if let Some(tag) = tag.filter(|tag| !is_of_kind(tag, &value)) {
            return Err(unknown_tag(tag, line));
        }
        self.open.push(Open {
            value,
            line,
            anchor,
            key: None,
        });
        Ok(())
    }

    fn count(&mut self, more: usize, line: usize) -> Result<()> {
        self.values += more;
        if self.values > YAML_VALUES {
            let problem = format!("more than {YAML_VALUES} values, copies of anchors counted");
            return Err(YamlError::new(line, problem));
        }
        Ok(())
    }

    /// Puts a finished value where it belongs.
    fn put(&mut self, value: Yaml, anchor: usize) -> Result<()> {
        self.count(1, value.line)?;
        if anchor > 0 {
            self.anchors.insert(anchor, value.clone());
        }
        let Some(open) = self.open.last_mut() else {
            self.root = Some(value);
            return Ok(());
        };
        match (&mut open.value, open.key.take()) {
            (YamlValue::List(items), _) => items.push(value),
            (YamlValue::Map(entries), Some(key)) => insert(entries, &key, value)?,
            _ => open.key = Some(value),
        }
        Ok(())
    }
}

/// Values in a value, itself included. A long text counts as several: it is copied too.
fn count(of: &Yaml) -> usize {
    let of_text = |text: &String| text.len() / BYTES_OF_VALUE;
    1 + match &of.value {
        YamlValue::List(items) => items.iter().map(count).sum(),
        YamlValue::Map(entries) => {
            let entries = entries.iter();
            entries
                .map(|(key, value)| of_text(key) + count(value))
                .sum()
        }
        YamlValue::Text(text) | YamlValue::Tagged(_, text) => of_text(text),
        _ => 0,
    }
}

/// Puts a value under its key. `<<` copies what is not there yet; a key that comes again replaces, as PyYAML has it.
fn insert(entries: &mut Vec<(String, Yaml)>, key: &Yaml, value: Yaml) -> Result<()> {
    let name = match &key.value {
        YamlValue::Text(name) => name.clone(),
        YamlValue::Int(number) => number.to_string(),
        YamlValue::Bool(is_true) => (if *is_true { "True" } else { "False" }).into(),
        YamlValue::Null => "None".into(),
        YamlValue::Float(_) | YamlValue::List(_) | YamlValue::Map(_) | YamlValue::Tagged(..) => {
            let problem = format!("{} as a key", key.kind());
            return Err(YamlError::new(key.line, problem));
        }
    };
    if name == "<<" {
        return merge(entries, value);
    }
    // An error about it names the line of its key.
    let value = Yaml {
        line: key.line,
        ..value
    };
    let is_full = entries.len() == MOST_KEYS;
    match entries.iter_mut().find(|(known, _)| *known == name) {
        Some((_, old)) => *old = value,
        None if is_full => {
            let problem = format!("more than {MOST_KEYS} keys in a mapping");
            return Err(YamlError::new(key.line, problem));
        }
        None => entries.push((name, value)),
    }
    Ok(())
}

fn merge(entries: &mut Vec<(String, Yaml)>, value: Yaml) -> Result<()> {
    match value.value {
        YamlValue::Map(other) => {
            for (name, value) in other {
                if !entries.iter().any(|(known, _)| *known == name) {
                    entries.push((name, value));
                }
            }
            Ok(())
        }
        YamlValue::List(maps) => maps.into_iter().try_for_each(|map| merge(entries, map)),
        _ => {
            let problem = format!("{} where `<<` copies a mapping", value.kind());
            Err(YamlError::new(value.line, problem))
        }
    }
}

fn unknown_tag(tag: &Tag, line: usize) -> YamlError {
    let problem = format!("the unknown tag `{}{}`", tag.handle(), tag.suffix());
    YamlError::new(line, problem)
}

/// The tag's name among YAML's own.
fn own_name(tag: &Tag) -> Option<&str> {
    tag.is_yaml_core_schema().then_some(tag.suffix())
}

fn is_of_kind(tag: &Tag, value: &YamlValue) -> bool {
    match value {
        YamlValue::List(_) => own_name(tag) == Some("seq"),
        YamlValue::Map(_) => own_name(tag) == Some("map"),
        _ => false,
    }
}

/// A text, or what stands for another value.
fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>, line: usize) -> Result<YamlValue> {
    let Some(tag) = tag else {
        return Ok(match style {
            ScalarStyle::Plain => plain(text),
            _ => YamlValue::Text(text.into()),
        });
    };
    if let Some(name) = own_name(tag) {
        return match (name, plain(text)) {
            ("str", _) => Ok(YamlValue::Text(text.into())),
            ("int", value @ YamlValue::Int(_))
            | ("bool", value @ YamlValue::Bool(_))
            | ("float", value @ YamlValue::Float(_))
            | ("null", value @ YamlValue::Null) => Ok(value),
            ("float", YamlValue::Int(number)) => Ok(YamlValue::Float(number as f64)),
            _ => Err(unknown_tag(tag, line)),
        };
    }
    if tag.handle() == "!" && !tag.suffix().is_empty() {
        return Ok(YamlValue::Tagged(tag.suffix().into(), text.into()));
    }
    match (tag.handle(), tag.suffix()) {
        ("!", "") | ("", "!") => Ok(YamlValue::Text(text.into())),
        _ => Err(unknown_tag(tag, line)),
    }
}

/// What a text without quotes stands for.
fn plain(text: &str) -> YamlValue {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return YamlValue::Null,
        "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => {
            return YamlValue::Bool(true);
        }
        "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
            return YamlValue::Bool(false);
        }
        _ => {}
    }
    let number = integer(text).map(YamlValue::Int);
    let number = number.or_else(|| float(text).map(YamlValue::Float));
    number.unwrap_or_else(|| YamlValue::Text(text.into()))
}

/// What PyYAML takes for an integer: binary, octal, decimal, hexadecimal, or of sixtieths.
static INTEGER: LazyLock<Option<Regex>> = LazyLock::new(|| {
    let pattern = r"^[-+]?(?:0b[0-1_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|[1-9][0-9_]*(?::[0-5]?[0-9])+)$";
    Regex::new(pattern).ok()
});

/// What it takes for a number: with a point, and with a sign in the exponent.
static FLOAT: LazyLock<Option<Regex>> = LazyLock::new(|| {
    let exponent = "(?:[eE][-+][0-9]+)?";
    let pattern = format!(
        r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*{exponent}|\.[0-9][0-9_]*{exponent}|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    );
    Regex::new(&pattern).ok()
});

/// The sign and the rest, without `_`.
fn signed(text: &str) -> (i64, String) {
    let rest = text.trim_start_matches(['-', '+']);
    let sign = if text.starts_with('-') { -1 } else { 1 };
    (sign, rest.replace('_', ""))
}

fn integer(text: &str) -> Option<i64> {
    if !INTEGER.as_ref()?.is_match(text) {
        return None;
    }
    let (sign, digits) = signed(text);
    let radix = |rest: &str, radix| i64::from_str_radix(rest, radix).ok();
    let number = if let Some(rest) = digits.strip_prefix("0b") {
        radix(rest, 2)
    } else if let Some(rest) = digits.strip_prefix("0x") {
        radix(rest, 16)
    } else if digits.contains(':') {
        let mut parts = digits.split(':').map(|part| part.parse::<i64>().ok());
        parts.try_fold(0_i64, |total, part| {
            total.checked_mul(60)?.checked_add(part?)
        })
    } else if digits.starts_with('0') && digits.len() > 1 {
        radix(&digits, 8)
    } else {
        radix(&digits, 10)
    };
    Some(sign * number?)
}

fn float(text: &str) -> Option<f64> {
    if !FLOAT.as_ref()?.is_match(text) {
        return None;
    }
    let (sign, digits) = signed(text);
    let number = match digits.to_ascii_lowercase().as_str() {
        ".inf" => f64::INFINITY,
        ".nan" => f64::NAN,
        digits => {
            let mut parts = digits.split(':').map(|part| part.parse::<f64>().ok());
            parts.try_fold(0.0, |total, part| Some(60.0 * total + part?))?
        }
    };
    Some(sign as f64 * number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> YamlValue {
        Yaml::parse(text).unwrap().value
    }

    /// The values that PyYAML 6.0.3 gives.
    #[test]
    fn plain_texts_are_what_pyyaml_makes_of_them() {
        for (text, expected) in [
            ("yes", YamlValue::Bool(true)),
            ("Off", YamlValue::Bool(false)),
            ("y", YamlValue::Text("y".into())),
            ("~", YamlValue::Null),
            ("'no'", YamlValue::Text("no".into())),
            ("012", YamlValue::Int(10)),
            ("08", YamlValue::Text("08".into())),
            ("0x_1F", YamlValue::Int(31)),
            ("-0b101", YamlValue::Int(-5)),
            ("1_000", YamlValue::Int(1000)),
            ("1:30", YamlValue::Int(90)),
            ("1:60", YamlValue::Text("1:60".into())),
            ("1.5", YamlValue::Float(1.5)),
            (".5", YamlValue::Float(0.5)),
            ("-.5", YamlValue::Text("-.5".into())),
            ("1e3", YamlValue::Text("1e3".into())),
            ("1.0e3", YamlValue::Text("1.0e3".into())),
            ("1.0e+3", YamlValue::Float(1000.0)),
            ("-.inf", YamlValue::Float(f64::NEG_INFINITY)),
            ("!!str 3", YamlValue::Text("3".into())),
            ("!!float 3", YamlValue::Float(3.0)),
            (
                "!function utils.f",
                YamlValue::Tagged("function".into(), "utils.f".into()),
            ),
        ] {
            assert_eq!(value(text), expected, "{text}");
        }
    }

    #[test]
    fn lines_anchors_and_merges_are_kept() {
        let text = "base: &b\n  a: 1\n  b: 2\nother:\n  b: 3\n  <<: *b\nlist: [x, 'y']\nblock: |\n  two\n  lines\n";
        let file = Yaml::parse(text).unwrap();
        let YamlValue::Map(entries) = &file.value else {
            panic!("{file:?}")
        };
        let lines: Vec<(&str, usize)> = entries.iter().map(|(k, v)| (k.as_str(), v.line)).collect();
        assert_eq!(
            lines,
            [("base", 1), ("other", 4), ("list", 7), ("block", 8)]
        );
        let YamlValue::Map(other) = &entries[1].1.value else {
            panic!("{file:?}")
        };
        let other: Vec<_> = other
            .iter()
            .map(|(k, v)| (k.as_str(), v.value.clone()))
            .collect();
        assert_eq!(other, [("b", YamlValue::Int(3)), ("a", YamlValue::Int(1))]);
        assert_eq!(entries[3].1.value, YamlValue::Text("two\nlines\n".into()));
    }

    #[test]
    fn wrong_files_are_refused_with_their_line() {
        let bomb = (0..20).fold("a0: &a0 [x, x, x, x]\n".to_owned(), |text, n| {
            let copies = vec![format!("*a{n}"); 8].join(", ");
            format!("{text}a{m}: &a{m} [{copies}]\n", m = n + 1)
        });
        let copies = vec!["*a"; 1000].join(", ");
        let long = format!("a: &a {}\nb: [{copies}]\n", "x".repeat(1 << 17));
        let keys: String = (0..2000).map(|n| format!("k{n}: 1\n")).collect();
        for (text, line, problem) in [
            ("a: [1\nb: 2", 2, ""),
            ("a: 1\nb: !odd [1]\n", 2, "the unknown tag"),
            ("a: 1\n---\nb: 2\n", 2, "another document"),
            ("a: *gone\n", 1, ""),
            ("a: &x [*x]\n", 1, "inside of its own"),
            ("a: 1\n? [2]\n: 3\n", 2, "a list as a key"),
            (&bomb, 7, "more than"),
            (&long, 2, "more than"),
            (&keys, 1025, "1024 keys in a mapping"),
        ] {
            let error = Yaml::parse(text).unwrap_err();
            assert!(error.problem.contains(problem), "{error:?}");
            assert_eq!(error.line, line, "{error:?}");
        }
    }
}
