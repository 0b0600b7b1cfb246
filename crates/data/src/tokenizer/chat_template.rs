//! A model's chat template: from messages to the text the model was trained to read.
//!
//! Deliberately not here: which of that text is trained (see `turn.rs`), and tokens.

use super::config::{CONFIG, TEMPLATE, TemplateField, TokenizerConfig};
use super::files::TokenizerFiles;
use super::jinja_compat;
use crate::error::{Error, Result};
use minijinja::{Environment, Value as TemplateValue};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;

const TEMPLATE_NAME: &str = "chat_template";

/// Whether a rendering ends with the header of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GenerationPrompt {
    /// End with the header, so that the model answers.
    Add,
    /// The same for an answer that begins with a thought, if the template has such an option.
    Think,
    /// End with the last message.
    Omit,
}

/// The Jinja template of a model, and the special tokens that it may name.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: BTreeMap<&'static str, String>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("special_tokens", &self.special_tokens)
            .finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// The file `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json` (one
    /// template, or the one named `default`). `None` if there is neither.
    pub(super) fn from_files(
        files: &TokenizerFiles,
        config: &TokenizerConfig,
    ) -> Result<Option<Self>> {
        let Some((name, source)) = Self::source(files, config) else {
            return Ok(None);
        };
        Self::new(source, config.special_tokens())
            .map(Some)
            .map_err(|problem| files.malformed(name, &problem.to_string()))
    }

    /// The template's text, and the name of its file.
    pub(super) fn source<'a>(
        files: &'a TokenizerFiles,
        config: &'a TokenizerConfig,
    ) -> Option<(&'static str, &'a str)> {
        match (&files.chat_template, &config.chat_template) {
            (Some(source), _) => Some((TEMPLATE, source)),
            (None, Some(TemplateField::One(source))) => Some((CONFIG, source)),
            (None, Some(TemplateField::Named(named))) => {
                let default = named.iter().find(|template| template.name == "default")?;
                Some((CONFIG, &default.template))
            }
            (None, None) => None,
        }
    }

    fn new(source: &str, special_tokens: BTreeMap<&'static str, String>) -> Result<Self> {
        let mut environment = jinja_compat::environment();
        environment
            .add_template_owned(TEMPLATE_NAME, without_generation_tags(source))
            .map_err(template_error)?;
        Ok(Self {
            environment,
            special_tokens,
        })
    }

    /// Renders messages (objects with `role`, `content` and other keys of the template), and descriptions of tools if there
    /// are any.
    ///
    /// # Errors
    /// If the template refuses the messages or takes too long.
    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        generation_prompt: GenerationPrompt,
    ) -> Result<String> {
        self.render_as_given(messages, tools, generation_prompt)
            .or_else(|problem| match with_arguments_as_text(messages) {
                Some(messages) => self.render_as_given(&messages, tools, generation_prompt),
                None => Err(problem),
            })
    }

    fn render_as_given(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        generation_prompt: GenerationPrompt,
    ) -> Result<String> {
        let template = self
            .environment
            .get_template(TEMPLATE_NAME)
            .map_err(template_error)?;
        let mut context: BTreeMap<&str, TemplateValue> = self
            .special_tokens
            .iter()
            .map(|(name, text)| (*name, TemplateValue::from(text.as_str())))
            .collect();
        context.insert("messages", TemplateValue::from_serialize(messages));
        // Hugging Face passes `None` if there are none, and templates test `is not none`.
        context.insert("tools", TemplateValue::from_serialize(tools));
        context.insert("documents", TemplateValue::from(()));
        context.insert(
            "add_generation_prompt",
            (generation_prompt != GenerationPrompt::Omit).into(),
        );
        if generation_prompt == GenerationPrompt::Think {
            // DeepSeek's name and Qwen's. Templates test whether they are defined.
            context.insert("thinking", true.into());
            context.insert("enable_thinking", true.into());
        }
        template.render(context).map_err(template_error)
    }

    /// Whether a text occurs in the template.
    pub(crate) fn knows(&self, text: &str) -> bool {
        let template = self.environment.get_template(TEMPLATE_NAME);
        template.is_ok_and(|template| template.source().contains(text))
    }

    /// The template and the tokens it may name: what renderings depend on.
    pub(crate) fn identity(&self) -> String {
        let template = self.environment.get_template(TEMPLATE_NAME);
        let source = template.map(|template| template.source().to_owned());
        format!("{source:?} {:?}", self.special_tokens)
    }
}

/// The messages with the arguments of every tool call as JSON text, if any are objects: DeepSeek's
/// templates want text, as OpenAI's interface has it, others want objects, as Hugging Face advises.
fn with_arguments_as_text(messages: &[Value]) -> Option<Vec<Value>> {
    let mut messages = messages.to_vec();
    let mut changed = false;
    let calls = messages
        .iter_mut()
        .filter_map(|message| message.get_mut("tool_calls")?.as_array_mut())
        .flatten();
    for arguments in calls.filter_map(|call| call.get_mut("function")?.get_mut("arguments")) {
        if arguments.is_object() {
            *arguments = Value::String(jinja_compat::json_text(arguments));
            changed = true;
        }
    }
    changed.then_some(messages)
}

fn template_error(problem: minijinja::Error) -> Error {
    Error::Template(problem.to_string())
}

/// Turns `{% generation %}` … `{% endgeneration %}`, Hugging Face's mark around the assistant's text, into blocks that every
/// Jinja has.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (text, tag) = rest.split_at(start);
        let end = tag.find("%}").unwrap_or(tag.len());
        let (tag, after) = tag.split_at(end);
        out.push_str(text);
        match tag[2..].trim_matches(['-', '+', ' ', '\t', '\n', '\r']) {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::require_text;
    use serde_json::json;
    use std::path::Path;

    fn goldens() -> std::path::PathBuf {
        Path::new(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../tests/goldens/tokenizer_v3"
        ))
        .to_path_buf()
    }

    fn open(folder: &Path) -> Result<Option<ChatTemplate>> {
        let files = TokenizerFiles::with_siblings(folder, String::new())?;
        ChatTemplate::from_files(&files, &files.config()?)
    }

    #[test]
    fn deepseek_v3_renders_as_hugging_face_does() {
        let template = open(&goldens()).unwrap().unwrap();
        let text = require_text(&goldens().join("golden.json"), 1 << 20).unwrap();
        let golden: Value = serde_json::from_str(&text).unwrap();
        let chats = golden["chat"].as_array().unwrap();
        assert_eq!(chats.len(), 3);
        for chat in chats {
            let messages = chat["messages"].as_array().unwrap();
            let generation_prompt = match chat["add_generation_prompt"].as_bool().unwrap() {
                true => GenerationPrompt::Add,
                false => GenerationPrompt::Omit,
            };
            let rendered = template.render(messages, None, generation_prompt).unwrap();
            assert_eq!(rendered, chat["rendered"].as_str().unwrap());
        }
    }

    #[test]
    fn deepseek_v3_renders_tool_calls() {
        let template = open(&goldens()).unwrap().unwrap();
        let call = json!({"type": "function", "function": {"name": "f", "arguments": "{}"}});
        let messages = [
            json!({"role": "user", "content": "go"}),
            json!({"role": "assistant", "content": null, "tool_calls": [call]}),
            json!({"role": "tool", "content": "42"}),
        ];
        let rendered = template
            .render(&messages, None, GenerationPrompt::Add)
            .unwrap();
        assert_eq!(
            rendered,
            "<｜begin▁of▁sentence｜><｜User｜>go<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function\
             <｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>\
             <｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>42<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
        );
    }

    #[test]
    fn arguments_of_tool_calls_may_be_text_or_objects() {
        let template = open(&goldens()).unwrap().unwrap();
        let render = |arguments: Value| {
            let call =
                json!({"type": "function", "function": {"name": "f", "arguments": arguments}});
            let messages = [json!({"role": "assistant", "content": null, "tool_calls": [call]})];
            template
                .render(&messages, None, GenerationPrompt::Omit)
                .unwrap()
        };
        let text = render(json!("{\"x\": [1, 2]}"));
        assert_eq!(render(json!({"x": [1, 2]})), text);
    }

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    #[test]
    fn the_template_is_found_in_either_file() {
        let check = |files: &[(&str, &str)], expected: Option<&str>| {
            let folder = folder(files);
            let template = open(folder.path()).unwrap();
            let rendered = template.map(|t| t.render(&[], None, GenerationPrompt::Omit).unwrap());
            assert_eq!(rendered.as_deref(), expected, "{files:?}");
        };
        check(&[], None);
        check(&[(CONFIG, r#"{"chat_template": null}"#)], None);
        check(
            &[(
                CONFIG,
                r#"{"chat_template": "{{bos_token}}x", "bos_token": "<s>"}"#,
            )],
            Some("<s>x"),
        );
        let named = r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
        check(&[(CONFIG, named)], Some("d"));
        check(
            &[(CONFIG, named), ("chat_template.jinja", "file")],
            Some("file"),
        );
        check(
            &[("chat_template.jinja", "{{ tools is none }}")],
            Some("True"),
        );
        let marked = "{%- generation -%} a {%- endgeneration %} {% if true %}b{% endif %}";
        check(&[("chat_template.jinja", marked)], Some("a b"));
    }

    #[test]
    fn broken_templates_and_configs_name_their_file() {
        let check = |files: &[(&str, &str)], expected: &str| {
            let folder = folder(files);
            let problem = open(folder.path()).unwrap_err().to_string();
            assert!(problem.contains(expected), "{problem}");
        };
        check(
            &[("chat_template.jinja", "{% if %}")],
            "chat_template.jinja: chat template: syntax error",
        );
        check(
            &[("chat_template.jinja", "{% generation")],
            "chat_template.jinja: chat template: syntax error",
        );
        check(
            &[(CONFIG, r#"{"bos_token": 7}"#)],
            "tokenizer_config.json: a special token must be a string",
        );
        check(
            &[(CONFIG, r#"{"chat_template": 7}"#)],
            "tokenizer_config.json: `chat_template` must be",
        );
        check(&[(CONFIG, "[")], "tokenizer_config.json: ");
    }

    #[test]
    fn an_exception_of_a_template_reaches_the_user() {
        let template = ChatTemplate::new(
            "{{ raise_exception('roles must alternate') }}",
            BTreeMap::new(),
        )
        .unwrap();
        let problem = template
            .render(&[], None, GenerationPrompt::Omit)
            .unwrap_err()
            .to_string();
        assert!(problem.contains("roles must alternate"), "{problem}");
    }
}
