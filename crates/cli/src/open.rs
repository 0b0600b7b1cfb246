//! Opening a model by what a user typed.

mod keys;
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

pub(crate) use self::keys::{note_differences, note_keys};
pub(crate) use self::memory::{GenerationExtent, MemoryArgs, cache_object, cache_summary, repack};
use crate::console::{Console, printable};
use crate::device::{DeviceArgs, expect_right};
use crate::host;
use crate::values::{CACHE_HELP, COMPUTE_HELP, CacheValue, ComputeValue};

// The model of a verb, and the device it runs on. Not a doc comment: clap would show that as the help of the verb.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ModelArgs {
    /// Model: Hugging Face folder, GGUF file, or `org/name` in the local Hugging Face cache.
    pub(crate) model: String,
    /// LoRA adapter to apply: PEFT folder.
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
}

// How a model generates.
#[derive(Debug, Clone, Copy, clap::Args)]
#[command(next_help_heading = "Speed and memory")]
pub(crate) struct EngineArgs {
    #[arg(long, value_enum, help = COMPUTE_HELP)]
    compute: Option<ComputeValue>,
    #[arg(long, value_enum, value_name = "TYPE", help = CACHE_HELP)]
    cache: Option<CacheValue>,
    #[command(flatten)]
    pub(crate) memory: MemoryArgs,
}

impl EngineArgs {
    /// The options on the command line.
    pub(crate) fn words(&self) -> Vec<String> {
        let typed = [
            ("--compute", self.compute.map(ComputeValue::name)),
            ("--cache", self.cache.map(|cache| cache.cache_type().name())),
        ];
        let typed = typed
            .into_iter()
            .filter_map(|(name, value)| Some([name, value?]));
        let words = typed.flatten().map(str::to_owned);
        words.chain(self.memory.words()).collect()
    }

    /// What products and the KV cache are in, on a device: as typed, or its defaults.
    ///
    /// # Errors
    /// If a GPU does not compute what was typed.
    pub(crate) fn precision(
        &self,
        device: &Device,
        console: &Console,
    ) -> anyhow::Result<(ComputeValue, CacheValue)> {
        let typed = (self.compute, self.cache);
        if !kernels::device::is_gpu(device) {
            let default = (ComputeValue::Int8, CacheValue::F16);
            return Ok((typed.0.unwrap_or(default.0), typed.1.unwrap_or(default.1)));
        }
        if let Some(compute) = typed.0 {
            expect_computed(compute, device)?;
        }
        if let Some(cache) = typed.1 {
            expect_cache(cache, device)?;
        }
        if self.memory.budget.memory_budget.is_some() {
            bail!("`--memory-budget`: a GPU holds all weights; the option is for `--device cpu`");
        }
        if typed == (None, None) {
            console.note("on a GPU, products of stored weights and the KV cache are f32");
        }
        Ok((ComputeValue::F32, CacheValue::F32))
    }
}

/// Refuses activations in int8 on a GPU.
pub(crate) fn expect_computed(compute: ComputeValue, device: &Device) -> anyhow::Result<()> {
    if compute == ComputeValue::Int8 && kernels::device::is_gpu(device) {
        bail!("`--compute int8`: expected f32 on a GPU, which computes nothing else yet");
    }
    Ok(())
}

/// Refuses KV caches that a GPU does not have.
pub(crate) fn expect_cache(cache: CacheValue, device: &Device) -> anyhow::Result<()> {
    if cache != CacheValue::F32 && kernels::device::is_gpu(device) {
        let name = cache.cache_type().name();
        bail!("`--cache {name}`: expected f32 on a GPU, which has no other KV cache yet");
    }
    Ok(())
}

// Whether to decode speculatively.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Speed and memory")]
pub(crate) struct SpeculationArgs {
    /// Speculative decoding with the model's MTP layer. The output stays the same; the speed depends on the acceptance
    /// rate.
    ///
    /// The MTP layer (multi-token prediction, DeepSeek V3) drafts the token after the next one. The model then reads
    /// the next token and the draft in one pass, and keeps the draft only if it would have chosen that token. It does so
    /// for up to 4 sequences at a time. Text, log-probabilities and random draws are the same,
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
    /// None if the folder has no `tokenizer.json`, or if there is a problem with a GGUF's.
    pub(crate) tokenizer: Option<Arc<Tokenizer>>,
    /// Why a GGUF's tokenizer cannot be used. Token ids can.
    tokenizer_problem: Option<String>,
    /// The name of the folder, and of the adapter.
    pub(crate) name: String,
    pub(crate) device: Device,
}

impl ModelArgs {
    pub(crate) fn open(&self, console: &Console) -> anyhow::Result<Opened> {
        let adapter = self.adapter.as_deref();
        open_model(&self.model, adapter, &self.device.open()?, console)
    }
}

impl Opened {
    /// The tokenizer, for a verb that needs one.
    pub(crate) fn expect_tokenizer(&self) -> anyhow::Result<&Arc<Tokenizer>> {
        if let Some(problem) = &self.tokenizer_problem {
            bail!("{problem}");
        }
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
    /// If speculation is on, and the model has no module for it; if there is too little memory.
    pub(crate) fn engine(
        &self,
        args: EngineArgs,
        speculation: SpeculationArgs,
        extent: GenerationExtent,
        console: &Console,
    ) -> anyhow::Result<Engine> {
        let (compute, cache) = args.precision(&self.device, console)?;
        let mut engine = Engine::new(self.model.clone(), compute.quant(), self.device.clone());
        engine.mtp = speculation.module(&self.folder, &self.device)?;
        engine.cache = cache.cache_type();
        if !kernels::device::is_gpu(&self.device) {
            args.memory.place(&mut engine, extent, console)?;
        }
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
    note_keys(&folder, console)?;
    note_unused(&folder, console)?;
    expect_right(device, &load::read_config(&folder)?, console)?;
    let mut model = load::load(&folder, Training::Frozen, device)?;
    if let Some(path) = adapter {
        attach(&mut model, path, device, console)?;
        name = format!("{name} + {}", name_of(path));
    }
    let (tokenizer, tokenizer_problem) = match open_tokenizer(&folder) {
        Err(problem) if folder.metadata().is_some() => {
            console.note(format_args!("{problem:#}; only token ids can be read"));
            (None, Some(format!("{problem:#}")))
        }
        tokenizer => (tokenizer?.map(Arc::new), None),
    };
    let unread = tokenizer
        .iter()
        .flat_map(|tokenizer| tokenizer.unread_keys());
    let unread: Vec<String> = unread.map(|key| printable(key, &[])).collect();
    if !unread.is_empty() {
        console.note(format_args!(
            "tokenizer_config.json: unknown keys, not read: {}",
            unread.join(", ")
        ));
    }
    Ok(Opened {
        tokenizer,
        tokenizer_problem,
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
    let adapted = read_adapter(path, &model.config, console)?.attach(model, device)?;
    let parameters: usize = adapted.iter().map(|module| module.parameters).sum();
    console.detail(format_args!(
        "{}: {} modules adapted, {parameters} parameters",
        path.display(),
        adapted.len()
    ));
    Ok(())
}

/// Reads an adapter for a model, and notes what is unusual about it.
pub(crate) fn read_adapter(
    path: &Path,
    config: &ModelConfig,
    console: &Console,
) -> anyhow::Result<AdapterWeights> {
    let adapter = checkpoint::Adapter::open(path)?;
    note_format(&adapter, path, console);
    let weights = AdapterWeights::read(&adapter, config)?;
    if weights.is_zero() {
        console.note(format_args!(
            "{}: all updates are zero: the adapter changes nothing",
            path.display()
        ));
    }
    Ok(weights)
}

/// Notes that an adapter was trained for weights that are rounded after a merge: applied to the base, it differs.
fn note_format(adapter: &checkpoint::Adapter, path: &Path, console: &Console) {
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
    let path = checkpoint::resolve(model, hub_cache().as_deref())?;
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

/// The tokens that end a text of a model that may have no weights yet.
pub(crate) fn end_ids(path: &Path, tokenizer: Option<&Tokenizer>) -> anyhow::Result<Vec<u32>> {
    let mut ids = tokenizer.map_or(&[][..], Tokenizer::end_ids).to_vec();
    for name in ["config.json", "generation_config.json"] {
        let config = path.join(name);
        if path.is_dir() && checkpoint::is_present(&config)? {
            let value = &read_json(&config)?["eos_token_id"];
            ids.extend(data::eos_token_ids(value).unwrap_or_default());
        }
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// The architecture in a folder; none without a `config.json`.
fn read_config(folder: &Path) -> anyhow::Result<Option<ModelConfig>> {
    let path = folder.join("config.json");
    if !checkpoint::is_present(&path)? {
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

/// Hugging Face's cache of models and data sets: as its own tools find it.
///
/// Source: huggingface/huggingface_hub: src/huggingface_hub/constants.py.
pub(crate) fn hub_cache() -> Option<PathBuf> {
    let set = |name| {
        let value = std::env::var_os(name).filter(|value| !value.is_empty())?;
        Some(at_home(Path::new(&value)))
    };
    let home = || {
        set("HF_HOME")
            .or_else(|| Some(set("XDG_CACHE_HOME")?.join("huggingface")))
            .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/huggingface")))
    };
    set("HF_HUB_CACHE")
        .or_else(|| set("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| Some(home()?.join("hub")))
}

/// A path whose beginning `~` is the user's home.
fn at_home(path: &Path) -> PathBuf {
    match (path.strip_prefix("~"), std::env::var_os("HOME")) {
        (Ok(rest), Some(home)) => Path::new(&home).join(rest),
        _ => path.to_owned(),
    }
}

/// The folder of tokenized rows: in `XDG_CACHE_HOME`, or in `.cache` at home.
pub(crate) fn token_cache() -> Option<PathBuf> {
    Some(host::cache()?.join("tokens"))
}

/// The name of what is at a path: the last of the path, or `org/name` for a snapshot in Hugging Face's cache. A file in the cache
/// is a link, and what it leads to has a number for a name.
pub(crate) fn name_of(path: &Path) -> String {
    let whole = match path.file_name() {
        Some(_) => path.to_owned(),
        None => path.canonicalize().unwrap_or_else(|_| path.to_owned()),
    };
    let mut parts = whole.iter().rev().map(|part| part.to_string_lossy());
    let (last, parent, repo) = (parts.next(), parts.next(), parts.next());
    let published = repo
        .as_deref()
        .filter(|_| parent.as_deref() == Some("snapshots"));
    if let Some(name) = published.and_then(|repo| repo.strip_prefix("models--")) {
        return name.replacen("--", "/", 1);
    }
    last.map_or_else(|| path.display().to_string(), |name| name.into_owned())
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
