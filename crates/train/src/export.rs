//! The result of a run: an adapter, or a whole model.

use checkpoint::{Adapter, AdapterConfig, CARD_NAME, FolderWriter, Notes};
use model::AdapterWeights;
use model::export::{self, WeightFormat};

use crate::recipe::{ExportDType, Method};
use crate::run_dir::RunDir;
use crate::session::Session;
use crate::{Result, model_card};

/// Writes `adapter/` or `model/` into the run directory. An existing one, of a run that was killed after its last step, is
/// complete, since folders appear whole.
pub(crate) fn result(session: &Session, run: &RunDir) -> Result<()> {
    let name = if session.recipe.train.method == Method::Lora {
        "adapter"
    } else {
        "model"
    };
    let path = run.path().join(name);
    if path.exists() {
        return Ok(());
    }
    let mut writer = FolderWriter::create(&path)?;
    match session.recipe.train.method {
        Method::Lora => {
            let (config, notes) = adapter_files(session, &mut writer)?;
            let card = model_card::of_adapter(session, run, &config, &notes);
            writer.write_bytes(CARD_NAME, card.as_bytes())?;
        }
        Method::Full => {
            model_into(session, &mut writer)?;
            let card = model_card::of_model(session, run);
            writer.write_bytes(CARD_NAME, card.as_bytes())?;
        }
    }
    Ok(writer.finish()?)
}

/// Writes the adapter's files into a folder; nothing for full training.
pub(crate) fn adapter_into(session: &Session, writer: &mut FolderWriter) -> Result<()> {
    if session.recipe.train.method == Method::Lora {
        adapter_files(session, writer)?;
    }
    Ok(())
}

/// Writes the adapter's files; returns what they say.
fn adapter_files(session: &Session, writer: &mut FolderWriter) -> Result<(AdapterConfig, Notes)> {
    let adapter = AdapterWeights::from_model(
        &session.model,
        session.update.scaling,
        session.recipe.lora.dropout as f32,
    );
    let (config, tensors) = adapter.files(&session.base.name)?;
    let notes = Notes {
        trained_for: session.quantizer.map(|quantizer| quantizer.to_string()),
        experts_share: session.update.share.map(|share| share.name().into()),
    };
    Adapter::save_notes(writer, &notes)?;
    Adapter::save_into(writer, &config, &tensors)?;
    Ok((config, notes))
}

/// Writes a Hugging Face folder.
fn model_into(session: &Session, writer: &mut FolderWriter) -> Result<()> {
    let base = &session.base;
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
            export::export_subset(&session.model, folder, writer)?;
        }
        folder => {
            let origin = (folder.as_ref(), &base.config);
            export::export(&session.model, origin, format, writer)?;
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
