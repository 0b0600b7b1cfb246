//! A GGUF's tokenizer, and its ends of a text, as the files that stand with a folder's weights.

use crate::tokenizer::TokenizerFiles;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

/// The tokenizer's files of a GGUF as names and contents, from its path and metadata; none if it has no tokenizer.
///
/// It has the type of the function that an opened model folder takes for its companions, so that exports write the files:
/// `Folder::open(path)?.with_companions(data::companions)`.
///
/// # Errors
/// If the tokenizer's keys are malformed or contradict each other.
pub fn companions(
    path: &Path,
    metadata: &BTreeMap<String, Value>,
) -> Result<Vec<(String, String)>, Box<dyn Error + Send + Sync>> {
    let Some(tokenizer) = TokenizerFiles::of_metadata(path, metadata)? else {
        return Ok(Vec::new());
    };
    let files = tokenizer.files()?.into_iter();
    let mut files: Vec<_> = files
        .map(|(name, text)| (name.to_owned(), text.into_owned()))
        .collect();
    // The config of the folder has one end.
    let ends = tokenizer.gguf_ends();
    if ends.len() > 1 {
        let config = json!({ "eos_token_id": ends });
        files.push(("generation_config.json".to_owned(), format!("{config:#}\n")));
    }
    Ok(files)
}
