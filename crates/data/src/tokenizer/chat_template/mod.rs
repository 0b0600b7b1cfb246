//! A model's chat template: from messages to the text the model was trained to read.
//!
//! Deliberately not here: which of that text is trained (see `turn.rs`), and tokens.

mod expected;

use super::config::{CONFIG, DEFAULT, TEMPLATE, TemplateField, TokenizerConfig};
use super::files::TokenizerFiles;
use crate::error::{Error, Result};
use crate::file::parse_line;
use crate::jinja::{self, Template};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::OnceLock;

use expected::Expected;

pub(crate) use expected::THOUGHTS;

/// The template for conversations with tools, as Hugging Face's library chooses it.
const TOOL_USE: &str = "tool_use";

/// What ends the thought of DeepSeek's and Qwen's models.
const THOUGHT_END: &str = "</think>";

/// Whether a rendering ends with the header of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GenerationPrompt {
    /// End with the header, so that the model answers.
    Add,
    /// The same for an answer that begins with a thought, if the template has such an option.
    Think,
    /// The same for an answer without a thought, if the template has such an option.
    NoThink,
    /// End with the last message.
    Omit,
}

/// The Jinja templates of a model, and the special tokens that they may name.
#[derive(Clone)]
pub struct ChatTemplate {
    /// By name; most models have one, [`DEFAULT`].
    templates: BTreeMap<String, Template>,
    special_tokens: BTreeMap<String, Value>,
    /// Without and with tools.
    expected: [OnceLock<Expected>; 2],
}

/// A template's name, its text, and the name of its file.
pub(super) type NamedSource<'a> = (&'a str, &'a str, String);

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("names", &self.templates.keys())
            .field("special_tokens", &self.special_tokens)
            .finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// A template, and the texts of special tokens by the names that it has for them (`bos_token`).
    ///
    /// # Errors
    /// If it is no Jinja template.
    pub fn new(source: &str, special_tokens: BTreeMap<String, Value>) -> Result<Self> {
        let template = Template::parse(source).map_err(template_error)?;
        Ok(Self::of(
            BTreeMap::from([(DEFAULT.to_owned(), template)]),
            special_tokens,
        ))
    }

    fn of(templates: BTreeMap<String, Template>, special_tokens: BTreeMap<String, Value>) -> Self {
        Self {
            templates,
            special_tokens,
            expected: Default::default(),
        }
    }

    /// The templates of [`sources`]. `None` if there are none.
    pub(super) fn from_files(
        files: &TokenizerFiles,
        config: &TokenizerConfig,
    ) -> Result<Option<Self>> {
        let mut templates = BTreeMap::new();
        for (name, source, file) in sources(files, config) {
            let parsed = Template::parse(source)
                .map_err(|problem| files.malformed(&file, &template_error(problem).to_string()))?;
            templates.insert(name.to_owned(), parsed);
        }
        let special_tokens = config.special_tokens();
        Ok((!templates.is_empty()).then(|| Self::of(templates, special_tokens)))
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
        if !self.expected(tools).only_parts {
            return self.render_as_given(messages, tools, generation_prompt);
        }
        let mut messages = messages.to_vec();
        for message in &mut messages {
            if let Some(content) = message.get_mut("content").filter(|c| c.is_string()) {
                *content = json!([{"type": "text", "text": content.take()}]);
            }
        }
        self.render_as_given(&messages, tools, generation_prompt)
    }

    fn render_as_given(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        generation_prompt: GenerationPrompt,
    ) -> Result<String> {
        let mut variables = vec![
            ("messages", jinja::Value::list_of_json(messages)),
            // Hugging Face passes `None` if there are none, and templates test `is not none`.
            (
                "tools",
                jinja::Value::of_json(tools.unwrap_or(&Value::Null)),
            ),
            ("documents", jinja::Value::of_json(&Value::Null)),
            (
                "add_generation_prompt",
                jinja::Value::of_json(&(generation_prompt != GenerationPrompt::Omit).into()),
            ),
        ];
        let thinks = match generation_prompt {
            GenerationPrompt::Think => Some(true),
            GenerationPrompt::NoThink => Some(false),
            GenerationPrompt::Add | GenerationPrompt::Omit => None,
        };
        // DeepSeek's name and Qwen's. Templates test whether they are defined.
        for name in ["thinking", "enable_thinking"] {
            let value = thinks.map(|thinks| (name, jinja::Value::of_json(&thinks.into())));
            variables.extend(value);
        }
        self.run(tools.is_some(), variables)
    }

    /// Renders with just the variables of a JSON object and the special tokens: what Hugging Face's library makes of them.
    ///
    /// # Errors
    /// If it is no object, or as [`ChatTemplate::render`].
    pub fn render_json(&self, variables: &str) -> Result<String> {
        let Value::Object(variables) = parse_line(variables)? else {
            return Err(Error::schema("a JSON object", "another value"));
        };
        let named = variables.iter();
        let named = named.map(|(name, value)| (name.as_str(), jinja::Value::of_json(value)));
        let with_tools = variables.get("tools").is_some_and(|tools| !tools.is_null());
        self.run(with_tools, named.collect())
    }

    fn run<'a>(
        &'a self,
        with_tools: bool,
        mut variables: Vec<(&'a str, jinja::Value)>,
    ) -> Result<String> {
        let tokens = self.special_tokens.iter();
        variables.extend(tokens.map(|(name, text)| (name.as_str(), jinja::Value::of_json(text))));
        self.chosen(with_tools)?
            .render(variables)
            .map_err(template_error)
    }

    fn chosen(&self, with_tools: bool) -> Result<&Template> {
        let named = |name| self.templates.get(name);
        let for_tools = named(TOOL_USE).filter(|_| with_tools);
        for_tools.or_else(|| named(DEFAULT)).ok_or_else(|| {
            let names: Vec<&str> = self.templates.keys().map(String::as_str).collect();
            Error::Template(format!(
                "expected one of the name `{DEFAULT}`, found {}",
                names.join(", ")
            ))
        })
    }

    fn expected(&self, tools: Option<&Value>) -> &Expected {
        let with_tools = tools.is_some();
        self.expected[usize::from(with_tools)].get_or_init(|| Expected::of(self, with_tools))
    }

    /// Whether the template shows the thought of a last message.
    pub(crate) fn shows_thoughts(&self, tools: Option<&Value>) -> bool {
        self.expected(tools).thoughts
    }

    /// What ends a thought, if the template has thoughts.
    pub fn thought_end(&self) -> Option<&'static str> {
        Some(THOUGHT_END).filter(|end| self.knows(end))
    }

    /// Whether a text occurs in a template.
    pub(crate) fn knows(&self, text: &str) -> bool {
        let mut templates = self.templates.values();
        templates.any(|template| template.source().contains(text))
    }

    /// The templates and the tokens that they may name: what renderings depend on.
    pub(crate) fn identity(&self) -> String {
        let sources = self.templates.iter();
        let sources = sources.map(|(name, template)| (name, template.source()));
        format!(
            "{:?} {:?}",
            sources.collect::<Vec<_>>(),
            self.special_tokens
        )
    }
}

fn template_error(problem: jinja::Error) -> Error {
    Error::Template(problem.to_string())
}

/// The templates of a tokenizer: those of the folder `additional_chat_templates` and of `chat_template.jinja`, which stands for
/// all in `tokenizer_config.json` if it is there, as in Hugging Face's library.
pub(super) fn sources<'a>(
    files: &'a TokenizerFiles,
    config: &'a TokenizerConfig,
) -> Vec<NamedSource<'a>> {
    let mut found: BTreeMap<&str, (&str, String)> = BTreeMap::new();
    match (&files.chat_template, &config.chat_template) {
        (Some(source), _) => _ = found.insert(DEFAULT, (source, TEMPLATE.to_owned())),
        (None, Some(TemplateField::One(source))) => {
            found.insert(DEFAULT, (source, CONFIG.to_owned()));
        }
        (None, Some(TemplateField::Named(named))) => {
            let named = named.iter();
            found.extend(named.map(|t| (&*t.name, (&*t.template, CONFIG.to_owned()))));
        }
        (None, None) => {}
    }
    for (file, source) in &files.additional_templates {
        let name = file.rsplit('/').next().unwrap_or(file);
        let name = name.strip_suffix(".jinja").unwrap_or(name);
        found.insert(name, (source, file.clone()));
    }
    let found = found.into_iter();
    found
        .map(|(name, (source, file))| (name, source, file))
        .collect()
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
            let messages = template
                .prepare(&messages, None, &mut Default::default())
                .unwrap();
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
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
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
        let additional = ("additional_chat_templates/tool_use.jinja", "t");
        check(&[("chat_template.jinja", "file"), additional], Some("file"));
        check(
            &[("chat_template.jinja", "{{ tools is none }}")],
            Some("True"),
        );
        let marked = "{%- generation -%} a {%- endgeneration %} {% if true %}b{% endif %}";
        check(&[("chat_template.jinja", marked)], Some("a b"));
    }

    #[test]
    fn rows_with_tools_have_the_template_for_them() {
        let named = r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
        let additional = ("additional_chat_templates/tool_use.jinja", "t");
        let tools = json!([{"name": "f"}]);
        let renderings = |files: &[(&str, &str)]| {
            let folder = folder(files);
            let template = open(folder.path()).unwrap().unwrap();
            [None, Some(&tools)].map(|tools| {
                let rendered = template.render(&[], tools, GenerationPrompt::Omit);
                rendered.map_err(|problem| problem.to_string())
            })
        };
        let both = [Ok("d".to_owned()), Ok("t".to_owned())];
        assert_eq!(renderings(&[(CONFIG, named)]), both);
        assert_eq!(renderings(&[(TEMPLATE, "d"), additional]), both);
        assert_eq!(
            renderings(&[(CONFIG, r#"{"chat_template": "d"}"#), additional]),
            both
        );
        let others = r#"{"chat_template": [{"name": "rag", "template": "r"}, {"name": "tool_use", "template": "t"}]}"#;
        let [without, with] = renderings(&[(CONFIG, others)]);
        assert!(
            without
                .unwrap_err()
                .contains("`default`, found rag, tool_use")
        );
        assert_eq!(with.as_deref(), Ok("t"));
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
            &[("additional_chat_templates/x.jinja", "{{ }}")],
            "additional_chat_templates/x.jinja: chat template: syntax error",
        );
        check(
            &[(CONFIG, r#"{"bos_token": 7}"#)],
            "tokenizer_config.json: `bos_token`: a special token must be a string",
        );
        check(
            &[(CONFIG, r#"{"chat_template": 7}"#)],
            "tokenizer_config.json: `chat_template`: `chat_template` must be",
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
