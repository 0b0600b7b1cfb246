//! Messages and tools as data sets write them, brought into one form, that of OpenAI's interface:
//!
//! - A key whose value is null is absent, at every depth of objects: columns of a table are null where a row has no such key.
//!   Null in a list, in the JSON text of arguments, and as `content` stays.
//! - `content` is text. Parts of text become one part each; what is no text is refused by its type.
//! - Calls are `tool_calls`, each with `type` and a `function`; an empty list is none. A `function_call` is one call.
//! - A thought has every name under which templates look for it.
//! - A message that is not trained has `weight` 0, whichever flag says so.

use super::call;
use crate::error::{Error, Result};
use crate::file::describe;
use crate::jinja::{json_text, keep_exact};
use crate::tokenizer::THOUGHTS;
use serde_json::{Map, Value, json};

/// Flags of a message that say whether it is trained: OpenAI's, Axolotl's, verl's and ms-swift's.
const FLAGS: [&str; 4] = ["weight", "train", "trainable", "loss"];
/// Keys that would change the sample and cannot be obeyed: other media, and parts of a message to train.
const REFUSED_KEYS: [&str; 8] = [
    "audio",
    "audios",
    "image",
    "images",
    "video",
    "videos",
    "refusal",
    "train_detail",
];

/// A list of messages, each an object with a role.
pub(crate) fn messages(key: &str, value: Option<Value>) -> Result<Vec<Value>> {
    let list = match value.unwrap_or_default() {
        Value::Array(list) if !list.is_empty() => list,
        Value::Array(_) => {
            return Err(Error::schema(
                format!("messages in `{key}`"),
                "an empty list",
            ));
        }
        other => {
            return Err(Error::schema(
                format!("a list of messages in `{key}`"),
                describe(&other),
            ));
        }
    };
    let messages = list.into_iter().enumerate();
    messages
        .map(|(index, value)| message(&format!("{key}[{index}]"), value))
        .collect()
}

fn message(place: &str, value: Value) -> Result<Value> {
    if !value["role"].is_string() {
        let expected = format!("`{place}` to be an object with a string `role`");
        let found = match value.get("role") {
            Some(role) => format!("`role` {}", describe(role)),
            None if value.is_object() => "no `role`".to_owned(),
            None => describe(&value),
        };
        return Err(Error::schema(expected, found));
    }
    let Value::Object(mut message) = value else {
        return Err(Error::schema(format!("an object in `{place}`"), "another"));
    };
    for (key, value) in &mut message {
        drop_nulls(value);
        if REFUSED_KEYS.contains(&key.as_str()) && !is_empty(value) {
            let expected = format!("text alone in `{place}`, which can be trained");
            return Err(Error::schema(expected, format!("`{key}`")));
        }
    }
    message.retain(|key, value| key == "content" || !value.is_null());
    flag(place, &mut message)?;
    content(place, &mut message)?;
    call::calls(place, &mut message)?;
    thought(place, &mut message)?;
    // The name before there were tools.
    if message["role"] == "function" {
        message.insert("role".into(), "tool".into());
    }
    Ok(Value::Object(message))
}

/// Removes the keys of null at every depth. What is null in a list has a meaning there: `"enum": ["a", null]`.
pub(crate) fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(list) => list.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// Puts a weight of 0 in place of flags that say no, and nothing in place of others.
fn flag(place: &str, message: &mut Map<String, Value>) -> Result<()> {
    let mut trained = true;
    for key in FLAGS {
        let Some(value) = message.remove(key) else {
            continue;
        };
        trained &= switch(&value).ok_or_else(|| {
            Error::schema(
                format!("`{place}.{key}` to be true, false, 1 or 0"),
                describe(&value),
            )
        })?;
    }
    if !trained {
        message.insert("weight".into(), 0.into());
    }
    Ok(())
}

/// Yes or no, in the types that JSON, tables and CSV files have for it.
fn switch(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(flag) => Some(*flag),
        Value::Number(number) if number.as_f64() == Some(1.0) => Some(true),
        Value::Number(number) if number.as_f64() == Some(0.0) => Some(false),
        Value::String(text) => match text.trim().to_ascii_lowercase().as_str() {
            "true" | "1" | "1.0" => Some(true),
            "false" | "0" | "0.0" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

/// Leaves a text, null, nothing, or a list of two texts or more in `content`; templates differ in what they put between those.
fn content(place: &str, message: &mut Map<String, Value>) -> Result<()> {
    let is_tool = ["tool", "function", "ipython"].map(Value::from);
    let is_tool = is_tool.contains(&message["role"]);
    let content = match message.get_mut("content") {
        None | Some(Value::Null | Value::String(_)) => return Ok(()),
        Some(content) => content.take(),
    };
    let texts = match content {
        Value::Array(list) if !is_tool || list.iter().all(is_part) => parts(place, list, message)?,
        // The result of a tool that a data set keeps as JSON: a model reads its text.
        result if is_tool => vec![json_text(&result).into()],
        other => {
            let expected = format!("text or a list of parts in `{place}.content`");
            return Err(Error::schema(expected, describe(&other)));
        }
    };
    let content = match <[Value; 1]>::try_from(texts) {
        Ok([text]) => text,
        Err(texts) if texts.is_empty() => "".into(),
        Err(texts) => Value::Array(texts),
    };
    message.insert("content".into(), content);
    Ok(())
}

fn is_part(part: &Value) -> bool {
    part.is_string() || part["type"].is_string() || part["text"].is_string()
}

/// The texts of parts. A thought among them goes to its own key.
fn parts(place: &str, list: Vec<Value>, message: &mut Map<String, Value>) -> Result<Vec<Value>> {
    let mut texts = Vec::new();
    let mut thoughts = Vec::new();
    for (index, part) in list.into_iter().enumerate() {
        let kind = part["type"].as_str().unwrap_or("text");
        let text = match kind {
            "text" | "input_text" | "output_text" => {
                part.as_str().or_else(|| part["text"].as_str())
            }
            "thinking" | "reasoning" => {
                let named = [kind, "text"].map(|key| part[key].as_str());
                named.into_iter().flatten().next()
            }
            _ => None,
        };
        let Some(text) = text else {
            let expected = format!("a part of the type `text` in `{place}.content[{index}]`");
            let found = match kind {
                "text" => describe(&part),
                kind => format!("the type `{kind}`"),
            };
            return Err(Error::schema(expected, found));
        };
        match kind {
            "thinking" | "reasoning" => thoughts.push(text.to_owned()),
            _ => texts.push(Value::from(text)),
        }
    }
    if !thoughts.is_empty() {
        let taken = THOUGHTS.iter().find(|key| message.contains_key(**key));
        if let Some(key) = taken {
            let expected = format!("one thought in `{place}`");
            let found = format!("one in `{key}` and one in `content`");
            return Err(Error::schema(expected, found));
        }
        message.insert(THOUGHTS[0].into(), thoughts.join("\n").into());
    }
    Ok(texts)
}

/// Gives a thought all of its names.
fn thought(place: &str, message: &mut Map<String, Value>) -> Result<()> {
    let mut found: Option<Value> = None;
    for key in THOUGHTS {
        match message.remove(key) {
            None => {}
            Some(Value::String(text)) if text.is_empty() => {}
            Some(Value::String(text)) => match &found {
                Some(thought) if *thought != text => {
                    let expected = format!("one thought in `{place}`");
                    let different = format!("another one in `{key}`");
                    return Err(Error::schema(expected, different));
                }
                _ => found = Some(text.into()),
            },
            Some(other) => {
                let expected = format!("text in `{place}.{key}`");
                return Err(Error::schema(expected, describe(&other)));
            }
        }
    }
    if let Some(thought) = found {
        for key in THOUGHTS {
            message.insert(key.into(), thought.clone());
        }
    }
    Ok(())
}

/// Descriptions of tools: a list, or (in some data sets) the JSON text of a list. An empty list is none.
pub(crate) fn tools(value: Option<Value>) -> Result<Option<Value>> {
    let value = match value {
        Some(Value::String(text)) if text.trim().is_empty() => Value::Null,
        Some(Value::String(text)) => {
            serde_json::from_str(&keep_exact(&text)).unwrap_or(Value::String(text))
        }
        value => value.unwrap_or_default(),
    };
    match value {
        Value::Null => Ok(None),
        Value::Array(mut list) => {
            list.retain(|tool| !tool.is_null());
            for (index, tool) in list.iter_mut().enumerate() {
                if !tool.is_object() {
                    let expected = format!("an object in `tools[{index}]`");
                    return Err(Error::schema(expected, describe(tool)));
                }
                drop_nulls(tool);
            }
            Ok((!list.is_empty()).then_some(Value::Array(list)))
        }
        other => Err(Error::schema(
            "a list of tools in `tools`",
            describe(&other),
        )),
    }
}

/// Puts `{name, description, parameters}`, as ShareGPT rows have tools, into a `function`, as templates expect them.
pub(crate) fn as_functions(tools: &mut Value) {
    let list = tools.as_array_mut().into_iter().flatten();
    for tool in list.filter(|tool| tool.get("function").is_none() && tool["name"].is_string()) {
        *tool = json!({"type": "function", "function": tool.take()});
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(value: Value) -> Result<Value, String> {
        let messages = messages("messages", Some(json!([value])));
        Ok(messages.map_err(|problem| problem.to_string())?.remove(0))
    }

    fn check(value: Value, expected: Value) {
        assert_eq!(one(value.clone()).unwrap(), expected, "{value}");
    }

    fn refused(value: Value, expected: &str) {
        let problem = one(value.clone()).unwrap_err();
        assert!(problem.contains(expected), "{value}: {problem}");
    }

    #[test]
    fn keys_of_null_are_absent_at_every_depth() {
        let call = |arguments: Value| json!([{"type": "function", "function": {"name": "f", "arguments": arguments}}]);
        check(
            json!({"role": "assistant", "content": null, "name": null,
                "tool_calls": call(json!({"a": null, "b": [null, {"c": null, "d": 0}]}))}),
            json!({"role": "assistant", "content": null, "tool_calls": call(json!({"b": [null, {"d": 0}]}))}),
        );
        let text = json!({"role": "assistant", "tool_calls": call(json!("{\"a\": null}"))});
        check(text.clone(), text);
        let schema = json!({"enum": ["x", null], "default": null, "properties": {"y": null}});
        let found = tools(Some(json!([{"name": "f", "parameters": schema}, null]))).unwrap();
        let clean = json!([{"name": "f", "parameters": {"enum": ["x", null], "properties": {}}}]);
        assert_eq!(found, Some(clean));
        assert_eq!(tools(Some(json!("[]"))).unwrap(), None);
        assert!(tools(Some(json!(["f"]))).is_err());
    }

    #[test]
    fn every_flag_of_every_type_is_obeyed_or_refused() {
        let (off, on) = (
            json!({"role": "assistant", "weight": 0}),
            json!({"role": "assistant"}),
        );
        for key in FLAGS {
            for (value, expected) in [
                (json!(false), &off),
                (json!(0), &off),
                (json!(0.0), &off),
                (json!("False"), &off),
                (json!("0"), &off),
                (json!(true), &on),
                (json!(1), &on),
                (json!(1.0), &on),
                (json!("true"), &on),
                (json!(null), &on),
            ] {
                check(json!({"role": "assistant", key: value}), expected.clone());
            }
            for odd in [json!(0.5), json!(2), json!("no"), json!([]), json!({})] {
                refused(
                    json!({"role": "assistant", key: odd}),
                    &format!("`messages[0].{key}` to be true, false, 1 or 0"),
                );
            }
        }
        check(
            json!({"role": "assistant", "weight": 1, "train": false}),
            off,
        );
    }

    #[test]
    fn parts_are_texts_and_thoughts() {
        let user = |content: Value| json!({"role": "user", "content": content});
        check(
            user(json!([{"type": "text", "text": "a", "image_url": null}])),
            user(json!("a")),
        );
        check(
            user(json!(["a", {"type": "input_text", "text": "b"}])),
            user(json!(["a", "b"])),
        );
        check(user(json!([])), user(json!("")));
        let thinking =
            json!([{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}]);
        check(
            json!({"role": "assistant", "content": thinking}),
            json!({"role": "assistant", "content": "a", "reasoning_content": "t", "thinking": "t", "reasoning": "t"}),
        );
        let image = json!([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]);
        refused(
            user(image),
            "`messages[0].content[1]`, found the type `image_url`",
        );
        refused(user(json!([{"text": 3}])), "`messages[0].content[0]`");
        refused(
            user(json!(3)),
            "text or a list of parts in `messages[0].content`, found 3",
        );
        refused(
            json!({"role": "user", "content": "a", "images": ["x.png"]}),
            "found `images`",
        );
        let tool = |content: Value| json!({"role": "tool", "content": content});
        check(tool(json!({"t": 4, "u": null})), tool(json!("{\"t\": 4}")));
        check(tool(json!([1, 2])), tool(json!("[1, 2]")));
        check(
            json!({"role": "function", "name": "f", "content": "1"}),
            json!({"role": "tool", "name": "f", "content": "1"}),
        );
    }

    #[test]
    fn a_thought_has_all_of_its_names() {
        for key in THOUGHTS {
            check(
                json!({"role": "assistant", key: "t"}),
                json!({"role": "assistant", "reasoning_content": "t", "thinking": "t", "reasoning": "t"}),
            );
            refused(
                json!({"role": "assistant", key: 1}),
                &format!("text in `messages[0].{key}`"),
            );
        }
        refused(
            json!({"role": "assistant", "reasoning": "a", "thinking": "b"}),
            "one thought",
        );
    }
}
