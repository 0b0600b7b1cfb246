//! The model that is measured: a checkpoint, or an architecture whose weights are made up.

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use burn::tensor::Device;
use checkpoint::{DType, Folder};
use model::{Compute, Model, ModelConfig, Mtp, Training, weights};
use serde_json::Value;

use crate::console::Console;
use crate::open::{GuessArgs, attach, find, is_gguf, name_of, open_model, read_json};

/// What is measured.
#[derive(Debug)]
pub(super) struct Subject {
    /// What to call it: the folder's name.
    pub(super) name: String,
    pub(super) config: ModelConfig,
    pub(super) weights: Weights,
}

/// Made-up token ids, spread over the vocabulary: every one a Fibonacci hash of its place.
pub(super) fn ids(places: Range<u64>, vocab_size: u64) -> impl Iterator<Item = u64> {
    places.map(move |place| (place.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) % vocab_size)
}

/// Where weights come from.
#[derive(Debug)]
pub(super) enum Weights {
    /// A model folder.
    Checkpoint(PathBuf),
    /// The seed of the recipe, for the architecture of this `config.json`.
    Random(Value),
}

impl Subject {
    /// Opens what a user typed: a model, a folder with nothing but a `config.json`, or such a file. Of random weights the
    /// number of routed experts may be another than in the file.
    pub(super) fn open(model: &str, experts: Option<u64>) -> anyhow::Result<Self> {
        let path = Path::new(model);
        if path.is_file() && !is_gguf(path) {
            return Self::random(path, experts);
        }
        let path = find(model)?;
        let folder = match Folder::open(&path) {
            Ok(folder) => folder,
            Err(checkpoint::Error::NoWeights { found, .. }) if found == "none" => {
                return Self::random(&path.join("config.json"), experts);
            }
            Err(error) => return Err(error.into()),
        };
        if experts.is_some() {
            bail!(
                "--experts: expected a model without weights, which are then made up, found those of `{}`",
                path.display()
            );
        }
        Ok(Self {
            name: name_of(&path),
            config: weights::read_config(&folder)?,
            weights: Weights::Checkpoint(path),
        })
    }

    /// Whether its weights are made up.
    pub(super) fn is_random(&self) -> bool {
        matches!(self.weights, Weights::Random(_))
    }

    /// What products with most of its weights round to, where they may round to what is asked for.
    pub(super) fn compute(&self, asked: Compute) -> anyhow::Result<Compute> {
        let Weights::Checkpoint(path) = &self.weights else {
            return Ok(Compute::F32);
        };
        if asked == Compute::F32 {
            return Ok(asked);
        }
        let folder = Folder::open(path)?;
        let mut bytes = [Compute::F32, Compute::Bf16, Compute::Int8].map(|compute| (0, compute));
        for name in folder.names() {
            let tensor = folder.stored(name)?;
            let of_blocks = tensor.dtype.block() > 1;
            let at = 2 * usize::from(of_blocks) + usize::from(tensor.dtype == DType::BF16);
            bytes[at].0 += tensor.bytes.len();
        }
        let most = bytes.into_iter().max_by_key(|(bytes, _)| *bytes);
        Ok(most.map_or(Compute::F32, |(_, compute)| compute))
    }

    /// The model, frozen, and where it computes.
    pub(super) fn load(
        &self,
        adapter: Option<&Path>,
        seed: u64,
        console: &Console,
    ) -> anyhow::Result<(Model, Device)> {
        match &self.weights {
            Weights::Checkpoint(path) => {
                let opened = open_model(&path.to_string_lossy(), adapter, console)?;
                Ok((opened.model, opened.device))
            }
            Weights::Random(_) => {
                console.note(format_args!("{}: making up weights", self.name));
                let device = Device::flex();
                let mut model = weights::fresh(&self.config, Training::Frozen, seed, &device)?;
                if let Some(adapter) = adapter {
                    attach(&mut model, adapter, &device, console)?;
                }
                Ok((model, device))
            }
        }
    }

    /// The module that guesses tokens, if there is to be one.
    pub(super) fn module(
        &self,
        guessing: GuessArgs,
        seed: u64,
        device: &Device,
    ) -> anyhow::Result<Option<Mtp>> {
        match &self.weights {
            Weights::Checkpoint(path) => guessing.module(&Folder::open(path)?, device),
            Weights::Random(_) if !guessing.speculative => Ok(None),
            Weights::Random(_) => {
                let module = weights::fresh_mtp(&self.config, seed, device)?;
                let expected =
                    "--speculative: expected `num_nextn_predict_layers` above 0 in the config";
                module.map(Some).context(expected)
            }
        }
    }

    fn random(file: &Path, experts: Option<u64>) -> anyhow::Result<Self> {
        const KEY: &str = "n_routed_experts";
        let mut json = read_json(file)?;
        if let Some(experts) = experts {
            match json.get_mut(KEY) {
                Some(found) => *found = experts.into(),
                None => bail!(
                    "--experts: expected a config with `{KEY}`, found none in `{}`",
                    file.display()
                ),
            }
        }
        let config = ModelConfig::from_json(&json, file);
        let config = match experts {
            Some(experts) => config.with_context(|| format!("--experts {experts}"))?,
            None => config?,
        };
        let file = file.canonicalize()?;
        Ok(Self {
            name: name_of(file.parent().unwrap_or(&file)),
            config,
            weights: Weights::Random(json),
        })
    }
}
