//! The model to measure: a checkpoint, or an architecture with random weights.

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use burn::tensor::Device;
use checkpoint::{DType, Folder};
use model::{ActivationQuant, Compute, Model, ModelConfig, Mtp, Training, load};
use serde_json::Value;

use crate::console::Console;
use crate::device::expect_right;
use crate::open::{SpeculationArgs, attach, find, is_gguf, name_of, open_model, read_json};

/// A model to measure.
#[derive(Debug)]
pub(super) struct Subject {
    /// The folder's name.
    pub(super) name: String,
    pub(super) config: ModelConfig,
    pub(super) weights: SubjectWeights,
}

/// Synthetic token ids, spread over the vocabulary: each is a Fibonacci hash of its place.
pub(super) fn ids(places: Range<u64>, vocab_size: u64) -> impl Iterator<Item = u64> {
    places.map(move |place| (place.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) % vocab_size)
}

/// The source of the weights.
#[derive(Debug)]
pub(super) enum SubjectWeights {
    /// A model folder.
    Checkpoint(PathBuf),
    /// Random weights for the architecture of this `config.json`.
    Random(Value),
}

impl Subject {
    /// Opens a model, a folder with only a `config.json`, or such a file. For random weights, `experts` replaces the
    /// number of routed experts in the file.
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
                "--experts: expected a model without weights, because the option needs random ones; found weights in `{}`",
                path.display()
            );
        }
        Ok(Self {
            name: name_of(&path),
            config: load::read_config(&folder)?,
            weights: SubjectWeights::Checkpoint(path),
        })
    }

    /// Whether the weights are random.
    pub(super) fn is_random(&self) -> bool {
        matches!(self.weights, SubjectWeights::Random(_))
    }

    /// The arithmetic of products with most of the weights, if activations are quantized as `requested`.
    pub(super) fn compute(&self, requested: ActivationQuant) -> anyhow::Result<Compute> {
        let SubjectWeights::Checkpoint(path) = &self.weights else {
            return Ok(Compute::F32);
        };
        if requested == ActivationQuant::None {
            return Ok(Compute::F32);
        }
        let folder = Folder::open(path)?;
        let mut bytes =
            [Compute::F32, Compute::Bf16, Compute::MatchWeight].map(|compute| (0, compute));
        for name in folder.names() {
            let tensor = folder.stored(name)?;
            let of_blocks = tensor.dtype.block() > 1;
            let at = 2 * usize::from(of_blocks) + usize::from(tensor.dtype == DType::BF16);
            bytes[at].0 += tensor.bytes.len();
        }
        let most = bytes.into_iter().max_by_key(|(bytes, _)| *bytes);
        Ok(most.map_or(Compute::F32, |(_, compute)| compute))
    }

    /// The frozen model.
    pub(super) fn load(
        &self,
        adapter: Option<&Path>,
        seed: u64,
        device: &Device,
        console: &Console,
    ) -> anyhow::Result<Model> {
        match &self.weights {
            SubjectWeights::Checkpoint(path) => {
                let opened = open_model(&path.to_string_lossy(), adapter, device, console)?;
                Ok(opened.model)
            }
            SubjectWeights::Random(_) => {
                console.note(format_args!("{}: random weights", self.name));
                expect_right(device, &self.config, console)?;
                let mut model = load::fresh(&self.config, Training::Frozen, seed, device)?;
                if let Some(adapter) = adapter {
                    attach(&mut model, adapter, device, console)?;
                }
                Ok(model)
            }
        }
    }

    /// The drafting module, if speculation is on.
    pub(super) fn module(
        &self,
        speculation: SpeculationArgs,
        seed: u64,
        device: &Device,
    ) -> anyhow::Result<Option<Mtp>> {
        match &self.weights {
            SubjectWeights::Checkpoint(path) => speculation.module(&Folder::open(path)?, device),
            SubjectWeights::Random(_) if !speculation.speculative => Ok(None),
            SubjectWeights::Random(_) => {
                let module = load::fresh_mtp(&self.config, seed, device)?;
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
            weights: SubjectWeights::Random(json),
        })
    }
}
