//! What a chat template expects of messages, where data sets and templates differ: the form of a call's arguments, of the content
//! with calls, of parts, and whether it knows the role `developer`.
//!
//! Templates are programs, so it is found by rendering probes and looking for their marks, never by a template's name.

use super::{ChatTemplate, GenerationPrompt};
use crate::error::{Error, Result};
use crate::jinja::{json_text, keep_exact};
use crate::notes::RowNotes;
use serde_json::{Map, Value, json};

/// Names of a thought. Hugging Face's library gives a template the first two, whichever the row has.
pub(crate) const THOUGHTS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
/// Text that no template and no data treats specially: private-use characters around a letter.
const PROBE_MARKS: [&str; 3] = [
    "\u{e000}a\u{e001}",
    "\u{e000}b\u{e001}",
    "\u{e000}c\u{e001}",
];
/// The longest text that a template may put between two parts. More means that it does not print them as they are.
const MAX_SEPARATOR_BYTES: usize = 2;
/// The text between parts for templates that read only text, as llama.cpp and vLLM have it.
const SEPARATOR: &str = "\n";

/// The keys that a message may have: more are named, unless the template knows them.
const KNOWN_KEYS: [&str; 13] = [
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "weight",
    "reasoning_content",
    "thinking",
    "reasoning",
    "id",
    "index",
    "annotations",
    "timestamp",
];

/// What a template expects.
#[derive(Clone, Debug)]
pub(super) struct Expected {
    /// Renders arguments that are an object, and those that are its JSON text, as a call of JSON.
    arguments: [bool; 2],
    /// Renders calls with content that is null, empty, or absent.
    contents: [bool; 3],
    /// The text between two parts; none if the template cannot read parts.
    separator: Option<String>,
    /// Whether content has to be a list of parts.
    pub(super) only_parts: bool,
    developer: bool,
    /// Whether a thought is shown.
    pub(super) thoughts: bool,
}

/// The forms of content without text, in the order in which they are tried.
const NO_CONTENT: [Option<Value>; 3] =
    [Some(Value::Null), Some(Value::String(String::new())), None];

impl Expected {
    /// The same for all conversations with tools, whichever they are.
    pub(super) fn of(template: &ChatTemplate, with_tools: bool) -> Self {
        let schema = json!({"type": "object", "properties": {}, "required": []});
        let function = json!({"name": "f", "description": "d", "parameters": schema});
        let tools = json!([{"type": "function", "function": function}]);
        let tools = with_tools.then_some(&tools);
        let probe = |messages: Value| {
            let messages = messages.as_array().map(Vec::as_slice).unwrap_or_default();
            template
                .render_as_given(messages, tools, GenerationPrompt::Omit)
                .ok()
        };
        let [a, b, _] = PROBE_MARKS;
        let shows =
            |messages: Value, mark: &str| probe(messages).is_some_and(|text| text.contains(mark));
        let user = |content: Value| json!({"role": "user", "content": content});
        let part = |text: &str| json!({"type": "text", "text": text});
        let separator = probe(json!([user(json!([part(a), part(b)]))]))
            .and_then(|text| Some(text.split_once(a)?.1.split_once(b)?.0.to_owned()))
            .filter(|between| between.len() <= MAX_SEPARATOR_BYTES);
        let only_parts = separator.is_some() && !shows(json!([user(a.into())]), a);
        let wrapped = |text: &str| match only_parts {
            true => json!([part(text)]),
            false => text.into(),
        };
        let mut thoughtful = json!({"role": "assistant", "content": wrapped(b)});
        for key in THOUGHTS {
            thoughtful[key] = a.into();
        }
        let calls = CallProbe::of(&wrapped("u"), probe);
        Self {
            arguments: calls.arguments(),
            contents: calls.contents(),
            separator,
            only_parts,
            developer: shows(
                json!([{"role": "developer", "content": wrapped(a)}, user(wrapped(b))]),
                a,
            ),
            thoughts: shows(json!([user(wrapped("u")), thoughtful]), a),
        }
    }
}

/// Which of the forms of a call a template renders: by content, then by arguments.
struct CallProbe([[bool; 2]; 3]);

impl CallProbe {
    fn of(user: &Value, probe: impl Fn(Value) -> Option<String>) -> Self {
        let object = json!({PROBE_MARKS[0]: PROBE_MARKS[1]});
        let text = Value::from(json_text(&object));
        let found = NO_CONTENT.map(|content| {
            [&object, &text].map(|arguments| {
                let function = json!({"name": PROBE_MARKS[2], "arguments": arguments});
                // Mistral's templates want an id of nine letters.
                let call = json!({"id": "abcdefghi", "type": "function", "function": function});
                let mut message = json!({"role": "assistant", "tool_calls": [call]});
                if let Some(content) = &content {
                    message["content"] = content.clone();
                }
                probe(json!([{"role": "user", "content": user}, message]))
            })
        });
        let nones = |text: &String| text.matches("None").count();
        let fewest = found.iter().flatten().flatten().map(nones).min();
        Self(found.map(|by_arguments| {
            by_arguments
                .map(|text| text.is_some_and(|text| Some(nones(&text)) == fewest && is_call(&text)))
        }))
    }

    fn arguments(&self) -> [bool; 2] {
        [0, 1].map(|form| self.0.iter().any(|by_arguments| by_arguments[form]))
    }

    fn contents(&self) -> [bool; 3] {
        let forms = self.arguments();
        // Content of a form must do with whichever arguments the template reads.
        self.0
            .map(|by_arguments| forms != [false; 2] && by_arguments == forms)
    }
}

/// Whether a rendering shows the name and the argument of the probe, not quoted twice and not as Python prints a dictionary.
fn is_call(text: &str) -> bool {
    let [key, value, name] = PROBE_MARKS;
    let before = text.find(key).map(|at| &text[..at]);
    let quoted =
        before.is_some_and(|before| before.ends_with(['\\', '\'']) || before.ends_with("\\\""));
    text.contains(name) && text.contains(value) && before.is_some() && !quoted
}

impl ChatTemplate {
    /// Messages as the template expects them.
    ///
    /// # Errors
    /// If the arguments of a call are not the JSON text of an object, and the template wants an object.
    pub(crate) fn prepare(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        notes: &mut RowNotes,
    ) -> Result<Vec<Value>> {
        let expected = self.expected(tools);
        let mut messages = messages.to_vec();
        for (index, message) in messages.iter_mut().enumerate() {
            let Some(message) = message.as_object_mut() else {
                continue;
            };
            self.note_unknown(message, notes);
            if message["role"] == "developer" && !expected.developer {
                message.insert("role".into(), "system".into());
                notes.insert(
                    "the chat template knows no role `developer`: its messages are the system's"
                        .into(),
                );
            }
            expected.content(message);
            expected.arguments(message).map_err(|found| {
                let expected = format!(
                    "the JSON text of an object in the arguments of a call of message {index}"
                );
                Error::schema(expected, found)
            })?;
        }
        Ok(messages)
    }

    fn note_unknown(&self, message: &Map<String, Value>, notes: &mut RowNotes) {
        let unknown = |key: &&String| !KNOWN_KEYS.contains(&key.as_str()) && !self.knows(key);
        for key in message.keys().filter(unknown) {
            notes.insert(format!(
                "the chat template does not read `{key}` of messages"
            ));
        }
    }
}

impl Expected {
    fn content(&self, message: &mut Map<String, Value>) {
        if let Some(Value::Array(parts)) = message.get("content") {
            let texts: Vec<&str> = parts.iter().filter_map(Value::as_str).collect();
            let text = texts.join(self.separator.as_deref().unwrap_or(SEPARATOR));
            message.insert("content".into(), text.into());
        }
        if !message.get("content").is_none_or(Value::is_null) && message["content"] != "" {
            return;
        }
        if !message.contains_key("tool_calls") {
            message.insert("content".into(), "".into());
            return;
        }
        let given = message.get("content").cloned();
        let works = |form: &Option<Value>| {
            let mut forms = NO_CONTENT.into_iter().zip(self.contents);
            forms.any(|(known, works)| works && known == *form)
        };
        if works(&given) {
            return;
        }
        if let Some(form) = NO_CONTENT.into_iter().find(works) {
            match form {
                Some(content) => message.insert("content".into(), content),
                None => message.shift_remove("content"),
            };
        }
    }

    /// Rewrites arguments of calls if the template does not render the form that they have.
    fn arguments(&self, message: &mut Map<String, Value>) -> Result<(), String> {
        let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
        for call in calls.into_iter().flatten() {
            let arguments = &mut call["function"]["arguments"];
            let rewritten = match (&*arguments, self.arguments) {
                (Value::Object(_), [false, true]) => json_text(arguments).into(),
                (Value::String(text), [true, false]) if text.trim().is_empty() => json!({}),
                (Value::String(text), [true, false]) => {
                    match serde_json::from_str(&keep_exact(text)) {
                        Ok(object @ Value::Object(_)) => object,
                        _ => return Err(text.clone()),
                    }
                }
                _ => continue,
            };
            *arguments = rewritten;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    const QUOTED: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}\
        {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}{% endfor %}";

    /// The messages as a template gets them, and the notes.
    fn prepared(template: &str, messages: Value) -> (Value, RowNotes) {
        let template = ChatTemplate::new(template, BTreeMap::new()).unwrap();
        let messages = crate::row::messages("messages", Some(messages)).unwrap();
        let mut notes = RowNotes::new();
        let messages = template.prepare(&messages, None, &mut notes).unwrap();
        (messages.into(), notes)
    }

    fn call(arguments: Value) -> Value {
        json!([{"type": "function", "function": {"name": "f", "arguments": arguments}}])
    }

    #[test]
    fn arguments_have_the_form_that_the_template_reads() {
        let (object, text) = (json!({"x": [1, 2.0]}), json!("{\"x\": [1, 2.0]}"));
        let arguments = |template: &str, given: &Value| {
            let messages =
                json!([{"role": "assistant", "content": "", "tool_calls": call(given.clone())}]);
            let (messages, _) = prepared(template, messages);
            messages[0]["tool_calls"][0]["function"]["arguments"].clone()
        };
        let joined = QUOTED.replace("c.function.arguments | tojson", "'' + c.function.arguments");
        let either = QUOTED.replace(
            "c.function.arguments | tojson",
            "c.function.arguments if c.function.arguments is string else c.function.arguments | tojson",
        );
        let items = QUOTED.replace(
            "{{ c.function.arguments | tojson }}",
            "{% for k, v in c.function.arguments | items %}<{{ k }}>{{ v }}{% endfor %}",
        );
        let printed = QUOTED.replace(" | tojson", "");
        for (template, given, expected) in [
            (QUOTED, &text, &object),
            (QUOTED, &object, &object),
            (&joined, &object, &text),
            (&joined, &text, &text),
            (&either, &object, &object),
            (&either, &text, &text),
            (&items, &text, &object),
            // Python's way to print a dictionary is no JSON.
            (&printed, &object, &text),
        ] {
            assert_eq!(arguments(template, given), *expected, "{template}");
        }
        let big = json!("{\"x\": 123456789012345678901234567890}");
        let kept = arguments(QUOTED, &big);
        assert_eq!(json_text(&kept), "{\"x\": 123456789012345678901234567890}");

        let template = ChatTemplate::new(QUOTED, BTreeMap::new()).unwrap();
        let wrong = [json!({"role": "assistant", "tool_calls": call("f(1)".into())})];
        let problem = template.prepare(&wrong, None, &mut RowNotes::new());
        let problem = problem.unwrap_err().to_string();
        assert!(
            problem.contains("the arguments of a call of message 0, found f(1)"),
            "{problem}"
        );
    }

    #[test]
    fn content_beside_calls_has_the_form_that_shows_them() {
        let content = |template: &str, given: Option<Value>| {
            let mut message = json!({"role": "assistant", "tool_calls": call(json!({}))});
            if let Some(content) = given {
                message["content"] = content;
            }
            let (messages, _) = prepared(template, json!([message]));
            messages[0].get("content").cloned()
        };
        let (null, empty) = (Some(Value::Null), Some(Value::from("")));
        // As DeepSeek-V3's: calls only where there is no content.
        let only_null = QUOTED.replace(
            "m.tool_calls or []",
            "(m.tool_calls if m.content is none else [])",
        );
        let only_null = only_null.replace("{{ m.content }}", "{{ m.content if m.content }}");
        assert_eq!(content(&only_null, empty.clone()), null);
        assert_eq!(content(&only_null, None), null);
        // Prints `None`, or adds texts.
        for template in [
            QUOTED.to_owned(),
            QUOTED.replace("{{ m.content }}", "{{ '' + m.content }}"),
        ] {
            assert_eq!(content(&template, null.clone()), empty, "{template}");
            assert_eq!(content(&template, empty.clone()), empty, "{template}");
        }
        // Where all forms do, the row's stays.
        let any = QUOTED.replace("{{ m.content }}", "{{ m.content or '' }}");
        for given in [null, empty, None] {
            assert_eq!(content(&any, given.clone()), given);
        }
    }

    #[test]
    fn parts_are_joined_as_the_template_joins_them() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let chat = json!([{"role": "user", "content": parts}]);
        let either = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}\
            {% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}";
        let only =
            "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}";
        let rendered = |template: &str| {
            let (messages, _) = prepared(template, chat.clone());
            let template = ChatTemplate::new(template, BTreeMap::new()).unwrap();
            let messages = messages.as_array().unwrap();
            template
                .render(messages, None, GenerationPrompt::Omit)
                .unwrap()
        };
        assert_eq!(rendered(QUOTED), "<user>a\nb");
        assert_eq!(rendered(either), "ab");
        assert_eq!(
            rendered(&either.replace("{{ p.text }}", "{{ p.text }} ")),
            "a b"
        );
        assert_eq!(rendered(only), "[a][b]");
    }

    #[test]
    fn a_developer_is_the_system_where_the_template_knows_none() {
        let role = |template: &str| {
            let (messages, notes) = prepared(
                template,
                json!([{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}]),
            );
            (messages[0]["role"].clone(), notes.len())
        };
        assert_eq!(role(QUOTED), ("developer".into(), 0));
        let strict = "{% for m in messages %}{% if m.role in ['system', 'user'] %}{{ m.content }}{% endif %}{% endfor %}";
        assert_eq!(role(strict), ("system".into(), 1));
        let raises = strict.replace(
            "{% endif %}",
            "{% else %}{{ raise_exception('no') }}{% endif %}",
        );
        assert_eq!(role(&raises), ("system".into(), 1));
    }

    #[test]
    fn keys_that_the_template_does_not_read_are_noted() {
        let chat = json!([{"role": "user", "content": "a", "prefix": true, "mood": "x"}]);
        let (_, notes) = prepared(&format!("{QUOTED}{{{{ messages[0].prefix }}}}"), chat);
        assert_eq!(
            notes.into_iter().collect::<Vec<_>>(),
            ["the chat template does not read `mood` of messages"]
        );
    }
}
