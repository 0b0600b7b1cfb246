//! The state of a run in a checkpoint: counters, what the watchdog remembers, and the optimizer's moments.
//!
//! Nothing is rounded: counters are integers, sums are written as the shortest decimal that reads back to the same bits, and
//! moments keep their dtype. So a resumed run continues bit for bit.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use checkpoint::{DType, FolderWriter, Safetensors, TensorSpec};
use serde::{Deserialize, Serialize};

use crate::dataset::{DataFile, Dataset};
use crate::loss_scale::LossScale;
use crate::recipe::KeepBest;
use crate::{Error, Recipe, Result};

const STATE_NAME: &str = "state.json";
const OPTIMIZER_NAME: &str = "optimizer.safetensors";

/// The state of a run after a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunState {
    /// Optimizer updates made.
    pub step: u64,
    /// Number of the next micro-batch in [`data::SampleOrder`].
    pub micro_step: u64,
    /// Unmasked targets trained on.
    pub trained_tokens: u64,
    /// The scale of the loss, in f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
    /// Slots per expert since the last line of metrics, by layer.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub expert_loads: BTreeMap<usize, Vec<u64>>,
    /// The best validation pass so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<BestValidation>,
    /// The best score of the task that the best checkpoint is best in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_score: Option<BestScore>,
    /// Validation passes since `best`.
    #[serde(default)]
    pub passes_since_best: u64,
    /// Whether the validation pass after this step was interrupted: the run goes on with it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub validation_due: bool,
    /// The watchdog's memory.
    #[serde(default)]
    pub watchdog: Watchdog,
    /// The settings of the recipe that a run keeps, as TOML.
    pub settings: String,
    /// The identity of the run's base.
    pub model_hash: String,
    /// [`data::Corpus::identity`] of the run's training rows.
    pub data_hash: String,
    /// The files of the training rows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data_files: Vec<DataFile>,
}

fn is_false(holds: &bool) -> bool {
    !holds
}

/// A validation pass with the lowest loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BestValidation {
    /// After which step.
    pub step: u64,
    /// Mean nats per trained token, or per pair.
    #[serde(with = "exact")]
    pub loss: f64,
}

/// The best score of a task so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BestScore {
    /// After which step.
    pub step: u64,
    /// The score.
    #[serde(with = "exact")]
    pub value: f64,
}

/// The watchdog's memory. `fit/watchdog.rs` is what it does.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watchdog {
    /// Exponential average of the losses that were not spikes, in nats.
    #[serde(with = "exact")]
    pub(crate) smoothed: f64,
    /// Number of losses in the average.
    pub(crate) steps: u64,
    /// Consecutive spikes, up to the last step.
    pub(crate) spikes: u64,
    /// The micro-batch with which they began.
    pub(crate) first_batch: u64,
    /// Skipped micro-batches as half-open ranges, one for each rollback.
    pub(crate) skipped: Vec<[u64; 2]>,
}

impl RunState {
    /// Before the first step of a recipe on a base of this identity and these training rows.
    pub(crate) fn start(recipe: &Recipe, model_hash: String, data: &Dataset) -> Self {
        Self {
            step: 0,
            micro_step: 0,
            trained_tokens: 0,
            loss_scale: LossScale::new(&recipe.precision),
            expert_loads: BTreeMap::new(),
            best: None,
            best_score: None,
            passes_since_best: 0,
            validation_due: false,
            watchdog: Watchdog::default(),
            settings: recipe.kept_settings(),
            model_hash,
            data_hash: data.corpus.identity(),
            data_files: data.files.clone(),
        }
    }

    /// Records a validation pass after the current step. Returns whether its loss is the lowest so far.
    pub(crate) fn note_validation(&mut self, loss: f64) -> bool {
        // A loss that is not a number is never the best.
        let is_best = loss.is_finite() && self.best.is_none_or(|best| loss < best.loss);
        if is_best {
            let step = self.step;
            self.best = Some(BestValidation { step, loss });
            self.passes_since_best = 0;
        } else {
            self.passes_since_best += 1;
        }
        is_best
    }

    /// Records a score after the current step. Returns whether it is the best so far.
    pub(crate) fn note_score(&mut self, value: f64, is_higher_better: bool) -> bool {
        let is_better = |best: BestScore| match is_higher_better {
            true => value > best.value,
            false => value < best.value,
        };
        let is_best = value.is_finite() && self.best_score.is_none_or(is_better);
        if is_best {
            let step = self.step;
            self.best_score = Some(BestScore { step, value });
        }
        is_best
    }

    /// The step of the best checkpoint, if one is retained.
    pub(crate) fn best_step(&self, keep: &KeepBest) -> Option<u64> {
        match keep {
            KeepBest::Loss(false) => None,
            KeepBest::Loss(true) => self.best.map(|best| best.step),
            KeepBest::Score(_) => self.best_score.map(|best| best.step),
        }
    }

    /// Writes `state.json` into a checkpoint.
    ///
    /// # Errors
    /// If writing fails.
    pub fn write(&self, writer: &mut FolderWriter) -> Result<()> {
        let value = serde_json::to_value(self).expect("a state has only string keys");
        Ok(writer.write_json(STATE_NAME, &value)?)
    }

    /// The state for other ranks.
    pub(crate) fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a state has only string keys")
    }

    /// The state that another rank has read in a checkpoint.
    pub(crate) fn of_json(json: &[u8], checkpoint: &Path) -> Result<Self> {
        let path = checkpoint.join(STATE_NAME);
        serde_json::from_slice(json).map_err(|cause| Error::State { path, cause })
    }

    /// Reads the `state.json` of a checkpoint.
    ///
    /// # Errors
    /// If it is absent or malformed.
    pub fn read(checkpoint: &Path) -> Result<Self> {
        let path = checkpoint.join(STATE_NAME);
        let text = std::fs::read(&path).map_err(crate::error::io("read", &path))?;
        Self::of_json(&text, checkpoint)
    }
}

/// Writes `optimizer.safetensors` into a checkpoint, one tensor in memory at a time.
///
/// `tensors` are F32 or BF16; `values(i)` returns the elements of `tensors[i]` and is called once for each, in order. An
/// index of weights must be written before this, or it would list these tensors too.
///
/// # Errors
/// If a name repeats, also among the weights in the same checkpoint, `values` fails or returns another number of elements
/// than the shape has, or writing fails.
pub fn write_optimizer(
    writer: &mut FolderWriter,
    tensors: &[TensorSpec],
    mut values: impl FnMut(usize) -> Result<Vec<f32>>,
) -> Result<()> {
    writer.add_shard(OPTIMIZER_NAME, tensors, |i| {
        let values = values(i).map_err(|error| checkpoint::Error::Produce {
            tensor: tensors[i].name.to_string(),
            cause: Box::new(error),
        })?;
        Ok(bytes_of(&values, tensors[i].dtype))
    })?;
    Ok(())
}

/// The bytes of values that have this dtype, bf16 or f32, already: nothing is rounded.
fn bytes_of(values: &[f32], dtype: DType) -> Vec<u8> {
    let bits = values.iter().map(|value| value.to_bits());
    match dtype {
        DType::BF16 => bits
            .flat_map(|b| ((b >> 16) as u16).to_le_bytes())
            .collect(),
        _ => bits.flat_map(u32::to_le_bytes).collect(),
    }
}

/// Reads the `optimizer.safetensors` of a checkpoint: `take(i, values)` gets the elements of `tensors[i]`, once for each, in
/// order.
///
/// # Errors
/// If the file does not have exactly these tensors in these shapes, before `take` is called; or if `take` fails.
pub fn read_optimizer(
    checkpoint: &Path,
    tensors: &[TensorSpec],
    mut take: impl FnMut(usize, Vec<f32>) -> Result<()>,
) -> Result<()> {
    let path = checkpoint.join(OPTIMIZER_NAME);
    let file = Safetensors::open(&path)?;
    for spec in tensors {
        let tensor = file.tensor(&spec.name)?;
        tensor.expect_shape(&spec.shape)?;
        if tensor.dtype != spec.dtype {
            return Err(Error::OptimizerDType {
                path,
                tensor: spec.name.to_string(),
                expected: spec.dtype,
                found: tensor.dtype,
            });
        }
    }
    let wanted: HashSet<&str> = tensors.iter().map(|spec| &*spec.name).collect();
    let extra = file.tensors().iter();
    let mut extra = extra.filter(|tensor| !wanted.contains(&*tensor.name));
    if let Some(extra) = extra.next() {
        return Err(Error::OptimizerExtra {
            path,
            expected: tensors.len(),
            found: file.tensors().len(),
            tensor: crate::error::shown(&extra.name),
        });
    }
    for (i, spec) in tensors.iter().enumerate() {
        take(i, file.tensor(&spec.name)?.to_f32()?)?;
    }
    Ok(())
}

/// A number as text: JSON's reader may be off by the last bit, and JSON has no infinity.
pub(crate) mod exact {
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub(crate) fn serialize<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(number)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse()
            .map_err(|_| D::Error::custom("expected a number as text"))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    fn state() -> RunState {
        RunState {
            step: 3,
            micro_step: 12,
            trained_tokens: u64::MAX,
            loss_scale: Some(LossScale {
                exponent: 16,
                clean_steps: 3,
            }),
            expert_loads: BTreeMap::from([(3, vec![7, 0, u64::MAX])]),
            best: Some(BestValidation {
                step: 2,
                loss: 1.0 / 3.0,
            }),
            best_score: Some(BestScore {
                step: 1,
                value: 1.0 / 3.0,
            }),
            passes_since_best: 1,
            validation_due: true,
            watchdog: Watchdog::default(),
            settings: "\"lora.rank\" = 8\n".to_owned(),
            model_hash: "0123456789abcdef".to_owned(),
            data_hash: "fedcba9876543210".to_owned(),
            data_files: vec![DataFile {
                name: "train.jsonl".to_owned(),
                sha256: "0f".repeat(32),
            }],
        }
    }

    fn spec(name: &str, dtype: DType, shape: &[usize]) -> TensorSpec {
        TensorSpec {
            name: name.into(),
            dtype,
            shape: shape.to_vec(),
        }
    }

    fn tensors() -> Vec<TensorSpec> {
        vec![
            spec("b.exp_avg", DType::F32, &[2, 1]),
            spec("a", DType::BF16, &[]),
        ]
    }

    const VALUES: [&[f32]; 2] = [&[1.5, f32::MIN_POSITIVE / 2.0], &[-1.0078125]];

    fn written() -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = FolderWriter::create(&folder.path().join("c")).unwrap();
        state().write(&mut writer).unwrap();
        write_optimizer(&mut writer, &tensors(), |i| Ok(VALUES[i].to_vec())).unwrap();
        writer.finish().unwrap();
        folder
    }

    #[test]
    fn state_and_moments_read_back_bit_for_bit() {
        let folder = written();
        let checkpoint = folder.path().join("c");
        assert_eq!(RunState::read(&checkpoint).unwrap(), state());
        let mut taken = Vec::new();
        read_optimizer(&checkpoint, &tensors(), |i, values| {
            taken.push((i, values.iter().map(|value| value.to_bits()).collect()));
            Ok(())
        })
        .unwrap();
        let bits = |i: usize| -> Vec<u32> { VALUES[i].iter().map(|v| v.to_bits()).collect() };
        assert_eq!(taken, [(0, bits(0)), (1, bits(1))]);
    }

    #[test]
    fn losses_of_every_kind_read_back() {
        for loss in [
            0.0,
            -0.0,
            1e300,
            f64::MIN_POSITIVE / 4.0,
            f64::INFINITY,
            1.0 / 3.0,
        ] {
            let state = RunState {
                best: Some(BestValidation { step: 2, loss }),
                ..state()
            };
            let text = serde_json::to_string(&state).unwrap();
            let read: RunState = serde_json::from_str(&text).unwrap();
            assert_eq!(read.best.unwrap().loss.to_bits(), loss.to_bits());
        }
    }

    #[test]
    fn the_best_score_is_the_first_that_no_other_exceeds() {
        for (sign, is_higher_better) in [(1.0, true), (-1.0, false)] {
            let mut state = state();
            state.best_score = None;
            let mut note = |step, value: f64| {
                state.step = step;
                let is_best = state.note_score(sign * value, is_higher_better);
                (is_best, state.best_step(&KeepBest::Score("t acc".into())))
            };
            assert_eq!(note(0, f64::NAN), (false, None));
            assert_eq!(note(1, 0.5), (true, Some(1)));
            assert_eq!(note(2, 0.5), (false, Some(1)));
            assert_eq!(note(3, 0.75), (true, Some(3)));
            assert_eq!(note(4, 0.25), (false, Some(3)));
            assert_eq!(state.best_step(&KeepBest::Loss(true)), Some(2));
            assert_eq!(state.best_step(&KeepBest::Loss(false)), None);
        }
    }

    #[test]
    fn the_best_pass_is_the_first_with_the_lowest_loss() {
        let mut state = RunState {
            best: None,
            ..state()
        };
        let mut note = |step, loss| {
            state.step = step;
            let is_best = state.note_validation(loss);
            (
                is_best,
                state.best.map(|best| best.step),
                state.passes_since_best,
            )
        };
        assert_eq!(note(1, f64::NAN), (false, None, 2));
        assert_eq!(note(2, 3.0), (true, Some(2), 0));
        assert_eq!(note(3, 3.0), (false, Some(2), 1));
        assert_eq!(note(4, f64::INFINITY), (false, Some(2), 2));
        assert_eq!(note(5, 2.5), (true, Some(5), 0));
    }

    #[test]
    fn moments_of_another_run_are_refused() {
        let folder = written();
        let checkpoint = folder.path().join("c");
        let check = |tensors: &[TensorSpec], expected: &str| {
            let error = read_optimizer(&checkpoint, tensors, |_, _| panic!("not called"));
            let error = error.unwrap_err().to_string();
            assert!(error.ends_with(expected), "{error}");
        };
        let a = || spec("a", DType::BF16, &[]);
        check(&[a(), spec("c", DType::F32, &[1])], "no tensor `c`");
        check(
            &[spec("a", DType::F32, &[])],
            "tensor `a`: expected dtype F32, found BF16",
        );
        check(
            &[spec("b.exp_avg", DType::F32, &[1, 2])],
            "tensor `b.exp_avg`: expected shape [1, 2], found [2, 1]",
        );
        check(
            &[a()],
            "expected 1 tensors, found 2, among them `b.exp_avg`, which this run does not train",
        );
    }

    #[test]
    fn a_malformed_state_or_a_failing_source_is_named() {
        let folder = written();
        let path = folder.path().join("c/state.json");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("\"step\"", "\"stop\"")).unwrap();
        let error = RunState::read(&folder.path().join("c"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("state.json`: unknown field `stop`"),
            "{error}"
        );
        let error = RunState::read(folder.path()).unwrap_err().to_string();
        assert!(error.starts_with("cannot read `"), "{error}");

        let mut writer = FolderWriter::create(&folder.path().join("d")).unwrap();
        let error = write_optimizer(&mut writer, &tensors(), |_| Ok(vec![0.0]));
        let error = error.unwrap_err().to_string();
        assert!(
            error.ends_with("tensor `b.exp_avg`: expected 8 bytes, found 4"),
            "{error}"
        );
    }
}
