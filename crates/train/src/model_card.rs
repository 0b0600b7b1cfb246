//! What a run's own files say about its result, for the `README.md` next to it.
//!
//! All of it is read from a checkpoint and the files around it, so a card that is made at the run's end and one that is made when
//! the adapter is merged say the same. What a run directory does not hold is not said.

use std::path::Path;

use checkpoint::{AdapterConfig, ModelCard, Notes, Relation, code};

use crate::Result;
use crate::checkpoint_state::RunState;
use crate::metrics::{LoggedLosses, METRICS_NAME, logged_losses};
use crate::recipe::{Loss, Recipe};
use crate::run_dir::{RECIPE_NAME, RunDir, checkpoint_of};
use crate::session::Session;

/// A run up to a checkpoint.
#[derive(Clone, Debug)]
pub struct RunRecord {
    /// The run's resolved recipe.
    pub recipe: Recipe,
    state: RunState,
    losses: LoggedLosses,
}

impl RunRecord {
    /// The run that an adapter's folder is a result or a checkpoint of. None if it lies elsewhere, or the run directory has no
    /// checkpoint with the same tensors.
    pub fn of_adapter(adapter: &Path) -> Option<Self> {
        Self::read(&checkpoint_of(adapter)?).ok()
    }

    /// The run directory around a checkpoint.
    fn read(checkpoint: &Path) -> Result<Self> {
        let run = checkpoint.parent().unwrap_or(Path::new("."));
        let state = RunState::read(checkpoint)?;
        Ok(Self {
            recipe: Recipe::open(&run.join(RECIPE_NAME), &[])?,
            losses: logged_losses(&run.join(METRICS_NAME), state.step)?,
            state,
        })
    }

    /// The Hub's word for the kind of training.
    pub fn tag(&self) -> &'static str {
        match self.recipe.train.loss {
            Loss::CrossEntropy => "sft",
            Loss::Dpo => "dpo",
        }
    }

    /// Adds a section: the length, the data, the losses and the recipe.
    pub fn describe(&self, card: &mut ModelCard) {
        let state = &self.state;
        card.heading(2, "Training");
        let row = |name: &str, value: String| vec![name.to_owned(), value];
        card.table(&[
            row("of the run", "value".to_owned()),
            row("steps", state.step.to_string()),
            row("trained tokens", state.trained_tokens.to_string()),
            row(
                "hash of the training files and of how they are read: tokenizer, template, columns, `data.max_length`",
                code(&state.data_hash),
            ),
        ]);
        self.describe_data(card);
        self.describe_losses(card);
        card.paragraph("The recipe, with absolute paths cut to their last names:");
        card.file("toml", &without_places(&self.recipe).to_toml());
    }

    /// The files of the training rows.
    fn describe_data(&self, card: &mut ModelCard) {
        let files = &self.state.data_files;
        if files.is_empty() {
            return;
        }
        let head = ["training file", "SHA-256"].map(str::to_owned).to_vec();
        let files = files
            .iter()
            .map(|file| vec![code(&file.name), code(&file.sha256)]);
        card.table(&std::iter::once(head).chain(files).collect::<Vec<_>>());
    }

    /// The first and the last of the losses of both kinds.
    fn describe_losses(&self, card: &mut ModelCard) {
        let ends = |kind: usize| {
            let measured = self.losses.iter().filter(|line| line.1[kind].is_some());
            let mut steps = measured.map(|line| *line.0);
            [steps.next(), steps.next_back()]
        };
        let mut steps: Vec<u64> = [ends(0), ends(1)].into_iter().flatten().flatten().collect();
        if steps.is_empty() {
            return;
        }
        steps.sort_unstable();
        steps.dedup();
        card.paragraph(match self.recipe.train.loss {
            Loss::CrossEntropy => "Losses, in nats per trained token:",
            Loss::Dpo => "Losses of DPO, per pair:",
        });
        let head = ["after step", "training loss", "validation loss"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for (step, losses) in &self.losses {
            if steps.contains(step) {
                let shown = losses.map(|loss| loss.map_or_else(String::new, |x| format!("{x:.4}")));
                let [trained, valid] = shown;
                rows.push(vec![step.to_string(), trained, valid]);
            }
        }
        card.table(&rows);
    }
}

/// The card of a run's adapter.
pub(crate) fn of_adapter(
    session: &Session,
    run: &RunDir,
    config: &AdapterConfig,
    notes: &Notes,
) -> String {
    let (base, record) = (base_path(session), record(session, run));
    let tags: Vec<&str> = std::iter::once("lora")
        .chain(record.as_ref().map(RunRecord::tag))
        .collect();
    let mut card = ModelCard::new(base, Relation::Adapter, &tags);
    let name = base.map(checkpoint::model_label);
    card.heading(
        1,
        &match &name {
            Some(name) => format!("LoRA adapter for {}", code(name)),
            None => "LoRA adapter".to_owned(),
        },
    );
    card.paragraph(&format!("Trained with {}.", ModelCard::PROGRAM));
    card.base(base);
    card.heading(2, "Adapter");
    card.adapter(config, notes);
    if let Some(record) = record {
        record.describe(&mut card);
    }
    card.to_text()
}

/// The card of a fully trained model.
pub(crate) fn of_model(session: &Session, run: &RunDir) -> String {
    let (base, record) = (base_path(session), record(session, run));
    let tags: Vec<&str> = record.as_ref().map(RunRecord::tag).into_iter().collect();
    let mut card = ModelCard::new(base, Relation::Finetune, &tags);
    card.heading(
        1,
        &match base.map(checkpoint::model_label) {
            Some(name) => format!("{}, fine-tuned", code(&name)),
            None => "A model trained from random weights".to_owned(),
        },
    );
    card.paragraph(&format!("Trained with {}.", ModelCard::PROGRAM));
    card.base(base);
    if let Some(record) = record {
        record.describe(&mut card);
    }
    card.to_text()
}

fn base_path(session: &Session) -> Option<&Path> {
    session.base.folder.as_ref().map(checkpoint::Folder::path)
}

/// The record of the checkpoint that the result is: the best one, if the recipe says so, or the last.
fn record(session: &Session, run: &RunDir) -> Option<RunRecord> {
    let state = &session.state;
    let best = state.best_step(&session.recipe.train.keep_best);
    let step = best.unwrap_or(state.step);
    RunRecord::read(&run.checkpoint_path(step)).ok()
}

/// The recipe with absolute paths cut to their last names: a card is published, and where its author keeps files is nobody's
/// business.
fn without_places(recipe: &Recipe) -> Recipe {
    let mut recipe = recipe.clone();
    let cut = |path: &mut std::path::PathBuf| {
        if let (true, Some(name)) = (path.is_absolute(), path.file_name()) {
            *path = name.into();
        }
    };
    let model = &mut recipe.model;
    if let Some(name) = &mut model.path {
        let mut path = name.as_str().into();
        cut(&mut path);
        *name = path.to_string_lossy().into_owned();
    }
    let paths = [&mut model.config, &mut model.tokenizer, &mut model.adapter];
    paths.into_iter().flatten().for_each(cut);
    recipe.data.path.iter_mut().for_each(cut);
    recipe
}
