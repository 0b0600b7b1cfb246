//! Alpaca and ShareGPT rows, turned into messages.
//!
//! - Alpaca: `instruction` with an optional `input` below it, and `output`; optional `system`, and earlier turns in `history`, a
//!   list of pairs of texts, whose answers are trained too.
//! - ShareGPT: `conversations` of `from` and `value`; optional `system` and `tools`. Entries with `role` and `content` are
//!   messages already.

use super::call;
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
    messages.extend(history(row.remove("history"))?);
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

/// The turns before the instruction.
fn history(value: Option<Value>) -> Result<Vec<Value>> {
    let pairs = match value.unwrap_or_default() {
        Value::Null => Vec::new(),
        Value::Array(pairs) => pairs,
        other => {
            let expected = "a list of pairs [instruction, answer] in `history`";
            return Err(Error::schema(expected, describe(&other)));
        }
    };
    let mut messages = Vec::with_capacity(2 * pairs.len());
    for (index, pair) in pairs.into_iter().enumerate() {
        let texts = pair.as_array().map(|pair| pair.iter().map(Value::as_str));
        let texts: Option<Vec<&str>> = texts.and_then(Iterator::collect);
        let Some([user, answer]) = texts.as_deref() else {
            let expected = format!("a pair of texts in `history[{index}]`");
            return Err(Error::schema(expected, describe(&pair)));
        };
        messages.push(json!({"role": "user", "content": user}));
        messages.push(json!({"role": "assistant", "content": answer}));
    }
    Ok(messages)
}

/// One entry of a conversation. Its other keys than `from` and `value`, such as a flag or a thought, are those of a message.
fn message(index: usize, mut entry: Value) -> Result<Value> {
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
        "developer" => "developer",
        "tool" | "observation" | "function_response" => "tool",
        "function_call" | "tool_call" => {
            let calls = call::list(&format!("conversations[{index}].value"), value.into())?;
            entry["tool_calls"] = calls.into();
            entry["value"] = Value::Null;
            "assistant"
        }
        other => {
            let expected = format!(
                "`conversations[{index}].from` to be human, gpt, system, developer, tool, observation or function_call"
            );
            return Err(Error::schema(expected, format!("`{other}`")));
        }
    };
    let mut message = json!({"role": role, "content": entry["value"].take()});
    let rest = entry
        .as_object_mut()
        .map(std::mem::take)
        .into_iter()
        .flatten();
    for (key, value) in rest.filter(|(key, _)| key != "from" && key != "value") {
        message[key] = value;
    }
    Ok(message)
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
    fn a_turn_may_have_several_calls() {
        let calls = json!([{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": "{}"}]);
        let row = json!({"conversations": [{"from": "tool_call", "value": calls.to_string(), "train": false}]});
        let function = |call: &Value| json!({"type": "function", "function": call});
        let calls: Vec<Value> = calls.as_array().unwrap().iter().map(function).collect();
        let expected =
            json!({"role": "assistant", "content": null, "tool_calls": calls, "train": false});
        assert_eq!(conversations(&mut object(row)).unwrap(), [expected]);
    }

    #[test]
    fn earlier_turns_stand_before_the_instruction() {
        let row = |history: Value| json!({"instruction": "I", "output": "O", "system": "S", "history": history});
        let texts = |row: Value| -> Result<Vec<String>, String> {
            let messages = instruction(&mut object(row)).map_err(|problem| problem.to_string())?;
            let text = |m: Value| format!("{} {}", m["role"], m["content"]).replace('"', "");
            Ok(messages.into_iter().map(text).collect())
        };
        let found = texts(row(json!([["a", "b"], ["c", "d"]]))).unwrap();
        let expected = [
            "system S",
            "user a",
            "assistant b",
            "user c",
            "assistant d",
            "user I",
            "assistant O",
        ];
        assert_eq!(found, expected);
        assert_eq!(texts(row(json!(null))).unwrap().len(), 3);
        assert_eq!(texts(row(json!([]))).unwrap().len(), 3);
        for (history, place) in [
            (json!("a"), "`history`"),
            (json!([["a"]]), "`history[0]`"),
            (json!([["a", "b"], [1, "b"]]), "`history[1]`"),
        ] {
            let problem = texts(row(history)).unwrap_err();
            assert!(problem.contains(place), "{problem}");
        }
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
