//! The result of a run: an adapter, or a whole model.

use std::path::{Path, PathBuf};

use checkpoint::{Adapter, AdapterConfig, CARD_NAME, FolderWriter, Notes};
use model::export::{self, TrainedReader, WeightFormat};
use model::{AdapterWeights, Model};

use crate::recipe::{ExportDType, Method};
use crate::run_dir::RunDir;
use crate::session::Session;
use crate::{Result, model_card};

/// The name of a run's result.
fn result_name(session: &Session) -> &'static str {
    match session.recipe.train.method {
        Method::Lora => "adapter",
        Method::Full => "model",
    }
}

/// Names an existing result after the step that it was made in, for a run that goes on. Returns its new path.
pub(crate) fn set_aside(session: &Session, run: &RunDir, step: u64) -> Result<Option<PathBuf>> {
    let name = result_name(session);
    let (path, aside) = (
        run.path().join(name),
        run.path().join(format!("{name}-{step}")),
    );
    if !path.exists() {
        return Ok(None);
    }
    std::fs::rename(&path, &aside).map_err(crate::error::io("rename", &path))?;
    Ok(Some(aside))
}

/// Writes `adapter/` or `model/` into the run directory: of an adapter's model with all experts, of a whole model from the
/// values that `read_values` reads. An existing one, of a run that was killed after its last step, is complete, since folders
/// appear whole, and it is this run's, since one that goes on sets it aside.
pub(crate) fn result(
    session: &Session,
    model: &Model,
    run: &RunDir,
    read_values: &mut TrainedReader<'_>,
) -> Result<()> {
    let path = run.path().join(result_name(session));
    if path.exists() {
        return Ok(());
    }
    let mut writer = FolderWriter::create(&path)?;
    match session.recipe.train.method {
        Method::Lora => {
            let (config, notes) = adapter_files(session, model, &mut writer)?;
            let card = model_card::of_adapter(session, run, &config, &notes);
            writer.write_bytes(CARD_NAME, card.as_bytes())?;
        }
        Method::Full => {
            model_into(session, &mut writer, read_values)?;
            let card = model_card::of_model(session, run);
            writer.write_bytes(CARD_NAME, card.as_bytes())?;
        }
    }
    Ok(writer.finish()?)
}

/// Writes the adapter's files into a folder; nothing for full training.
pub(crate) fn adapter_into(
    session: &Session,
    model: &Model,
    writer: &mut FolderWriter,
) -> Result<()> {
    if session.recipe.train.method == Method::Lora {
        adapter_files(session, model, writer)?;
    }
    Ok(())
}

/// Writes the adapter's files; returns what they say.
fn adapter_files(
    session: &Session,
    model: &Model,
    writer: &mut FolderWriter,
) -> Result<(AdapterConfig, Notes)> {
    let adapter = updates(session, model);
    let (base, revision) = base_name(&session.base.name);
    let (mut config, tensors) = adapter.files(&base)?;
    config.revision = revision;
    let notes = Notes {
        trained_for: session.quantizer.map(|quantizer| quantizer.to_string()),
        experts_share: session.update.share.map(|share| share.name().into()),
        unread_by_peft: adapter.unread_by_peft(),
    };
    Adapter::save_notes(writer, &notes)?;
    Adapter::save_into(writer, &config, &tensors)?;
    Ok((config, notes))
}

/// The name of the base as PEFT looks it up, and its revision: both are one name in a recipe.
fn base_name(name: &str) -> (String, Option<String>) {
    match checkpoint::repo_and_revision(name) {
        Some((repo, Some(revision))) if !Path::new(name).exists() => (repo, Some(revision.into())),
        _ => (name.into(), None),
    }
}

/// The updates on a session's model with all experts.
fn updates(session: &Session, model: &Model) -> AdapterWeights {
    let dropout = session.recipe.lora.dropout as f32;
    AdapterWeights::from_model(model, session.update.scaling, dropout)
}

impl Session {
    /// What PEFT will not read of the run's adapter, and why; none if it reads all of it rightly, or there is no adapter.
    pub fn unread_by_peft(&self) -> Option<String> {
        match self.recipe.train.method {
            Method::Lora => {
                AdapterWeights::outline(&self.model, self.update.scaling).unread_by_peft()
            }
            Method::Full => None,
        }
    }
}

/// Writes a Hugging Face folder.
fn model_into(
    session: &Session,
    writer: &mut FolderWriter,
    read_values: &mut TrainedReader<'_>,
) -> Result<()> {
    let (base, model) = (&session.base, &session.model);
    let is_fp8 = match session.recipe.train.export_dtype {
        ExportDType::Fp8 => true,
        ExportDType::Bf16 => false,
        ExportDType::Base => base.folder.as_ref().is_some_and(export::is_fp8),
    };
    let format = if is_fp8 {
        WeightFormat::Fp8
    } else {
        WeightFormat::Bf16
    };
    match &base.folder {
        Some(folder) if session.recipe.is_partial() => {
            export::export_subset(model, folder, writer, read_values)?;
        }
        folder => {
            let origin = (folder.as_ref(), &base.config);
            export::export(model, origin, format, writer, read_values)?;
        }
    }
    match (&base.tokenizer_folder, &base.folder) {
        _ if base.tokenizer.is_none() => {}
        (Some(path), _) => export::copy_texts(path, writer)?,
        (None, Some(folder)) => export::copy_companions(folder, writer)?,
        (None, None) => {}
    }
    Ok(())
}
