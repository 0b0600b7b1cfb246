//! Reading a model's weights as they would be written in fewer bits.
//!
//! What a model computes then is what its merged and quantized export computes, without an export: for training an
//! adapter that survives the rounding, and for measuring what survives of one.

use std::collections::BTreeMap;

use kernels::Quantizer;

use crate::Error;
use crate::decoder::Model;
use crate::export::hf_fp8::is_lowered;
use crate::decoder::visit::Site;

impl Model {
    /// Reads frozen weights as `quantizer` writes them, low-rank updates folded in: those of the modules that are
    /// published in low precision and that `chosen` picks by their path, a layer's experts counted as one. `kv_b_proj` is
    /// rounded as the one matrix it is, though some GGUF files hold it in two. Returns how many matrices are in which
    /// format: one whose rows the blocks do not fill is in another than was asked for.
    ///
    /// # Errors
    /// If FP8 is asked for and the model's own blocks are not 128 × 128, or the model has DoRA updates.
    pub fn round_weights(
        &mut self,
        quantizer: Quantizer,
        chosen: &mut dyn FnMut(&str) -> bool,
    ) -> Result<BTreeMap<String, usize>, Error> {
        let quantizer = match quantizer {
            Quantizer::Fp8(_) if self.config.fp8_block != [128, 128] => {
                return Err(Error::Unsupported(format!(
                    "rounding to FP8 knows blocks of 128 × 128, and the model's are {:?}",
                    self.config.fp8_block
                )));
            }
            Quantizer::Fp8(_) => Quantizer::Fp8(self.config.fp8_scales),
            Quantizer::Gguf(_) => quantizer,
        };
        let (mut counts, mut has_dora) = (BTreeMap::new(), false);
        self.for_each_site(&mut |path, site| {
            let (place, matrices) = match site {
                Site::Linear(linear) if is_lowered(&format!("{path}.weight")) => {
                    let width = linear.weight.dims()[1];
                    has_dora |= linear.lora.as_ref().is_some_and(|lora| lora.dora.is_some());
                    (&mut linear.quantizer, vec![(width, 1)])
                }
                Site::Linear(_) => return,
                Site::Experts(experts) => {
                    let [n, inner, hidden] = experts.dims();
                    (&mut experts.quantizer, vec![(hidden, 2 * n), (inner, n)])
                }
            };
            if chosen(path) {
                *place = Some(quantizer);
                for (width, n) in matrices {
                    let format = quantizer.for_width(width).to_string();
                    *counts.entry(format).or_default() += n;
                }
            }
        });
        if has_dora {
            return Err(Error::Unsupported(
                "weights that carry a DoRA update are not read rounded; merge the adapter and look at the merged \
                 model"
                    .into(),
            ));
        }
        Ok(counts)
    }
}
