//! Training runs: the recipe, the session, the training loop, the run directory and its checkpoints.
//!
//! A [`Recipe`] describes a run, a [`Session`] holds it in memory, and a [`RunDir`] holds everything that it writes. A run can
//! be killed at any moment and resumed from its latest checkpoint, to the same bits: a checkpoint is whole or absent, and
//! nothing that enters a result comes from a clock.
//!
//! ```no_run
//! use std::path::Path;
//! use moeforge_train::{Recipe, RunDir, RunState, Schedule};
//!
//! let recipe = Recipe::open(Path::new("recipe.toml"), &["train.steps=10".to_owned()])?;
//! let run = RunDir::create(Path::new("runs/first"), &recipe)?;
//! let mut metrics = run.metrics(None)?;
//! let schedule = Schedule::new(recipe.optimizer.learning_rate, &recipe.schedule);
//! for step in 0..10 {
//!     let learning_rate = schedule.rate(step, 10);
//!     metrics.append(step + 1, &serde_json::json!({ "learning_rate": learning_rate }))?;
//! }
//! if let Some((step, folder)) = run.latest()? {
//!     assert_eq!(RunState::read(&folder)?.step, step);
//! }
//! # Ok::<(), moeforge_train::Error>(())
//! ```

mod error;
mod recipe;
mod schedule;

mod dataset;
mod loss_scale;
mod optimizer;
mod routing;

mod balance;
mod dpo;

mod checkpoint_state;
mod metrics;
mod origin;
mod run_dir;

mod checkpoints;
mod events;
mod export;
mod fit;
mod identity;
mod model_card;
mod open;
mod session;
mod warnings;

pub use self::checkpoint_state::{
    BestScore, BestValidation, RunState, Watchdog, read_optimizer, write_optimizer,
};
pub use self::dataset::{DataFile, Dataset};
pub use self::dpo::Rewards;
pub use self::error::{Error, Result};
pub use self::events::{
    Event, Host, Memory, SampledText, StepReport, TaskScore, ValidationProgress,
};
pub use self::fit::step_memory::StepMemory;
pub use self::fit::{
    GradAudit, RangeTest, RankLayout, RatePoint, TensorGradient, ZeroGradient, steepest,
};
pub use self::loss_scale::LossScale;
pub use self::metrics::Metrics;
pub use self::model_card::RunRecord;
pub use self::open::SessionOptions;
pub use self::recipe::forecast::{
    BatchShape, Forecast, HeapUse, PROGRAM, PROGRAM_MAPPED, TrainingPlan,
};
pub use self::recipe::{
    DataSection, DpoReference, DpoSection, EvalSection, ExportDType, KeepBest, LoraSection, Loss,
    Method, ModelSection, Moments, OptimizerSection, PrecisionSection, Recipe, RouterTraining,
    ScheduleKind, ScheduleSection, TrainSection,
};
pub use self::routing::{LayerDrift, LayerLoad};
pub use self::run_dir::RunDir;
pub use self::schedule::Schedule;
pub use self::session::Session;
