//! Which text of a rendered conversation the assistant says.
//!
//! A template is a program, so the text of a turn cannot be read off the messages. It is found by
//! rendering variants of the conversation and comparing:
//!
//! 1. the messages before the turn, with generation prompt, and those through it. If both are
//!    prefixes of the whole, the turn is what the second has more: exactly what the model would
//!    have to write;
//! 2. otherwise (templates that drop the thoughts of earlier turns, or whose generation prompt
//!    opens a thought that past turns do not show), the whole conversation with the content of
//!    this turn replaced by two different marks. What both have in common around the marks is
//!    around the content too; the end token after it is the one a rendering that ends with the
//!    mark has;
//! 3. otherwise (a tool call whose content the template does not print), the turn begins where
//!    the two renderings of 1 part.
//!
//! If none of them fits, there is an error rather than a guess.

use crate::chat_template::{ChatTemplate, GenerationPrompt};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use serde_json::Value;
use std::ops::Range;

/// How much template text may differ between a mark and the real content (`<think>`, `</think>` and
/// line ends in known templates). More means that the comparison went wrong.
const MAX_WRAPPER_BYTES: usize = 64;

/// A conversation to render.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Conversation<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) template: &'a ChatTemplate,
    pub(crate) messages: &'a [Value],
    pub(crate) tools: Option<&'a Value>,
}

impl Conversation<'_> {
    /// The text of the conversation, and the ranges of it that the assistant says in the messages
    /// from number `first` on.
    pub(crate) fn assistant_turns(&self, first: usize) -> Result<(String, Vec<Range<usize>>)> {
        let whole = self.render(self.messages, GenerationPrompt::Omit)?;
        let mut turns: Vec<Range<usize>> = Vec::new();
        for (index, message) in self.messages.iter().enumerate().skip(first) {
            if message["role"] != "assistant" {
                continue;
            }
            let floor = turns.last().map_or(0, |turn| turn.end);
            let turn = self
                .turn(&whole, index)?
                .filter(|turn| turn.start >= floor && turn.start <= turn.end);
            turns.push(self.without_trailing_space(&whole, turn.ok_or(Error::Turn { index })?));
        }
        Ok((whole, turns))
    }

    fn render(&self, messages: &[Value], generation_prompt: GenerationPrompt) -> Result<String> {
        self.template
            .render(messages, self.tools, generation_prompt)
    }

    fn turn(&self, whole: &str, index: usize) -> Result<Option<Range<usize>>> {
        // Templates may refuse a part of a conversation that they accept as a whole.
        let before = self
            .render(&self.messages[..index], GenerationPrompt::Add)
            .ok();
        let through = self
            .render(&self.messages[..=index], GenerationPrompt::Omit)
            .ok();
        let parts = before
            .as_deref()
            .zip(through.as_deref())
            .filter(|(_, through)| whole.starts_with(through));
        if let Some((before, through)) = parts
            && through.starts_with(before)
        {
            return Ok(Some(before.len()..through.len()));
        }
        if let Some(turn) = self.marked_turn(whole, index) {
            return Ok(Some(turn));
        }
        Ok(parts.map(|(before, through)| common_prefix(before, through)..through.len()))
    }

    /// Finds a turn by putting marks in the place of its content.
    fn marked_turn(&self, whole: &str, index: usize) -> Option<Range<usize>> {
        // Private-use characters: no template and no data treats them specially.
        let (mark, other) = ("\u{e000}", "\u{e001}");
        let marked = |mark: &str, end: usize| {
            let mut messages = self.messages[..end].to_vec();
            messages[index]["content"] = mark.into();
            self.render(&messages, GenerationPrompt::Omit).ok()
        };
        let a = marked(mark, self.messages.len())?;
        let b = marked(other, self.messages.len())?;
        let header = common_prefix(&a, &b);
        if !a[header..].starts_with(mark) {
            return None; // the content is not printed, or not as it is
        }
        let footer = &a[header + mark.len()..];
        let start = common_prefix(&a[..header], whole);
        let end = whole.len().checked_sub(footer.len())?;
        if header - start > MAX_WRAPPER_BYTES || end < start || !whole.ends_with(footer) {
            return None;
        }

        let last = marked(mark, index + 1)?;
        let (_, end_token) = last.split_once(mark)?;
        whole[end..]
            .starts_with(end_token)
            .then_some(start..end + end_token.len())
    }

    /// Leaves out the white space that some templates put after the end token: at generation the
    /// model is stopped before it.
    fn without_trailing_space(&self, whole: &str, turn: Range<usize>) -> Range<usize> {
        let text = whole[turn.clone()].trim_end();
        if self.tokenizer.ends_with_special(text) {
            turn.start..turn.start + text.len()
        } else {
            turn
        }
    }
}

/// How many bytes two texts have in common at their beginning, in whole characters.
pub(crate) fn common_prefix(a: &str, b: &str) -> usize {
    let same = a.chars().zip(b.chars()).take_while(|(a, b)| a == b);
    same.map(|(char, _)| char.len_utf8()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::tokenizer;
    use serde_json::json;

    const DEEPSEEK: &str =
        include_str!("../../../tests/goldens/tokenizer_v3/tokenizer_config.json");

    fn deepseek() -> String {
        let config: Value = serde_json::from_str(DEEPSEEK).unwrap();
        config["chat_template"].as_str().unwrap().to_owned()
    }

    /// ChatML that drops the thoughts of all but the last turn and always shows a thought there.
    const THINKING: &str = "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}\
        {% if loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}\
        {{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{{ eos_token }}\n{% endfor %}\
        {% if add_generation_prompt %}<|assistant|>\n{% endif %}";

    /// A generation prompt that opens a thought which past turns do not show.
    const OPENED: &str = "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}\
        <｜Assistant｜>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}\
        {% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}";

    fn turns(template: &str, messages: &Value) -> Result<Vec<String>> {
        let tokenizer = tokenizer(Some(template), true);
        let conversation = Conversation {
            tokenizer: &tokenizer,
            template: tokenizer.chat_template().unwrap(),
            messages: messages.as_array().unwrap(),
            tools: None,
        };
        let (whole, turns) = conversation.assistant_turns(0)?;
        Ok(turns
            .into_iter()
            .map(|turn| whole[turn].to_owned())
            .collect())
    }

    fn check(template: &str, messages: &Value, expected: &[&str]) {
        assert_eq!(turns(template, messages).unwrap(), expected, "{messages}");
    }

    #[test]
    fn each_turn_is_what_the_model_has_to_write() {
        let chat = json!([
            {"role": "system", "content": "S"}, {"role": "user", "content": "A"}, {"role": "assistant", "content": "B"},
            {"role": "user", "content": "B"}, {"role": "assistant", "content": ""}]);
        const EOS: &str = "<｜end▁of▁sentence｜>";
        check(&deepseek(), &chat, &["B<｜end▁of▁sentence｜>", EOS]);
        check(OPENED, &chat, &["B<｜end▁of▁sentence｜>", EOS]);
        let plain = "{% for m in messages %}{{ m.role }}: {{ m.content|trim }}\n{% endfor %}\
            {% if add_generation_prompt %}assistant:{% endif %}";
        check(plain, &chat, &[" B\n", " \n"]);
    }

    #[test]
    fn thoughts_that_a_template_drops_are_not_trained_and_those_it_keeps_are() {
        let chat = json!([
            {"role": "user", "content": "A"}, {"role": "assistant", "content": "<think>x</think>B", "reasoning_content": "x"},
            {"role": "user", "content": "C"}, {"role": "assistant", "content": "D", "reasoning_content": "y"}]);
        check(
            &deepseek(),
            &chat,
            &["B<｜end▁of▁sentence｜>", "D<｜end▁of▁sentence｜>"],
        );
        check(
            THINKING,
            &chat,
            &[
                "B<｜end▁of▁sentence｜>",
                "<think>\ny\n</think>\n\nD<｜end▁of▁sentence｜>",
            ],
        );
        let opened = &[
            "<think>x</think>B<｜end▁of▁sentence｜>",
            "D<｜end▁of▁sentence｜>",
        ];
        check(OPENED, &chat, opened);
    }

    #[test]
    fn tool_calls_and_the_answers_to_their_results_are_turns() {
        let call =
            |name| json!([{"type": "function", "function": {"name": name, "arguments": "{}"}}]);
        let chat = json!([
            {"role": "user", "content": "A"}, {"role": "assistant", "content": null, "tool_calls": call("f")},
            {"role": "tool", "content": "1"}, {"role": "assistant", "content": "B"},
            {"role": "user", "content": "C"}, {"role": "assistant", "content": "", "tool_calls": call("g")}]);
        let f = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```\
            <｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>";
        // This template forgets the header of every call after the first.
        let g = "\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```\
            <｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>";
        check(&deepseek(), &chat, &[f, "B<｜end▁of▁sentence｜>", g]);
    }

    #[test]
    fn a_conversation_that_cannot_be_taken_apart_is_an_error() {
        let scrambled =
            "{{ messages|length }}{% for m in messages %}{{ m.content|upper }}{% endfor %}";
        let chat = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]);
        let counted =
            "{{ messages|length }}{% for m in messages %}{{ m.content|length }}{% endfor %}";
        assert!(matches!(
            turns(counted, &chat),
            Err(Error::Turn { index: 1 })
        ));
        // Marks still find the place, whatever the counter at the beginning says.
        check(scrambled, &chat, &["B"]);
    }
}
