//! Alpaca and ShareGPT rows, turned into messages.
//!
//! - Alpaca: `instruction` with an optional `input` below it, and `output`; optional `system`.
//! - ShareGPT: `conversations` of `from` and `value`; optional `system` and `tools`. Entries with `role` and `content` are
//!   messages already.

use crate::error::{Error, Result};
use crate::file::describe;
use crate::row::{optional_string, string};
use serde_json::{Map, Value, json};

/// The messages of an Alpaca row.
pub(crate) fn instruction(row: &mut Map<String, Value>) -> Result<Vec<Value>> {
    let (instruction, output) = (string(row, "instruction")?, string(row, "output")?);
    let user = match optional_string(row, "input")? {
        Some(input) if !input.is_empty() => format!("{instruction}\n{input}"),
        _ => instruction,
    };
    let mut messages = system(row)?;
    messages.push(json!({"role": "user", "content": user}));
    messages.push(json!({"role": "assistant", "content": output}));
    Ok(messages)
}

/// The messages of a ShareGPT row.
pub(crate) fn conversations(row: &mut Map<String, Value>) -> Result<Vec<Value>> {
    let mut messages = system(row)?;
    let entries = match row.remove("conversations").unwrap_or_default() {
        Value::Array(entries) => entries,
        other => {
            return Err(Error::schema(
                "a list of entries in `conversations`",
                describe(&other),
            ));
        }
    };
    for (index, entry) in entries.into_iter().enumerate() {
        messages.push(message(index, entry)?);
    }
    Ok(messages)
}

fn system(row: &mut Map<String, Value>) -> Result<Vec<Value>> {
    let text = optional_string(row, "system")?.filter(|text| !text.is_empty());
    let message = |text| json!({"role": "system", "content": text});
    Ok(text.map(message).into_iter().collect())
}

/// One entry of a conversation.
fn message(index: usize, entry: Value) -> Result<Value> {
    if entry["role"].is_string() {
        return Ok(entry);
    }
    let (Some(from), Some(value)) = (entry["from"].as_str(), entry["value"].as_str()) else {
        let expected =
            format!("`conversations[{index}]` to be an object with strings `from` and `value`");
        return Err(Error::schema(expected, describe(&entry)));
    };
    let role = match from {
        "human" | "user" => "user",
        "gpt" | "assistant" | "chatgpt" | "bing" | "bard" | "model" => "assistant",
        "system" => "system",
        "tool" | "observation" | "function_response" => "tool",
        "function_call" => return function_call(index, value),
        other => {
            let expected = format!(
                "`conversations[{index}].from` to be human, gpt, system, tool, observation or function_call"
            );
            return Err(Error::schema(expected, format!("`{other}`")));
        }
    };
    let mut message = json!({"role": role, "content": value});
    // Some programs mark turns that should not be trained with a weight of 0.
    if let Some(weight) = entry.get("weight") {
        message["weight"] = weight.clone();
    }
    Ok(message)
}

/// A call written as the JSON text of `name` and `arguments`.
fn function_call(index: usize, value: &str) -> Result<Value> {
    let call: Value = serde_json::from_str(value).unwrap_or_default();
    let Some(name) = call["name"].as_str() else {
        let expected = format!(
            "`conversations[{index}].value` to be the JSON text of a call {{name, arguments}}"
        );
        return Err(Error::schema(expected, "other text"));
    };
    let function = json!({"name": name, "arguments": call["arguments"]});
    let call = json!({"type": "function", "function": function});
    Ok(json!({"role": "assistant", "content": null, "tool_calls": [call]}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(row: Value) -> Map<String, Value> {
        row.as_object().unwrap().clone()
    }

    #[test]
    fn alpaca_rows_become_messages() {
        let row = json!({"system": "S", "instruction": "Add.", "input": "1 1", "output": "2"});
        let expected = [
            json!({"role": "system", "content": "S"}),
            json!({"role": "user", "content": "Add.\n1 1"}),
            json!({"role": "assistant", "content": "2"}),
        ];
        assert_eq!(instruction(&mut object(row)).unwrap(), expected);
        let row = json!({"instruction": "Hi.", "input": "", "output": "Yo"});
        assert_eq!(instruction(&mut object(row)).unwrap()[0]["content"], "Hi.");
    }

    #[test]
    fn sharegpt_rows_become_messages() {
        let row = json!({"system": "S", "conversations": [
            {"from": "human", "value": "A"},
            {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"},
            {"from": "observation", "value": "1"}, {"from": "gpt", "value": "B", "weight": 0},
            {"role": "user", "content": "C"}]});
        let call = json!([{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]);
        let expected = [
            json!({"role": "system", "content": "S"}),
            json!({"role": "user", "content": "A"}),
            json!({"role": "assistant", "content": null, "tool_calls": call}),
            json!({"role": "tool", "content": "1"}),
            json!({"role": "assistant", "content": "B", "weight": 0}),
            json!({"role": "user", "content": "C"}),
        ];
        assert_eq!(conversations(&mut object(row)).unwrap(), expected);
    }

    #[test]
    fn malformed_entries_name_their_place() {
        let check = |row: Value, expected: &str| {
            let problem = conversations(&mut object(row)).unwrap_err().to_string();
            assert!(problem.contains(expected), "{problem}");
        };
        check(
            json!({"conversations": "x"}),
            "a list of entries in `conversations`, found a string",
        );
        check(
            json!({"conversations": [{"from": "human"}]}),
            "`conversations[0]` to be an object with strings",
        );
        check(
            json!({"conversations": [{"from": "cat", "value": ""}]}),
            "or function_call, found `cat`",
        );
        check(
            json!({"conversations": [{"from": "function_call", "value": "f()"}]}),
            "`conversations[0].value` to be the JSON text of a call",
        );
    }
}
