//! Whether samples teach a model to end a text.

use crate::corpus::Corpus;
use crate::error::Result;

/// The samples that are looked at: reading all of a large file again would take long, and if none of these ends, none does.
const MOST_SAMPLES: usize = 10_000;

impl Corpus {
    /// The number of samples that were looked at, at most ten thousand, if none of them trains one of these tokens; none if one
    /// of them does, or if there are no samples.
    ///
    /// # Errors
    /// If samples cannot be read.
    pub fn endless_samples(&self, end_ids: &[u32]) -> Result<Option<usize>> {
        let looked_at = self.len().min(MOST_SAMPLES);
        for index in 0..looked_at {
            let sample = self.sample(index)?;
            let mut tokens = sample.ids.iter().zip(&sample.trained);
            if tokens.any(|(id, trained)| *trained && end_ids.contains(id)) {
                return Ok(None);
            }
        }
        Ok((looked_at > 0).then_some(looked_at))
    }
}

#[cfg(test)]
mod tests {
    use crate::{Columns, Corpus, ReadOptions, RowFilter};

    #[test]
    fn samples_without_a_trained_end_are_counted() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let rows = [
            r#"{"input_ids": [1, 2, 9], "labels": [-100, 2, -100]}"#,
            r#"{"input_ids": [9, 2, 3, 8]}"#,
        ];
        std::fs::write(file.path(), rows.join("\n")).unwrap();
        let options = ReadOptions {
            tokenizer: None,
            max_length: 9,
            vocab_size: 10,
            filter: RowFilter::Any,
            columns: &Columns::default(),
            cache: None,
            progress: &|_, _| {},
        };
        let corpus = Corpus::open(&[file.path().to_owned()], options).unwrap();
        let endless = |ends: &[u32]| corpus.endless_samples(ends).unwrap();
        // 9 is in both, and trained in neither: the first token has nothing before it.
        assert_eq!(endless(&[9]), Some(2));
        assert_eq!(endless(&[]), Some(2));
        assert_eq!(endless(&[8]), None);
        assert_eq!(endless(&[5, 2]), None);
    }
}
