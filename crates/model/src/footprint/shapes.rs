//! The modules of a model as memory sees them: widths, and what of them is trained.

use super::BYTES_OF_F32;
use crate::adapt::{AdapterWeights, LoraConfig};
use crate::config::{AttentionConfig, ModelConfig};
use crate::keys::{Module, PROJECTIONS, ParamKey, ParamPart, Projection};
use crate::load::Training;

/// What of a model is trained.
#[derive(Clone, Copy, Debug)]
pub enum Trained<'a> {
    /// Nothing.
    Nothing,
    /// Some or all of its own weights.
    Weights(&'a Training),
    /// Fresh low-rank updates.
    Fresh(&'a LoraConfig),
    /// The low-rank updates of an adapter.
    Stored(&'a AdapterWeights),
}

/// A linear layer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LinearShape {
    /// Width of its output.
    pub out: f64,
    /// Width of its input.
    pub width: f64,
    /// Whether its weight is trained.
    pub is_trained: bool,
    /// Whether its bias is.
    pub has_trained_bias: bool,
    /// Rank of its update; 0 for none.
    pub rank: f64,
    /// Whether the update has DoRA's part.
    pub has_dora: bool,
    /// Whether the update sees dropped inputs.
    pub drops: bool,
}

impl LinearShape {
    /// Whether its input is saved for the backward pass.
    pub(super) fn saves_input(&self) -> bool {
        self.is_trained || self.rank > 0.0
    }

    /// Parameters of its update.
    pub fn update(&self) -> f64 {
        let dora = if self.has_dora { self.out } else { 0.0 };
        self.rank * (self.out + self.width) + dora
    }

    /// Parameters of its own that are trained.
    pub fn trained(&self) -> f64 {
        let weight = if self.is_trained {
            self.out * self.width
        } else {
            0.0
        };
        let bias = if self.has_trained_bias { self.out } else { 0.0 };
        weight + bias
    }
}

/// The routed experts of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ExpertsAt {
    /// Number of experts.
    pub experts: f64,
    /// Experts of a token.
    pub top_k: f64,
    /// Width of the residual stream.
    pub hidden: f64,
    /// Inner width.
    pub inner: f64,
    /// Experts whose weights are trained.
    pub n_trained: f64,
    /// Parameters of their updates.
    pub update: f64,
}

impl ExpertsAt {
    /// Parameters of their own that are trained.
    pub fn trained(&self) -> f64 {
        3.0 * self.n_trained * self.hidden * self.inner
    }
}

/// The feed-forward part of a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedForwardShape {
    /// One MLP: gate, up, down.
    Dense([LinearShape; 3]),
    /// A mixture: router, experts, and the shared ones.
    Moe {
        /// The router.
        router: LinearShape,
        /// The routed experts.
        experts: ExpertsAt,
        /// The shared experts, fused.
        shared: Option<[LinearShape; 3]>,
    },
}

/// A decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerShape {
    /// The linear layers of attention.
    pub attention: Vec<(Module, LinearShape)>,
    /// The feed-forward part.
    pub mlp: FeedForwardShape,
    /// Parameters of its norms that are trained.
    pub norms: f64,
}

/// A model.
#[derive(Clone, Debug)]
pub struct ModelShape {
    /// Its config.
    pub config: ModelConfig,
    /// Its layers.
    pub layers: Vec<LayerShape>,
    /// The embedding: its output is the vocabulary.
    pub embedding: LinearShape,
    /// The output head, which may be the embedding.
    pub head: LinearShape,
    /// Parameters of the last norm that are trained.
    pub final_norm: f64,
}

impl ModelShape {
    /// The shape of a model of which something is trained.
    pub fn new(config: &ModelConfig, trained: Trained<'_>) -> Self {
        let of = ShapesOf { config, trained };
        let embedding = of.linear(None, Module::Embedding).unwrap_or_default();
        Self {
            config: config.clone(),
            layers: (0..config.num_hidden_layers)
                .map(|layer_idx| of.layer(layer_idx))
                .collect(),
            embedding,
            head: of.linear(None, Module::Head).unwrap_or(LinearShape {
                rank: 0.0,
                has_dora: false,
                ..embedding
            }),
            final_norm: of.norm(None, Module::FinalNorm),
        }
    }

    /// The shape of a rank that has a share of the experts.
    #[must_use]
    pub fn with_experts_shared(mut self, ranks: usize) -> Self {
        for layer in &mut self.layers {
            if let FeedForwardShape::Moe { experts, .. } = &mut layer.mlp {
                experts.n_trained /= ranks as f64;
                experts.update /= ranks as f64;
            }
        }
        self
    }

    /// Whether the head has a weight of its own.
    pub(super) fn has_own_head(&self) -> bool {
        !self.config.tie_word_embeddings
    }

    /// Bytes of the weights that are trained, in f32.
    pub fn trained(&self) -> f64 {
        let head = if self.has_own_head() {
            self.head.trained()
        } else {
            0.0
        };
        let layers: f64 = self.layers.iter().map(LayerShape::trained).sum();
        BYTES_OF_F32 * (self.embedding.trained() + head + self.final_norm + layers)
    }

    /// Bytes of low-rank updates.
    pub fn updates(&self) -> f64 {
        let layers: f64 = self.layers.iter().map(LayerShape::update).sum();
        let head = if self.has_own_head() {
            self.head.update()
        } else {
            0.0
        };
        BYTES_OF_F32 * (self.embedding.update() + head + layers)
    }

    /// The first layer with something to train; as many as there are if none has.
    pub fn first_trained_layer(&self) -> usize {
        if self.embedding.saves_input() {
            return 0;
        }
        let is_trained = |layer: &LayerShape| layer.trained() + layer.update() > 0.0;
        let first = self.layers.iter().position(is_trained);
        first.unwrap_or(self.layers.len())
    }
}

impl LayerShape {
    /// Its linear layers outside of experts.
    pub(super) fn linears(&self) -> impl Iterator<Item = &LinearShape> {
        let (router, mlp) = match &self.mlp {
            FeedForwardShape::Dense(mlp) => (None, Some(mlp)),
            FeedForwardShape::Moe { router, shared, .. } => (Some(router), shared.as_ref()),
        };
        let attention = self.attention.iter().map(|(_, linear)| linear);
        attention.chain(router).chain(mlp.into_iter().flatten())
    }

    fn experts(&self) -> Option<&ExpertsAt> {
        match &self.mlp {
            FeedForwardShape::Dense(_) => None,
            FeedForwardShape::Moe { experts, .. } => Some(experts),
        }
    }

    /// Parameters of its own that are trained.
    pub fn trained(&self) -> f64 {
        let linears: f64 = self.linears().map(LinearShape::trained).sum();
        linears + self.norms + self.experts().map_or(0.0, ExpertsAt::trained)
    }

    /// Parameters of its updates.
    pub fn update(&self) -> f64 {
        let linears: f64 = self.linears().map(LinearShape::update).sum();
        linears + self.experts().map_or(0.0, |experts| experts.update)
    }
}

/// Makes shapes.
struct ShapesOf<'a> {
    config: &'a ModelConfig,
    trained: Trained<'a>,
}

impl ShapesOf<'_> {
    fn layer(&self, layer_idx: usize) -> LayerShape {
        let modules: &[Module] = match &self.config.attention {
            AttentionConfig::Mla(_) => &[
                Module::Q,
                Module::QA,
                Module::QB,
                Module::KvA,
                Module::KvB,
                Module::O,
            ],
            AttentionConfig::Gqa(_) => &[Module::Q, Module::K, Module::V, Module::O],
        };
        let attention = modules.iter().filter_map(|module| {
            let linear = self.linear(Some(layer_idx), *module)?;
            Some((*module, linear))
        });
        let norms = [
            Module::InputNorm,
            Module::PostAttentionNorm,
            Module::QANorm,
            Module::KvANorm,
        ];
        let norms = norms.map(|module| self.norm(Some(layer_idx), module));
        LayerShape {
            attention: attention.collect(),
            mlp: self.mlp(layer_idx),
            norms: norms.iter().sum(),
        }
    }

    fn mlp(&self, layer_idx: usize) -> FeedForwardShape {
        let layer = Some(layer_idx);
        let linears = |of: fn(Projection) -> Module| {
            let [gate, up, down] = Projection::ALL.map(|p| self.linear(layer, of(p)));
            Some([gate?, up?, down?])
        };
        match linears(Module::Mlp) {
            Some(mlp) => FeedForwardShape::Dense(mlp),
            None => FeedForwardShape::Moe {
                router: self.linear(layer, Module::Router).unwrap_or_default(),
                experts: self.experts(layer_idx),
                shared: linears(Module::SharedExperts),
            },
        }
    }

    /// A module's linear layer; none if the model has none.
    fn linear(&self, layer: Option<usize>, module: Module) -> Option<LinearShape> {
        let key = ParamKey::weight(layer, module);
        let shape = key.shape(self.config)?;
        let bias = ParamKey {
            part: ParamPart::Bias,
            ..key
        };
        let has_bias = bias.shape(self.config).is_some();
        let mut linear = LinearShape {
            out: shape[0] as f64,
            width: shape[1] as f64,
            ..LinearShape::default()
        };
        let path = module.path(layer);
        match self.trained {
            Trained::Nothing => {}
            Trained::Weights(training) => {
                linear.is_trained = training.trains(&key.to_string());
                linear.has_trained_bias = has_bias && training.trains(&bias.to_string());
            }
            Trained::Fresh(config) if config.adapts(&path) => {
                linear.rank = config.rank_of(&path) as f64;
                linear.has_dora = config.use_dora;
                linear.drops = config.dropout > 0.0;
            }
            Trained::Fresh(_) => {}
            Trained::Stored(adapter) => {
                if let Some(update) = adapter.size_of(&path) {
                    linear.rank = update.rank as f64;
                    linear.has_dora = update.has_dora;
                    linear.drops = update.drops;
                }
            }
        }
        Some(linear)
    }

    /// Parameters of a norm that are trained.
    fn norm(&self, layer: Option<usize>, module: Module) -> f64 {
        let key = ParamKey::weight(layer, module);
        match (self.trained, key.shape(self.config)) {
            (Trained::Weights(training), Some(shape)) if training.trains(&key.to_string()) => {
                shape[0] as f64
            }
            _ => 0.0,
        }
    }

    fn experts(&self, layer_idx: usize) -> ExpertsAt {
        let Some(moe) = &self.config.moe else {
            return ExpertsAt::default();
        };
        let n = moe.n_routed_experts;
        let mut at = ExpertsAt {
            experts: n as f64,
            top_k: moe.choice.top_k as f64,
            hidden: self.config.hidden_size as f64,
            inner: moe.moe_intermediate_size as f64,
            ..ExpertsAt::default()
        };
        match self.trained {
            Trained::Nothing => {}
            Trained::Weights(training) => {
                let trains = |expert: &usize| {
                    Projection::ALL.iter().any(|projection| {
                        let module = Module::Expert(*expert, *projection);
                        training.trains(&ParamKey::weight(layer_idx, module).to_string())
                    })
                };
                at.n_trained = (0..n).filter(trains).count() as f64;
            }
            Trained::Fresh(config) => {
                let path = Module::Experts.path(Some(layer_idx));
                for projection in PROJECTIONS {
                    let adapted = config.adapted_experts(&path, projection, n).len();
                    at.update += config.factors(&format!("{path}.{projection}"), adapted, &at);
                }
            }
            Trained::Stored(adapter) => {
                let path = Module::Experts.path(Some(layer_idx));
                at.update = adapter.size_of_experts(&path) as f64;
            }
        }
        at
    }
}

impl LoraConfig {
    /// Parameters of the factors of `n` experts' projection, by its path.
    fn factors(&self, path: &str, n: usize, at: &ExpertsAt) -> f64 {
        if n == 0 {
            return 0.0;
        }
        let projection = path.rsplit('.').next().unwrap_or(path);
        let [width, out] = if projection == Projection::Down.name() {
            [at.inner, at.hidden]
        } else {
            [at.hidden, at.inner]
        };
        let shared = self.experts_share.map(|share| share.factors(projection));
        let [n_a, n_b] = shared
            .unwrap_or_default()
            .map(|is_shared| if is_shared { 1.0 } else { n as f64 });
        self.rank_of(path) as f64 * (n_a * width + n_b * out)
    }
}
