//! What a model's files say and nothing here obeys.

use std::path::Path;

use checkpoint::Folder;
use model::export::llama_cpp_differences;
use model::load;
use serde_json::Value;

use crate::console::{Console, printable};

/// Names the keys of a model's config, or of a GGUF's metadata, that are neither obeyed nor known to change nothing; with
/// --verbose their values too. Of a GGUF it says what llama.cpp computes otherwise.
pub(crate) fn note_keys(folder: &Folder, console: &Console) -> anyhow::Result<()> {
    let mut unknown = load::unknown_keys(folder)?;
    let metadata = folder.metadata();
    if let Some(metadata) = metadata {
        let of_tokens = data::unknown_metadata(metadata).into_iter();
        unknown.extend(of_tokens.map(|key| (key.to_owned(), metadata[key].clone())));
        note_differences(folder, console)?;
    }
    note_unknown(&folder.config_path(), &unknown, console);
    if metadata.is_none() {
        let unknown = infer::unknown_generation_keys(folder).into_iter();
        let unknown: Vec<_> = unknown
            .map(|(key, v)| (key.to_owned(), v.clone()))
            .collect();
        let file = folder.path().join("generation_config.json");
        note_unknown(&file, &unknown, console);
    }
    Ok(())
}

fn note_unknown(file: &Path, unknown: &[(String, Value)], console: &Console) {
    if unknown.is_empty() {
        return;
    }
    let names: Vec<String> = unknown.iter().map(|(key, _)| printable(key, &[])).collect();
    console.note(format_args!(
        "{}: keys that are not used: {}",
        file.display(),
        listed(&names)
    ));
    for (name, (_, value)) in names.iter().zip(unknown) {
        console.detail(format_args!("  {name} = {}", shown(value)));
    }
}

/// Says what llama.cpp computes otherwise with a GGUF of the model.
pub(crate) fn note_differences(folder: &Folder, console: &Console) -> anyhow::Result<()> {
    for difference in llama_cpp_differences(&load::read_config(folder)?) {
        console.note(format_args!(
            "llama.cpp does not compute the same: {difference}"
        ));
    }
    Ok(())
}

/// The first few names.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 12;
    let first = names.get(..SHOWN).unwrap_or(names).join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => first,
        more => format!("{first} and {more} more (-v lists all)"),
    }
}

fn shown(value: &Value) -> String {
    const SHOWN: usize = 200;
    let text = printable(&value.to_string(), &[]);
    let cut: String = text.chars().take(SHOWN).collect();
    if cut.len() < text.len() {
        format!("{cut}…")
    } else {
        text
    }
}
