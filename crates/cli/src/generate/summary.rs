//! What a generation did, for people and as JSON.

use anyhow::Context as _;
use data::{Special, Tokenizer};
use infer::{Completed, FinishReason, Generation, Logprobs};
use serde_json::{Value, json};

/// One line for people.
pub(super) fn summary(generation: &Generation) -> String {
    let rate = |rate: Option<f64>| rate.map_or_else(String::new, |rate| format!(" ({rate:.1}/s)"));
    let [prefill, decode] = rates(generation).map(rate);
    let why = match generation.finish_reason {
        FinishReason::EndOfText(_) => "at the end of the text",
        FinishReason::StopString => "at a stop string",
        FinishReason::Length => "at --max-tokens",
        FinishReason::Cancelled => "early, on Ctrl-C",
    };
    let (read, written) = (generation.prefill_tokens, generation.token_ids.len());
    let drafts = match (generation.accepted, generation.drafted) {
        (_, 0) => String::new(),
        (accepted, drafted) => {
            let share = 100.0 * accepted as f64 / drafted as f64;
            format!(", {accepted} of {drafted} drafts accepted ({share:.0} %)")
        }
    };
    format!("{read} tokens read{prefill}, {written} written{decode}{drafts}, stopped {why}")
}

/// One JSON object.
pub(super) fn object(
    n_prompt_tokens: usize,
    completed: &Completed,
    tokenizer: Option<&Tokenizer>,
) -> anyhow::Result<Value> {
    let generation = &completed.generation;
    let [prefill, decode_rate] = rates(generation);
    let mut object = json!({
        "token_ids": generation.token_ids,
        "text": tokenizer.map(|_| &completed.text),
        "prompt_tokens": n_prompt_tokens,
        "finish_reason": generation.finish_reason.name(),
        "stop_string": completed.stop_string,
        "prefill_tokens_per_sec": prefill,
        "decode_tokens_per_sec": decode_rate,
        "drafted": generation.drafted,
        "accepted": generation.accepted,
    });
    let tokens = generation.token_ids.iter().zip(&generation.logprobs);
    let logprobs = tokens.map(|(id, logprobs)| logprobs_object(*id, logprobs, tokenizer));
    let logprobs = logprobs.collect::<anyhow::Result<Vec<_>>>()?;
    if !logprobs.is_empty() {
        object["logprobs"] = logprobs.into();
    }
    Ok(object)
}

/// A token with its logprob, and the most likely tokens in its place.
fn logprobs_object(
    id: u32,
    logprobs: &Logprobs,
    tokenizer: Option<&Tokenizer>,
) -> anyhow::Result<Value> {
    let one = |id: u32, logprob: f64| {
        let text = tokenizer.map(|tokenizer| tokenizer.decode(&[id], Special::Keep));
        let text = text.transpose().context("cannot decode a token")?;
        anyhow::Ok(json!({"id": id, "text": text, "logprob": logprob}))
    };
    let mut object = one(id, logprobs.chosen)?;
    let top = logprobs.top.iter().map(|(id, logprob)| one(*id, *logprob));
    object["top"] = top.collect::<anyhow::Result<Vec<_>>>()?.into();
    Ok(object)
}

/// Tokens read per second, and tokens chosen after the first per second; none if there was nothing to measure.
fn rates(generation: &Generation) -> [Option<f64>; 2] {
    let rate = |count: usize, secs: f64| (count > 0 && secs > 0.0).then(|| count as f64 / secs);
    [
        rate(generation.prefill_tokens, generation.prefill_secs),
        rate(generation.decode_steps, generation.decode_secs),
    ]
}
