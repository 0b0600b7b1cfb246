//! The files of a model folder other than its weights: tokenizer, templates and the like.

use std::path::Path;

use checkpoint::{Folder, FolderWriter};
use serde_json::Value;

use crate::Error;

const GENERATION: &str = "generation_config.json";

/// The folder of chat templates that have names.
const TEMPLATES: &str = "additional_chat_templates";

/// Copies all small files of a model, or makes them from a GGUF.
///
/// # Errors
/// As [`copy_texts`], or if the tokenizer of a GGUF is malformed.
pub fn copy_companions(model: &Folder, writer: &mut FolderWriter) -> Result<(), Error> {
    if model.metadata().is_none() {
        return copy_texts(model.path(), writer);
    }
    // Recommended sampling and the ends of a text are in one file.
    let mut generation = model.generation_config().cloned();
    for (name, text) in model.companions()? {
        let more = (name == GENERATION).then(|| serde_json::from_str::<Value>(&text));
        match (more, &mut generation) {
            (Some(Ok(Value::Object(more))), Some(Value::Object(config))) => config.extend(more),
            (Some(Ok(more)), generation) => *generation = Some(more),
            _ => writer.write_bytes(&name, text.as_bytes())?,
        }
    }
    if let Some(config) = generation {
        writer.write_json(GENERATION, &config)?;
    }
    Ok(())
}

/// Copies every small file of a folder, except for those that an export makes anew, and the chat templates in a folder of it.
///
/// # Errors
/// If the folder cannot be read, or a file cannot be copied.
pub fn copy_texts(folder: &Path, writer: &mut FolderWriter) -> Result<(), Error> {
    const WANTED: [&str; 5] = ["json", "jinja", "model", "txt", "py"];
    const MADE_ANEW: [&str; 3] = [
        "config.json",
        "model.safetensors.index.json",
        "moeforge.manifest.json",
    ];
    for name in files_of(folder)? {
        let path = folder.join(&name);
        let wanted = name
            .rsplit_once('.')
            .is_some_and(|(_, ending)| WANTED.contains(&ending));
        // A link to nothing is not left out: its file would be missed.
        if wanted
            && !MADE_ANEW.contains(&name.as_str())
            && checkpoint::is_present(&path)?
            && path.is_file()
        {
            writer.copy_file(&path, &name)?;
        }
    }
    let templates = folder.join(TEMPLATES);
    if !templates.is_dir() {
        return Ok(());
    }
    for name in files_of(&templates)? {
        let path = templates.join(&name);
        if name.ends_with(".jinja") && checkpoint::is_present(&path)? && path.is_file() {
            writer.copy_file(&path, &format!("{TEMPLATES}/{name}"))?;
        }
    }
    Ok(())
}

/// The names of the files in a folder, sorted.
fn files_of(folder: &Path) -> Result<Vec<String>, Error> {
    let entries = std::fs::read_dir(folder).map_err(|cause| Error::Read {
        file: folder.into(),
        cause,
    })?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort_unstable();
    Ok(names)
}
