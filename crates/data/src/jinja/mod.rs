//! Jinja as chat templates and evaluation tasks use it, with Python's values.
//!
//! Templates are written for Jinja2 in Hugging Face's setup: a sandbox whose lists and dictionaries cannot be changed,
//! `trim_blocks` and `lstrip_blocks`, `break` and `continue`, a `tojson` that escapes no HTML, `raise_exception`, `strftime_now` and
//! `{% generation %}`. What a template prints is trained, so it has to be equal to the byte: `None` and `True` are capitalized, a
//! float is `1e+16`, a list is `['a']`, and `'%.2f' % x` formats.
//!
//! Templates of evaluation tasks ([`Syntax::Harness`]) are written for Jinja2 as the evaluation harness sets it up: white space
//! around blocks stays, and a name without a value is an error.
//!
//! Absent: inheritance, includes, imports, recursive loops, automatic escaping, and filters for web pages. Steps, text and nesting
//! are bounded (`budget.rs`).
//!
//! Sources: pallets/jinja: src/jinja2; python/cpython; huggingface/transformers: utils/chat_template_utils.py;
//! EleutherAI/lm-evaluation-harness: lm_eval/utils.py.

mod arguments;
mod ast;
mod budget;
mod dumps;
mod evaluate;
mod filters;
mod format;
mod functions;
mod lexer;
mod markup;
mod methods;
mod numbers;
mod operators;
mod parser;
mod predicates;
mod python;
mod render;
mod strftime;
mod strings;
mod value;

use budget::Budget;
use dumps::{JsonStyle, dumps};
use render::Renderer;
use std::fmt;
use std::sync::Arc;

pub(crate) use filters::PythonRegex;
pub(crate) use numbers::keep_exact;
pub use python::is_space;
pub(crate) use python::{float_text, write_quoted};
pub(crate) use value::Value;

/// A result with this module's [`Error`].
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// What is wrong with a template, or what it says is wrong with a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Error {
    problem: String,
    line: Option<u32>,
}

impl Error {
    pub(crate) fn new(problem: impl Into<String>) -> Self {
        Self {
            problem: problem.into(),
            line: None,
        }
    }

    fn syntax(problem: &str, line: u32) -> Self {
        Self::new(format!("syntax error: {problem}")).at(line)
    }

    /// The error with its line, unless it has one.
    fn at(mut self, line: u32) -> Self {
        self.line.get_or_insert(line);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problem)?;
        match self.line {
            Some(line) => write!(f, " (line {line} of the template)"),
            None => Ok(()),
        }
    }
}

/// How Jinja is set up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Syntax {
    /// As for chat templates.
    #[default]
    Chat,
    /// As for the templates of evaluation tasks.
    Harness,
}

/// A template, ready to render.
#[derive(Clone, Debug)]
pub(crate) struct Template {
    source: Arc<str>,
    tree: Arc<parser::Tree>,
}

impl Template {
    /// # Errors
    /// If the text is no template, or has a tag that is absent here.
    pub(crate) fn parse(source: &str) -> Result<Self> {
        Self::parse_as(source, Syntax::Chat)
    }

    /// # Errors
    /// As [`Self::parse`].
    pub(crate) fn parse_as(source: &str, syntax: Syntax) -> Result<Self> {
        Ok(Self {
            source: source.into(),
            tree: Arc::new(parser::parse(source, syntax)?),
        })
    }

    /// # Errors
    /// If the template raises an exception, does what Python refuses, or takes too many steps.
    pub(crate) fn render(&self, variables: Vec<(&str, Value)>) -> Result<String> {
        Renderer::new(&self.tree, variables).render()
    }

    /// The value of a template that is one expression and nothing else; none for another.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub(crate) fn evaluate(&self, variables: Vec<(&str, Value)>) -> Result<Option<Value>> {
        Renderer::new(&self.tree, variables).evaluate()
    }

    pub(crate) fn source(&self) -> &str {
        &self.source
    }
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False)` writes it.
pub(crate) fn json_text(json: &serde_json::Value) -> String {
    let text = dumps(
        &Value::of_json(json),
        &JsonStyle::default(),
        &Budget::default(),
    );
    text.unwrap_or_else(|_| json.to_string())
}

#[cfg(test)]
mod unit;
