//! Prompts as conversations: the turns of a question and its examples, in a model's chat template or as plain text.
//!
//! Source: EleutherAI/lm-evaluation-harness 0.4.13: lm_eval/api/utils.py, `multiturn_to_singleturn`; huggingface/transformers 4.57:
//! src/transformers/utils/chat_template_utils.py, `render_jinja_template` (where a message that goes on is cut).

use std::cell::Cell;

use serde_json::{Value, json};

use crate::jinja::is_space;
use crate::{ChatTemplate, Error, GenerationPrompt, Result};

/// How prompts become conversations. By default they do not.
#[derive(Clone, Debug, Default)]
pub struct TaskChat<'a> {
    /// The model's template; none for plain text.
    pub template: Option<&'a ChatTemplate>,
    /// What comes before a task's description.
    pub system: Option<&'a str>,
    /// Whether all examples and the question are one message.
    pub is_single_turn: bool,
    /// How the answer begins, if the task does not say so.
    pub generation_prompt: Option<GenerationPrompt>,
    /// Whether the template has refused a system message, and conversations are without one.
    pub is_without_system: Cell<bool>,
}

/// Who says something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    System,
    User,
    Assistant,
}

/// A part of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Turn {
    role: Role,
    text: String,
    /// What follows it in plain text.
    delimiter: String,
}

impl Turn {
    pub(super) fn new(role: Role, text: String, delimiter: &str) -> Self {
        Self {
            role,
            text,
            delimiter: delimiter.to_owned(),
        }
    }

    fn message(&self) -> Value {
        let role = match self.role {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        };
        json!({"role": role, "content": self.text})
    }
}

impl TaskChat<'_> {
    /// Whether prompts are conversations.
    pub(super) fn is_chat(&self) -> bool {
        self.template.is_some()
    }

    /// The text of turns; `goes_on` if the last one is the beginning of the answer.
    ///
    /// # Errors
    /// If the template refuses them.
    pub(super) fn render(&self, turns: Vec<Turn>, goes_on: bool) -> Result<String> {
        let Some(template) = self.template else {
            return Ok(plain(&turns));
        };
        let turns = match self.is_single_turn {
            true => single(turns),
            false => turns,
        };
        let render = |turns: &[Turn]| -> Result<String> {
            let messages: Vec<Value> = turns.iter().map(Turn::message).collect();
            let Some(last) = turns.last().filter(|_| goes_on) else {
                let prompt = self.generation_prompt.unwrap_or(GenerationPrompt::Add);
                return template.render(&messages, None, prompt);
            };
            let text = template.render(&messages, None, GenerationPrompt::Omit)?;
            up_to(text, &last.text)
        };
        let has_system = turns.first().is_some_and(|turn| turn.role == Role::System);
        match render(&turns) {
            Err(Error::Template(_)) if has_system => {
                let text = render(&turns[1..])?;
                self.is_without_system.set(true);
                Ok(text)
            }
            rendered => rendered,
        }
    }
}

/// An answer without the thought before it.
///
/// Source: EleutherAI/lm-evaluation-harness 0.4.13: lm_eval/models/utils.py, `postprocess_generated_text`.
pub fn without_thought<'a>(text: &'a str, end: &str) -> &'a str {
    match text.rsplit_once(end) {
        Some((_, answer)) => answer.trim_start_matches(is_space),
        None => text,
    }
}

fn plain(turns: &[Turn]) -> String {
    let parts = turns
        .iter()
        .flat_map(|turn| [&*turn.text, &*turn.delimiter]);
    parts.collect()
}

/// All questions and examples as one message, between the system's and the beginning of the answer.
fn single(mut turns: Vec<Turn>) -> Vec<Turn> {
    let answer = turns.pop_if(|turn| turn.role == Role::Assistant);
    let n_system = turns
        .iter()
        .take_while(|turn| turn.role == Role::System)
        .count();
    let mut asked = turns.split_off(n_system);
    if let Some(last) = asked.last_mut() {
        last.delimiter.clear();
    }
    turns.push(Turn::new(Role::User, plain(&asked), ""));
    turns.extend(answer);
    turns
}

/// A rendered conversation up to the end of its last message, which the model goes on with.
fn up_to(mut text: String, last: &str) -> Result<String> {
    let trimmed = last.trim_matches(is_space);
    let Some(at) = text.rfind(trimmed) else {
        let expected = "a chat template that shows the beginning of the answer";
        return Err(Error::schema(expected, "one that does not"));
    };
    // White space after the message is the template's, unless it keeps the message's own.
    let is_kept = text[at..].starts_with(last);
    text.truncate(at + if is_kept { last.len() } else { trimmed.len() });
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}";

    fn turns() -> Vec<Turn> {
        vec![
            Turn::new(Role::System, "S".into(), ""),
            Turn::new(Role::User, "q1".into(), " "),
            Turn::new(Role::Assistant, "a1".into(), "\n\n"),
            Turn::new(Role::User, "q2".into(), " "),
        ]
    }

    fn chat(template: &ChatTemplate) -> TaskChat<'_> {
        TaskChat {
            template: Some(template),
            ..TaskChat::default()
        }
    }

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source, BTreeMap::new()).unwrap()
    }

    #[test]
    fn turns_are_plain_text_one_message_or_several() {
        let plain = TaskChat::default().render(turns(), false).unwrap();
        assert_eq!(plain, "Sq1 a1\n\nq2 ");
        let template = template(TEMPLATE);
        let several = chat(&template);
        assert_eq!(
            several.render(turns(), false).unwrap(),
            "<system>S</system><user>q1</user><assistant>a1</assistant><user>q2</user><assistant>"
        );
        let one = TaskChat {
            is_single_turn: true,
            generation_prompt: Some(GenerationPrompt::NoThink),
            ..chat(&template)
        };
        assert_eq!(
            one.render(turns(), false).unwrap(),
            "<system>S</system><user>q1 a1\n\nq2</user><assistant><think></think>"
        );
    }

    #[test]
    fn an_answer_that_has_begun_goes_on() {
        let template = template(TEMPLATE);
        let mut turns = turns();
        turns.push(Turn::new(Role::Assistant, "The answer is ".into(), ""));
        for is_single_turn in [false, true] {
            let chat = TaskChat {
                is_single_turn,
                ..chat(&template)
            };
            let text = chat.render(turns.clone(), true).unwrap();
            assert!(
                text.ends_with("q2</user><assistant>The answer is"),
                "{text}"
            );
        }
        let whole = up_to("<a>x y </a>".into(), "x y ").unwrap();
        assert_eq!(whole, "<a>x y ");
    }

    #[test]
    fn a_template_without_system_messages_is_asked_without_them() {
        let source = format!(
            "{{% if messages[0].role == 'system' %}}{{{{ raise_exception('no system') }}}}{{% endif %}}{TEMPLATE}"
        );
        let template = template(&source);
        let chat = chat(&template);
        let text = chat.render(turns(), false).unwrap();
        assert!(text.starts_with("<user>q1</user>"), "{text}");
        assert!(chat.is_without_system.get());
    }

    #[test]
    fn thoughts_are_cut_off_before_answers() {
        let cut = |text| without_thought(text, "</think>");
        assert_eq!(cut("2 and 2\n</think>\n\n 4 "), "4 ");
        assert_eq!(cut("a</think>b</think>c"), "c");
        assert_eq!(cut(" no thought"), " no thought");
    }
}
