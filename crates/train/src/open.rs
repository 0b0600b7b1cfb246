//! Opens what a recipe names, as a session.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{Device, FloatDType};
use checkpoint::{Adapter, Folder};
use data::{Columns, Corpus, ReadOptions, RowFilter, Tokenizer, TokenizerFiles};
use kernels::Quantizer;
use model::adapt::{self, AdaptedModule};
use model::{
    AdapterWeights, Checkpointing, ExpertRanks, Model, ModelConfig, OperandRounding, Training, load,
};
use parallel::World;

use crate::checkpoint_state::RunState;
use crate::dataset::{self, Dataset};
use crate::fit::RankLayout;
use crate::fit::joining::Sharing;
use crate::fit::ranks::Ranks;
use crate::identity;
use crate::optimizer::AdamW;
use crate::recipe::forecast::{Forecast, HeapUse};
use crate::recipe::{DpoReference, KeepBest, Loss, Method, Moments, Recipe, SPARED};
use crate::session::{Base, Reference, Session, UpdateForm};
use crate::{Error, Result};

/// How a session is opened, apart from its recipe.
#[derive(Clone, Copy)]
pub struct SessionOptions<'a> {
    /// Where the model computes.
    pub device: &'a Device,
    /// Turns the recipe's model into a folder.
    pub resolve: &'a dyn Fn(&str) -> Result<PathBuf>,
    /// The name of the base in an adapter; none is `model.path`. A run that was moved has another path and the same name.
    pub base_name: Option<&'a str>,
    /// The folder in which tokenized rows are cached for the next run; none caches none.
    pub token_cache: Option<&'a Path>,
    /// Receives how many bytes of rows are tokenized, and how many there are.
    pub tokenizing: &'a dyn Fn(u64, u64),
    /// The ranks that make the run together, and how; none if this is the only one.
    pub ranks: Option<(&'a World, RankLayout)>,
    /// Decides whether what a run will take of memory is there, before its model is opened.
    pub approve: &'a dyn Fn(&Forecast<'_>) -> std::result::Result<HeapUse, String>,
}

impl<'a> SessionOptions<'a> {
    /// Without a token cache or other ranks.
    pub fn new(device: &'a Device, resolve: &'a dyn Fn(&str) -> Result<PathBuf>) -> Self {
        Self {
            device,
            resolve,
            base_name: None,
            token_cache: None,
            tokenizing: &|_, _| {},
            ranks: None,
            approve: &|_| Ok(HeapUse::Fast),
        }
    }
}

impl std::fmt::Debug for SessionOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SessionOptions")
            .field("device", &self.device)
            .field("token_cache", &self.token_cache)
            .finish_non_exhaustive()
    }
}

/// The device with gradients. It refuses settings that a GPU does not compute yet: nothing else is computed in their place.
fn device_of(recipe: &Recipe, device: &Device) -> Result<Device> {
    let with_gradients = device.clone().autodiff();
    if !kernels::device::is_gpu(device) {
        return Ok(with_gradients);
    }
    let refused = |key: &str, found: &str, expected: &str| {
        Err(Error::NotOnGpu {
            key: key.to_owned(),
            found: found.to_owned(),
            expected: expected.to_owned(),
        })
    };
    if recipe.precision.compute != OperandRounding::F32 {
        return refused("precision.compute", recipe.precision.compute_word(), "f32");
    }
    if recipe.optimizer.moments() != Moments::F32 {
        return refused("optimizer.moments", "bf16", "f32");
    }
    match quantizer_of(recipe)? {
        Some(quantizer) => refused("lora.quantizer", &quantizer.to_string(), "none"),
        None => Ok(with_gradients),
    }
}

impl Session {
    /// Opens what a recipe names, on a device. `resolve` turns the recipe's model into a folder.
    ///
    /// # Errors
    /// If the model, the tokenizer, an adapter or a data file cannot be used.
    pub fn open(
        recipe: Recipe,
        device: &Device,
        resolve: &dyn Fn(&str) -> Result<PathBuf>,
    ) -> Result<Self> {
        Self::open_with(recipe, SessionOptions::new(device, resolve))
    }

    /// [`Session::open`] with a token cache, or as one of several ranks: only the first one's run directory is kept then, and
    /// that of another has its metrics and nothing else. Opening exchanges nothing with the others.
    ///
    /// # Errors
    /// As [`Session::open`]; if the micro-batches of a step cannot be shared out, or experts cannot as the layout says.
    pub fn open_with(recipe: Recipe, options: SessionOptions<'_>) -> Result<Self> {
        let device = device_of(&recipe, options.device)?;
        let (base, config) = open_base(&recipe, &options)?;
        let stored = open_adapter(&recipe, &config)?;
        let sharing = Sharing::new(&recipe, &config, stored.as_ref(), options.device);
        let joined = sharing.join(options.ranks)?;
        let ranks = joined.experts.as_ref();
        let tokenizer = base.tokenizer.as_ref().map(Tokenizer::new).transpose()?;
        let (train, valid) = open_rows(&recipe, tokenizer.as_ref(), &config, &options)?;
        let sources = (base.folder.as_ref(), stored.as_ref());
        let forecast = Forecast::new(&recipe, &config, sources, joined.layout.ep)?
            .with_batch(train.largest_batch());
        let heap = (options.approve)(&forecast).map_err(Error::TooLarge)?;
        let plan = forecast.plan();
        // What is converted while a model opens would leave gaps in the heap.
        kernels::map_large_blocks();
        let mut model = open_model(&recipe, &base, &config, (&device, ranks))?;
        let mut reference = open_reference(&recipe, &model, &base, (options.device, ranks))?;
        let mut start = open_start(&recipe, reference.as_ref(), stored.as_ref(), options.device)?;
        let (adapted, mut update) = adapt(&recipe, &mut model, stored.as_ref(), &device)?;
        drop(stored);
        if model.parameters().is_empty() {
            return Err(Error::NothingTrained);
        }
        let quantizer = quantizer_of(&recipe)?;
        if let Some(quantizer) = quantizer {
            let others = [&mut reference, &mut start];
            update.n_rounded = fake_quantize(quantizer, &mut model, others)?;
        }
        if recipe.precision.round_start {
            round_to_bf16(&mut model);
            start.iter_mut().for_each(round_to_bf16);
        }
        expect_spared(&recipe, &model)?;
        if heap == HeapUse::Fast && recipe.train.checkpointing == Checkpointing::None {
            kernels::keep_large_blocks();
        }
        Ok(Self {
            optimizer: AdamW::new(&recipe),
            ranks: Ranks::new(joined, &model),
            state: RunState::start(&recipe, identity::of_base(&base)?, &train),
            tokenizer_size: tokenizer.as_ref().map(Tokenizer::vocab_size),
            pad_id: pad_id(tokenizer.as_ref(), model.config.vocab_size),
            reference: reference.map(Reference::new),
            start,
            recipe,
            adapted,
            quantizer,
            plan,
            train,
            valid,
            end_ids: tokenizer.map_or_else(Vec::new, |known| known.end_ids().to_vec()),
            model,
            update,
            base,
            device,
        })
    }
}

/// Opens the rows to train on, and those to validate on if there are any.
fn open_rows(
    recipe: &Recipe,
    tokenizer: Option<&Tokenizer>,
    config: &ModelConfig,
    options: &SessionOptions<'_>,
) -> Result<(Dataset, Option<Corpus>)> {
    let columns = columns_of(recipe)?;
    let reading = ReadOptions {
        tokenizer,
        max_length: recipe.data.max_length,
        vocab_size: config.vocab_size,
        filter: filter_of(recipe.train.loss),
        columns: &columns,
        cache: options.token_cache,
        progress: options.tokenizing,
    };
    let train = Dataset::open(recipe, reading)?;
    let valid = dataset::validation(recipe, reading)?;
    expect_valid(recipe, valid.as_ref())?;
    Ok((train, valid))
}

/// The names that the recipe gives to columns.
fn columns_of(recipe: &Recipe) -> Result<Columns> {
    let columns = recipe.data.columns.iter();
    let columns = columns.map(|(key, column)| (key.to_owned(), column.clone()));
    Ok(Columns::new(columns)?)
}

/// The token that fills up rows: that which ends a text, if the model has it.
fn pad_id(tokenizer: Option<&Tokenizer>, vocab_size: usize) -> u32 {
    tokenizer
        .and_then(Tokenizer::eos_id)
        .filter(|id| (*id as usize) < vocab_size)
        .unwrap_or(0)
}

/// The rows that a loss can learn from.
fn filter_of(loss: Loss) -> RowFilter {
    match loss {
        Loss::CrossEntropy => RowFilter::Samples,
        Loss::Dpo => RowFilter::Pairs,
    }
}

/// Rounds the model, and what it is compared with, to the format that the recipe's adapter is trained for.
fn fake_quantize(
    quantizer: Quantizer,
    model: &mut Model,
    others: [&mut Option<Model>; 2],
) -> Result<BTreeMap<String, usize>> {
    for other in others.into_iter().flatten() {
        other.fake_quantize(quantizer, &mut |_| true)?;
    }
    Ok(model.fake_quantize(quantizer, &mut |_| true)?)
}

/// Refuses settings that need validation rows if there are none.
fn expect_valid(recipe: &Recipe, valid: Option<&Corpus>) -> Result<()> {
    let key = if recipe.train.keep_best == KeepBest::Loss(true) {
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

/// Refuses a pattern of `optimizer.no_decay` that spares nothing, unless it is one of the defaults.
fn expect_spared(recipe: &Recipe, model: &Model) -> Result<()> {
    let parameters = model.parameters();
    let spares = |pattern: &str| parameters.iter().any(|p| model::matches(pattern, &p.name));
    let patterns = recipe.optimizer.no_decay.iter();
    let mut idle =
        patterns.filter(|pattern| !SPARED.contains(&pattern.as_str()) && !spares(pattern));
    match idle.next() {
        None => Ok(()),
        Some(pattern) => Err(Error::NothingSpared {
            pattern: pattern.clone(),
            example: parameters
                .first()
                .map(|p| p.name.clone())
                .unwrap_or_default(),
        }),
    }
}

/// Rounds the trained values to bf16.
fn round_to_bf16(model: &mut Model) {
    model.map_parameters(&mut |_, values| values.cast(FloatDType::BF16).cast(FloatDType::F32));
}

/// The model before anything is put on it. It takes no memory: an adapter's base shares its weights with the model, and
/// trained weights are mapped from their file again.
fn open_reference(
    recipe: &Recipe,
    model: &Model,
    base: &Base,
    (device, ranks): (&Device, Option<&Arc<ExpertRanks>>),
) -> Result<Option<Model>> {
    match (recipe.train.method, &base.folder) {
        (Method::Lora, _) => Ok(Some(model.clone().valid())),
        (Method::Full, Some(folder)) if recipe.train.loss == Loss::Dpo => {
            let frozen = Training::Frozen;
            Ok(Some(load::load_shard(folder, frozen, ranks, device)?))
        }
        (Method::Full, _) => Ok(None),
    }
}

/// The frozen model that preferences are learned relative to, if it is the base with the adapter that training starts
/// from. It shares the base's weights and takes the memory of another adapter.
fn open_start(
    recipe: &Recipe,
    base: Option<&Model>,
    adapter: Option<&AdapterWeights>,
    device: &Device,
) -> Result<Option<Model>> {
    let is_wanted = recipe.train.loss == Loss::Dpo
        && recipe.dpo.reference == DpoReference::Start
        && adapter.is_some();
    let Some(base) = base.filter(|_| is_wanted) else {
        return Ok(None);
    };
    let mut start = base.clone();
    adapt(recipe, &mut start, adapter, device)?;
    Ok(Some(start))
}

/// The format that the recipe's adapter is trained to be merged into.
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

/// The updates that training starts from, if they are stored.
fn open_adapter(recipe: &Recipe, config: &ModelConfig) -> Result<Option<AdapterWeights>> {
    match (recipe.train.method, &recipe.model.adapter) {
        (Method::Lora, Some(folder)) => {
            let adapter = AdapterWeights::read(&Adapter::open(folder)?, config)?;
            Ok(Some(adapter.with_dropout(recipe.lora.dropout as f32)?))
        }
        _ => Ok(None),
    }
}

/// Puts the recipe's low-rank updates on the model: fresh ones, or those of an adapter.
fn adapt(
    recipe: &Recipe,
    model: &mut Model,
    adapter: Option<&AdapterWeights>,
    device: &Device,
) -> Result<(Vec<AdaptedModule>, UpdateForm)> {
    let config = recipe.lora_config();
    let form = |scaling, share| UpdateForm {
        scaling,
        share,
        n_rounded: BTreeMap::new(),
    };
    match (recipe.train.method, adapter) {
        (Method::Full, _) => Ok((vec![], form(config.scaling, None))),
        (Method::Lora, None) => {
            let adapted = adapt::attach(model, &config, device)?;
            Ok((adapted, form(config.scaling, config.experts_share)))
        }
        (Method::Lora, Some(adapter)) => {
            let adapted = adapter.attach(model, device)?;
            Ok((adapted, form(adapter.scaling(), adapter.share())))
        }
    }
}

/// What the model is, and where it comes from.
fn open_base(recipe: &Recipe, options: &SessionOptions<'_>) -> Result<(Base, ModelConfig)> {
    let tokenizer_folder = recipe.model.tokenizer.clone();
    if let Some(path) = &recipe.model.path {
        let folder = Folder::open(&(options.resolve)(path)?)?.with_companions(data::companions);
        let model_config = load::read_config(&folder)?;
        let tokenizer = match &tokenizer_folder {
            Some(given) => TokenizerFiles::read(given)?,
            None => TokenizerFiles::of_model(folder.path(), folder.metadata())?,
        };
        let base = Base {
            config: folder.config().clone(),
            tokenizer,
            tokenizer_folder,
            name: options.base_name.unwrap_or(path).to_owned(),
            folder: Some(folder),
        };
        return Ok((base, model_config));
    }
    let file = recipe.model.config.clone().unwrap_or_default();
    let text = std::fs::read(&file).map_err(crate::error::io("read", &file))?;
    let json: serde_json::Value = serde_json::from_slice(&text).map_err(|cause| Error::State {
        path: file.clone(),
        cause,
    })?;
    let model_config = ModelConfig::from_json(&json, &file)?;
    let tokenizer = tokenizer_folder.as_deref().map(TokenizerFiles::open);
    let base = Base {
        folder: None,
        config: json,
        tokenizer: tokenizer.transpose()?,
        tokenizer_folder,
        name: file.display().to_string(),
    };
    Ok((base, model_config))
}

/// The model, with this rank's share of the experts if ranks share them out.
fn open_model(
    recipe: &Recipe,
    base: &Base,
    config: &ModelConfig,
    (device, ranks): (&Device, Option<&Arc<ExpertRanks>>),
) -> Result<Model> {
    let (training, seed) = (recipe.training(), recipe.train.seed);
    Ok(match &base.folder {
        Some(folder) => load::load_shard(folder, training, ranks, device)?,
        None => load::fresh_shard(config, training, (seed, ranks), device)?,
    })
}
