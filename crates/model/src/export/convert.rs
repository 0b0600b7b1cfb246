//! A model in another number format.

use std::path::Path;

use checkpoint::Folder;

use super::merge::{MergeReport, Merger};
use super::weight_format::WeightFormat;
use crate::Error;
use crate::load::read_config;

/// Writes `base` in another number format to the new folder `out`, whole or not at all; see [`super::merge()`].
///
/// # Errors
/// If reading or writing fails, or the check finds a difference beyond rounding ([`Error::Unfaithful`]).
pub fn convert(
    base: &Folder,
    format: WeightFormat,
    out: &Path,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<MergeReport, Error> {
    let config = read_config(base)?;
    let merger = Merger::new(base, config, None, Some(format))?;
    merger.write(out, progress)
}
