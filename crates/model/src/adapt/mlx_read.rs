//! From mlx-lm's tensors to updates.
//!
//! A linear layer has `lora_a [in, rank]` and `lora_b [rank, out]`, the transposes of PEFT's, and with DoRA `m [out]`. The
//! experts of a layer are `switch_mlp`, with `lora_a [experts, rank, in]` and `lora_b [experts, out, rank]`.
//!
//! Source: ml-explore/mlx-lm: mlx_lm/tuner/lora.py and dora.py; checked against adapters it wrote.

use checkpoint::{Adapter, Tensor};

use super::peft_whole::transposed;
use super::weights::{AdapterWeights, WeightUpdate};
use crate::Error;
use crate::config::ModelConfig;

const A: &str = ".lora_a";
const B: &str = ".lora_b";
const MLX_MAGNITUDE: &str = ".m";
const SWITCH_EXPERTS: &str = ".switch_mlp.";

impl AdapterWeights {
    /// Reads all updates of an adapter that mlx-lm wrote.
    pub(super) fn read_mlx(
        &mut self,
        adapter: &Adapter,
        config: &ModelConfig,
    ) -> Result<(), Error> {
        for tensor in adapter.tensors() {
            let suffixes = [A, B, MLX_MAGNITUDE];
            let parts = suffixes
                .iter()
                .find_map(|s| Some((tensor.name.strip_suffix(s)?, *s)));
            let Some((path, suffix)) = parts else {
                return Err(self.wrong(
                    tensor,
                    "a name `<module>.lora_a`, `<module>.lora_b` or, with DoRA, `<module>.m`"
                        .into(),
                    tensor.name.to_string(),
                ));
            };
            if suffix != A {
                // Without a first factor it is no update.
                adapter.tensor(&format!("{path}{A}"))?;
                continue;
            }
            let b = adapter.tensor(&format!("{path}{B}"))?;
            match path.split_once(SWITCH_EXPERTS) {
                Some((layer, projection)) => {
                    let owner = format!("{layer}.experts");
                    self.read_mlx_experts(adapter, [tensor, &b], &owner, projection, config)?;
                }
                None => self.read_mlx_linear(adapter, [tensor, &b], path)?,
            }
        }
        Ok(())
    }

    fn read_mlx_linear(
        &mut self,
        adapter: &Adapter,
        [a, b]: [&Tensor; 2],
        path: &str,
    ) -> Result<(), Error> {
        let rank = adapter.config.r;
        let (&[width, a_rank], &[b_rank, out]) = (&a.shape[..], &b.shape[..]) else {
            return Err(self.wrong(a, "two axes".into(), format!("{:?}", a.shape)));
        };
        if [a_rank, b_rank] != [rank; 2] {
            let expected = format!("rank {rank}, as adapter_config.json says");
            return Err(self.wrong(a, expected, format!("ranks {a_rank} and {b_rank}")));
        }
        let magnitude = if adapter.config.use_dora {
            let tensor = adapter.tensor(&format!("{path}{MLX_MAGNITUDE}"))?;
            tensor.expect_shape(&[out])?;
            Some(self.values(&tensor)?)
        } else {
            None
        };
        let (a, b) = (self.values(a)?, self.values(b)?);
        let pair = self.mlx_pair(adapter, transposed(&a, width), transposed(&b, rank));
        self.linear
            .insert(path.into(), WeightUpdate { magnitude, ..pair });
        Ok(())
    }

    fn read_mlx_experts(
        &mut self,
        adapter: &Adapter,
        [a, b]: [&Tensor; 2],
        owner: &str,
        projection: &str,
        config: &ModelConfig,
    ) -> Result<(), Error> {
        let experts = config.moe.as_ref().map_or(0, |moe| moe.n_routed_experts);
        let rank = adapter.config.r;
        let (&[n, a_rank, _], &[b_n, _, b_rank]) = (&a.shape[..], &b.shape[..]) else {
            return Err(self.wrong(a, "three axes".into(), format!("{:?}", a.shape)));
        };
        if experts == 0 || [n, b_n] != [experts; 2] || [a_rank, b_rank] != [rank; 2] {
            let expected = format!("{experts} experts and rank {rank}");
            let found = format!("{n} and {b_n} experts, ranks {a_rank} and {b_rank}");
            return Err(self.wrong(a, expected, found));
        }
        let (a, b) = (self.values(a)?, self.values(b)?);
        for expert in 0..experts {
            let part = |values: &[f32]| {
                let size = values.len() / experts;
                values[expert * size..(expert + 1) * size].to_vec()
            };
            let pair = self.mlx_pair(adapter, part(&a), part(&b));
            self.linear
                .insert(format!("{owner}.{expert}.{projection}"), pair);
        }
        Ok(())
    }

    fn mlx_pair(&self, adapter: &Adapter, a: Vec<f32>, b: Vec<f32>) -> WeightUpdate {
        let (rank, alpha) = (adapter.config.r, adapter.config.lora_alpha);
        WeightUpdate {
            a,
            b,
            rank,
            alpha,
            scale: self.scaling.scale(alpha, rank),
            magnitude: None,
        }
    }
}
