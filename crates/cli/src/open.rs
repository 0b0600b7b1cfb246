//! Opening a model by what a user typed.

mod memory;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use burn::tensor::Device;
use checkpoint::Folder;
use clap::ValueEnum;
use data::{ChatTemplate, Tokenizer, TokenizerFiles};
use infer::Engine;
use model::adapter::AdapterWeights;
use model::{CacheType, Compute, Model, ModelConfig, Mtp, Training, weights};
use serde_json::Value;

pub(crate) use self::memory::{MemoryArgs, cache_object, cache_summary, repack};
use crate::console::Console;

/// Which model, and where it computes.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ModelArgs {
    /// Hugging Face folder, GGUF file, or `org/name` in the local Hugging Face cache.
    pub(crate) model: String,
    /// Folder of a LoRA adapter (PEFT) to attach.
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: Option<PathBuf>,
    /// Where to compute. This build has the CPU only.
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    pub(crate) device: DeviceName,
}

/// Where a model computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeviceName {
    Cpu,
    Gpu,
    Metal,
    Vulkan,
    Cuda,
}

/// What products may round activations to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ComputeName {
    /// Nothing.
    F32,
    /// What the weight is in: int8 in blocks of 32 beside ggml's blocks, bf16 beside bf16 (but for the output head), as
    /// llama.cpp does; nothing beside f32, f16 and FP8.
    Int8,
}

impl ComputeName {
    pub(crate) fn compute(self) -> Compute {
        match self {
            Self::F32 => Compute::F32,
            Self::Int8 => Compute::Int8,
        }
    }

    /// As it is written on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Int8 => "int8",
        }
    }
}

/// In what form what attention reads of earlier tokens is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CacheName {
    /// As it was computed.
    F32,
    /// In half of that, rounded to 11 significant bits. Numbers beyond 65,504, which models rarely have there, are too large.
    F16,
    /// In half of it too, rounded to 8 significant bits, whatever their size.
    Bf16,
    /// 8 bits a number, and a scale for 32.
    #[value(name = "q8_0")]
    Q8_0,
}

impl CacheName {
    pub(crate) fn cache_type(self) -> CacheType {
        match self {
            Self::F32 => CacheType::F32,
            Self::F16 => CacheType::F16,
            Self::Bf16 => CacheType::Bf16,
            Self::Q8_0 => CacheType::Q8_0,
        }
    }
}

/// How a model continues prompts.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct EngineArgs {
    /// What products round activations to.
    #[arg(long, value_enum, default_value_t = ComputeName::Int8)]
    pub(crate) compute: ComputeName,
    /// In what form what attention reads of earlier tokens is held.
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = CacheName::F16)]
    pub(crate) cache: CacheName,
    #[command(flatten)]
    pub(crate) guessing: GuessArgs,
    #[command(flatten)]
    pub(crate) memory: MemoryArgs,
}

/// Whether tokens are guessed ahead.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, clap::Args)]
pub(crate) struct GuessArgs {
    /// Guess tokens ahead with the model's layer for multi-token prediction, and read each guess in the pass that says
    /// whether it is right. The text is the same; how fast it comes depends on how many guesses are right.
    #[arg(long)]
    pub(crate) speculative: bool,
}

impl GuessArgs {
    /// The module that guesses, if there is to be one.
    pub(crate) fn module(self, folder: &Folder, device: &Device) -> anyhow::Result<Option<Mtp>> {
        if !self.speculative {
            return Ok(None);
        }
        let module = weights::load_mtp(folder, device);
        let hint =
            "--speculative needs a module that guesses; without the option the text is the same";
        module.context(hint).map(Some)
    }
}

/// A model that is ready to run.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) folder: Folder,
    /// Frozen, with its adapter.
    pub(crate) model: Model,
    /// None where the folder has no `tokenizer.json`.
    pub(crate) tokenizer: Option<Tokenizer>,
    /// What to call it: the folder's name, and the adapter's.
    pub(crate) name: String,
    pub(crate) device: Device,
}

impl ModelArgs {
    pub(crate) fn open(&self, console: &Console) -> anyhow::Result<Opened> {
        self.device.check()?;
        open_model(&self.model, self.adapter.as_deref(), console)
    }
}

impl DeviceName {
    pub(crate) fn check(self) -> anyhow::Result<()> {
        match self.to_possible_value() {
            Some(value) if self != Self::Cpu => {
                let found = value.get_name();
                bail!("`--device`: expected cpu, the only device of this build, found {found}")
            }
            _ => Ok(()),
        }
    }
}

impl Opened {
    /// The tokenizer, for a verb that cannot do without.
    pub(crate) fn expect_tokenizer(&self) -> anyhow::Result<&Tokenizer> {
        let path = self.folder.path().display();
        let tokenizer = self.tokenizer.as_ref();
        tokenizer.with_context(|| format!("{path}: expected a tokenizer, found none"))
    }

    /// The tokenizer and its chat template, for what cannot do without.
    pub(crate) fn expect_chat_template(&self) -> anyhow::Result<(&Tokenizer, &ChatTemplate)> {
        let tokenizer = self.expect_tokenizer()?;
        let template = tokenizer.chat_template().with_context(|| {
            let path = self.folder.path().display();
            format!("{path}: expected a chat template, found none")
        })?;
        Ok((tokenizer, template))
    }

    /// What continues prompts with the model.
    ///
    /// # Errors
    /// If guesses are asked for, and the model has no module for them.
    pub(crate) fn engine(&self, args: EngineArgs, console: &Console) -> anyhow::Result<Engine> {
        let mut engine = Engine::new(
            self.model.clone(),
            args.compute.compute(),
            self.device.clone(),
        );
        engine.mtp = args.guessing.module(&self.folder, &self.device)?;
        engine.cache = args.cache.cache_type();
        args.memory.place(&mut engine, console);
        Ok(engine)
    }
}

/// Opens a model with an adapter, and says which tensors of its folder it does not use.
pub(crate) fn open_model(
    model: &str,
    adapter: Option<&Path>,
    console: &Console,
) -> anyhow::Result<Opened> {
    let device = Device::flex();
    let (folder, mut name) = open_folder(model)?;
    note_unused(&folder, console)?;
    let mut model = weights::load(&folder, Training::Frozen, &device)?;
    if let Some(path) = adapter {
        attach(&mut model, path, &device, console)?;
        name = format!("{name} + {}", name_of(path));
    }
    Ok(Opened {
        tokenizer: open_tokenizer(&folder)?,
        folder,
        model,
        name,
        device,
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

/// Says so if an adapter was trained for weights that are rounded after a merge: beside the base it is not what it was.
pub(crate) fn note_format(adapter: &checkpoint::Adapter, path: &Path, console: &Console) {
    if let Some(format) = &adapter.notes.trained_for {
        console.note(format_args!(
            "{}: trained to be merged and rounded to {format}; see `moeforge survival`",
            path.display()
        ));
    }
}

/// Opens a model's folder, and says what to call it.
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

/// Whether a path is named as GGUF files are.
pub(crate) fn is_gguf(path: &Path) -> bool {
    let extension = path.extension();
    extension.is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// The tokenizer of a model, if it has one.
pub(crate) fn open_tokenizer(folder: &Folder) -> anyhow::Result<Option<Tokenizer>> {
    let files = TokenizerFiles::of_model(folder.path(), folder.metadata())?;
    Ok(files.as_ref().map(Tokenizer::new).transpose()?)
}

/// The tokenizer and the architecture of a model, or of a folder that may have no weights yet: each if it is there.
pub(crate) fn open_texts(path: &Path) -> anyhow::Result<(Option<Tokenizer>, Option<ModelConfig>)> {
    if path.is_file() {
        let folder = Folder::open(path)?.with_companions(data::companions);
        let config = weights::read_config(&folder)?;
        return Ok((open_tokenizer(&folder)?, Some(config)));
    }
    let files = TokenizerFiles::read(path)?;
    let tokenizer = files.as_ref().map(Tokenizer::new).transpose()?;
    Ok((tokenizer, read_config(path)?))
}

/// The architecture in a folder; none where there is no `config.json`.
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

/// `HF_HOME`, or where Hugging Face's tools put it.
fn hf_home() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let default = || Some(PathBuf::from(set("HOME")?).join(".cache/huggingface"));
    set("HF_HOME").map(PathBuf::from).or_else(default)
}

/// Where tokenized rows are kept for the next run: in `XDG_CACHE_HOME`, or in `.cache` at home.
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
    let audit = weights::audit(folder)?;
    let place = folder.path().display();
    if !audit.unknown.is_empty() {
        console.note(format_args!(
            "{place}: not used: {}",
            listed(&audit.unknown)
        ));
    }
    if !audit.mtp.is_empty() {
        console.detail(format_args!(
            "{place}: multi-token prediction, run with --speculative only: {}",
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

/// The first few names, and how many there are.
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
