//! The assistant's turns in a rendered conversation.
//!
//! A template is a program, so the text of a turn cannot be read off the messages. It is found by rendering variants of the
//! conversation and comparing them:
//!
//! 1. the messages before the turn, with generation prompt, and those through it. If both are prefixes of the whole, the turn is
//!    the difference: exactly the text that the model would have to write;
//! 2. otherwise (templates that drop the thoughts of earlier turns, or whose generation prompt
//!    opens a thought that past turns do not show), the whole conversation with the content of
//!    this turn replaced by two different marks. The common text around the marks is around the content too; the end token
//!    after it is that of a rendering that ends with the mark;
//! 3. otherwise (a tool call whose content the template does not print), the turn begins where
//!    the two renderings of step 1 start to differ.
//!
//! If none of them fits, there is an error rather than a guess.
//!
//! A turn with a thought (`reasoning_content`, or `<think>…</think>` in `content`) that the template drops is trained in a
//! separate text that ends with the turn, thought included, as the model has to write it there. So every turn is trained once,
//! after the context in which it will be written: earlier thoughts are as the template shows them.
//! What else the template leaves out of a conversation ends in an error (`coverage.rs`).

mod coverage;

use crate::common_prefix::common_prefix;
use crate::error::{Error, Result};
use crate::notes::RowNotes;
use crate::tokenizer::{ChatTemplate, GenerationPrompt, Tokenizer};
use serde_json::Value;
use std::ops::Range;

/// Maximum difference of template text between a mark and the real content (`<think>`, `</think>` and line ends in known
/// templates). More means that the comparison failed.
const MAX_WRAPPER_BYTES: usize = 64;

/// The tags around a thought in DeepSeek's and Qwen's texts.
const THINK: &str = "<think>";
const END_OF_THOUGHT: &str = "</think>";

/// A text and its trained ranges.
pub(crate) type MarkedText = (String, Vec<Range<usize>>);

/// Messages by number, with the range of each in the text.
type Turns = Vec<(usize, Range<usize>)>;

/// A conversation to render.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Conversation<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) template: &'a ChatTemplate,
    pub(crate) messages: &'a [Value],
    pub(crate) tools: Option<&'a Value>,
}

impl<'a> Conversation<'a> {
    /// The texts in which the assistant's messages from number `first` on are trained: the whole conversation, and one for each
    /// turn with a thought that the whole lacks. A message with a `weight` of 0 is not trained.
    ///
    /// # Errors
    /// If the template leaves out a part of the conversation, other than a thought of an earlier turn, or the turns cannot be
    /// told apart.
    pub(crate) fn texts(&self, first: usize, notes: &mut RowNotes) -> Result<Vec<MarkedText>> {
        let whole = self.whole()?;
        coverage::check(*self, &whole, notes)?;
        let turns = self.assistant_turns(&whole, first)?;
        let (mut together, mut apart) = (Vec::new(), Vec::new());
        for (index, turn) in turns {
            let message = &self.messages[index];
            let dropped = thought(message).filter(|thought| !whole[turn.clone()].contains(thought));
            let is_trained = message["weight"].as_f64() != Some(0.0);
            match dropped {
                Some(thought) if is_trained => {
                    apart.push(self.with_thought(index, &whole[turn], thought)?);
                    notes.insert(
                        "the chat template leaves out thoughts of earlier turns: each is trained in a text of its own".into(),
                    );
                }
                Some(_) => self.note_untrained(index, notes)?,
                None if is_trained => together.push(turn),
                None => {}
            }
        }
        for index in (0..first).filter(|&index| {
            thought(&self.messages[index]).is_some_and(|thought| !whole.contains(thought))
        }) {
            self.note_untrained(index, notes)?;
        }
        // Without a single turn to train the row is still a sample, and counted as such.
        if !together.is_empty() || apart.is_empty() {
            apart.insert(0, (whole, together));
        }
        Ok(apart)
    }

    /// The same with other messages.
    pub(crate) fn with<'b>(&self, messages: &'b [Value]) -> Conversation<'b>
    where
        'a: 'b,
    {
        Conversation { messages, ..*self }
    }

    /// RowNotes the thought of an untrained turn that the template drops, as it does in use.
    fn note_untrained(&self, index: usize, notes: &mut RowNotes) -> Result<()> {
        if !self.template.shows_thoughts(self.tools) && !self.template.knows(END_OF_THOUGHT) {
            return Err(self.no_thought(index));
        }
        notes.insert(
            "the chat template leaves out thoughts of earlier turns that are not trained".into(),
        );
        Ok(())
    }

    fn no_thought(&self, index: usize) -> Error {
        Error::LeftOut {
            part: "the thought".into(),
            index,
            role: "assistant".into(),
        }
    }

    /// The conversation through a message, with the thought that `turn` lacks.
    fn with_thought(&self, index: usize, turn: &str, thought: &str) -> Result<MarkedText> {
        // A template may show the thought of the last message.
        let through = self.with(&self.messages[..=index]);
        if let Ok(text) = through.whole()
            && let Ok(mut turns) = through.assistant_turns(&text, index)
            && let Some((_, turn)) = turns.pop()
            && text[turn.clone()].contains(thought)
        {
            return Ok((text, vec![turn]));
        }
        if !self.template.knows(END_OF_THOUGHT) {
            return Err(self.no_thought(index));
        }
        let before = self.render(&self.messages[..index], GenerationPrompt::Think)?;
        // R1's prompt opens the thought on a separate line, V3.1's does not. Without either, the model has to open it.
        let (open, inline) = match before.trim_end().ends_with(THINK) {
            true => ("", before.ends_with(THINK)),
            false => ("<think>\n", false),
        };
        let answer = turn.trim_start_matches(END_OF_THOUGHT);
        let answer = match inline {
            true => format!("{thought}{END_OF_THOUGHT}{answer}"),
            false => {
                let answer = answer.trim_start_matches(['\n', ' ']);
                format!("{open}{thought}\n{END_OF_THOUGHT}\n\n{answer}")
            }
        };
        let start = before.len();
        let text = before + &answer;
        let turn = start..text.len();
        Ok((text, vec![turn]))
    }

    /// The text of the conversation.
    pub(crate) fn whole(&self) -> Result<String> {
        self.render(self.messages, GenerationPrompt::Omit)
    }

    /// The ranges of the assistant's messages from number `first` on in the conversation's text, with the number of each.
    fn assistant_turns(&self, whole: &str, first: usize) -> Result<Turns> {
        let mut turns = Turns::new();
        for (index, message) in self.messages.iter().enumerate().skip(first) {
            if message["role"] != "assistant" {
                continue;
            }
            let floor = turns.last().map_or(0, |(_, turn)| turn.end);
            let turn = self
                .turn(whole, index)?
                .filter(|turn| turn.start >= floor && turn.start <= turn.end);
            let turn = self.without_trailing_space(whole, turn.ok_or(Error::Turn { index })?);
            turns.push((index, turn));
        }
        Ok(turns)
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

    /// Finds a turn by replacing its content with marks.
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

    /// The turn without the white space that some templates put after the end token: generation stops before it.
    fn without_trailing_space(&self, whole: &str, turn: Range<usize>) -> Range<usize> {
        let text = whole[turn.clone()].trim_end();
        if self.tokenizer.ends_with_special(text) {
            turn.start..turn.start + text.len()
        } else {
            turn
        }
    }
}

/// The thought before a message, if there is one.
fn thought(message: &Value) -> Option<&str> {
    let apart = message["reasoning_content"].as_str();
    let within = || {
        let (thought, _) = message["content"].as_str()?.split_once(END_OF_THOUGHT)?;
        Some(thought.trim_start().trim_start_matches(THINK))
    };
    let thought = apart.or_else(within)?.trim();
    (!thought.is_empty()).then_some(thought)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::tokenizer;
    use serde_json::json;

    const DEEPSEEK: &str =
        include_str!("../../../../tests/goldens/tokenizer_v3/tokenizer_config.json");

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

    /// The trained texts, and the whole texts that they are in.
    fn texts(template: &str, messages: &Value) -> Result<Vec<(Vec<String>, String)>> {
        let tokenizer = tokenizer(Some(template), true);
        let template = tokenizer.chat_template().unwrap();
        let mut notes = RowNotes::new();
        let messages = crate::row::messages("messages", Some(messages.clone()))?;
        let messages = template.prepare(&messages, None, &mut notes)?;
        let conversation = Conversation {
            tokenizer: &tokenizer,
            template,
            messages: &messages,
            tools: None,
        };
        let cut = |(text, turns): MarkedText| {
            let turns = turns.into_iter().map(|turn| text[turn].to_owned());
            (turns.collect(), text)
        };
        let texts = conversation.texts(0, &mut notes)?;
        Ok(texts.into_iter().map(cut).collect())
    }

    fn turns(template: &str, messages: &Value) -> Result<Vec<String>> {
        let texts = texts(template, messages)?;
        Ok(texts.into_iter().flat_map(|(turns, _)| turns).collect())
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
    fn a_space_that_the_model_has_to_write_is_part_of_its_turn() {
        // V2's way: the prompt ends with the colon.
        let v2 = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n\n\
            {% else %}Assistant: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}\
            {% if add_generation_prompt %}Assistant:{% endif %}";
        let chat = json!([
            {"role": "user", "content": "A"}, {"role": "assistant", "content": "B"},
            {"role": "user", "content": "C"}, {"role": "assistant", "content": "D"}]);
        let expected = "<s>User: A\n\nAssistant: B</s>User: C\n\nAssistant: D</s>";
        check_texts(v2, &chat, &[(" B</s>| D</s>", expected)]);
    }

    fn thinking_chat() -> Value {
        json!([
            {"role": "user", "content": "A"}, {"role": "assistant", "content": "<think>x</think>B"},
            {"role": "user", "content": "C"}, {"role": "assistant", "content": "D", "reasoning_content": "y"}])
    }

    fn check_texts(template: &str, messages: &Value, expected: &[(&str, &str)]) {
        let short = |text: &str| {
            text.replace("<｜begin▁of▁sentence｜>", "<s>")
                .replace("<｜end▁of▁sentence｜>", "</s>")
        };
        let found = texts(template, messages).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|(turns, text)| (short(&turns.join("|")), short(text)))
            .collect();
        let expected = expected
            .iter()
            .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()));
        assert_eq!(found, expected.collect::<Vec<_>>());
    }

    #[test]
    fn every_thought_is_trained_once_after_what_the_model_will_see() {
        let chat = thinking_chat();
        let r1 = deepseek().replace(
            "{{'<｜Assistant｜>'}}{% endif %}",
            "{{'<｜Assistant｜><think>\\n'}}{% endif %}",
        );
        assert_ne!(r1, deepseek());
        check_texts(
            &r1,
            &chat,
            &[
                (
                    "x\n</think>\n\nB</s>",
                    "<s><｜User｜>A<｜Assistant｜><think>\nx\n</think>\n\nB</s>",
                ),
                (
                    "y\n</think>\n\nD</s>",
                    "<s><｜User｜>A<｜Assistant｜>B</s><｜User｜>C<｜Assistant｜><think>\ny\n</think>\n\nD</s>",
                ),
            ],
        );
        // V3's prompt opens no thought: there the model has to.
        check(
            &deepseek(),
            &chat,
            &[
                "<think>\nx\n</think>\n\nB<｜end▁of▁sentence｜>",
                "<think>\ny\n</think>\n\nD<｜end▁of▁sentence｜>",
            ],
        );
        check_texts(
            THINKING,
            &chat,
            &[
                (
                    "<think>\ny\n</think>\n\nD</s>",
                    "<|user|>\nA</s>\n<|assistant|>\nB</s>\n<|user|>\nC</s>\n\
                     <|assistant|>\n<think>\ny\n</think>\n\nD</s>\n",
                ),
                (
                    "<think>\nx\n</think>\n\nB</s>",
                    "<|user|>\nA</s>\n<|assistant|>\n<think>\nx\n</think>\n\nB</s>",
                ),
            ],
        );
        // A template that knows of no thoughts shows what the content holds; what it cannot show is refused.
        let problem = turns(OPENED, &chat).unwrap_err().to_string();
        assert!(
            problem.contains("leaves out the thought of message 3"),
            "{problem}"
        );
        let mut within = chat;
        within[3] = json!({"role": "assistant", "content": "D"});
        check(
            OPENED,
            &within,
            &[
                "<think>x</think>B<｜end▁of▁sentence｜>",
                "D<｜end▁of▁sentence｜>",
            ],
        );
    }

    /// V3.1's way: past answers and quick ones follow `</think>`, a thinking one follows `<think>`.
    const HYBRID: &str = "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}\
        <｜Assistant｜></think>{{ m.content.split('</think>', 1)[-1] }}{{ eos_token }}{% endif %}{% endfor %}\
        {% if add_generation_prompt %}<｜Assistant｜>{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}";

    #[test]
    fn a_template_with_and_without_thoughts_is_told_which() {
        let mut chat = thinking_chat();
        chat[1]["content"] = "B".into();
        check_texts(
            HYBRID,
            &chat,
            &[
                (
                    "B</s>",
                    "<｜User｜>A<｜Assistant｜></think>B</s><｜User｜>C<｜Assistant｜></think>D</s>",
                ),
                (
                    "y</think>D</s>",
                    "<｜User｜>A<｜Assistant｜></think>B</s><｜User｜>C<｜Assistant｜><think>y</think>D</s>",
                ),
            ],
        );
    }

    #[test]
    fn messages_of_no_weight_are_not_trained() {
        let mut chat = thinking_chat();
        chat[1]["weight"] = 0.into();
        check(
            &deepseek(),
            &chat,
            &["<think>\ny\n</think>\n\nD<｜end▁of▁sentence｜>"],
        );
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
        let counted = "{{ messages|length }}{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}";
        assert!(matches!(
            turns(counted, &chat),
            Err(Error::Turn { index: 1 })
        ));
        // Marks still find the place, whatever the counter at the beginning says.
        check(scrambled, &chat, &["B"]);
    }
}
