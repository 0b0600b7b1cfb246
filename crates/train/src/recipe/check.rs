//! Which values a recipe may have.

use std::fmt::Display;
use std::path::Path;

use data::Columns;

use crate::Recipe;
use crate::recipe::{MAX_LOSS_SCALE_EXPONENT, RouterTraining};

/// A refused setting. The reader of the file knows its place.
#[derive(Debug)]
pub(crate) struct Problem {
    /// `section.key`.
    pub(crate) key: String,
    /// The accepted values.
    pub(crate) expected: String,
    /// The value.
    pub(crate) found: String,
}

type Result<T = (), E = Problem> = std::result::Result<T, E>;

impl Recipe {
    /// Checks every range, and the settings that exclude each other.
    pub(crate) fn check(&self) -> Result {
        self.check_choices()?;
        self.check_paths()?;
        self.check_counts()?;
        self.check_numbers()?;
        self.check_precision()?;
        self.check_watching()?;
        self.check_method()?;
        self.check_patterns()
    }

    fn check_precision(&self) -> Result {
        let precision = &self.precision;
        let scale = precision.loss_scale;
        let exponent = scale.log2();
        let largest = f64::from(MAX_LOSS_SCALE_EXPONENT);
        let holds = (0.0..=largest).contains(&exponent) && exponent.fract() == 0.0;
        let expected = format!("a power of two from 1 to 2^{MAX_LOSS_SCALE_EXPONENT}");
        require(holds, "precision.loss_scale", &expected, shown(scale))?;
        let interval = precision.loss_scale_growth_interval;
        let expected = "a whole number of at least 1";
        let key = "precision.loss_scale_growth_interval";
        require(interval >= 1, key, expected, interval)?;
        if self.lora.quantizer.is_some() {
            let is_lora = self.train.method == crate::Method::Lora;
            let expected = "`lora`, because `lora.quantizer` is given";
            require(is_lora, "train.method", expected, "`full`")?;
            let dropout = self.lora.dropout;
            let expected = "0, because `lora.quantizer` makes the adapter part of the weights";
            require(dropout == 0.0, "lora.dropout", expected, shown(dropout))?;
        }
        Ok(())
    }

    /// Settings of the watchdog, of validation and of samples.
    fn check_watching(&self) -> Result {
        let (train, eval) = (&self.train, &self.eval);
        let factor = train.spike_factor;
        let expected = "0, or a finite number above 1";
        let holds = factor == 0.0 || factor > 1.0 && factor.is_finite();
        require(holds, "train.spike_factor", expected, shown(factor))?;
        let can_go_back = factor == 0.0 || train.save_every.is_some();
        let expected = "a number, because `train.spike_factor` is given";
        require(can_go_back, "train.save_every", expected, "none")?;
        let is_measured = eval.patience.is_none() || train.eval_every.is_some();
        let expected = "a number, because `eval.patience` is given";
        require(is_measured, "train.eval_every", expected, "none")?;
        let has_prompts = eval.generate_every.is_none() || !eval.prompts.is_empty();
        let expected = "at least one, because `eval.generate_every` is given";
        require(has_prompts, "eval.prompts", expected, "none")?;
        for prompt in &eval.prompts {
            require(!prompt.is_empty(), "eval.prompts", "no empty prompt", "one")?;
        }
        let has_tasks = !eval.tasks.is_empty();
        for (key, needs_tasks) in [
            ("eval.tasks_every", eval.tasks_every.is_some()),
            ("eval.tasks_max_samples", eval.tasks_max_samples.is_some()),
            ("eval.gates", !eval.gates.is_empty()),
            ("train.keep_best", train.keep_best.score().is_some()),
        ] {
            let expected = format!("at least one, because `{key}` is given");
            require(has_tasks || !needs_tasks, "eval.tasks", &expected, "none")?;
        }
        let is_asked = train.keep_best.score().is_none() || eval.tasks_every.is_some();
        let expected = "a number, because `train.keep_best` names a task";
        require(is_asked, "eval.tasks_every", expected, "none")?;
        Ok(())
    }

    /// Learning from preferences, and the settings that it excludes.
    fn check_dpo(&self) -> Result {
        let dpo = &self.dpo;
        check_positive("dpo.beta", dpo.beta)?;
        let holds = (0.0..0.5).contains(&dpo.label_smoothing);
        let expected = "a number of at least 0 and below 0.5";
        require(
            holds,
            "dpo.label_smoothing",
            expected,
            shown(dpo.label_smoothing),
        )?;
        if self.train.loss != crate::Loss::Dpo {
            return Ok(());
        }
        let expected =
            "`cross-entropy`, because `model.config` makes fresh weights, which prefer nothing yet";
        let is_fresh = self.model.config.is_some();
        require(!is_fresh, "train.loss", expected, "`dpo`")?;
        let expected = "false, because `train.loss` is `dpo`, which compares whole answers";
        require(!self.data.packing, "data.packing", expected, "true")?;
        let key = "data.group_by_length";
        require(!self.data.group_by_length, key, expected, "true")
    }

    /// The trained parts, and the settings that they exclude.
    fn check_method(&self) -> Result {
        let (train, lora) = (&self.train, &self.lora);
        let is_full = train.method == crate::Method::Full;
        if lora.use_dora {
            let expected = "false, because `lora.quantizer` is given";
            require(lora.quantizer.is_none(), "lora.use_dora", expected, true)?;
        }
        let has_patterns = !train.unfrozen_parameters.is_empty();
        let key = "train.unfrozen_parameters";
        let expected = "none with `train.method = \"lora\"`, because an adapter holds no weights";
        require(is_full || !has_patterns, key, expected, "some")?;
        let is_router_frozen = matches!(
            train.router,
            Some(RouterTraining::Frozen | RouterTraining::BiasOnly)
        );
        let is_partial = has_patterns || (is_full && is_router_frozen);
        if is_partial && self.model.config.is_some() {
            let key = if has_patterns { key } else { "train.router" };
            let expected = "nothing left out, because `model.config` makes fresh weights";
            return Err(problem(key, expected, "a part that is not trained"));
        }
        let is_as_base = train.export_dtype == crate::ExportDType::Base;
        let expected = "`base`, because some tensors stay as they are; convert the result with `moeforge quantize`";
        let key = "train.export_dtype";
        require(!is_partial || is_as_base, key, expected, "another")?;
        self.check_dpo()?;
        let speed = train.bias_update_speed;
        let key = "train.bias_update_speed";
        match train.router {
            Some(RouterTraining::BiasOnly) if !is_full => {
                let expected = "`frozen` or `trainable` with `train.method = \"lora\"`, because an adapter holds no bias";
                Err(problem("train.router", expected, "`bias-only`"))
            }
            Some(RouterTraining::BiasOnly) => {
                let expected =
                    "a number above 0, such as 1e-3, because `train.router` is `bias-only`";
                require(speed > 0.0, key, expected, speed)
            }
            Some(RouterTraining::Frozen) => {
                let expected = "0, because `train.router` is `frozen`";
                require(speed == 0.0, key, expected, speed)
            }
            _ => Ok(()),
        }
    }

    fn check_choices(&self) -> Result {
        let either = "either `path` or `config`";
        match (&self.model.path, &self.model.config) {
            (None, None) => return Err(problem("model", either, "neither")),
            (Some(_), Some(_)) => return Err(problem("model", either, "both")),
            _ => {}
        }
        if self.train.steps.is_some() && self.train.epochs.is_some() {
            return Err(problem("train", "either `steps` or `epochs`", "both"));
        }
        if self.model.adapter.is_some() && self.train.method == crate::Method::Full {
            let expected = "`lora`, because `model.adapter` is given";
            return Err(problem("train.method", expected, "`full`"));
        }
        if self.train.method == crate::Method::Lora {
            // An adapter cannot hold fresh weights or a router's bias: they would be trained and then lost.
            let expected = "`full`, because `model.config` makes fresh weights";
            if self.model.config.is_some() {
                return Err(problem("train.method", expected, "`lora`"));
            }
            let speed = self.train.bias_update_speed;
            let expected = "0 with `train.method = \"lora\"`, because an adapter holds no bias";
            require(speed == 0.0, "train.bias_update_speed", expected, speed)?;
        }
        let warmup_steps = self.schedule.warmup_steps;
        if let Some(steps) = self.train.steps {
            let expected = format!("at most `train.steps`, which is {steps}");
            let key = "schedule.warmup_steps";
            require(warmup_steps <= steps, key, &expected, warmup_steps)?;
        }
        Ok(())
    }

    fn check_paths(&self) -> Result {
        if self.data.path.is_empty() {
            return Err(problem("data.path", "at least one folder", "none"));
        }
        self.check_data()?;
        let model = &self.model;
        let mut paths = vec![
            ("model.path", model.path.as_deref().map(Path::new)),
            ("model.config", model.config.as_deref()),
            ("model.tokenizer", model.tokenizer.as_deref()),
            ("model.adapter", model.adapter.as_deref()),
        ];
        let data = self.data.path.iter();
        paths.extend(data.map(|path| ("data.path", Some(path.as_path()))));
        for (key, path) in paths {
            let is_named = path.is_none_or(|path| !path.as_os_str().is_empty());
            require(is_named, key, "no empty path", "one")?;
        }
        Ok(())
    }

    fn check_data(&self) -> Result {
        let data = &self.data;
        if let Some(weights) = &data.weights {
            let n_folders = data.path.len();
            let expected = format!("{n_folders} numbers, one for each folder of `data.path`");
            let found = format!("{} of them", weights.len());
            require(weights.len() == n_folders, "data.weights", &expected, found)?;
            let valid = weights
                .iter()
                .all(|weight| weight.is_finite() && *weight >= 0.0);
            let expected = "finite numbers of at least 0, not all 0";
            let holds = valid && weights.iter().any(|weight| *weight > 0.0);
            require(holds, "data.weights", expected, "others")?;
        }
        for (key, column) in data.columns.iter() {
            let named = Columns::new([(key.to_owned(), column.clone())]);
            if let Err(data::Error::Schema { expected, found }) = named {
                return Err(problem(&format!("data.columns.{key}"), &expected, &found));
            }
        }
        if data.group_by_length {
            let expected = "false, because `data.packing` leaves no padding";
            require(!data.packing, "data.group_by_length", expected, "true")?;
            let expected = "false, because `train.shuffle = false` keeps the order of the files";
            require(self.train.shuffle, "data.group_by_length", expected, "true")?;
        }
        Ok(())
    }

    fn check_counts(&self) -> Result {
        // A row of one token has nothing to predict.
        let max_length = self.data.max_length;
        require(
            max_length >= 2,
            "data.max_length",
            "a whole number of at least 2",
            max_length,
        )?;
        let train = &self.train;
        let positive = [
            ("lora.rank", Some(self.lora.rank as u64)),
            ("train.steps", train.steps),
            ("train.batch_size", Some(train.batch_size as u64)),
            ("train.accumulate", Some(train.accumulate as u64)),
            ("train.log_every", Some(train.log_every)),
            ("train.eval_every", train.eval_every),
            ("train.save_every", train.save_every),
            ("train.keep_last", Some(train.keep_last as u64)),
            ("eval.batch_size", Some(self.eval.batch_size as u64)),
            ("eval.max_batches", self.eval.max_batches),
            ("eval.tasks_every", self.eval.tasks_every),
            ("eval.tasks_max_samples", self.eval.tasks_max_samples),
            ("eval.patience", self.eval.patience),
            ("eval.generate_every", self.eval.generate_every),
            ("eval.max_new_tokens", Some(self.eval.max_new_tokens as u64)),
            ("train.spike_steps", Some(train.spike_steps)),
        ];
        for (key, count) in positive {
            let is_positive = count.is_none_or(|count| count >= 1);
            require(
                is_positive,
                key,
                "a whole number of at least 1",
                count.unwrap_or(0),
            )?;
        }
        Ok(())
    }

    fn check_numbers(&self) -> Result {
        let (optimizer, train) = (&self.optimizer, &self.train);
        let positive = [
            ("lora.alpha", self.lora.alpha),
            ("lora.loraplus_lr_ratio", self.lora.loraplus_lr_ratio),
            ("optimizer.learning_rate", optimizer.learning_rate),
            ("optimizer.eps", optimizer.eps),
            ("train.epochs", train.epochs.unwrap_or(1.0)),
        ];
        for (key, number) in positive {
            check_positive(key, number)?;
        }
        let not_negative = [
            ("optimizer.weight_decay", optimizer.weight_decay),
            ("optimizer.clip", optimizer.clip),
            ("train.balance_loss", train.balance_loss),
            ("train.bias_update_speed", train.bias_update_speed),
        ];
        for (key, number) in not_negative {
            let holds = number.is_finite() && number >= 0.0;
            require(holds, key, "a finite number of at least 0", shown(number))?;
        }
        let [beta_1, beta_2] = optimizer.betas;
        let below_one = [
            ("lora.dropout", self.lora.dropout),
            ("optimizer.betas", beta_1),
            ("optimizer.betas", beta_2),
        ];
        for (key, number) in below_one {
            let holds = (0.0..1.0).contains(&number);
            require(
                holds,
                key,
                "a number of at least 0 and below 1",
                shown(number),
            )?;
        }
        let ratio = self.schedule.final_ratio;
        let holds = (0.0..=1.0).contains(&ratio);
        require(
            holds,
            "schedule.final_ratio",
            "a number from 0 to 1",
            shown(ratio),
        )
    }

    fn check_patterns(&self) -> Result {
        let lora = &self.lora;
        if lora.target.is_empty() {
            return Err(problem("lora.target", "at least one pattern", "none"));
        }
        let targets = lora.target.iter().map(|text| ("lora.target", text));
        let excludes = lora.exclude.iter().map(|text| ("lora.exclude", text));
        let unfrozen = self.train.unfrozen_parameters.iter();
        let unfrozen = unfrozen.map(|text| ("train.unfrozen_parameters", text));
        let spared = self.optimizer.no_decay.iter();
        let spared = spared.map(|text| ("optimizer.no_decay", text));
        for (key, text) in targets.chain(excludes).chain(unfrozen).chain(spared) {
            require(!text.is_empty(), key, "no empty pattern", "one")?;
        }
        for (pattern, &rank) in lora.rank_pattern.iter() {
            let key = format!("lora.rank_pattern.{pattern}");
            require(rank >= 1, &key, "a whole number of at least 1", rank)?;
        }
        for (pattern, &alpha) in lora.alpha_pattern.iter() {
            check_positive(&format!("lora.alpha_pattern.{pattern}"), alpha)?;
        }
        Ok(())
    }
}

fn check_positive(key: &str, number: f64) -> Result {
    let holds = number.is_finite() && number > 0.0;
    require(holds, key, "a finite number above 0", shown(number))
}

fn require(holds: bool, key: &str, expected: &str, found: impl Display) -> Result {
    if holds {
        return Ok(());
    }
    Err(problem(key, expected, &found.to_string()))
}

fn problem(key: &str, expected: &str, found: &str) -> Problem {
    Problem {
        key: key.to_owned(),
        expected: expected.to_owned(),
        found: found.to_owned(),
    }
}

/// A number as TOML has it: `1e-8`, not eight zeros.
fn shown(number: f64) -> String {
    format!("{number:?}")
}
