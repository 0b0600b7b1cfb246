//! The one error type of the crate.

/// A weight's bytes or shape are wrong, or a format's name is unknown.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The byte length does not fit the shape and format.
    #[error("expected {expected} bytes for a {rows} × {cols} {format} matrix, found {found}")]
    ByteLength {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// Number format.
        format: &'static str,
        /// Bytes needed.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// The scales do not form the block grid of the matrix.
    #[error("expected {expected:?} block scales, found {found:?}")]
    ScaleShape {
        /// Blocks along rows and columns.
        expected: [usize; 2],
        /// What was given.
        found: Vec<usize>,
    },
    /// A block scale is NaN, infinite or negative.
    #[error("block scale {idx} is {found}: expected a finite number that is not negative")]
    BadScale {
        /// Which scale, row-major.
        idx: usize,
        /// Its value, as text.
        found: String,
    },
    /// Two matrices are not the keys and values of one `kv_b_proj`.
    #[error(
        "expected the keys and values of {heads} heads of one rank, found matrices {keys:?} and {values:?}"
    )]
    SplitKvB {
        /// Number of heads.
        heads: usize,
        /// Rows and columns of the keys.
        keys: [usize; 2],
        /// Rows and columns of the values.
        values: [usize; 2],
    },
    /// Weights cannot be copied to a GPU.
    #[error("{0}")]
    Placement(String),
    /// No quantizer has this name.
    #[error("expected one of {}, found `{found}`", known.join(", "))]
    UnknownQuantizer {
        /// The known names.
        known: Vec<String>,
        /// What was given.
        found: String,
    },
}
