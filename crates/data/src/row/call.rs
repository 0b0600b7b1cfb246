//! The calls of a message in one form: `tool_calls`, a list of `{type, function: {name, arguments}}` with an `id` if there is one.
//!
//! `arguments` stay as the row has them, an object or its JSON text; each template says which it wants (`expected.rs`).

use crate::error::{Error, Result};
use crate::file::describe;
use crate::jinja::keep_exact;
use serde_json::{Map, Value, json};

/// Brings a message's calls into their form.
pub(crate) fn calls(place: &str, message: &mut Map<String, Value>) -> Result<()> {
    let mut calls = match message.remove("tool_calls") {
        None => Vec::new(),
        Some(value) => list(&format!("{place}.tool_calls"), value)?,
    };
    if let Some(value) = message.remove("function_call") {
        let place = format!("{place}.function_call");
        if !calls.is_empty() {
            let expected = format!("either `tool_calls` or `{place}`");
            return Err(Error::schema(expected, "both"));
        }
        calls = list(&place, value)?;
    }
    if !calls.is_empty() {
        message.insert("tool_calls".into(), Value::Array(calls));
    }
    Ok(())
}

/// Calls in a list, one call, or the JSON text of either.
pub(crate) fn list(place: &str, value: Value) -> Result<Vec<Value>> {
    let value = match value {
        Value::String(text) if text.trim().is_empty() => Value::Array(Vec::new()),
        Value::String(text) => match serde_json::from_str(&keep_exact(&text)) {
            Ok(value @ (Value::Array(_) | Value::Object(_))) => value,
            _ => {
                let expected =
                    format!("`{place}` to be the JSON text of a call {{name, arguments}}");
                return Err(Error::schema(expected, "other text"));
            }
        },
        value => value,
    };
    match value {
        Value::Array(list) => {
            let list = list.into_iter().enumerate();
            list.map(|(index, value)| call(&format!("{place}[{index}]"), value))
                .collect()
        }
        one => Ok(vec![call(place, one)?]),
    }
}

/// One call, whether its name and arguments are in a `function` or not.
fn call(place: &str, value: Value) -> Result<Value> {
    let Value::Object(mut call) = value else {
        let expected = format!("`{place}` to be a call {{name, arguments}}");
        return Err(Error::schema(expected, describe(&value)));
    };
    if !call.get("function").is_some_and(Value::is_object) {
        let named = ["name", "arguments"].map(|key| Some((key.to_owned(), call.remove(key)?)));
        call.insert(
            "function".into(),
            Value::Object(named.into_iter().flatten().collect()),
        );
    }
    let function = &mut call["function"];
    if !function["name"].is_string() {
        let expected = format!("text in the `name` of the call `{place}`");
        return Err(Error::schema(expected, describe(&function["name"])));
    }
    match &function["arguments"] {
        Value::Null => function["arguments"] = json!({}),
        Value::Object(_) | Value::String(_) => {}
        other => {
            let expected = format!("an object or its JSON text in the `arguments` of `{place}`");
            return Err(Error::schema(expected, describe(other)));
        }
    }
    if !call.get("type").is_some_and(Value::is_string) {
        call.insert("type".into(), "function".into());
    }
    Ok(Value::Object(call))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(message: Value) -> Result<Value, String> {
        let mut message = message.as_object().unwrap().clone();
        calls("m", &mut message).map_err(|problem| problem.to_string())?;
        Ok(Value::Object(message))
    }

    #[test]
    fn calls_have_one_form() {
        let function = json!({"name": "f", "arguments": {"x": 1}});
        let expected = json!({"tool_calls": [{"type": "function", "function": function}]});
        for message in [
            expected.clone(),
            json!({"function_call": function}),
            json!({"function_call": function.to_string()}),
            json!({"tool_calls": [function]}),
            json!({"tool_calls": json!([function]).to_string()}),
            json!({"tool_calls": [], "function_call": function}),
            json!({"tool_calls": function}),
        ] {
            assert_eq!(found(message.clone()).unwrap(), expected, "{message}");
        }
        let none = json!({"tool_calls": [{"function": {"name": "f"}, "id": "1"}]});
        let with = json!({"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}, "id": "1"}]});
        assert_eq!(found(none).unwrap(), with);
        assert_eq!(found(json!({"tool_calls": []})).unwrap(), json!({}));
    }

    #[test]
    fn calls_of_another_form_are_refused_by_place() {
        for (message, expected) in [
            (json!({"tool_calls": "f()"}), "`m.tool_calls`"),
            (json!({"tool_calls": ["f"]}), "`m.tool_calls[0]`"),
            (
                json!({"tool_calls": [{"function": {}}]}),
                "`m.tool_calls[0]`",
            ),
            (
                json!({"function_call": {"name": "f", "arguments": [1]}}),
                "`m.function_call`",
            ),
            (
                json!({"tool_calls": [{"name": "f"}], "function_call": {"name": "g"}}),
                "either `tool_calls` or `m.function_call`",
            ),
        ] {
            let problem = found(message.clone()).unwrap_err();
            assert!(problem.contains(expected), "{message}: {problem}");
        }
    }
}
