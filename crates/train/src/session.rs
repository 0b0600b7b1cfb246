//! A training session: a model, its data and its optimizer, as a recipe describes them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{Device, FloatDType, Tensor};
use checkpoint::{Adapter, DType, Folder, TensorSpec};
use data::{Corpus, Reading, Tokenizer, TokenizerFiles, Wanted};
use kernels::Quantizer;
use kernels::fp8::Scales;
use model::Policy;
use model::adapt::{self, AdaptedModule, LoraConfig, Scaling, Share};
use model::{AdapterWeights, Model, ModelConfig, Training, load};

use crate::dataset::{self, Dataset};
use crate::fit::Picks;
use crate::loss_scale::LARGEST_EXPONENT;
use crate::optimizer::AdamW;
use crate::recipe::{Checkpointing, Compute, ExpertsShare, Loss, Method, Recipe, RouterTraining};
use crate::run_dir::RunDir;
use crate::state::{State, read_optimizer};
use crate::{Error, Result};

/// Everything a run needs in memory.
#[derive(Debug)]
pub struct Session {
    /// The resolved recipe.
    pub recipe: Recipe,
    /// The model being trained.
    pub(crate) model: Model,
    /// What was adapted; empty for full training.
    pub adapted: Vec<AdaptedModule>,
    /// What the merged weights are rounded to, if to anything: as the recipe says, or the adapter it goes on from.
    pub quantizer: Option<Quantizer>,
    /// How many matrices are rounded to which format.
    formats: BTreeMap<String, usize>,
    /// Training rows.
    pub train: Dataset,
    /// Validation samples, if there are any.
    pub valid: Option<Corpus>,
    pub(crate) optimizer: AdamW,
    pub(crate) state: State,
    pub(crate) device: Device,
    pub(crate) base: Base,
    /// How the adapter's alphas become scales.
    pub(crate) scaling: Scaling,
    /// The base without an adapter and without gradients: what preferences and routing are compared with. None for full
    /// training on next tokens.
    pub(crate) reference: Option<Model>,
    /// Which factors the experts of a layer share.
    pub(crate) share: Option<Share>,
    pub(crate) pad_id: u32,
    /// What the reference's routers pick on the validation rows, once that is known.
    pub(crate) reference_picks: Option<Vec<Picks>>,
}

/// Where the model came from, for what is written beside its weights.
#[derive(Debug)]
pub(crate) struct Base {
    /// The checkpoint, or none for fresh weights.
    pub(crate) folder: Option<Folder>,
    /// `config.json` as it was read.
    pub(crate) config: serde_json::Value,
    /// The tokenizer's files, and their folder where it is another than the checkpoint's.
    pub(crate) tokenizer: Option<TokenizerFiles>,
    pub(crate) tokenizer_folder: Option<PathBuf>,
    /// How the base is named in an adapter.
    pub(crate) name: String,
}

/// What a session asks of the program around it.
#[derive(Clone, Copy)]
pub struct Surroundings<'a> {
    /// Turns the recipe's model into a folder.
    pub resolve: &'a dyn Fn(&str) -> Result<PathBuf>,
    /// Where tokenized rows are kept for the next run; none keeps none.
    pub token_cache: Option<&'a Path>,
    /// Told how many bytes of rows are tokenized, and how many there are.
    pub tokenizing: &'a dyn Fn(u64, u64),
}

impl std::fmt::Debug for Surroundings<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Surroundings")
            .field("token_cache", &self.token_cache)
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Opens what a recipe names. `resolve` turns the recipe's model into a folder.
    ///
    /// # Errors
    /// If the model, the tokenizer, an adapter or a data file cannot be used.
    pub fn open(recipe: Recipe, resolve: &dyn Fn(&str) -> Result<PathBuf>) -> Result<Self> {
        let surroundings = Surroundings {
            resolve,
            token_cache: None,
            tokenizing: &|_, _| {},
        };
        Self::open_in(recipe, surroundings)
    }

    /// [`Session::open`] with a token cache.
    ///
    /// # Errors
    /// As [`Session::open`].
    pub fn open_in(recipe: Recipe, surroundings: Surroundings<'_>) -> Result<Self> {
        let resolve = surroundings.resolve;
        if recipe.train.checkpointing == Checkpointing::Block {
            kernels::map_large_blocks();
        }
        let device = Device::flex().autodiff();
        let (mut model, base) = open_model(&recipe, resolve, &device)?;
        let mut reference = reference_of(&recipe, &model, &base)?;
        let (adapted, scaling, share) = adapt(&recipe, &mut model, &device)?;
        if model.parameters().is_empty() {
            return Err(Error::NothingTrained);
        }
        let quantizer = quantizer_of(&recipe)?;
        let mut formats = BTreeMap::new();
        if let Some(quantizer) = quantizer {
            formats = model.fake_quantize(quantizer, &mut |_| true)?;
            if let Some(reference) = &mut reference {
                reference.fake_quantize(quantizer, &mut |_| true)?;
            }
        }
        if recipe.precision.round_start {
            round(&mut model);
        }
        let tokenizer = base.tokenizer.as_ref().map(Tokenizer::new).transpose()?;
        let reading = Reading {
            tokenizer: tokenizer.as_ref(),
            max_length: recipe.data.max_length,
            vocab_size: model.config.vocab_size,
            wanted: match recipe.train.loss {
                Loss::CrossEntropy => Wanted::Samples,
                Loss::Dpo => Wanted::Pairs,
            },
            cache: surroundings.token_cache,
            progress: surroundings.tokenizing,
        };
        let train = Dataset::open(&recipe, reading)?;
        let valid = dataset::validation(&recipe, reading)?;
        expect_valid(&recipe, valid.as_ref())?;
        Ok(Self {
            optimizer: AdamW::new(&recipe),
            state: State::start(&recipe, train.corpus.identity()),
            pad_id: tokenizer
                .and_then(|tokenizer| tokenizer.eos_id())
                .filter(|id| (*id as usize) < model.config.vocab_size)
                .unwrap_or(0),
            recipe,
            model,
            adapted,
            quantizer,
            formats,
            train,
            valid,
            device,
            base,
            scaling,
            share,
            reference,
            reference_picks: None,
        })
    }

    /// Goes on from a run's latest checkpoint, if it has one; returns the step it goes on from.
    ///
    /// # Errors
    /// If the checkpoint is malformed or not of this recipe.
    pub fn resume(&mut self, run: &RunDir) -> Result<Option<u64>> {
        let Some((step, folder)) = run.latest()? else {
            return Ok(None);
        };
        self.load(&folder)?;
        Ok(Some(step))
    }

    /// Becomes what a checkpoint holds.
    pub(crate) fn load(&mut self, folder: &Path) -> Result<()> {
        let state = State::read(folder)?;
        if state.recipe_hash != self.recipe.hash() {
            return Err(Error::OtherRecipe {
                path: folder.to_owned(),
            });
        }
        if state.data_hash != self.state.data_hash {
            return Err(Error::OtherData {
                path: folder.to_owned(),
            });
        }
        let fits = match state.loss_scale {
            Some(scale) => self.state.loss_scale.is_some() && scale.exponent <= LARGEST_EXPONENT,
            None => self.state.loss_scale.is_none(),
        };
        if !fits {
            return Err(Error::LossScale {
                path: folder.to_owned(),
            });
        }
        self.restore(folder)?;
        self.state = state;
        Ok(())
    }

    /// Optimizer updates made so far.
    pub fn steps_done(&self) -> u64 {
        self.state.step
    }

    /// Optimizer updates of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.recipe.total_steps(self.train.rows())
    }

    /// The tokenizer's files, if there is a tokenizer.
    pub fn tokenizer_files(&self) -> Option<&TokenizerFiles> {
        self.base.tokenizer.as_ref()
    }

    /// The checkpoint that training started from; none for fresh weights.
    pub fn base_folder(&self) -> Option<&Folder> {
        self.base.folder.as_ref()
    }

    /// Trained numbers.
    pub fn trained_parameters(&self) -> usize {
        self.model
            .parameters()
            .iter()
            .map(|parameter| parameter.values.dims()[0])
            .sum()
    }

    /// Puts a checkpoint's tensors into the model and the optimizer.
    pub(crate) fn restore(&mut self, folder: &Path) -> Result<()> {
        let specs = self.state_tensors();
        let dtype = self.recipe.optimizer.moments().float();
        let (mut parameters, mut moments, mut biases) = (BTreeMap::new(), Vec::new(), Vec::new());
        let device = self.device.clone().inner();
        read_optimizer(folder, &specs, |i, values| {
            let tensor = Tensor::<1>::from_floats(values.as_slice(), &device);
            match specs[i].name.split_once('/') {
                Some(("parameter", name)) => _ = parameters.insert(name.to_owned(), tensor),
                Some((kind @ ("moment1" | "moment2"), name)) => {
                    moments.push((kind == "moment1", name.to_owned(), tensor.cast(dtype)))
                }
                _ => biases.push(values),
            }
            Ok(())
        })?;
        self.model
            .map_parameters(&mut |name, values| parameters.remove(name).unwrap_or(values));
        let zeros = || Tensor::<1>::zeros([0], &device);
        for (first, name, tensor) in moments {
            let pair = self
                .optimizer
                .moments
                .entry(name)
                .or_insert_with(|| [zeros(), zeros()]);
            pair[usize::from(!first)] = tensor;
        }
        let device = self.device.clone();
        for ((_, bias), values) in self.model.correction_biases_mut().zip(biases) {
            *bias = Tensor::from_floats(values.as_slice(), &device);
        }
        Ok(())
    }

    /// Everything a checkpoint holds: parameters, their moments, the routers' biases.
    pub(crate) fn state_tensors(&mut self) -> Vec<TensorSpec> {
        let parameters = self.model.parameters();
        let moments = self.recipe.optimizer.moments().dtype();
        let kinds = [
            ("parameter", DType::F32),
            ("moment1", moments),
            ("moment2", moments),
        ];
        let of_kind = |(kind, dtype): (&str, DType)| {
            let specs = parameters.iter().map(|p| TensorSpec {
                name: format!("{kind}/{}", p.name).as_str().into(),
                dtype,
                shape: vec![p.values.dims()[0]],
            });
            specs.collect::<Vec<_>>()
        };
        let mut specs = kinds.map(of_kind).concat();
        let biases = self.model.correction_biases();
        specs.extend(biases.map(|(layer_idx, bias)| TensorSpec {
            name: format!("bias/{layer_idx}").as_str().into(),
            dtype: DType::F32,
            shape: bias.dims().to_vec(),
        }));
        specs
    }

    /// What is stored, computed, added and kept in what.
    ///
    /// # Errors
    /// If a header of the base cannot be read.
    pub fn policy(&self) -> Result<Policy> {
        let compute = self.compute();
        let policy = match (&self.base.folder, self.recipe.train.method) {
            (Some(folder), Method::Lora) => {
                let policy = Policy::of_checkpoint(folder, compute)?;
                policy.with_lora(&self.formats)
            }
            _ => Policy::trained(compute),
        };
        Ok(policy)
    }

    /// What products round to.
    pub fn compute(&self) -> model::Compute {
        match self.recipe.precision.compute {
            Compute::F32 => model::Compute::F32,
            Compute::Bf16 => model::Compute::Bf16,
            Compute::F16 => model::Compute::F16,
            Compute::Fp8 => model::Compute::Fp8(self.model.config.fp8_scales),
            Compute::Fp8Unscaled => model::Compute::Fp8(Scales::One),
        }
    }
}

/// Refuses settings that look at validation rows where there are none.
fn expect_valid(recipe: &Recipe, valid: Option<&Corpus>) -> Result<()> {
    let key = if recipe.train.keep_best {
        "train.keep_best"
    } else if recipe.eval.patience.is_some() {
        "eval.patience"
    } else {
        return Ok(());
    };
    let missing = || Error::NoValidationData {
        key,
        folders: recipe.data.path.clone(),
    };
    valid.map(|_| ()).ok_or_else(missing)
}

/// Rounds the trained values to bf16.
fn round(model: &mut Model) {
    model.map_parameters(&mut |_, values| values.cast(FloatDType::BF16).cast(FloatDType::F32));
}

/// A model as it is before anything is put on it. It takes no memory: an adapter's base has its weights in common with
/// the model, and where those are trained they are mapped from their file once more.
fn reference_of(recipe: &Recipe, model: &Model, base: &Base) -> Result<Option<Model>> {
    let device = Device::flex();
    match (recipe.train.method, &base.folder) {
        (Method::Lora, _) => Ok(Some(model.clone().valid())),
        (Method::Full, Some(folder)) if recipe.train.loss == Loss::Dpo => {
            Ok(Some(load::load(folder, Training::Frozen, &device)?))
        }
        (Method::Full, _) => Ok(None),
    }
}

/// What a recipe's adapter is trained to be merged into.
fn quantizer_of(recipe: &Recipe) -> Result<Option<Quantizer>> {
    let (None, Some(folder)) = (recipe.lora.quantizer, &recipe.model.adapter) else {
        return Ok(recipe.lora.quantizer);
    };
    let adapter = Adapter::open(folder)?;
    let parsed = adapter
        .notes
        .trained_for
        .as_deref()
        .map(str::parse)
        .transpose();
    parsed.map_err(|cause| Error::TrainedFor {
        path: folder.clone(),
        cause,
    })
}

/// Puts the recipe's low-rank updates on the model: fresh ones, or those of an adapter.
fn adapt(
    recipe: &Recipe,
    model: &mut Model,
    device: &Device,
) -> Result<(Vec<AdaptedModule>, Scaling, Option<Share>)> {
    let config = lora_config(recipe);
    let (scaling, share) = (config.scaling, config.experts_share);
    match (recipe.train.method, &recipe.model.adapter) {
        (Method::Full, _) => Ok((vec![], scaling, None)),
        (Method::Lora, None) => Ok((adapt::attach(model, &config, device)?, scaling, share)),
        (Method::Lora, Some(folder)) => {
            let adapter = AdapterWeights::read(&Adapter::open(folder)?, &model.config)?
                .with_dropout(recipe.lora.dropout as f32)?;
            let adapted = adapter.attach(model, device)?;
            Ok((adapted, adapter.scaling(), adapter.share()))
        }
    }
}

/// Opens a model's folder, or a GGUF file with the tokenizer that it holds.
///
/// # Errors
/// If a file of it is malformed.
pub fn open_folder(path: &Path) -> Result<Folder> {
    let folder = Folder::open(path)?;
    Ok(folder.with_companions(|path, metadata| {
        let Some(tokenizer) = TokenizerFiles::of_metadata(path, metadata)? else {
            return Ok(Vec::new());
        };
        let files = tokenizer.files()?.into_iter();
        Ok(files
            .map(|(name, text)| (name.to_owned(), text.into_owned()))
            .collect())
    }))
}

/// The tokenizer of what [`open_folder`] opened, if it has one.
///
/// # Errors
/// If a file of it cannot be read, or says of tokens what cannot be.
pub fn tokenizer_of(folder: &Folder) -> Result<Option<TokenizerFiles>> {
    match folder.metadata() {
        Some(metadata) => Ok(TokenizerFiles::of_metadata(folder.path(), metadata)?),
        None => Ok(TokenizerFiles::read(folder.path())?),
    }
}

fn open_model(
    recipe: &Recipe,
    resolve: &dyn Fn(&str) -> Result<PathBuf>,
    device: &Device,
) -> Result<(Model, Base)> {
    let tokenizer_folder = recipe.model.tokenizer.clone();
    if let Some(path) = &recipe.model.path {
        let folder = open_folder(&resolve(path)?)?;
        let model = load::load(&folder, recipe.training(), device)?;
        let tokenizer = match &tokenizer_folder {
            Some(given) => TokenizerFiles::read(given)?,
            None => tokenizer_of(&folder)?,
        };
        let base = Base {
            config: folder.config().clone(),
            tokenizer,
            tokenizer_folder,
            name: path.clone(),
            folder: Some(folder),
        };
        return Ok((model, base));
    }
    let file = recipe.model.config.clone().unwrap_or_default();
    let text = std::fs::read(&file).map_err(crate::error::io("read", &file))?;
    let json: serde_json::Value = serde_json::from_slice(&text).map_err(|cause| Error::State {
        path: file.clone(),
        cause,
    })?;
    let config = ModelConfig::from_json(&json, &file)?;
    let tokenizer = tokenizer_folder.as_deref().map(TokenizerFiles::open);
    let model = load::fresh(&config, recipe.training(), recipe.train.seed, device)?;
    Ok((
        model,
        Base {
            folder: None,
            config: json,
            tokenizer: tokenizer.transpose()?,
            tokenizer_folder,
            name: file.display().to_string(),
        },
    ))
}

/// The adapter a recipe asks for.
fn lora_config(recipe: &Recipe) -> LoraConfig {
    let lora = &recipe.lora;
    let router = |wanted| (recipe.train.router == Some(wanted)).then(|| ROUTER.to_owned());
    let with =
        |patterns: &[String], more: Option<String>| patterns.iter().cloned().chain(more).collect();
    LoraConfig {
        target: with(&lora.target, router(RouterTraining::Trainable)),
        exclude: with(&lora.exclude, router(RouterTraining::Frozen)),
        rank: lora.rank,
        alpha: lora.alpha,
        scaling: if lora.use_rslora {
            Scaling::RsLora
        } else {
            Scaling::Plain
        },
        rank_pattern: lora
            .rank_pattern
            .iter()
            .map(|(pattern, rank)| (pattern.to_owned(), *rank))
            .collect(),
        alpha_pattern: lora
            .alpha_pattern
            .iter()
            .map(|(pattern, alpha)| (pattern.to_owned(), *alpha))
            .collect(),
        dropout: lora.dropout as f32,
        seed: recipe.train.seed,
        use_dora: lora.use_dora,
        experts_share: lora.experts_share.map(|share| match share {
            ExpertsShare::A => Share::A,
            ExpertsShare::B => Share::B,
            ExpertsShare::Outer => Share::Outer,
        }),
    }
}

/// The routers' weights, as a pattern.
const ROUTER: &str = "mlp.gate";

impl Recipe {
    /// Which of the model's own weights change.
    fn training(&self) -> Training {
        let train = &self.train;
        if train.method == Method::Lora {
            return Training::Frozen;
        }
        let (mut patterns, mut but) = (train.unfrozen_parameters.clone(), vec![]);
        let all = patterns.is_empty();
        if all {
            patterns.push("*".into());
        }
        match train.router {
            Some(RouterTraining::Frozen | RouterTraining::BiasOnly) => but.push(ROUTER.into()),
            Some(RouterTraining::Trainable) if !all => patterns.push(ROUTER.into()),
            _ => {}
        }
        if all && but.is_empty() {
            return Training::Full;
        }
        Training::Subset(patterns, but)
    }

    /// Whether weights are trained and some are not.
    pub(crate) fn is_partial(&self) -> bool {
        matches!(self.training(), Training::Subset(..))
    }
}
