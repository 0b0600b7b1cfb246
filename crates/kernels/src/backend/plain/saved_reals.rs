//! Activations saved for the backward pass: as they are, or recomputed.

use burn::backend::TensorMetadata;
use burn::backend::tensor::FloatTensor;

use crate::backend::gradients::Gradients;
use crate::backend::plain::check_compute;
use crate::backend::saved::{SavedActivation, SavedForm};
use crate::settings::Compute;

/// Saves `x` as it is.
pub(crate) fn save_for_backward<B: Gradients>(
    x: FloatTensor<B>,
    compute: Compute,
) -> SavedActivation<FloatTensor<B>> {
    check_compute(compute);
    let bytes = x.shape().num_elements() * size_of::<f32>();
    SavedActivation::new(SavedForm::Float(x), bytes)
}

/// The values of a saved activation.
pub(crate) fn saved_values<B: Gradients>(
    saved: &SavedActivation<FloatTensor<B>>,
) -> FloatTensor<B> {
    match saved.form() {
        SavedForm::Float(tensor) => tensor.clone(),
        SavedForm::Norm(x, weight, eps) => B::rms_norm(x.clone(), weight.clone(), *eps),
        SavedForm::Swiglu(products) => {
            let [gate, up] = products.each_ref().map(|saved| saved_values::<B>(saved));
            B::swiglu(gate, up, Compute::F32)
        }
        SavedForm::Fp8(_) => panic!("this backend saves activations in f32 alone"),
    }
}
