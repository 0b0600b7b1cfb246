//! The operations as burn sees them: their public functions, their gradients and their CPU implementation.
//!
//! [`traits`] has the signatures. Each family is a folder with the public functions (`mod.rs`), what autodiff saves
//! and registers (`autodiff.rs`, if there is a gradient) and the CPU implementation (`flex.rs`). `autodiff` and `flex`
//! implement the traits by handing each operation to its family. [`plain`] defines each operation in burn's own: the
//! default bodies of the traits, which a GPU (`cube`) has wherever it has no kernel.

pub(crate) mod attention;
mod autodiff;
#[cfg(feature = "gpu")]
pub(crate) mod cube;
pub(crate) mod elementwise;
pub(crate) mod experts;
pub(crate) mod factors;
mod flex;
pub(crate) mod gradients;
pub(crate) mod linear;
pub(crate) mod loss;
pub(crate) mod optimizer;
pub(crate) mod plain;
pub(crate) mod saved;
pub(crate) mod supplied;
pub(crate) mod traits;

/// Whether a device is a GPU, or a software adapter in place of one.
pub fn is_gpu(device: &burn::tensor::Device) -> bool {
    #[cfg(feature = "gpu")]
    return crate::formats::placed::cube_device(device).is_some();
    #[cfg(not(feature = "gpu"))]
    return {
        let _ = device;
        false
    };
}
