//! What a run leaves for others: an adapter, or a whole model.

use checkpoint::{Adapter, FolderWriter};
use model::{AdapterWeights, export};

use crate::Result;
use crate::recipe::Method;
use crate::run_dir::RunDir;
use crate::session::Session;

/// Writes `adapter/` or `model/` into the run directory. One that is there already, from a run that was killed after
/// its last step, is complete, since folders appear whole.
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
        Method::Lora => adapter_into(session, &mut writer)?,
        Method::Full => model_into(session, &mut writer)?,
    }
    Ok(writer.finish()?)
}

/// Writes the adapter's files into a folder; nothing for full training.
pub(crate) fn adapter_into(session: &Session, writer: &mut FolderWriter) -> Result<()> {
    if session.recipe.train.method == Method::Full {
        return Ok(());
    }
    let adapter = AdapterWeights::from_model(
        &session.model,
        session.scaling,
        session.recipe.lora.dropout as f32,
    );
    let (config, tensors) = adapter.files(&session.base.name)?;
    Ok(Adapter::save_into(writer, &config, &tensors)?)
}

/// Writes a Hugging Face folder in bf16.
fn model_into(session: &Session, writer: &mut FolderWriter) -> Result<()> {
    let base = &session.base;
    export::export(&session.model, base.folder.as_ref(), writer)?;
    writer.write_index()?;
    writer.write_json(
        "config.json",
        &export::exported_config(&base.config, "bfloat16"),
    )?;
    if let Some(tokenizer) = &base.tokenizer {
        export::copy_companions(tokenizer, writer)?;
    }
    Ok(())
}
