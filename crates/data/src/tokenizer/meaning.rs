//! What each key of `tokenizer_config.json` means: dropped, renamed, retyped or changed, it changes ids, text or the keys of a GGUF,
//! or is refused, or named, or is known to be harmless. There is no other outcome.

use super::config::CONFIG;
use super::tests::folder;
use super::*;
use crate::row::messages;
use serde_json::{Value, json};

/// Everything that a tokenizer's files decide.
fn observed(config: &Value) -> Result<String> {
    let folder = folder(|_, old| *old = config.clone());
    let files = TokenizerFiles::open(folder.path())?;
    let tokenizer = Tokenizer::new(&files)?;
    let chat = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    let chat = messages("messages", Some(chat))?;
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let rendered = [None, Some(&tools)].map(|tools| {
        let template = tokenizer.chat_template()?;
        template.render(&chat, tools, GenerationPrompt::Add).ok()
    });
    let keys = files.to_metadata(300, None)?;
    let short = keys
        .iter()
        .filter(|(key, _)| !key.contains("ggml.merges") && !key.contains("ggml.tokens"));
    Ok(format!(
        "{rendered:?} {:?} {:?} {:?} {:?}",
        tokenizer.encode("a b", Bos::Add)?,
        tokenizer.bos_id(),
        tokenizer.eos_id(),
        short.collect::<Vec<_>>(),
    ))
}

fn unread(config: &Value) -> Vec<String> {
    let folder = folder(|_, old| *old = config.clone());
    Tokenizer::open(folder.path()).map_or_else(|_| Vec::new(), |t| t.unread_keys().to_vec())
}

/// Another value of the same type, and one of another type.
fn others(value: &Value) -> [Value; 2] {
    match value {
        Value::Null => ["<pad>".into(), 7.into()],
        Value::Bool(flag) => [(!flag).into(), "yes".into()],
        Value::Number(_) => [12_345.into(), "many".into()],
        Value::String(text) if text.starts_with("<｜begin") => {
            ["<｜end▁of▁sentence｜>".into(), 7.into()]
        }
        Value::String(text) if text.starts_with("<｜end") => {
            ["<｜begin▁of▁sentence｜>".into(), 7.into()]
        }
        Value::String(text) => [format!("{text}!").into(), 7.into()],
        Value::Array(_) => [
            json!([{"name": "default", "template": "changed"}]),
            json!({"x": 1}),
        ],
        Value::Object(_) => {
            let mut other = value.clone();
            other["content"] = "<think>".into();
            [other, 7.into()]
        }
    }
}

fn outcome(config: &Value, changed: &Value, key: &str) -> &'static str {
    let before = observed(config).unwrap();
    match observed(changed) {
        Err(problem) => {
            let named =
                problem.to_string().contains(key) || problem.to_string().contains("vocabulary");
            assert!(named, "{key}: {problem}");
            "refused"
        }
        Ok(after) if after != before => "changes",
        Ok(_) if !unread(changed).is_empty() => "named",
        Ok(_) => "harmless",
    }
}

#[test]
#[expect(clippy::print_stdout, reason = "the table is for whoever asks for it")]
fn every_key_of_a_tokenizer_config_is_obeyed_refused_or_named() {
    let bos = "<｜begin▁of▁sentence｜>";
    let template = |text: &str| {
        format!(
            "{text}{{{{ bos_token }}}}{{{{ eos_token }}}}{{{{ pad_token }}}}{{{{ unk_token }}}}{{{{ cls_token }}}}"
        )
    };
    let named = json!([
        {"name": "default", "template": template("d")}, {"name": "tool_use", "template": template("t")}]);
    let text = require(&tests::goldens().join(CONFIG));
    let golden: Value = serde_json::from_str(&text).unwrap();
    let harmless = [
        "clean_up_tokenization_spaces",
        "legacy",
        "model_max_length",
        "sp_model_kwargs",
        "tokenizer_class",
        "__type",
    ];
    println!(
        "| chat template | key | dropped | renamed | changed | of another type |\n|---|---|---|---|---|---|"
    );
    for (kind, chat_template) in [("one", Value::from(template("d"))), ("named", named)] {
        let mut config = golden.clone();
        config["chat_template"] = chat_template;
        config["cls_token"] = bos.into();
        config["unk_token"] = "<think>".into();
        for key in config.as_object().unwrap().keys() {
            let with = |change: &dyn Fn(&mut serde_json::Map<String, Value>)| {
                let mut changed = config.clone();
                change(changed.as_object_mut().unwrap());
                outcome(&config, &changed, key)
            };
            let [other, retyped] = others(&config[key]);
            let found = [
                with(&|map| _ = map.shift_remove(key)),
                with(&|map| {
                    let value = map.shift_remove(key).unwrap_or_default();
                    map.insert(format!("{key}_x"), value);
                }),
                with(&|map| _ = map.insert(key.clone(), other.clone())),
                with(&|map| _ = map.insert(key.clone(), retyped.clone())),
            ];
            println!("| {kind} | `{key}` | {} |", found.join(" | "));
            // What a file leaves to its default cannot change by being left out.
            let is_default = key == "add_eos_token" || config[key].is_null();
            let may_stay =
                |place: usize| harmless.contains(&key.as_str()) || (is_default && place == 0);
            for (place, found) in found.into_iter().enumerate() {
                assert!(
                    found != "harmless" || may_stay(place),
                    "{kind}, {key}, {place}"
                );
            }
        }
    }
}

fn require(path: &Path) -> String {
    crate::file::require_text(path, 1 << 20).unwrap()
}
