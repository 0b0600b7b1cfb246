//! Forward passes over a batch.

use burn::tensor::{Device, Int, Tensor, TensorData};
use data::Batch;
use model::{ForwardContext, Model};

use crate::dataset::segments;

/// The loss of every position of a batch, `[rows · cols]`.
pub(super) fn losses(
    model: &Model,
    batch: &Batch,
    ctx: &mut ForwardContext<'_>,
    device: &Device,
) -> Tensor<1> {
    let hidden = hidden(model, batch, ctx, device);
    model.loss(hidden, ids(&batch.targets, batch, device), ctx)
}

/// The input of the head at every position of a batch, `[rows, cols, hidden_size]`. No sample of a packed row sees another.
pub(super) fn hidden(
    model: &Model,
    batch: &Batch,
    ctx: &mut ForwardContext<'_>,
    device: &Device,
) -> Tensor<3> {
    ctx.segments = segments(batch);
    model.hidden(ids(&batch.input_ids, batch, device), ctx)
}

/// Ids of a batch, `[rows, cols]`.
pub(super) fn ids(ids: &[i32], batch: &Batch, device: &Device) -> Tensor<2, Int> {
    let shape = [batch.rows, batch.cols];
    Tensor::from_data(TensorData::new(ids.to_vec(), shape), device)
}
