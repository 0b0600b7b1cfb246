//! The arguments of calls, filters and tests.

use super::value::Value;
use super::{Error, Result};
use std::sync::Arc;

/// CallValues of arguments, by place and by name.
#[derive(Debug, Default)]
pub(crate) struct CallValues {
    pub(crate) positional: Vec<Value>,
    pub(crate) named: Vec<(Arc<str>, Value)>,
}

impl CallValues {
    /// The values of parameters in their order. `called` is for messages.
    ///
    /// # Errors
    /// If there are more, or some of other names.
    pub(crate) fn bind<const N: usize>(
        self,
        called: &str,
        parameters: [&str; N],
    ) -> Result<[Option<Value>; N]> {
        let mut bound = [const { None }; N];
        if self.positional.len() > N {
            return Err(Error::new(format!(
                "{called} takes at most {N} arguments, found {}",
                self.positional.len()
            )));
        }
        for (slot, value) in bound.iter_mut().zip(self.positional) {
            *slot = Some(value);
        }
        for (name, value) in self.named {
            match parameters.iter().position(|parameter| *parameter == &*name) {
                Some(at) if bound[at].is_none() => bound[at] = Some(value),
                Some(_) => {
                    return Err(Error::new(format!("{called} has two values for '{name}'")));
                }
                None => {
                    return Err(Error::new(format!("{called} has no argument '{name}'")));
                }
            }
        }
        Ok(bound)
    }

    /// As [`CallValues::bind`], for parameters that have no default.
    pub(crate) fn require<const N: usize>(
        self,
        called: &str,
        parameters: [&str; N],
    ) -> Result<[Value; N]> {
        let bound = self.bind(called, parameters)?;
        let missing = bound.iter().position(Option::is_none);
        if let Some(at) = missing {
            return Err(Error::new(format!(
                "{called} needs the argument '{}'",
                parameters[at]
            )));
        }
        Ok(bound.map(|value| value.unwrap_or(Value::None)))
    }
}

/// An optional whole number.
pub(crate) fn int_or(value: Option<&Value>, default: i128) -> Result<i128> {
    match value {
        None => Ok(default),
        Some(value) => value.as_int().ok_or_else(|| {
            Error::new(format!(
                "expected an integer, found a value of type '{}'",
                value.kind()
            ))
        }),
    }
}

/// An optional text.
pub(crate) fn str_or<'v>(value: Option<&'v Value>, default: &'v str) -> Result<&'v str> {
    match value {
        None => Ok(default),
        Some(value) => str_of(value),
    }
}

pub(crate) fn str_of(value: &Value) -> Result<&str> {
    value.as_str().ok_or_else(|| match value {
        Value::Undefined(name) => Error::new(format!("'{name}' is undefined")),
        other => Error::new(format!(
            "expected a string, found a value of type '{}'",
            other.kind()
        )),
    })
}
