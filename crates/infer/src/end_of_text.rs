//! Which tokens end a text.

use checkpoint::Folder;

use crate::error::{Error, Result};

/// All ids that stop a generation: those of `generation_config.json`, of `config.json`, and the tokenizer's own.
/// Sorted, each once. Chat models name several, and their base config often fewer than their generation config.
///
/// # Errors
/// If `eos_token_id` of one of the files is there and neither an id nor a list of ids.
pub fn end_of_text_ids(folder: &Folder, tokenizer_eos: Option<u32>) -> Result<Vec<u32>> {
    let configs = [
        ("config.json", Some(folder.config())),
        ("generation_config.json", folder.generation_config()),
    ];
    let mut ids: Vec<u32> = tokenizer_eos.into_iter().collect();
    for (name, config) in configs {
        let Some(value) = config.and_then(|config| config.get("eos_token_id")) else {
            continue;
        };
        if value.is_null() {
            continue;
        }
        let list = value
            .as_array()
            .map_or(std::slice::from_ref(value), Vec::as_slice);
        for id in list {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            ids.push(id.ok_or_else(|| Error::EndOfText {
                file: folder.path().join(name),
                found: value.to_string().chars().take(80).collect(),
            })?);
        }
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}
