//! What the templates of a task give for a row.

use super::definition::DocValue;
use super::task_row::{TaskRow, failed};
use crate::jinja::{Syntax, Template, Value};
use crate::{Error, Result};

/// The prompt of a row.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum TextValue {
    Text(String),
    /// The number of the right choice: each choice is a prompt of its own.
    Choice(i64),
}

/// The expected answer to a row.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// The number of a choice.
    Choice(i64),
    /// A text.
    Text(String),
    /// Any of several.
    Any(Vec<Self>),
}

/// A value that a template gave, or a column has.
enum Given {
    /// What a template printed.
    Printed(String),
    Value(Value),
}

impl DocValue {
    fn given(&self, row: &TaskRow) -> Result<Given> {
        match self {
            Self::Fixed(value) => Ok(Given::Value(value.clone())),
            Self::Twin(twin) => twin.value(row).map(Given::Value),
            Self::Text(name, template) => match row.values().get(name) {
                Some(value) => Ok(Given::Value(Value::of_json(value))),
                None => row.render(template).map(Given::Printed),
            },
        }
    }

    /// A text, whatever it looks like.
    pub(super) fn printed(&self, row: &TaskRow) -> Result<String> {
        match self.given(row)? {
            Given::Printed(text) => Ok(text),
            Given::Value(Value::None) => Ok(String::new()),
            Given::Value(value) => text_of(&value),
        }
    }

    /// A prompt. With choices, digits are the number of one.
    pub(super) fn text(&self, row: &TaskRow, has_choices: bool) -> Result<TextValue> {
        match self.given(row)? {
            Given::Printed(text) => match number_of(&text).filter(|_| has_choices) {
                Some(number) => Ok(TextValue::Choice(number)),
                None => Ok(TextValue::Text(text)),
            },
            Given::Value(Value::Int(number)) => Ok(TextValue::Choice(small(number)?)),
            Given::Value(value) => text_of(&value).map(TextValue::Text),
        }
    }

    /// An answer. With choices, digits are the number of one; a text in brackets is a list, if it can be read as one.
    pub(super) fn target(&self, row: &TaskRow, has_choices: bool) -> Result<Target> {
        let text = match self.given(row)? {
            Given::Value(value) => return target_of(&value),
            Given::Printed(text) => text,
        };
        if let Some(number) = number_of(&text).filter(|_| has_choices) {
            return Ok(Target::Choice(number));
        }
        if text.len() >= 2
            && text.starts_with('[')
            && text.ends_with(']')
            && let Some(list) = literal(&text)
        {
            return target_of(&list);
        }
        Ok(Target::Text(text))
    }

    /// Choices.
    pub(super) fn choices(&self, row: &TaskRow) -> Result<Vec<String>> {
        let value = match (self, self.given(row)?) {
            (_, Given::Value(value)) => value,
            (Self::Text(_, template), Given::Printed(text)) => {
                let lone = template.evaluate(row.variables()).map_err(failed)?;
                match lone.filter(|value| !matches!(value, Value::Str(_))) {
                    Some(value) => value,
                    None => literal(&text)
                        .ok_or_else(|| Error::schema("a list of choices", format!("`{text}`")))?,
                }
            }
            (Self::Fixed(_) | Self::Twin(_), Given::Printed(text)) => {
                return Err(Error::schema("a list of choices", format!("`{text}`")));
            }
        };
        let Value::Seq(items) = &value else {
            return Err(Error::schema("a list of choices", value.kind()));
        };
        let choices: Vec<String> = items.items.iter().map(text_of).collect::<Result<_>>()?;
        if choices.is_empty() {
            return Err(Error::schema("at least one choice", "none"));
        }
        Ok(choices)
    }
}

/// The number of words of a text, as `len(re.split(r"\s+", text))` counts them: what is before and after white space, even if it
/// is nothing.
pub fn count_words(text: &str) -> usize {
    let mut words = 1;
    let mut in_space = false;
    for c in text.chars() {
        let is_space = crate::jinja::is_space(c);
        words += usize::from(is_space && !in_space);
        in_space = is_space;
    }
    words
}

impl std::fmt::Display for Target {
    /// As Python prints it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Choice(number) => write!(f, "{number}"),
            Self::Text(text) => f.write_str(text),
            Self::Any(targets) => {
                f.write_str("[")?;
                for (at, target) in targets.iter().enumerate() {
                    f.write_str(if at > 0 { ", " } else { "" })?;
                    match target {
                        Self::Text(text) => {
                            let mut quoted = String::new();
                            crate::jinja::write_quoted(&mut quoted, text);
                            f.write_str(&quoted)?;
                        }
                        other => write!(f, "{other}")?,
                    }
                }
                f.write_str("]")
            }
        }
    }
}

/// The number that a text of digits is.
fn number_of(text: &str) -> Option<i64> {
    let is_digits = !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
    is_digits.then(|| text.parse().ok())?
}

fn small(number: i128) -> Result<i64> {
    i64::try_from(number).map_err(|_| Error::schema("a number of a choice", format!("`{number}`")))
}

fn text_of(value: &Value) -> Result<String> {
    match value {
        Value::Str(text) => Ok(text.to_string()),
        Value::Int(number) => Ok(number.to_string()),
        Value::Float(number) => Ok(crate::jinja::float_text(*number)),
        Value::Bool(is_true) => Ok((if *is_true { "True" } else { "False" }).into()),
        _ => Err(Error::schema("a text", value.kind())),
    }
}

fn target_of(value: &Value) -> Result<Target> {
    match value {
        Value::Int(number) => small(*number).map(Target::Choice),
        Value::Bool(is_true) => Ok(Target::Choice((*is_true).into())),
        Value::Seq(items) => {
            let targets = items.items.iter().map(target_of);
            targets.collect::<Result<_>>().map(Target::Any)
        }
        _ => text_of(value).map(Target::Text),
    }
}

/// The value of a literal of Python: one expression without names. None if it is none.
fn literal(text: &str) -> Option<Value> {
    let template = Template::parse_as(&format!("{{{{ {text} }}}}"), Syntax::Harness).ok()?;
    template.evaluate(Vec::new()).ok()?
}
