//! Preference rows: two answers to one prompt, a chosen and a rejected one.

use crate::common_prefix::common_prefix;
use crate::error::{Error, Result};
use crate::row::{Row, messages, string};
use crate::sample::Sample;
use serde_json::{Map, Value, json};

/// A prompt with two answers, each a whole sequence in which the answer is trained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreferencePair {
    /// Prompt and the better answer.
    pub chosen: Sample,
    /// The same prompt and the worse answer.
    pub rejected: Sample,
}

/// The two rows of a preference row. The prompt is `prompt`, or the common beginning of both answers:
///
/// - `prompt`, `chosen`, `rejected`: strings, joined as they are;
/// - `prompt` a list of messages, the answers lists or strings;
/// - `chosen` and `rejected` alone, each a whole conversation or text. A `prompt` string in a row of whole conversations only
///   repeats their first message.
pub(crate) fn parse(row: &mut Map<String, Value>, tools: Option<Value>) -> Result<[Row; 2]> {
    let answers = ["chosen", "rejected"];
    let texts = answers.map(|key| row[key].is_string());
    match row.get("prompt") {
        None | Some(Value::Null) if texts == [true, true] => {
            let [chosen, rejected] = [string(row, "chosen")?, string(row, "rejected")?];
            let at = common_prefix(&chosen, &rejected);
            Ok([chosen, rejected].map(|text| Row::Completion {
                prompt: text[..at].to_owned(),
                completion: text[at..].to_owned(),
            }))
        }
        Some(Value::String(_)) if texts == [true, true] => {
            let prompt = string(row, "prompt")?;
            let [chosen, rejected] = [string(row, "chosen")?, string(row, "rejected")?];
            Ok([chosen, rejected].map(|completion| Row::Completion {
                prompt: prompt.clone(),
                completion,
            }))
        }
        _ => conversations(row, tools),
    }
}

/// Pairs of messages.
fn conversations(row: &mut Map<String, Value>, tools: Option<Value>) -> Result<[Row; 2]> {
    let prompt = match row.remove("prompt").unwrap_or_default() {
        Value::Null => Vec::new(),
        Value::String(text) => vec![json!({"role": "user", "content": text})],
        list => messages("prompt", Some(list))?,
    };
    let mut answer = |key: &str| match row.remove(key) {
        Some(Value::String(_)) if prompt.is_empty() => Err(Error::schema(
            "`chosen` and `rejected` to be two texts or two lists of messages",
            "one of each",
        )),
        Some(Value::String(text)) => Ok(vec![json!({"role": "assistant", "content": text})]),
        list => messages(key, list),
    };
    let [mut chosen, mut rejected] = [answer("chosen")?, answer("rejected")?];
    let repeats = |answer: &[Value]| answer.starts_with(&prompt) || has_prompt(answer, &prompt);
    if !(repeats(&chosen) && repeats(&rejected)) {
        chosen.splice(0..0, prompt.iter().cloned());
        rejected.splice(0..0, prompt.iter().cloned());
    }
    let same = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b);
    // Two equal answers teach nothing, but they are valid.
    let first = same.count().min(chosen.len() - 1);
    if first == 0 {
        return Err(Error::schema(
            "`chosen` and `rejected` to begin with the same messages",
            "none in common",
        ));
    }
    Ok([
        Row::conversation(chosen, tools.clone(), first)?,
        Row::conversation(rejected, tools, first)?,
    ])
}

/// Whether a conversation has the prompt's text, after a system message perhaps.
fn has_prompt(answer: &[Value], prompt: &[Value]) -> bool {
    let said = |message: &Value| {
        message["role"] == "user" && prompt.iter().any(|p| p["content"] == message["content"])
    };
    answer.len() > 1 && answer.iter().any(said)
}
