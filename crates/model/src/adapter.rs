//! PEFT adapters and our low-rank updates, one made from the other.
//!
//! Routed experts come in two dialects. *Classic*: one pair of factors per expert and projection, named like any other
//! linear layer. *Fused* (PEFT on transformers 5): two wrappers nested on `mlp.experts`, each with stacked factors: `A`
//! holds rows `expert · rank + j`, `B` holds columns `j · experts + expert`. The inner wrapper, `experts.base_layer.*`,
//! is `gate_up_proj` (gate's rows first, one `A` for both), the outer, `experts.*`, is `down_proj`; where only one of
//! the two is adapted it owns `experts.*`.
//!
//! The dialect is kept: what was read fused is trained and written fused, since gate and up share a factor there.
//!
//! Source: huggingface/peft: src/peft/tuners/lora/layer.py, `ParamWrapper`; checked against adapters it wrote.

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::tensor::{Device, Tensor};
use checkpoint::{Adapter, AdapterConfig, DType};

use crate::Error;
use crate::config::ModelConfig;
use crate::decoder::Model;
use crate::lora::{Adapted, Lora, Scaling, parameter};
use crate::moe::experts::{ExpertsLora, FactorStacks};
use crate::patterns::{Patterns, Settings, most_common};
use crate::sites::{PROJECTIONS, Site};

/// What PEFT puts before a module's path.
const PREFIX: &str = "base_model.model.";

/// The update of one weight `[out, in]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// `[rank, in]`, row-major.
    pub a: Vec<f32>,
    /// `[out, rank]`, row-major.
    pub b: Vec<f32>,
    /// Width of the bottleneck.
    pub rank: usize,
    /// Alpha, for the adapter's own config.
    pub alpha: f64,
    /// Multiplier of the update.
    pub scale: f32,
}

impl Pair {
    /// Input and output width.
    pub fn widths(&self) -> [usize; 2] {
        [self.a.len() / self.rank, self.b.len() / self.rank]
    }
}

/// An adapter, as updates of named modules.
#[derive(Clone, Debug)]
pub struct AdapterWeights {
    /// By module path; experts under their own numbers.
    linear: BTreeMap<String, Pair>,
    /// By path of `experts` and fused parameter: one pair per expert.
    fused: BTreeMap<(String, Fused), Vec<Pair>>,
    scaling: Scaling,
    dropout: f32,
    /// Where it was read from, for messages.
    source: PathBuf,
    /// Modules of the same last names that have no update: last names alone would choose them too.
    others: Vec<String>,
}

/// The fused parameters of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fused {
    GateUp,
    Down,
}

impl Fused {
    fn parameter(self) -> &'static str {
        match self {
            Self::GateUp => "mlp.experts.gate_up_proj",
            Self::Down => "mlp.experts.down_proj",
        }
    }
}

impl AdapterWeights {
    /// Reads an adapter for a model of some config.
    ///
    /// # Errors
    /// If a tensor is none of an adapter's, lacks its partner, or has a shape no update can have.
    pub fn read(adapter: &Adapter, config: &ModelConfig) -> Result<Self, Error> {
        let settings = &adapter.config;
        let scaling = if settings.use_rslora {
            Scaling::RsLora
        } else {
            Scaling::Plain
        };
        let source = adapter
            .tensors()
            .first()
            .map(|tensor| tensor.file.to_path_buf())
            .unwrap_or_default();
        let mut weights = Self {
            linear: BTreeMap::new(),
            fused: BTreeMap::new(),
            scaling,
            dropout: settings.lora_dropout as f32,
            source,
            others: vec![],
        };
        let patterns = Settings {
            alphas: Patterns::new(
                settings
                    .alpha_pattern
                    .iter()
                    .map(|(pattern, alpha)| (pattern, *alpha)),
            )?,
            ranks: Patterns::new(
                settings
                    .rank_pattern
                    .iter()
                    .map(|(pattern, rank)| (pattern, *rank)),
            )?,
            alpha: settings.lora_alpha,
            rank: settings.r,
        };
        for tensor in adapter.tensors() {
            weights.read_update(adapter, tensor, &patterns, config)?;
        }
        if weights.linear.is_empty() && weights.fused.is_empty() {
            return Err(weights.unfit("lora_A", "at least one update".into(), "none".into()));
        }
        Ok(weights)
    }

    /// How alphas become scales.
    pub fn scaling(&self) -> Scaling {
        self.scaling
    }

    /// The same updates with another dropout.
    ///
    /// # Errors
    /// If it is not 0 and experts are fused: PEFT allows no dropout there.
    pub fn with_dropout(self, dropout: f32) -> Result<Self, Error> {
        if dropout > 0.0 && !self.fused.is_empty() {
            let message = format!(
                "{}: fused experts allow no dropout; set lora.dropout to 0, found {dropout}",
                self.source.display()
            );
            return Err(Error::Unsupported(message));
        }
        Ok(Self { dropout, ..self })
    }

    /// Reads the update that starts with a `lora_A`.
    fn read_update(
        &mut self,
        adapter: &Adapter,
        a: &checkpoint::Tensor,
        settings: &Settings,
        config: &ModelConfig,
    ) -> Result<(), Error> {
        let key = a.name.strip_prefix(PREFIX);
        let Some(path) = key.and_then(|key| key.strip_suffix(".lora_A.weight")) else {
            return self.check_partner(adapter, a);
        };
        let b = adapter.tensor(&format!("{PREFIX}{path}.lora_B.weight"))?;
        let owner = path.strip_suffix(".base_layer").unwrap_or(path);
        if !owner.ends_with(".experts") {
            let pair = self.pair([a, &b], settings.alpha_of(path))?;
            self.check_rank(a, &pair, settings.rank_of(path))?;
            self.linear.insert(path.into(), pair);
            return Ok(());
        }
        let fused = self.fused_parameter(adapter, path, [a, &b], config)?;
        let name = fused_name(owner, fused);
        let pairs = self.split_fused([a, &b], settings.alpha_of(&name), (fused, config))?;
        // PEFT doubles the rank of gate_up_proj where it made it from gate_proj and up_proj.
        let doubled = fused == Fused::GateUp && pairs[0].rank == 2 * settings.rank_of(&name);
        if !doubled {
            self.check_rank(a, &pairs[0], settings.rank_of(&name))?;
        }
        self.fused.insert((owner.into(), fused), pairs);
        Ok(())
    }

    /// Everything that is no `lora_A` must be the `lora_B` of one.
    fn check_partner(&self, adapter: &Adapter, tensor: &checkpoint::Tensor) -> Result<(), Error> {
        let partner = tensor
            .name
            .strip_suffix(".lora_B.weight")
            .map(|path| format!("{path}.lora_A.weight"));
        match partner {
            Some(partner) if tensor.name.starts_with(PREFIX) => {
                adapter.tensor(&partner).map(|_| ()).map_err(Error::from)
            }
            _ => Err(self.wrong(
                tensor,
                "a name `base_model.model.<module>.lora_A.weight` or `….lora_B.weight`".into(),
                tensor.name.to_string(),
            )),
        }
    }

    fn wrong(&self, tensor: &checkpoint::Tensor, expected: String, found: String) -> Error {
        Error::Adapter {
            file: self.source.clone(),
            name: tensor.name.to_string(),
            expected,
            found,
        }
    }

    fn pair(&self, [a, b]: [&checkpoint::Tensor; 2], alpha: f64) -> Result<Pair, Error> {
        match (a.shape.as_slice(), b.shape.as_slice()) {
            (&[rank, _], &[_, b_rank]) if rank == b_rank && rank > 0 => Ok(Pair {
                a: a.to_f32()?,
                b: b.to_f32()?,
                rank,
                alpha,
                scale: self.scaling.scale(alpha, rank),
            }),
            (a_shape, b_shape) => Err(self.wrong(
                b,
                format!("[out, rank] to fit lora_A's {a_shape:?} = [rank, in]"),
                format!("{b_shape:?}"),
            )),
        }
    }

    /// The rank of a tensor must be the one its config gives it: another number of experts, or other patterns, would
    /// otherwise pass for another scale.
    fn check_rank(
        &self,
        tensor: &checkpoint::Tensor,
        pair: &Pair,
        expected: usize,
    ) -> Result<(), Error> {
        if pair.rank == expected {
            return Ok(());
        }
        Err(self.wrong(
            tensor,
            format!("rank {expected}, as adapter_config.json says"),
            format!("rank {}", pair.rank),
        ))
    }

    /// Which fused parameter a wrapper on `experts` stands for.
    fn fused_parameter(
        &self,
        adapter: &Adapter,
        path: &str,
        [a, _]: [&checkpoint::Tensor; 2],
        config: &ModelConfig,
    ) -> Result<Fused, Error> {
        if path.ends_with(".base_layer") {
            return Ok(Fused::GateUp);
        }
        if adapter.contains(&format!("{PREFIX}{path}.base_layer.lora_A.weight")) {
            return Ok(Fused::Down);
        }
        let targets = adapter
            .config
            .target_parameters
            .as_deref()
            .unwrap_or_default();
        let targeted = |fused: Fused| {
            targets.iter().any(|target| {
                target.ends_with(fused.parameter()) || fused.parameter().ends_with(target.as_str())
            })
        };
        let width = |width: usize| a.shape.get(1) == Some(&width);
        match (targeted(Fused::GateUp), targeted(Fused::Down)) {
            (true, false) => Ok(Fused::GateUp),
            (false, true) => Ok(Fused::Down),
            _ if width(config.hidden_size) => Ok(Fused::GateUp),
            _ if config
                .moe
                .as_ref()
                .is_some_and(|moe| width(moe.moe_intermediate_size)) =>
            {
                Ok(Fused::Down)
            }
            _ => Err(self.wrong(
                a,
                "target_parameters to say which experts' parameter this is".into(),
                format!("{targets:?}"),
            )),
        }
    }

    /// One pair per expert from stacked factors.
    fn split_fused(
        &self,
        [a, b]: [&checkpoint::Tensor; 2],
        alpha: f64,
        (fused, config): (Fused, &ModelConfig),
    ) -> Result<Vec<Pair>, Error> {
        let (experts, inner) = config.moe.as_ref().map_or((0, 0), |moe| {
            (moe.n_routed_experts, moe.moe_intermediate_size)
        });
        let (&[rows, _], &[out, cols]) = (&a.shape[..], &b.shape[..]) else {
            return Err(self.wrong(a, "two axes".into(), format!("{:?}", a.shape)));
        };
        if experts == 0 || rows != cols || rows == 0 || !rows.is_multiple_of(experts) {
            return Err(self.wrong(
                a,
                format!(
                    "a multiple of the model's {experts} experts as rows, and as lora_B's columns"
                ),
                format!("{rows} and {cols}"),
            ));
        }
        let expected = if fused == Fused::GateUp {
            2 * inner
        } else {
            config.hidden_size
        };
        if out != expected {
            return Err(self.wrong(b, format!("{expected} rows"), out.to_string()));
        }
        let (rank, a_values, b_values) = (rows / experts, a.to_f32()?, b.to_f32()?);
        let per_expert = a_values.len() / experts;
        let pair = |expert: usize| Pair {
            a: a_values[expert * per_expert..(expert + 1) * per_expert].to_vec(),
            b: (0..out * rank)
                .map(|i| b_values[i / rank * cols + i % rank * experts + expert])
                .collect(),
            rank,
            alpha,
            scale: self.scaling.scale(alpha, rank),
        };
        Ok((0..experts).map(pair).collect())
    }

    /// The update of one weight, by its module's path; experts by their number, whatever the dialect.
    pub fn update(&self, module: &str) -> Option<Pair> {
        if let Some(pair) = self.linear.get(module) {
            return Some(pair.clone());
        }
        let (rest, projection) = module.rsplit_once('.')?;
        let (owner, expert) = rest.rsplit_once('.')?;
        let fused = if projection == "down_proj" {
            Fused::Down
        } else {
            Fused::GateUp
        };
        let pair = self
            .fused
            .get(&(owner.into(), fused))?
            .get(expert.parse::<usize>().ok()?)?;
        let half = pair.b.len() / 2;
        let b = match projection {
            "gate_proj" => pair.b[..half].to_vec(),
            "up_proj" => pair.b[half..].to_vec(),
            "down_proj" => pair.b.clone(),
            _ => return None,
        };
        Some(Pair { b, ..pair.clone() })
    }

    /// The modules it updates, experts by their number.
    pub fn modules(&self) -> Vec<String> {
        let fused = self.fused.iter().flat_map(|((owner, fused), pairs)| {
            let projections: &[&str] = if *fused == Fused::Down {
                &PROJECTIONS[2..]
            } else {
                &PROJECTIONS[..2]
            };
            (0..pairs.len()).flat_map(move |expert| {
                projections
                    .iter()
                    .map(move |projection| format!("{owner}.{expert}.{projection}"))
            })
        });
        self.linear.keys().cloned().chain(fused).collect()
    }

    /// Puts the updates on a model; they may be trained from there on if the device tracks gradients.
    ///
    /// # Errors
    /// If a module is not the model's, or an update has other widths than its weight.
    pub fn attach(&self, model: &mut Model, device: &Device) -> Result<Vec<Adapted>, Error> {
        let mut rest: std::collections::BTreeSet<String> = self.modules().into_iter().collect();
        let (mut adapted, mut failure, mut site_number) = (Vec::new(), None, 0);
        model.for_each_site(&mut |path, site| {
            site_number += 1;
            let found = match site {
                Site::Linear(linear) => self
                    .linear_lora(path, linear.weight.dims(), site_number, device)
                    .map(|lora| {
                        linear.lora = lora;
                        rest.remove(path);
                        self.linear
                            .get(path)
                            .map(|pair| Adapted::new(path, pair, 1))
                            .into_iter()
                            .collect()
                    }),
                Site::Experts(experts) => self
                    .experts_lora(path, experts.dims(), site_number, device)
                    .map(|found| {
                        let (lora, adapted) =
                            found.map_or((None, vec![]), |(lora, adapted)| (Some(lora), adapted));
                        experts.lora = lora;
                        let n = experts.dims()[0];
                        (0..n)
                            .flat_map(|e| PROJECTIONS.map(|p| format!("{path}.{e}.{p}")))
                            .for_each(|module| _ = rest.remove(&module));
                        adapted
                    }),
            };
            match found {
                Ok(found) => adapted.extend(found),
                Err(error) => failure = failure.take().or(Some(error)),
            }
        });
        if let Some(error) = failure {
            return Err(error);
        }
        match rest.first() {
            None => Ok(adapted),
            Some(module) => Err(self.unfit(
                module,
                "a module of the model".into(),
                "an adapter for another model".into(),
            )),
        }
    }

    pub(crate) fn unfit(&self, module: &str, expected: String, found: String) -> Error {
        Error::Adapter {
            file: self.source.clone(),
            name: module.into(),
            expected,
            found,
        }
    }

    fn check_widths(
        &self,
        module: &str,
        pair: &Pair,
        [out, width]: [usize; 2],
    ) -> Result<(), Error> {
        if pair.widths() == [width, out] {
            return Ok(());
        }
        let [found_in, found_out] = pair.widths();
        Err(self.unfit(
            module,
            format!("an update of [{out}, {width}]"),
            format!("one of [{found_out}, {found_in}]"),
        ))
    }

    fn linear_lora(
        &self,
        path: &str,
        dims: [usize; 2],
        site: u64,
        device: &Device,
    ) -> Result<Option<Lora>, Error> {
        let Some(pair) = self.linear.get(path) else {
            return Ok(None);
        };
        self.check_widths(path, pair, dims)?;
        Ok(Some(Lora {
            lora_a: parameter(pair.a.clone(), [pair.rank, dims[1]], device),
            lora_b: parameter(pair.b.clone(), [dims[0], pair.rank], device),
            scale: pair.scale,
            dropout: self.dropout,
            site,
        }))
    }

    fn experts_lora(
        &self,
        path: &str,
        dims: [usize; 3],
        site: u64,
        device: &Device,
    ) -> Result<Option<(ExpertsLora, Vec<Adapted>)>, Error> {
        let [n_experts, inner, hidden] = dims;
        let mut adapted = Vec::new();
        let mut stacks = |name: &str, pairs: Option<Vec<&Pair>>, [out, width]: [usize; 2]| {
            let Some(pairs) = pairs else { return Ok(None) };
            let (first, module) = (pairs[0], format!("{path}.{name}"));
            for pair in &pairs {
                self.check_widths(&module, pair, [out, width])?;
                if (pair.rank, pair.scale) != (first.rank, first.scale) {
                    let shown =
                        |pair: &Pair| format!("rank {} and scale {}", pair.rank, pair.scale);
                    return Err(self.unfit(
                        &module,
                        format!("{} for all experts of a layer", shown(first)),
                        shown(pair),
                    ));
                }
            }
            adapted.push(Adapted::new(&module, first, n_experts));
            let gather = |of: fn(&Pair) -> &Vec<f32>| {
                pairs
                    .iter()
                    .flat_map(|pair| of(pair))
                    .copied()
                    .collect::<Vec<_>>()
            };
            Ok(Some(FactorStacks {
                lora_a: parameter(
                    gather(|pair| &pair.a),
                    [n_experts, first.rank, width],
                    device,
                ),
                lora_b: parameter(gather(|pair| &pair.b), [n_experts, out, first.rank], device),
                scale: first.scale,
            }))
        };
        let fused = |fused: Fused| {
            self.fused
                .get(&(path.into(), fused))
                .map(|pairs| pairs.iter().collect::<Vec<_>>())
        };
        let [gate, up, down] = PROJECTIONS;
        let lora = ExpertsLora {
            gate_proj: stacks(gate, self.classic(path, gate, n_experts)?, [inner, hidden])?,
            up_proj: stacks(up, self.classic(path, up, n_experts)?, [inner, hidden])?,
            gate_up_proj: stacks("gate_up_proj", fused(Fused::GateUp), [2 * inner, hidden])?,
            down_proj: match fused(Fused::Down) {
                Some(pairs) => stacks(down, Some(pairs), [hidden, inner])?,
                None => stacks(down, self.classic(path, down, n_experts)?, [hidden, inner])?,
            },
            dropout: self.dropout,
            site,
        };
        Ok((!adapted.is_empty()).then_some((lora, adapted)))
    }

    /// The pairs of all experts of a layer in the classic dialect: all, or none.
    fn classic(
        &self,
        path: &str,
        projection: &str,
        n_experts: usize,
    ) -> Result<Option<Vec<&Pair>>, Error> {
        let found: Vec<Option<&Pair>> = (0..n_experts)
            .map(|expert| self.linear.get(&format!("{path}.{expert}.{projection}")))
            .collect();
        match found.iter().position(Option::is_none) {
            None => Ok(Some(found.into_iter().flatten().collect())),
            Some(_) if found.iter().all(Option::is_none) => Ok(None),
            Some(missing) => {
                let some = format!("updates of all {n_experts} experts, or of none");
                Err(self.unfit(
                    &format!("{path}.{missing}.{projection}"),
                    some,
                    "nothing".into(),
                ))
            }
        }
    }

    /// The updates on a model, as an adapter.
    pub fn from_model(model: &Model, scaling: Scaling, dropout: f32) -> Self {
        let mut weights = Self {
            linear: BTreeMap::new(),
            fused: BTreeMap::new(),
            scaling,
            dropout,
            source: PathBuf::new(),
            others: vec![],
        };
        let mut plain = Vec::new();
        model.clone().for_each_site(&mut |path, site| match site {
            Site::Linear(linear) => {
                if linear.lora.is_none() {
                    plain.push(path.to_owned());
                }
                if let Some(lora) = &linear.lora {
                    let pair = weights.described(
                        flat(lora.lora_a.val()),
                        flat(lora.lora_b.val()),
                        lora.rank(),
                        lora.scale,
                    );
                    weights.linear.insert(path.into(), pair);
                }
            }
            Site::Experts(experts) => {
                let Some(lora) = &experts.lora else {
                    return plain
                        .extend(PROJECTIONS.map(|projection| format!("{path}.{projection}")));
                };
                weights.add_experts(path, lora);
            }
        });
        let chosen = |path: &String| {
            weights
                .linear
                .keys()
                .any(|adapted| last_name(adapted) == last_name(path))
        };
        weights.others = plain.into_iter().filter(chosen).collect();
        weights
    }

    /// Adds the updates of a layer's experts.
    fn add_experts(&mut self, path: &str, lora: &ExpertsLora) {
        let [gate, up, down] = PROJECTIONS;
        let is_fused = lora.gate_up_proj.is_some();
        for (name, stacks) in [
            (gate, &lora.gate_proj),
            (up, &lora.up_proj),
            ("gate_up_proj", &lora.gate_up_proj),
            (down, &lora.down_proj),
        ] {
            let Some(stacks) = stacks else { continue };
            let pairs = self.unstacked(stacks);
            if is_fused {
                let fused = if name == down {
                    Fused::Down
                } else {
                    Fused::GateUp
                };
                self.fused.insert((path.into(), fused), pairs);
            } else {
                let named = pairs
                    .into_iter()
                    .enumerate()
                    .map(|(expert, pair)| (format!("{path}.{expert}.{name}"), pair));
                self.linear.extend(named);
            }
        }
    }

    fn described(&self, a: Vec<f32>, b: Vec<f32>, rank: usize, scale: f32) -> Pair {
        let alpha = match self.scaling {
            Scaling::Plain => f64::from(scale) * rank as f64,
            Scaling::RsLora => f64::from(scale) * (rank as f64).sqrt(),
        };
        // Alphas people write have few digits; the f32 scale has seven.
        let digits = 10f64.powi(5 - alpha.abs().max(f64::MIN_POSITIVE).log10().floor() as i32);
        Pair {
            a,
            b,
            rank,
            alpha: (alpha * digits).round() / digits,
            scale,
        }
    }

    fn unstacked(&self, stacks: &FactorStacks) -> Vec<Pair> {
        let [n_experts, rank, _] = stacks.lora_a.val().dims();
        let (a, b) = (flat(stacks.lora_a.val()), flat(stacks.lora_b.val()));
        let parts = a
            .chunks(a.len() / n_experts)
            .zip(b.chunks(b.len() / n_experts));
        parts
            .map(|(a, b)| self.described(a.to_vec(), b.to_vec(), rank, stacks.scale))
            .collect()
    }

    /// The adapter's files: settings and tensors, f32.
    ///
    /// # Errors
    /// If a tensor cannot be described, which a well-formed update always can.
    pub fn files(&self, base: &str) -> Result<(AdapterConfig, Vec<checkpoint::Tensor>), Error> {
        let mut tensors = Vec::new();
        for (path, pair) in &self.linear {
            let [width, out] = pair.widths();
            tensors.push(tensor(
                &format!("{PREFIX}{path}.lora_A.weight"),
                [pair.rank, width],
                &pair.a,
            )?);
            tensors.push(tensor(
                &format!("{PREFIX}{path}.lora_B.weight"),
                [out, pair.rank],
                &pair.b,
            )?);
        }
        for ((owner, fused), pairs) in &self.fused {
            let inner =
                *fused == Fused::GateUp && self.fused.contains_key(&(owner.clone(), Fused::Down));
            let path = if inner {
                format!("{PREFIX}{owner}.base_layer")
            } else {
                format!("{PREFIX}{owner}")
            };
            let (experts, rank, [width, out]) = (pairs.len(), pairs[0].rank, pairs[0].widths());
            let a: Vec<f32> = pairs.iter().flat_map(|pair| &pair.a).copied().collect();
            let b: Vec<f32> = (0..out * rank * experts)
                .map(|i| {
                    let (row, col) = (i / (rank * experts), i % (rank * experts));
                    pairs[col % experts].b[row * rank + col / experts]
                })
                .collect();
            tensors.push(tensor(
                &format!("{path}.lora_A.weight"),
                [experts * rank, width],
                &a,
            )?);
            tensors.push(tensor(
                &format!("{path}.lora_B.weight"),
                [out, rank * experts],
                &b,
            )?);
        }
        Ok((self.config(base), tensors))
    }

    fn config(&self, base: &str) -> AdapterConfig {
        let named = self.linear.iter().map(|(path, pair)| (path.clone(), pair));
        let fused = self
            .fused
            .iter()
            .map(|((owner, fused), pairs)| (fused_name(owner, *fused), &pairs[0]));
        let all: Vec<(String, &Pair)> = named.chain(fused).collect();
        let rank = most_common(all.iter().map(|(_, pair)| pair.rank)).unwrap_or(1);
        let alpha = most_common(all.iter().map(|(_, pair)| pair.alpha.to_bits()))
            .map_or(1.0, f64::from_bits);
        let mut config = AdapterConfig::new(rank, alpha);
        config.base_model_name_or_path = Some(base.into());
        config.lora_dropout = f64::from(self.dropout);
        config.use_rslora = self.scaling == Scaling::RsLora;
        config.rank_pattern = all
            .iter()
            .filter(|(_, pair)| pair.rank != rank)
            .map(|(name, pair)| (regex::escape(name), pair.rank))
            .collect();
        config.alpha_pattern = all
            .iter()
            .filter(|(_, pair)| pair.alpha != alpha)
            .map(|(name, pair)| (regex::escape(name), pair.alpha))
            .collect();
        let mut names: Vec<String> = self
            .linear
            .keys()
            .map(|path| last_name(path).into())
            .collect();
        names.sort_unstable();
        names.dedup();
        if !self.others.is_empty() {
            names = self.linear.keys().cloned().collect();
        }
        config.target_modules = Some(checkpoint::TargetModules::List(names));
        let mut parameters: Vec<String> = self
            .fused
            .keys()
            .map(|(_, fused)| fused.parameter().into())
            .collect();
        parameters.sort_unstable();
        parameters.dedup();
        config.target_parameters = (!parameters.is_empty()).then_some(parameters);
        config
    }
}

impl Adapted {
    fn new(module: &str, pair: &Pair, copies: usize) -> Self {
        Self {
            module: module.into(),
            rank: pair.rank,
            alpha: pair.alpha,
            parameters: copies * (pair.a.len() + pair.b.len()),
        }
    }
}

fn last_name(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// The path of a fused parameter: `….mlp.experts.gate_up_proj`.
fn fused_name(owner: &str, fused: Fused) -> String {
    format!(
        "{}.{}",
        owner.strip_suffix(".mlp.experts").unwrap_or(owner),
        fused.parameter()
    )
}

fn flat<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("factors are f32")
}

fn tensor(name: &str, shape: [usize; 2], values: &[f32]) -> Result<checkpoint::Tensor, Error> {
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    Ok(checkpoint::Tensor::new(
        name,
        DType::F32,
        &shape,
        bytes.into(),
    )?)
}
