//! Tasks that a model in training is asked, and the bounds that its result must keep.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::eval::{EvalReport, ExpertChoices, Gate, GroupResult, ModelScores};
use anyhow::{Context, bail};
use burn::tensor::Device;
use data::{Columns, Tokenizer};
use model::{Model, OperandRounding};
use train::{KeepBest, Recipe, RunDir, Session, TaskScore};

use super::end_ids;
use crate::console::{Console, misuse};
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
    budget: BudgetArgs,
    /// Whether the best checkpoint is the best in a score.
    keeps_best_score: bool,
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
    pub(super) fn of(
        recipe: &Recipe,
        budget: BudgetArgs,
        console: &Console,
    ) -> anyhow::Result<Option<Self>> {
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
            budget,
            keeps_best_score: matches!(recipe.train.keep_best, KeepBest::Score(_)),
        };
        let columns = Columns::none();
        let chat = ConversationArgs::default();
        let options = tasks.options(OperandRounding::F32, (&columns, &chat));
        tasks.tasks = load(&eval.tasks, &options, console).context("eval.tasks")?;
        let judged = expect_gates(&tasks.gates, &tasks.tasks.measures(), true);
        judged.map_err(|problem| misuse(format!("eval.gates: {problem}")))?;
        Ok(Some(tasks))
    }

    /// Refuses a run that goes on with other questions than those its start was asked, if its result is compared with the start or
    /// with earlier steps.
    pub(super) fn expect_start(&self, run: &RunDir) -> anyhow::Result<()> {
        let is_compared = self.keeps_best_score || !self.gates.is_empty();
        if !is_compared || run.latest()?.is_none() {
            return Ok(());
        }
        let kept = read_report(&path_of(run.path(), 0)).context(
            "eval.gates, train.keep_best: expected the scores of the run's start; a run that began without tasks cannot be judged by them",
        )?;
        let (before, now) = (&kept["questions"], self.questions()?);
        let differs = now.iter().find(|(task, hash)| before[*task] != **hash);
        match differs {
            None => Ok(()),
            Some((task, _)) => bail!(
                "eval.tasks: expected the questions of `{task}` that the run's start was asked, found others; give back the task, its rows and `eval.tasks_max_samples`, or remove `eval.gates` and `train.keep_best`"
            ),
        }
    }

    /// What says whether two models were asked the same, by the names of tasks.
    fn questions(&self) -> anyhow::Result<BTreeMap<String, String>> {
        let mut questions = self.tasks.questions()?;
        for hash in questions.values_mut() {
            *hash = format!("{hash} {:?}", self.max_samples);
        }
        Ok(questions)
    }

    fn options<'a>(
        &self,
        rounding: OperandRounding,
        (columns, chat): (&'a Columns, &'a ConversationArgs),
    ) -> TaskOptions<'a> {
        TaskOptions {
            include_path: &[],
            cure: "give its file or folder",
            num_fewshot: None,
            max_samples: self.max_samples,
            max_length: None,
            batch: self.batch,
            compute: rounding.into(),
            columns,
            chat,
            budget: self.budget,
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
        let mut json = report.to_json();
        json["questions"] = serde_json::to_value(self.recipe.questions()?)?;
        let text = format!("{json}\n");
        let folder = self.run.join(SCORES_FOLDER);
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot make `{}`", folder.display()))?;
        checkpoint::write_file(&path_of(&self.run, step), text.as_bytes())?;
        Ok(found)
    }

    /// The result against the model at the start, and what became of the gates. None without scores of the start.
    pub(super) fn judge(&self, step: u64) -> anyhow::Result<Option<EvalReport>> {
        let [start, result] = [0, step].map(|step| path_of(&self.run, step));
        // A run that began without tasks has no scores of its start, and no gates.
        if !start.is_file() {
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
