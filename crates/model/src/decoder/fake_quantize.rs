//! Fake quantization: reading a model's weights as they would be written in fewer bits.
//!
//! The model then computes what its merged and quantized export would compute, without an export: to train an adapter that
//! survives the rounding, and to measure how much of one survives.

use std::collections::BTreeMap;

use kernels::Quantizer;

use super::Model;
use super::visit::ModuleMut;
use crate::Error;
use crate::precision::is_lowered;

impl Model {
    /// Reads frozen weights, low-rank updates merged, as `quantizer` would write them. This is for the modules that are
    /// published in low precision and that `chosen` picks by their paths, a layer's experts counted as one. `kv_b_proj` is
    /// rounded as one matrix, although some GGUF files store it in two. Returns the number of matrices by format: a matrix
    /// whose rows are not whole blocks has another format than the quantizer's.
    ///
    /// # Errors
    /// If the quantizer is FP8 and the model's own blocks are not 128 × 128, or the model has DoRA updates.
    pub fn fake_quantize(
        &mut self,
        quantizer: Quantizer,
        chosen: &mut dyn FnMut(&str) -> bool,
    ) -> Result<BTreeMap<String, usize>, Error> {
        let quantizer = match quantizer {
            Quantizer::Fp8(_) if self.config.fp8_block != [128, 128] => {
                return Err(Error::Unsupported(format!(
                    "fake quantization to FP8 needs blocks of 128 × 128, and the model's are {:?}",
                    self.config.fp8_block
                )));
            }
            Quantizer::Fp8(_) => Quantizer::Fp8(self.config.fp8_scales),
            Quantizer::Gguf(_) => quantizer,
        };
        let (mut counts, mut has_dora) = (BTreeMap::new(), false);
        for (path, module) in self.modules_mut() {
            let (place, matrices) = match module {
                ModuleMut::Linear(linear) if is_lowered(&format!("{path}.weight")) => {
                    let width = linear.weight.dims()[1];
                    has_dora |= linear.lora.as_ref().is_some_and(|lora| lora.dora.is_some());
                    (&mut linear.quantizer, vec![(width, 1)])
                }
                ModuleMut::Linear(_) => continue,
                ModuleMut::Experts(experts) => {
                    let [n, inner, hidden] = experts.dims();
                    (&mut experts.quantizer, vec![(hidden, 2 * n), (inner, n)])
                }
            };
            if chosen(&path) {
                *place = Some(quantizer);
                for (width, n) in matrices {
                    let format = quantizer.for_width(width).to_string();
                    *counts.entry(format).or_default() += n;
                }
            }
        }
        if has_dora {
            return Err(Error::Unsupported(
                "weights with a DoRA update cannot be fake-quantized; merge the adapter and use the merged model"
                    .into(),
            ));
        }
        Ok(counts)
    }
}
