//! Opening a model by what a user typed.

mod memory;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use burn::tensor::Device;
use checkpoint::Folder;
use data::{Tokenizer, TokenizerFiles};
use infer::Engine;
use model::AdapterWeights;
use model::{Model, ModelConfig, Mtp, Training, load};
use serde_json::Value;

pub(crate) use self::memory::{MemoryArgs, cache_object, cache_summary, repack};
use crate::console::{Console, printable};
use crate::device;
use crate::values::{CACHE_HELP, COMPUTE_HELP, CacheValue, ComputeValue};

// The model of a verb, and the device it runs on. Not a doc comment: clap would show that as the help of the verb.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ModelArgs {
    /// Model: Hugging Face folder, GGUF file, or `org/name` in the local Hugging Face cache.
    pub(crate) model: String,
    /// LoRA adapter to apply: PEFT folder.
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: Option<PathBuf>,
    /// Device to compute on. This build has one: `cpu`.
    #[arg(long, value_name = "DEVICE", default_value = device::CPU, value_parser = device::parse)]
    pub(crate) device: Device,
}

// How a model generates.
#[derive(Debug, Clone, Copy, clap::Args)]
#[command(next_help_heading = "Speed and memory")]
pub(crate) struct EngineArgs {
    #[arg(long, value_enum, default_value_t = ComputeValue::Int8, help = COMPUTE_HELP)]
    pub(crate) compute: ComputeValue,
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = CacheValue::F16, help = CACHE_HELP)]
    pub(crate) cache: CacheValue,
    #[command(flatten)]
    pub(crate) memory: MemoryArgs,
}

// Whether to decode speculatively.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Speed and memory")]
pub(crate) struct SpeculationArgs {
    /// Speculative decoding with the model's MTP layer. The output stays the same; the speed depends on the acceptance
    /// rate.
    ///
    /// The MTP layer (multi-token prediction, DeepSeek V3) drafts the token after the next one. The model verifies the
    /// draft in the same pass, for up to 4 sequences at a time. Text, log-probabilities and random draws are the same,
    /// bit for bit.
    #[arg(long)]
    pub(crate) speculative: bool,
}

impl SpeculationArgs {
    /// The drafting module, if speculation is on.
    pub(crate) fn module(self, folder: &Folder, device: &Device) -> anyhow::Result<Option<Mtp>> {
        if !self.speculative {
            return Ok(None);
        }
        let module = load::load_mtp(folder, device);
        let hint = "--speculative needs a model with an MTP layer; without the option the text is the same";
        module.context(hint).map(Some)
    }
}

/// A model that is ready to run.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) folder: Folder,
    /// Frozen, with its adapter if it has one.
    pub(crate) model: Model,
    /// None if the folder has no `tokenizer.json`.
    pub(crate) tokenizer: Option<Arc<Tokenizer>>,
    /// The name of the folder, and of the adapter.
    pub(crate) name: String,
    pub(crate) device: Device,
}

impl ModelArgs {
    pub(crate) fn open(&self, console: &Console) -> anyhow::Result<Opened> {
        let adapter = self.adapter.as_deref();
        open_model(&self.model, adapter, &self.device, console)
    }
}

impl Opened {
    /// The tokenizer, for a verb that needs one.
    pub(crate) fn expect_tokenizer(&self) -> anyhow::Result<&Arc<Tokenizer>> {
        let path = self.folder.path().display();
        let tokenizer = self.tokenizer.as_ref();
        tokenizer.with_context(|| format!("{path}: expected a tokenizer, found none"))
    }

    /// The tokenizer, for a verb that needs its chat template.
    pub(crate) fn expect_chat_template(&self) -> anyhow::Result<&Arc<Tokenizer>> {
        let tokenizer = self.expect_tokenizer()?;
        if tokenizer.chat_template().is_none() {
            let path = self.folder.path().display();
            bail!("{path}: expected a chat template, found none");
        }
        Ok(tokenizer)
    }

    /// The engine that generates with the model.
    ///
    /// # Errors
    /// If speculation is on, and the model has no module for it.
    pub(crate) fn engine(
        &self,
        args: EngineArgs,
        speculation: SpeculationArgs,
        console: &Console,
    ) -> anyhow::Result<Engine> {
        let mut engine = Engine::new(
            self.model.clone(),
            args.compute.quant(),
            self.device.clone(),
        );
        engine.mtp = speculation.module(&self.folder, &self.device)?;
        engine.cache = args.cache.cache_type();
        args.memory.place(&mut engine, console);
        Ok(engine)
    }
}

/// Opens a model with an adapter, and notes which tensors of its folder are not used.
pub(crate) fn open_model(
    model: &str,
    adapter: Option<&Path>,
    device: &Device,
    console: &Console,
) -> anyhow::Result<Opened> {
    let (folder, mut name) = open_folder(model)?;
    note_unused(&folder, console)?;
    let mut model = load::load(&folder, Training::Frozen, device)?;
    if let Some(path) = adapter {
        attach(&mut model, path, device, console)?;
        name = format!("{name} + {}", name_of(path));
    }
    let tokenizer = open_tokenizer(&folder)?;
    let unread = tokenizer.as_ref().map(Tokenizer::unread_keys);
    if let Some(keys @ [_, ..]) = unread {
        let keys: Vec<String> = keys.iter().map(|key| printable(key, &[])).collect();
        console.note(format_args!(
            "tokenizer_config.json: unknown keys, not read: {}",
            keys.join(", ")
        ));
    }
    Ok(Opened {
        tokenizer: tokenizer.map(Arc::new),
        folder,
        model,
        name,
        device: device.clone(),
    })
}

/// Attaches an adapter to a model.
pub(crate) fn attach(
    model: &mut Model,
    path: &Path,
    device: &Device,
    console: &Console,
) -> anyhow::Result<()> {
    let adapter = checkpoint::Adapter::open(path)?;
    note_format(&adapter, path, console);
    let adapted = AdapterWeights::read(&adapter, &model.config)?.attach(model, device)?;
    let parameters: usize = adapted.iter().map(|module| module.parameters).sum();
    console.detail(format_args!(
        "{}: {} modules adapted, {parameters} parameters",
        path.display(),
        adapted.len()
    ));
    Ok(())
}

/// Notes that an adapter was trained for weights that are rounded after a merge: applied to the base, it differs.
pub(crate) fn note_format(adapter: &checkpoint::Adapter, path: &Path, console: &Console) {
    if let Some(format) = &adapter.notes.trained_for {
        console.note(format_args!(
            "{}: trained to be merged and quantized to {format}; see `moeforge survival`",
            path.display()
        ));
    }
}

/// Opens a model's folder. Returns its name too.
pub(crate) fn open_folder(model: &str) -> anyhow::Result<(Folder, String)> {
    let path = find(model)?;
    let name = if Path::new(model).exists() {
        name_of(&path)
    } else {
        model.to_owned()
    };
    let folder = Folder::open(&path)?.with_companions(data::companions);
    Ok((folder, name))
}

/// The folder or GGUF file of a model: a path, or `org/name` in the local Hugging Face cache.
pub(crate) fn find(model: &str) -> anyhow::Result<PathBuf> {
    let path = checkpoint::resolve(model, hf_home().as_deref())?;
    if path.is_file() && !is_gguf(&path) {
        bail!(
            "`{}`: expected the folder of a model or a `.gguf` file, found another file",
            path.display()
        );
    }
    Ok(path)
}

/// Whether a path has the extension of GGUF files.
pub(crate) fn is_gguf(path: &Path) -> bool {
    let extension = path.extension();
    extension.is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// The tokenizer of a model, if it has one.
pub(crate) fn open_tokenizer(folder: &Folder) -> anyhow::Result<Option<Tokenizer>> {
    let files = TokenizerFiles::of_model(folder.path(), folder.metadata())?;
    Ok(files.as_ref().map(Tokenizer::new).transpose()?)
}

/// The tokenizer and the architecture of a model, or of a folder that may have no weights yet; none for what is
/// missing.
pub(crate) fn open_texts(path: &Path) -> anyhow::Result<(Option<Tokenizer>, Option<ModelConfig>)> {
    if path.is_file() {
        let folder = Folder::open(path)?.with_companions(data::companions);
        let config = load::read_config(&folder)?;
        return Ok((open_tokenizer(&folder)?, Some(config)));
    }
    let files = TokenizerFiles::read(path)?;
    let tokenizer = files.as_ref().map(Tokenizer::new).transpose()?;
    Ok((tokenizer, read_config(path)?))
}

/// The architecture in a folder; none without a `config.json`.
fn read_config(folder: &Path) -> anyhow::Result<Option<ModelConfig>> {
    let path = folder.join("config.json");
    if !path.exists() {
        return Ok(None);
    }
    Ok(Some(ModelConfig::from_json(&read_json(&path)?, &path)?))
}

/// The content of a `config.json`.
pub(crate) fn read_json(path: &Path) -> anyhow::Result<Value> {
    /// Real ones have a few thousand bytes.
    const LIMIT: u64 = 16 << 20;

    let reading = || format!("cannot read `{}`", path.display());
    let mut text = Vec::new();
    let file = File::open(path).with_context(reading)?;
    file.take(LIMIT)
        .read_to_end(&mut text)
        .with_context(reading)?;
    serde_json::from_slice(&text).with_context(reading)
}

/// `HF_HOME`, or the default of Hugging Face's tools.
fn hf_home() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let default = || Some(PathBuf::from(set("HOME")?).join(".cache/huggingface"));
    set("HF_HOME").map(PathBuf::from).or_else(default)
}

/// The folder of tokenized rows: in `XDG_CACHE_HOME`, or in `.cache` at home.
pub(crate) fn token_cache() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let default = || Some(PathBuf::from(set("HOME")?).join(".cache"));
    let folder = set("XDG_CACHE_HOME").map(PathBuf::from).or_else(default)?;
    Some(folder.join("moeforge/tokens"))
}

/// The last name of a path.
pub(crate) fn name_of(path: &Path) -> String {
    let whole = path.canonicalize();
    let name = whole.as_deref().unwrap_or(path).file_name();
    name.map_or_else(
        || path.display().to_string(),
        |name| name.to_string_lossy().into_owned(),
    )
}

fn note_unused(folder: &Folder, console: &Console) -> anyhow::Result<()> {
    let audit = load::audit(folder)?;
    let place = folder.path().display();
    if !audit.unknown.is_empty() {
        console.note(format_args!(
            "{place}: not used: {}",
            listed(&audit.unknown)
        ));
    }
    if !audit.mtp.is_empty() {
        console.detail(format_args!(
            "{place}: MTP layer, used with --speculative only: {}",
            listed(&audit.mtp)
        ));
    }
    let unindexed = folder.unindexed().iter();
    let unindexed: Vec<String> = unindexed.map(|tensor| tensor.name.to_string()).collect();
    if !unindexed.is_empty() {
        console.note(format_args!(
            "{place}: not in the index and not used: {}",
            listed(&unindexed)
        ));
    }
    Ok(())
}

/// The number of names, and the first few.
pub(crate) fn listed(names: &[String]) -> String {
    const SHOWN: usize = 3;
    let first: Vec<&str> = names.iter().take(SHOWN).map(String::as_str).collect();
    let more = if names.len() > SHOWN { ", …" } else { "" };
    let tensors = if names.len() == 1 {
        "tensor"
    } else {
        "tensors"
    };
    format!("{} {tensors} ({}{more})", names.len(), first.join(", "))
}
