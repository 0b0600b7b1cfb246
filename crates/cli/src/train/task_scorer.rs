//! Tasks that a model in training is asked, and the bounds that its result must keep.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::eval::{EvalReport, ExpertChoices, Gate, GroupResult, ModelScores};
use anyhow::Context;
use burn::tensor::Device;
use data::{Columns, Tokenizer};
use model::{Model, OperandRounding};
use train::{Recipe, RunDir, Session, TaskScore};

use super::end_ids;
use crate::console::Console;
use crate::eval::conversation_args::ConversationArgs;
use crate::eval::tasks::{AskedModel, LoadedTasks, TaskOptions, load};
use crate::eval::{expect_gates, read_report};
use crate::plan::budget::BudgetArgs;

/// The folder of a run with the scores after each step.
const SCORES_FOLDER: &str = "scores";

/// The tasks of a recipe, read before any model is.
#[derive(Debug)]
pub(super) struct RecipeTasks {
    tasks: LoadedTasks,
    gates: Vec<Gate>,
    batch: u64,
    max_samples: Option<usize>,
}

/// Asks the tasks of a recipe after steps of a run.
#[derive(Debug)]
pub(super) struct TaskScorer {
    recipe: RecipeTasks,
    tokenizer: Arc<Tokenizer>,
    end_ids: Vec<u32>,
    rounding: OperandRounding,
    device: Device,
    /// The run's folder.
    run: PathBuf,
    console: Console,
}

impl RecipeTasks {
    /// The tasks of a recipe; none if it has none.
    pub(super) fn of(recipe: &Recipe, console: &Console) -> anyhow::Result<Option<Self>> {
        let eval = &recipe.eval;
        if eval.tasks.is_empty() {
            return Ok(None);
        }
        let gates = eval.gates.iter().map(|gate| Gate::parse(gate));
        let gates = gates
            .collect::<::eval::Result<Vec<_>>>()
            .context("eval.gates")?;
        let mut tasks = Self {
            tasks: LoadedTasks::default(),
            gates,
            batch: eval.batch_size as u64,
            max_samples: eval.tasks_max_samples.map(|most| most as usize),
        };
        let columns = Columns::none();
        let chat = ConversationArgs::default();
        let options = tasks.options(OperandRounding::F32, (&columns, &chat));
        tasks.tasks = load(&eval.tasks, &options, console).context("eval.tasks")?;
        expect_gates(&tasks.gates, &tasks.tasks.metrics(), true).context("eval.gates")?;
        Ok(Some(tasks))
    }

    /// Refuses gates that cannot be judged when a run goes on: with the scores of its start.
    pub(super) fn expect_start(&self, run: &RunDir) -> anyhow::Result<()> {
        if self.gates.is_empty() || run.latest()?.is_none() {
            return Ok(());
        }
        let start = read_scores(&path_of(run.path(), 0));
        let judged = start.and_then(|start| {
            let both = vec![start.clone(), start];
            Ok(EvalReport::new(both, &self.gates)?)
        });
        judged.map(|_| ()).context(
            "eval.gates: expected the scores of the run's start, with the tasks of all gates; a run that began without them cannot be judged",
        )
    }

    fn options<'a>(
        &self,
        rounding: OperandRounding,
        (columns, chat): (&'a Columns, &'a ConversationArgs),
    ) -> TaskOptions<'a> {
        TaskOptions {
            include_path: &[],
            num_fewshot: None,
            max_samples: self.max_samples,
            max_length: None,
            batch: self.batch,
            compute: rounding.into(),
            columns,
            chat,
            budget: BudgetArgs::default(),
        }
    }
}

impl TaskScorer {
    pub(super) fn new(
        recipe: RecipeTasks,
        session: &Session,
        run: &RunDir,
        console: Console,
    ) -> anyhow::Result<Self> {
        let files = session.tokenizer_files();
        let files = files.context("`eval.tasks` need a tokenizer; give `model.tokenizer`")?;
        Ok(Self {
            recipe,
            tokenizer: Arc::new(Tokenizer::new(files)?),
            end_ids: end_ids(session)?,
            rounding: session.compute(),
            device: session.device(),
            run: run.path().to_owned(),
            console,
        })
    }

    /// The scores of a model after a step. They are kept in the run's folder, item by item.
    pub(super) fn score(&self, step: u64, model: &Model) -> anyhow::Result<Vec<TaskScore>> {
        let asked = AskedModel {
            name: name_of(step),
            model: model.clone(),
            tokenizer: Arc::clone(&self.tokenizer),
            end_ids: self.end_ids.clone(),
            device: self.device.clone(),
        };
        let columns = Columns::none();
        let chat = ConversationArgs::default();
        let options = self.recipe.options(self.rounding, (&columns, &chat));
        let mut results = Vec::new();
        for task in &self.recipe.tasks.tasks {
            let judged = task.result(&asked, &options, &mut (), &self.console)?;
            results.push(judged.result);
        }
        let groups = self.recipe.tasks.groups.iter();
        let scores = ModelScores {
            name: asked.name,
            text: None,
            groups: groups
                .map(|group| GroupResult::new(group, &results))
                .collect(),
            tasks: results,
            experts: ExpertChoices::default(),
        };
        let found = scores.tasks.iter().flat_map(|task| {
            task.metrics.iter().map(|metric| TaskScore {
                task: task.task.clone(),
                metric: metric.metric.name().to_owned(),
                filter: metric.filter.clone(),
                is_higher_better: metric.is_higher_better,
                value: metric.value,
                standard_error: metric.standard_error,
            })
        });
        let found = found.collect();
        let report = EvalReport::new(vec![scores], &[])?;
        let text = format!("{}\n", report.to_json());
        let folder = self.run.join(SCORES_FOLDER);
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot make `{}`", folder.display()))?;
        checkpoint::write_file(&path_of(&self.run, step), text.as_bytes())?;
        Ok(found)
    }

    /// The result against the model at the start, and what became of the gates. None if nothing was learned.
    pub(super) fn judge(&self, step: u64) -> anyhow::Result<Option<EvalReport>> {
        // A run that began without tasks has no scores of its start, and no gates.
        let [start, result] = [0, step].map(|step| path_of(&self.run, step));
        if step == 0 || !start.is_file() {
            return Ok(None);
        }
        let scores = vec![read_scores(&start)?, read_scores(&result)?];
        Ok(Some(EvalReport::new(scores, &self.recipe.gates)?))
    }
}

/// Where the scores of a run after a step are.
fn path_of(run: &Path, step: u64) -> PathBuf {
    let folder = run.join(SCORES_FOLDER);
    folder.join(format!("step_{step:08}.json"))
}

/// The scores in a file of a run.
fn read_scores(path: &Path) -> anyhow::Result<ModelScores> {
    let scores = ::eval::read_scores(&read_report(path)?);
    let scores = scores.with_context(|| format!("`{}`", path.display()))?;
    let first = scores.into_iter().next();
    first.with_context(|| format!("`{}`: expected scores, found none", path.display()))
}

fn name_of(step: u64) -> String {
    match step {
        0 => "start".into(),
        step => format!("step {step}"),
    }
}
