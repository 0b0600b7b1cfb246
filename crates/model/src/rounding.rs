//! Reading a model's weights as they would be written in fewer bits.
//!
//! What a model computes then is what its merged and quantized export computes, without an export: for training an
//! adapter that survives the rounding, and for measuring what survives of one.

use kernels::Quantizer;

use crate::decoder::Model;
use crate::export::block_fp8::is_lowered;
use crate::sites::Site;

impl Model {
    /// Reads frozen weights as `quantizer` writes them, low-rank updates folded in: those of the modules that are
    /// published in low precision and that `chosen` picks by their path, a layer's experts counted as one. Returns how
    /// many modules that are.
    pub fn round_weights(
        &mut self,
        quantizer: Quantizer,
        chosen: &mut dyn FnMut(&str) -> bool,
    ) -> usize {
        let quantizer = match quantizer {
            Quantizer::Fp8(_) => Quantizer::Fp8(self.config.fp8_scales),
            Quantizer::Gguf(_) => quantizer,
        };
        let mut count = 0;
        self.for_each_site(&mut |path, site| {
            let place = match site {
                Site::Linear(linear) if is_lowered(&format!("{path}.weight")) => {
                    &mut linear.quantizer
                }
                Site::Linear(_) => return,
                Site::Experts(experts) => &mut experts.quantizer,
            };
            if chosen(path) {
                *place = Some(quantizer);
                count += 1;
            }
        });
        count
    }
}
