//! The operations of a model other than linear layers, on slices of f32 values.

pub(crate) mod adamw;
pub(crate) mod attention;
pub(crate) mod dropout;
pub(crate) mod experts;
pub(crate) mod footprint;
pub(crate) mod loss;
pub(crate) mod rms_norm;
pub(crate) mod rope;
pub(crate) mod route;
pub(crate) mod row_norms;
pub(crate) mod swiglu;
