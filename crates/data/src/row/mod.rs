//! The rows of a data file: their kinds, and the trained tokens of each.

use crate::error::{Error, Result};
use crate::file::{describe, parse_line};
use crate::notes::RowNotes;
use crate::sample::{MarkedTokens, Sample};
use crate::tokenizer::{Bos, ChatTemplate, GenerationPrompt, Tokenizer};
use crate::turn::Conversation;
use kind::RowKind;
use serde_json::{Map, Value};
use std::ops::Range;

mod alpaca_sharegpt;
mod call;
mod kind;
mod message;
mod pair;

pub(crate) use kind::found_keys;
pub(crate) use message::messages;
pub use pair::PreferencePair;

/// The label of a token that is not trained: PyTorch's `ignore_index`.
const NOT_TRAINED: i64 = -100;

/// The keys that tables without lists, CSV above all, have as the JSON text of one.
const LISTS: [&str; 5] = [
    "messages",
    "conversations",
    "history",
    "input_ids",
    "labels",
];

/// The limits of samples.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Maximum length of a sample in tokens.
    pub(crate) max_length: usize,
    /// One more than the largest token id the model has.
    pub(crate) vocab_size: usize,
}

/// One row, checked.
#[derive(Debug, PartialEq)]
pub(crate) enum Row {
    /// Every token is trained. Split into pieces if too long.
    Text(String),
    /// Joined as they are; the completion is trained.
    Completion { prompt: String, completion: String },
    /// Rendered with the chat template; the assistant's turns from message `first` on are trained.
    Messages {
        messages: Vec<Value>,
        tools: Option<Value>,
        first: usize,
    },
    /// Another program's tokens.
    Ids { ids: Vec<u32>, trained: Vec<bool> },
    /// Two answers to one prompt: the chosen row and the rejected one.
    Pair(Box<[Self; 2]>),
}

impl Row {
    /// Recognizes a row by its keys, those that the caller named above all. Also returns the unread keys.
    pub(crate) fn parse(value: Value, named: &[&str]) -> Result<(Self, Vec<String>)> {
        let Value::Object(mut row) = value else {
            return Err(Error::schema("a JSON object", describe(&value)));
        };
        let (kind, ignored) = RowKind::of(&mut row, named)?;
        LISTS.iter().for_each(|key| unquote(&mut row, key));
        let mut tools = message::tools(row.remove("tools"))?;
        let parsed = match kind {
            RowKind::Text => Self::Text(string(&mut row, "text")?),
            RowKind::Completion => completion(row, tools)?,
            RowKind::Messages => {
                let messages = messages("messages", row.remove("messages"))?;
                Self::conversation(messages, tools, 0)?
            }
            RowKind::Instruction => {
                Self::conversation(alpaca_sharegpt::instruction(&mut row)?, tools, 0)?
            }
            RowKind::Conversations => {
                tools.iter_mut().for_each(message::as_functions);
                let list = Value::Array(alpaca_sharegpt::conversations(&mut row)?);
                Self::conversation(messages("conversations", Some(list))?, tools, 0)?
            }
            RowKind::Ids => pretokenized(&mut row)?,
            RowKind::Pair => Self::Pair(Box::new(pair::parse(&mut row, tools)?)),
        };
        Ok((parsed, ignored))
    }

    pub(crate) fn conversation(
        messages: Vec<Value>,
        tools: Option<Value>,
        first: usize,
    ) -> Result<Self> {
        if messages[first..]
            .iter()
            .all(|message| message["role"] != "assistant")
        {
            return Err(Error::schema(
                "a message of the role `assistant` to train on",
                "none",
            ));
        }
        Ok(Self::Messages {
            messages,
            tools,
            first,
        })
    }

    /// The row in tokens within the limits: several samples for a long text or a conversation with thoughts that the template
    /// drops, two for a pair, otherwise one.
    ///
    /// `notes` say what of the row is not as it is written.
    pub(crate) fn samples(
        &self,
        tokenizer: Option<&Tokenizer>,
        limits: Limits,
        notes: &mut RowNotes,
    ) -> Result<Vec<Sample>> {
        if let Self::Pair(answers) = self {
            let answers = answers.iter().map(|row| {
                let mut samples = row.samples(tokenizer, limits, notes)?;
                // An answer is one sample: of turns that need separate texts, the last one was chosen.
                if let (Some(last), true) = (row.last_turn(), samples.len() > 1) {
                    samples = last.samples(tokenizer, limits, notes)?;
                }
                samples
                    .pop()
                    .ok_or_else(|| Error::schema("an answer", "none"))
            });
            return answers.collect();
        }
        let pieces = match self {
            Self::Ids { ids, trained } => vec![MarkedTokens {
                ids: ids.clone(),
                trained: trained.clone(),
                text_bytes: vec![0; ids.len()],
            }],
            _ => self.tokenize(tokenizer.ok_or(Error::NoTokenizer)?, notes)?,
        };
        let mut samples = Vec::new();
        for marked in &pieces {
            limits.check(&marked.ids)?;
            match self {
                Self::Text(_) => samples.extend(marked.chunks(limits.max_length)),
                _ => samples.push(marked.truncate(limits.max_length)),
            }
        }
        Ok(samples)
    }

    /// The conversation with only the assistant's last turn trained.
    fn last_turn(&self) -> Option<Self> {
        let Self::Messages {
            messages, tools, ..
        } = self
        else {
            return None;
        };
        let first = messages
            .iter()
            .rposition(|message| message["role"] == "assistant")?;
        Some(Self::Messages {
            messages: messages.clone(),
            tools: tools.clone(),
            first,
        })
    }

    fn tokenize(&self, tokenizer: &Tokenizer, notes: &mut RowNotes) -> Result<Vec<MarkedTokens>> {
        match self {
            Self::Text(text) => {
                let encoded = tokenizer.encode_with_ranges(text, Bos::Add)?;
                let mut marked =
                    MarkedTokens::new(encoded, std::slice::from_ref(&(0..text.len())), tokenizer);
                marked.end_with(tokenizer.eos_id());
                Ok(vec![marked])
            }
            Self::Completion { prompt, completion } => {
                let mut marked = continuation(prompt, completion, Bos::Add, tokenizer)?;
                marked.end_with(tokenizer.eos_id());
                Ok(vec![marked])
            }
            Self::Messages {
                messages,
                tools,
                first,
            } => {
                let template = tokenizer.chat_template().ok_or(Error::NoChatTemplate)?;
                let messages = &template.prepare(messages, tools.as_ref(), notes)?;
                let conversation = Conversation {
                    tokenizer,
                    template,
                    messages,
                    tools: tools.as_ref(),
                };
                let encode = |(text, turns): (String, Vec<Range<usize>>)| {
                    let encoded = tokenizer.encode_with_ranges(&text, Bos::Never)?;
                    Ok(MarkedTokens::new(encoded, &turns, tokenizer))
                };
                let texts = conversation.texts(*first, notes)?;
                texts.into_iter().map(encode).collect()
            }
            Self::Ids { .. } | Self::Pair(_) => Ok(Vec::new()),
        }
    }
}

impl Limits {
    fn check(&self, ids: &[u32]) -> Result<()> {
        let beyond = |id: &&u32| **id as usize >= self.vocab_size;
        if let Some(&id) = ids.iter().find(beyond) {
            return Err(Error::Vocabulary {
                id,
                vocab_size: self.vocab_size,
            });
        }
        if ids.is_empty() {
            return Err(Error::schema("at least one token", "an empty row"));
        }
        Ok(())
    }
}

/// A prompt and the trained text after it, tokenized as one text.
pub(crate) fn continuation(
    prompt: &str,
    text: &str,
    bos: Bos,
    tokenizer: &Tokenizer,
) -> Result<MarkedTokens> {
    let joined = [prompt, text].concat();
    let encoded = tokenizer.encode_with_ranges(&joined, bos)?;
    Ok(MarkedTokens::new(
        encoded,
        std::slice::from_ref(&(prompt.len()..joined.len())),
        tokenizer,
    ))
}

/// Messages ready to be answered, as text.
pub(crate) fn render_prompt(messages: &[Value], template: Option<&ChatTemplate>) -> Result<String> {
    let template = template.ok_or(Error::NoChatTemplate)?;
    let messages = template.prepare(messages, None, &mut RowNotes::new())?;
    template.render(&messages, None, GenerationPrompt::Add)
}

/// Every key that some kind of row reads.
pub(crate) fn row_keys() -> impl Iterator<Item = &'static str> {
    RowKind::keys()
}

/// Replaces the JSON text of a list by the list.
fn unquote(row: &mut Map<String, Value>, key: &str) {
    if let Some(value) = row.get_mut(key)
        && let Some(list @ Value::Array(_)) = value.as_str().and_then(|text| parse_line(text).ok())
    {
        *value = list;
    }
}

/// A {prompt, completion} row: two strings, or messages and the assistant's answer to them.
fn completion(mut row: Map<String, Value>, tools: Option<Value>) -> Result<Row> {
    if row["prompt"].is_string() {
        let (prompt, completion) = (string(&mut row, "prompt")?, string(&mut row, "completion")?);
        return Ok(Row::Completion { prompt, completion });
    }
    let mut all = messages("prompt", row.remove("prompt"))?;
    let first = all.len();
    match row.remove("completion") {
        Some(Value::String(content)) => {
            all.push(serde_json::json!({"role": "assistant", "content": content}));
        }
        completion => all.extend(messages("completion", completion)?),
    }
    Row::conversation(all, tools, first)
}

fn pretokenized(row: &mut Map<String, Value>) -> Result<Row> {
    let ids: Vec<u32> = integers("input_ids", row.remove("input_ids"))?;
    let Some(labels) = row.remove("labels") else {
        return Ok(Row::Ids {
            trained: vec![true; ids.len()],
            ids,
        });
    };
    let labels: Vec<i64> = integers("labels", Some(labels))?;
    if labels.len() != ids.len() {
        return Err(Error::schema(
            format!("{} `labels`, one for each of `input_ids`", ids.len()),
            labels.len().to_string(),
        ));
    }
    for (index, (&label, &id)) in labels.iter().zip(&ids).enumerate() {
        if label != NOT_TRAINED && label != i64::from(id) {
            let expected = format!("`labels[{index}]` to be -100 or `input_ids[{index}]` = {id}");
            return Err(Error::schema(expected, label.to_string()));
        }
    }
    Ok(Row::Ids {
        trained: labels.iter().map(|&label| label != NOT_TRAINED).collect(),
        ids,
    })
}

/// A list of integers that fit `T`. Errors name the place of negative ids, fractions and texts.
pub(crate) fn integers<T: TryFrom<i64>>(key: &str, value: Option<Value>) -> Result<Vec<T>> {
    let value = value.unwrap_or_default();
    let Value::Array(list) = &value else {
        return Err(Error::schema(
            format!("a list of integers in `{key}`"),
            describe(&value),
        ));
    };
    let integer = |(index, value): (usize, &Value)| {
        let fits = value.as_i64().and_then(|number| T::try_from(number).ok());
        fits.ok_or_else(|| {
            Error::schema(
                format!("`{key}[{index}]` to be a token id"),
                describe(value),
            )
        })
    };
    list.iter().enumerate().map(integer).collect()
}

/// A string that may be absent or null.
pub(crate) fn optional_string(row: &mut Map<String, Value>, key: &str) -> Result<Option<String>> {
    match row.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(_) => string(row, key).map(Some),
    }
}

pub(crate) fn string(row: &mut Map<String, Value>, key: &str) -> Result<String> {
    match row.remove(key).unwrap_or_default() {
        Value::String(text) => Ok(text),
        other => Err(Error::schema(
            format!("a string in `{key}`"),
            describe(&other),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::tokenizer;
    use serde_json::json;

    const CHAT: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}\
        {% else %}<｜Assistant｜>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}\
        {% if add_generation_prompt %}<｜Assistant｜>{% endif %}";
    const LIMITS: Limits = Limits {
        max_length: 64,
        vocab_size: 288,
    };
    const BOS: &str = "<｜begin▁of▁sentence｜>";
    const EOS: &str = "<｜end▁of▁sentence｜>";

    fn parse(row: Value) -> Result<(Row, Vec<String>)> {
        Row::parse(row, &[])
    }

    /// The spans of a row, `[…]` around trained ones, BOS and EOS shortened.
    fn shown(row: Value, add_bos: bool) -> String {
        let tokenizer = tokenizer(Some(CHAT), add_bos);
        let samples = parse(row)
            .unwrap()
            .0
            .samples(Some(&tokenizer), LIMITS, &mut RowNotes::new())
            .unwrap();
        let [sample] = samples.as_slice() else {
            panic!("{samples:?}")
        };
        let show = |(text, trained)| if trained { format!("[{text}]") } else { text };
        let spans = sample.spans(&tokenizer).unwrap();
        spans
            .into_iter()
            .map(show)
            .collect::<String>()
            .replace(BOS, "<s>")
            .replace(EOS, "</s>")
    }

    #[test]
    fn each_kind_of_row_trains_what_it_should() {
        let check = |row: Value, add_bos, expected: &str| {
            assert_eq!(shown(row.clone(), add_bos), expected, "{row}")
        };
        check(json!({"text": "ab"}), true, "<s>[ab</s>]");
        check(json!({"text": "ab"}), false, "a[b</s>]");
        check(
            json!({"text": format!("{BOS}ab{EOS}")}),
            true,
            "<s>[ab</s>]",
        );
        check(
            json!({"prompt": "1+1=", "completion": "2"}),
            true,
            "<s>1+1=[2</s>]",
        );
        check(
            json!({"prompt": "x: ", "completion": "the"}),
            false,
            "x:[ the</s>]",
        );
        check(
            json!({"prompt": "", "completion": "ab"}),
            true,
            "<s>[ab</s>]",
        );
        let user = json!([{"role": "user", "content": "hi"}]);
        check(
            json!({"prompt": user, "completion": "yo"}),
            true,
            "<s><｜User｜>hi<｜Assistant｜>[yo</s>]",
        );
        let answer = json!([{"role": "assistant", "content": "yo"}]);
        check(
            json!({"prompt": user, "completion": answer}),
            true,
            "<s><｜User｜>hi<｜Assistant｜>[yo</s>]",
        );
        let shots = json!([
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]);
        check(
            json!({"prompt": shots, "completion": "d"}),
            true,
            "<s><｜User｜>a<｜Assistant｜>b</s><｜User｜>c<｜Assistant｜>[d</s>]",
        );
        let chat = json!([
            {"role": "user", "content": "深"}, {"role": "assistant", "content": "é🚀"},
            {"role": "user", "content": "é🚀"}, {"role": "assistant", "content": "Assistant"}]);
        check(
            json!({"messages": chat, "tools": null}),
            true,
            "<s><｜User｜>深<｜Assistant｜>[é🚀</s>]<｜User｜>é🚀<｜Assistant｜>[Assistant</s>]",
        );
    }

    #[test]
    fn lists_may_be_json_texts() {
        let list = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
        for messages in [list.clone(), list.to_string().into()] {
            assert_eq!(
                shown(json!({"messages": messages}), true),
                "<s><｜User｜>a<｜Assistant｜>[b</s>]"
            );
        }
        let (row, _) = parse(json!({"input_ids": "[5, 6]", "labels": "[-100, 6]"})).unwrap();
        let expected = json!({"input_ids": [5, 6], "labels": [-100, 6]});
        assert_eq!(row, parse(expected).unwrap().0);
        // Python's own form of a list is not JSON.
        let problem = parse(json!({"messages": "[{'role': 'user'}]"})).unwrap_err();
        assert!(
            problem
                .to_string()
                .ends_with("in `messages`, found a string"),
            "{problem}"
        );
    }

    #[test]
    fn named_keys_choose_the_kind() {
        let row = json!({"prompt": "1+1=", "completion": "2", "messages": [], "id": 1});
        let (row, mut ignored) = Row::parse(row, &["prompt", "completion"]).unwrap();
        ignored.sort();
        let (prompt, completion) = ("1+1=".to_owned(), "2".to_owned());
        assert_eq!(row, Row::Completion { prompt, completion });
        assert_eq!(ignored, ["id", "messages"]);
    }

    #[test]
    fn labels_are_those_of_hugging_face() {
        let row = json!({"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, 8]});
        let samples = parse(row)
            .unwrap()
            .0
            .samples(None, LIMITS, &mut RowNotes::new())
            .unwrap();
        // The label of the first token trains nothing: nothing predicts it.
        assert_eq!(samples[0].trained, [false, false, true, true]);
        let samples = parse(json!({"input_ids": [5, 6]}))
            .unwrap()
            .0
            .samples(None, LIMITS, &mut RowNotes::new())
            .unwrap();
        assert_eq!(
            (&samples[0].trained[..], samples[0].trained_bytes),
            (&[false, true][..], 0)
        );
    }

    fn refused(row: Value, expected: &str) {
        let tokenizer = tokenizer(None, true);
        let samples = parse(row.clone())
            .and_then(|(row, _)| row.samples(Some(&tokenizer), LIMITS, &mut RowNotes::new()));
        let problem = samples.unwrap_err().to_string();
        assert!(problem.contains(expected), "{row}: {problem}");
    }

    #[test]
    fn rows_with_the_wrong_keys_or_values_say_so() {
        refused(json!([1]), "expected a JSON object, found a list");
        refused(json!({"txt": "a"}), "found the keys {txt}");
        refused(json!({"text": 3}), "expected a string in `text`, found 3");
        let row = json!({"prompt": "a", "completion": []});
        refused(row, "expected a string in `completion`, found a list");
        let row = json!({"prompt": 1, "completion": ""});
        refused(row, "expected a list of messages in `prompt`, found 1");
    }

    #[test]
    fn messages_without_a_role_or_an_answer_are_refused() {
        let user = json!([{"role": "user", "content": "a"}]);
        let row = json!({"prompt": user, "completion": 1});
        refused(row, "expected a list of messages in `completion`, found 1");
        refused(
            json!({"messages": []}),
            "expected messages in `messages`, found an empty list",
        );
        let expected = "`messages[0]` to be an object with a string `role`, found a string";
        refused(json!({"messages": ["x"]}), expected);
        refused(json!({"messages": [{"role": 1}]}), "found `role` 1");
        refused(
            json!({"messages": user}),
            "a message of the role `assistant` to train on, found none",
        );
        let row = json!({"messages": user, "tools": "x"});
        refused(row, "expected a list of tools in `tools`, found a string");
        refused(
            json!({"messages": [{"role": "assistant", "content": ""}]}),
            "no chat template",
        );
    }

    #[test]
    fn ids_and_labels_that_cannot_be_are_refused() {
        let expected = "to be a token id, found";
        refused(
            json!({"input_ids": [1, -2]}),
            &format!("expected `input_ids[1]` {expected} -2"),
        );
        refused(
            json!({"input_ids": [1.5]}),
            &format!("expected `input_ids[0]` {expected} 1.5"),
        );
        refused(
            json!({"input_ids": "1"}),
            "a list of integers in `input_ids`, found a string",
        );
        refused(
            json!({"input_ids": []}),
            "expected at least one token, found an empty row",
        );
        refused(
            json!({"input_ids": [288]}),
            "token ids below the vocabulary size 288, found 288",
        );
        let row = json!({"input_ids": [1, 2], "labels": [1]});
        refused(
            row,
            "expected 2 `labels`, one for each of `input_ids`, found 1",
        );
        let row = json!({"input_ids": [1, 2], "labels": [1, 3]});
        refused(
            row,
            "expected `labels[1]` to be -100 or `input_ids[1]` = 2, found 3",
        );
        let problem = Row::Text("a".to_owned())
            .samples(None, LIMITS, &mut RowNotes::new())
            .unwrap_err();
        assert!(matches!(problem, Error::NoTokenizer));
    }

    #[test]
    fn long_texts_are_cut_into_pieces_and_other_rows_truncated() {
        let tokenizer = tokenizer(None, true);
        let limits = Limits {
            max_length: 4,
            ..LIMITS
        };
        let samples = |row| {
            parse(row)
                .unwrap()
                .0
                .samples(Some(&tokenizer), limits, &mut RowNotes::new())
                .unwrap()
        };
        let pieces = samples(json!({"text": "qzxjkvw"}));
        assert_eq!(
            pieces
                .iter()
                .map(|piece| piece.ids.len())
                .collect::<Vec<_>>(),
            [4, 4, 3]
        );
        assert_eq!(pieces.iter().map(Sample::trained_tokens).sum::<usize>(), 8);
        let cut = samples(json!({"prompt": "qz", "completion": "xjkvw"}));
        assert_eq!(
            (
                cut.len(),
                cut[0].ids.len(),
                cut[0].trained_bytes,
                cut[0].truncated
            ),
            (1, 4, 1, true)
        );
    }

    #[test]
    fn of_an_answer_in_several_texts_the_last_turn_is_chosen() {
        // Shows the thought of the last message alone, so that the first turn needs a text of its own.
        let template = "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' and loop.last %}<think>\n\
            {{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}{{ eos_token }}\n{% endfor %}\
            {% if add_generation_prompt %}<|assistant|>\n{% endif %}";
        let tokenizer = tokenizer(Some(template), true);
        let row = json!({
            "prompt": [{"role": "user", "content": "A"}],
            "chosen": [
                {"role": "assistant", "reasoning_content": "x", "content": "B"},
                {"role": "user", "content": "C"},
                {"role": "assistant", "reasoning_content": "y", "content": "D"}],
            "rejected": [{"role": "assistant", "reasoning_content": "z", "content": "E"}]});
        let limits = Limits {
            max_length: 999,
            ..LIMITS
        };
        let (row, _) = parse(row).unwrap();
        let samples = row
            .samples(Some(&tokenizer), limits, &mut RowNotes::new())
            .unwrap();
        let trained = |sample: &Sample| -> String {
            let spans = sample.spans(&tokenizer).unwrap().into_iter();
            spans
                .filter(|(_, trained)| *trained)
                .map(|(text, _)| text)
                .collect()
        };
        let found: Vec<String> = samples.iter().map(trained).collect();
        let turn = |thought, answer| format!("<think>\n{thought}\n</think>\n\n{answer}{EOS}");
        assert_eq!(found, [turn("y", "D"), turn("z", "E")]);
    }
}
