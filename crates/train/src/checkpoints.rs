//! How a session is saved into a checkpoint and restored from one.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Tensor;
use checkpoint::{DType, FolderWriter, TensorSpec};
use kernels::device::read;
use parallel::{Ask, MessageReader, MessageWriter};

use crate::checkpoint_state::{RunState, write_optimizer};
use crate::events::{Event, Host};
use crate::fit::ranks::{Ranks, values_of};
use crate::recipe::{MAX_LOSS_SCALE_EXPONENT, Method};
use crate::run_dir::RunDir;
use crate::session::Session;
use crate::{Error, Result, export};

impl Session {
    /// Continues from a run's latest checkpoint, if it has one; returns the checkpoint's step.
    ///
    /// # Errors
    /// If the checkpoint is malformed, or belongs to another recipe, other rows or another base, or if the recipe now ends
    /// before it.
    pub fn resume(&mut self, run: &RunDir) -> Result<Option<u64>> {
        let latest = self.ranks.world.first_does("latest checkpoint", || {
            let mut latest = MessageWriter::default();
            if let Some((step, _)) = run.latest()? {
                latest.count(step);
            }
            Ok::<_, Error>(latest.finish())
        })?;
        if latest.is_empty() {
            return Ok(None);
        }
        let step = MessageReader::new(&latest).count()?;
        self.load(&run.checkpoint_path(step))?;
        let total = self.total_steps();
        if total < step {
            return Err(Error::PastEnd {
                run: run.path().to_owned(),
                step,
                total,
            });
        }
        Ok(Some(step))
    }

    /// Restores a checkpoint of this recipe and of these rows. The first rank reads it.
    pub(crate) fn load(&mut self, folder: &Path) -> Result<()> {
        let state = (self.ranks.world).first_does("state", || self.expect_own(folder))?;
        self.restore(folder)?;
        self.state = RunState::of_json(&state, folder)?;
        Ok(())
    }

    /// A checkpoint's state, as JSON, if it is of this recipe and of these rows.
    fn expect_own(&self, folder: &Path) -> Result<Vec<u8>> {
        let state = RunState::read(folder)?;
        let changes = self.recipe.changes_from(&state.settings);
        let changes = changes.map_err(|cause| Error::Settings {
            path: folder.to_owned(),
            cause,
        })?;
        if !changes.is_empty() {
            return Err(Error::OtherSettings {
                path: folder.to_owned(),
                changes,
            });
        }
        if state.model_hash != self.state.model_hash {
            return Err(Error::OtherModel {
                path: folder.to_owned(),
                model: self.base.name.clone(),
            });
        }
        if state.data_hash != self.state.data_hash {
            return Err(Error::OtherData {
                path: folder.to_owned(),
            });
        }
        let fits = match state.loss_scale {
            Some(scale) => {
                self.state.loss_scale.is_some() && scale.exponent <= MAX_LOSS_SCALE_EXPONENT
            }
            None => self.state.loss_scale.is_none(),
        };
        if !fits {
            return Err(Error::LossScale {
                path: folder.to_owned(),
                max_exponent: MAX_LOSS_SCALE_EXPONENT,
            });
        }
        Ok(state.to_json())
    }

    /// Restores a checkpoint's tensors: the model's and the optimizer's. The first rank reads them, one by one.
    pub(crate) fn restore(&mut self, folder: &Path) -> Result<()> {
        let specs = self.state_tensors();
        let dtype = self.recipe.optimizer.moments().float();
        let (mut parameters, mut moments, mut biases) = (BTreeMap::new(), Vec::new(), Vec::new());
        let device = self.device();
        let ranks = self.ranks.clone();
        ranks.read_tensors(folder, &specs, |i, values| {
            let tensor = Tensor::<1>::from_floats(values.as_slice(), &device);
            match specs[i].name.split_once('/') {
                Some(("parameter", name)) => {
                    _ = parameters.insert(name.to_owned(), tensor);
                }
                Some((kind @ ("moment1" | "moment2"), name)) => {
                    if ranks.owns(name) {
                        moments.push((kind == "moment1", name.to_owned(), tensor.cast(dtype)));
                    }
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

    /// Saves a checkpoint, and removes those that are no longer needed. The first rank writes it, and asks the owners for one
    /// tensor after another.
    pub(crate) fn save(&self, run: &RunDir, host: &mut dyn Host) -> Result<()> {
        self.ranks.expect_replicas(&self.model)?;
        let (specs, state) = (self.state_tensors(), self.own_state());
        let adapter = match self.recipe.train.method {
            Method::Lora => Some(self.ranks.whole_model(&self.model, &self.device())?),
            Method::Full => None,
        };
        let answer = |i: u64| state.answer(specs[i as usize].name.as_ref(), &self.ranks);
        let write = |ask: &mut Ask<'_>| {
            let fill = |writer: &mut FolderWriter| {
                write_optimizer(writer, &specs, |i| {
                    let len = specs[i].shape.iter().product();
                    let own = state.values(specs[i].name.as_ref(), &self.ranks);
                    let whole = own.filter(|values| values.dims()[0] == len);
                    let values = match whole {
                        Some(values) => read(values.clone()),
                        None if self.ranks.world.is_alone() => Vec::new(),
                        None => values_of(&ask(i as u64)?)?,
                    };
                    // A parameter without a gradient has moments of zero.
                    Ok(if values.is_empty() {
                        vec![0.0; len]
                    } else {
                        values
                    })
                })?;
                if let Some(model) = &adapter {
                    export::adapter_into(self, model, writer)?;
                }
                self.state.write(writer)
            };
            if self.is_outdated(run)? {
                run.replace(self.state.step, fill)?;
            } else {
                run.save(self.state.step, fill)?;
            }
            run.prune(self.recipe.train.keep_last, &self.protected(run)?)?;
            Ok::<_, Error>(Vec::new())
        };
        self.ranks.world.first_asks("checkpoint", write, answer)?;
        host.see(&Event::Saved {
            step: self.state.step,
        });
        Ok(())
    }

    /// What this rank has of a checkpoint's tensors.
    fn own_state(&self) -> OwnState<'_> {
        let parameters = self.model.parameters().into_iter();
        let biases = self.model.correction_biases();
        OwnState {
            parameters: parameters.map(|p| (p.name, p.values)).collect(),
            moments: &self.optimizer.moments,
            biases: biases
                .map(|(layer_idx, bias)| (layer_idx.to_string(), bias.clone().inner()))
                .collect(),
        }
    }

    /// Whether the step's checkpoint is from before its validation pass, which is made now.
    fn is_outdated(&self, run: &RunDir) -> Result<bool> {
        let step = self.state.step;
        if self.state.validation_due || !run.steps()?.contains(&step) {
            return Ok(false);
        }
        Ok(RunState::read(&run.checkpoint_path(step))?.validation_due)
    }

    /// The checkpoints that stay whatever their age: the one that a spike goes back to, and the best ones of this step and
    /// of every step that a resumed run may start from.
    fn protected(&self, run: &RunDir) -> Result<Vec<u64>> {
        let train = &self.recipe.train;
        let mut protected: Vec<u64> = self.anchor().into_iter().collect();
        if train.keep_best.is_on() {
            let steps = run.steps()?;
            let newest = steps.iter().rev().take(train.keep_last);
            let starts: Vec<u64> = newest.chain(&protected).copied().collect();
            protected.extend(self.state.best_step(&train.keep_best));
            for step in starts {
                let state = RunState::read(&run.checkpoint_path(step))?;
                protected.extend(state.best_step(&train.keep_best));
            }
        }
        Ok(protected)
    }

    /// The regular checkpoint that the run would go back to after its current step: the last one before the spikes. None
    /// if the watchdog is off.
    pub(crate) fn anchor(&self) -> Option<u64> {
        let train = &self.recipe.train;
        let every = train.save_every.filter(|_| train.spike_factor > 0.0)?;
        let calm_steps = self.state.step.saturating_sub(self.state.watchdog.spikes);
        Some(calm_steps / every * every)
    }

    /// The tensors of a checkpoint: parameters, their moments, the routers' biases.
    fn state_tensors(&self) -> Vec<TensorSpec> {
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
                shape: vec![self.ranks.whole_len(&p.name, p.values.dims()[0])],
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
}

/// A rank's part of what a checkpoint has, by name. The result is gathered expert by expert instead (`SharedValues`).
struct OwnState<'a> {
    parameters: BTreeMap<String, Tensor<1>>,
    moments: &'a BTreeMap<String, [Tensor<1>; 2]>,
    biases: BTreeMap<String, Tensor<1>>,
}

impl OwnState<'_> {
    /// The values that this rank is asked for; none if they are another one's.
    fn values(&self, tensor: &str, ranks: &Ranks) -> Option<&Tensor<1>> {
        let (kind, name) = tensor.split_once('/').unwrap_or(("", tensor));
        match kind {
            "parameter" => self.parameters.get(name).filter(|_| ranks.owns(name)),
            "moment1" => self.moments.get(name).map(|pair| &pair[0]),
            "moment2" => self.moments.get(name).map(|pair| &pair[1]),
            _ => self.biases.get(name).filter(|_| ranks.world.is_first()),
        }
    }

    /// What this rank says if the first one asks for a tensor.
    fn answer(&self, tensor: &str, ranks: &Ranks) -> Vec<u8> {
        let mut message = MessageWriter::default();
        if let Some(values) = self.values(tensor, ranks) {
            message.values(&read(values.clone()));
        }
        message.finish()
    }
}
