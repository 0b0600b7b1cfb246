//! A row of a task, as templates see it.

use serde_json::{Map, Value as Json};

use crate::jinja::{Template, Value};
use crate::{Error, Result};

/// A row as templates see it.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskRow {
    values: Map<String, Json>,
}

impl TaskRow {
    /// A row of columns and values.
    pub fn new(values: Map<String, Json>) -> Self {
        Self { values }
    }

    /// Its columns and values.
    pub fn values(&self) -> &Map<String, Json> {
        &self.values
    }

    /// Its columns as variables of a template.
    pub(super) fn variables(&self) -> Vec<(&str, Value)> {
        let values = self.values.iter();
        values
            .map(|(name, value)| (name.as_str(), Value::of_json(value)))
            .collect()
    }

    /// What a template prints of it.
    pub(super) fn render(&self, template: &Template) -> Result<String> {
        template.render(self.variables()).map_err(failed)
    }
}

pub(super) fn failed(problem: crate::jinja::Error) -> Error {
    Error::TaskTemplate(problem.to_string())
}
