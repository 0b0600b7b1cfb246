//! Sentences on what of the data is not as it is written.

use std::collections::BTreeSet;

/// Each sentence once.
pub(crate) type RowNotes = BTreeSet<String>;

/// Adds sentences, up to a number that a person would look at: a file may give reason for a new one in every row.
pub(crate) fn add_notes(notes: &mut RowNotes, more: &RowNotes) {
    const MAX_NOTES: usize = 32;
    for note in more {
        if notes.len() < MAX_NOTES {
            notes.insert(note.clone());
        }
    }
}
