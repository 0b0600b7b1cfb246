//! Sentences on what of the data is not as it is written.

use std::collections::BTreeSet;

/// Each sentence once.
pub(crate) type RowNotes = BTreeSet<String>;
