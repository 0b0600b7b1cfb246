//! Gradients that come from outside of a graph.

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::TensorData;

/// Gradients that someone else supplies before a graph is differentiated.
#[derive(Clone, Debug, Default)]
pub struct SuppliedGradients(Arc<Mutex<Option<[TensorData; 2]>>>);

impl SuppliedGradients {
    /// Supplies the gradients of `x` and `weights` of [`crate::computed_elsewhere`].
    pub fn supply(&self, dx: TensorData, dweights: TensorData) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some([dx, dweights]);
    }

    pub(crate) fn take(&self) -> [TensorData; 2] {
        let mut gradients = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (gradients.take()).expect("supplied before the graph is differentiated")
    }
}
