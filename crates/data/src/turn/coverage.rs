//! Whether a rendering shows all of a conversation: a template is free to skip roles, calls and thoughts.
//!
//! A conversation in which every text is a mark of its own is rendered once; a mark that does not come back names what the
//! template leaves out. Thoughts are checked turn by turn (`mod.rs`), since templates drop those of earlier turns by design.

use super::Conversation;
use crate::error::{Error, Result};
use crate::notes::RowNotes;
use serde_json::Value;

/// A text of a conversation: the number of its message, its name for people, and itself.
struct ShownPart {
    message: usize,
    name: String,
    text: String,
}

/// Refuses a conversation of whose texts or calls `whole`, its rendering, does not show all.
pub(crate) fn check(
    conversation: Conversation<'_>,
    whole: &str,
    notes: &mut RowNotes,
) -> Result<()> {
    let (marked, parts) = marked(conversation.messages);
    let rendered = conversation.with(&marked).whole();
    let shown = |(number, part): (usize, &ShownPart)| match &rendered {
        Ok(rendered) if rendered.contains(&mark(number)) => true,
        // Templates may look into a text, for example for tags, and take the mark for another kind of text.
        _ => contains(whole, &part.text),
    };
    let mut numbered = parts.iter().enumerate();
    if let Some((_, part)) = numbered.find(|part| !shown(*part)) {
        let message = &conversation.messages[part.message];
        return Err(Error::LeftOut {
            part: part.name.clone(),
            index: part.message,
            role: message["role"].as_str().unwrap_or_default().to_owned(),
        });
    }
    if let Some(tools) = conversation.tools.and_then(Value::as_array) {
        let name = |tool: &Value| {
            let named = tool["function"]["name"].as_str().or(tool["name"].as_str());
            named.is_none_or(|name| contains(whole, name))
        };
        if !tools.iter().all(name) {
            notes.insert(
                "the chat template does not show `tools`: describe them in a message".into(),
            );
        }
    }
    Ok(())
}

/// Whether a rendering holds a text, trimmed or as JSON writes it perhaps.
fn contains(whole: &str, text: &str) -> bool {
    let escaped = || Value::from(text.trim()).to_string();
    whole.contains(text.trim()) || whole.contains(escaped().trim_matches('"'))
}

fn mark(number: usize) -> String {
    format!("\u{e000}{number}\u{e001}")
}

/// The messages with marks for texts, and the texts in the order of their marks.
fn marked(messages: &[Value]) -> (Vec<Value>, Vec<ShownPart>) {
    let mut messages = messages.to_vec();
    let mut parts = Vec::new();
    for (index, message) in messages.iter_mut().enumerate() {
        let mut put = |name: String, value: &mut Value| {
            let text = match &*value {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            if !text.trim().is_empty() {
                *value = mark(parts.len()).into();
                parts.push(ShownPart {
                    message: index,
                    name,
                    text,
                });
            }
        };
        if message["content"].is_string() {
            put("`content`".to_owned(), &mut message["content"]);
        }
        let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
        for (number, call) in calls.into_iter().flatten().enumerate() {
            let place = format!("tool_calls[{number}].function");
            let function = &mut call["function"];
            put(format!("`{place}.name`"), &mut function["name"]);
            arguments(&mut function["arguments"], &mut |key, value| {
                put(format!("`{place}.arguments{key}`"), value);
            });
        }
    }
    (messages, parts)
}

/// Marks the values of arguments, in the form that they have.
fn arguments(arguments: &mut Value, put: &mut dyn FnMut(&str, &mut Value)) {
    let mut each = |object: &mut Value| {
        for (key, value) in object.as_object_mut().into_iter().flatten() {
            // Lists and objects are seen by their presence: what a template does with their leaves is up to it.
            if !value.is_array() && !value.is_object() && !value.is_null() {
                put(&format!(".{key}"), value);
            }
        }
    };
    if let Value::String(text) = &*arguments
        && let Ok(mut object @ Value::Object(_)) = serde_json::from_str(text)
    {
        each(&mut object);
        *arguments = object.to_string().into();
    } else if arguments.is_object() {
        each(arguments);
    } else {
        put("", arguments);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::tokenizer;
    use serde_json::json;

    const SHOWS_ALL: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% for c in m.tool_calls or [] %}\
        {{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}";

    fn checked(template: &str, messages: Value, tools: Option<Value>) -> Result<RowNotes, String> {
        let tokenizer = tokenizer(Some(template), true);
        let template = tokenizer.chat_template().unwrap();
        let messages = crate::row::messages("messages", Some(messages)).unwrap();
        let mut notes = RowNotes::new();
        let prepared = template
            .prepare(&messages, tools.as_ref(), &mut notes)
            .unwrap();
        let conversation = Conversation {
            tokenizer: &tokenizer,
            template,
            messages: &prepared,
            tools: tools.as_ref(),
        };
        let checked = conversation
            .whole()
            .and_then(|whole| check(conversation, &whole, &mut notes));
        checked
            .map(|()| notes)
            .map_err(|problem| problem.to_string())
    }

    fn chat() -> Value {
        let call = json!({"name": "f", "arguments": {"x": "1", "y": 2, "z": {"deep": 3}}});
        json!([
            {"role": "system", "content": " S "}, {"role": "user", "content": "U"},
            {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "T"},
            {"role": "observer", "content": "O"}, {"role": "assistant", "content": "\"A\""}])
    }

    #[test]
    fn what_the_template_leaves_out_is_named() {
        assert_eq!(checked(SHOWS_ALL, chat(), None), Ok(RowNotes::new()));
        let skips = |role: &str| {
            let body = SHOWS_ALL.strip_prefix("{% for m in messages %}").unwrap();
            let body = body.strip_suffix("{% endfor %}").unwrap();
            format!("{{% for m in messages if m.role != '{role}' %}}{body}{{% endfor %}}")
        };
        for (template, expected) in [
            (skips("system"), "`content` of message 0 (role `system`)"),
            (skips("tool"), "`content` of message 3 (role `tool`)"),
            (
                skips("observer"),
                "`content` of message 4 (role `observer`)",
            ),
            (
                skips("assistant"),
                "`tool_calls[0].function.name` of message 2",
            ),
            (
                SHOWS_ALL.replace("m.tool_calls or []", "[]"),
                "`tool_calls[0].function.name` of message 2",
            ),
            (
                SHOWS_ALL.replace("c.function.arguments | tojson", "c.function.arguments.x"),
                "`tool_calls[0].function.arguments.y` of message 2",
            ),
        ] {
            let problem = checked(&template, chat(), None).unwrap_err();
            assert!(problem.contains(expected), "{template}: {problem}");
        }
    }

    #[test]
    fn texts_that_the_template_looks_into_are_found() {
        // Shown as JSON, or only if they have a tag.
        let json = SHOWS_ALL.replace("m.content | trim", "m.content | tojson");
        assert!(checked(&json, chat(), None).is_ok());
        let tagged = "{% for m in messages %}{{ m.content if '<x>' in m.content }}{% endfor %}";
        let with_tag = json!([{"role": "user", "content": "<x>a"}]);
        assert!(checked(tagged, with_tag, None).is_ok());
        assert!(checked(tagged, json!([{"role": "user", "content": "a"}]), None).is_err());
    }

    #[test]
    fn tools_that_are_not_shown_are_noted() {
        let tools = json!([{"type": "function", "function": {"name": "weather"}}]);
        let notes = checked(SHOWS_ALL, chat(), Some(tools.clone())).unwrap();
        assert_eq!(notes.len(), 1, "{notes:?}");
        let shown = format!("{{{{ tools | tojson }}}}{SHOWS_ALL}");
        assert_eq!(checked(&shown, chat(), Some(tools)), Ok(RowNotes::new()));
    }
}
