//! What a person should know about a session before its first step: nothing that is wrong, and much that is overlooked.

use crate::session::Session;

impl Session {
    /// Sentences about lengths, tokens and batches that are not what they seem; none if all is plain.
    pub fn warnings(&self) -> Vec<String> {
        let all = [
            self.beyond_positions(),
            self.beyond_embedding(),
            self.repeated_rows(),
        ];
        all.into_iter().flatten().collect()
    }

    /// Rows that may be longer than the model was made for.
    fn beyond_positions(&self) -> Option<String> {
        let (max_length, positions) = (self.recipe.data.max_length, self.model.config.positions());
        if max_length <= positions {
            return None;
        }
        let corpora = [Some(&self.train.corpus), self.valid.as_ref()];
        let lengths = corpora
            .into_iter()
            .flatten()
            .flat_map(|corpus| corpus.lengths());
        let longer = lengths
            .filter(|length| *length as usize > positions)
            .count();
        Some(format!(
            "data.max_length is {max_length}, and the model has {positions} positions (max_position_embeddings, stretched \
             by its rope scaling): it was never trained beyond them, and {longer} samples are longer"
        ))
    }

    /// Tokens without an embedding.
    fn beyond_embedding(&self) -> Option<String> {
        let (size, vocab_size) = (self.tokenizer_size?, self.model.config.vocab_size);
        (size > vocab_size).then(|| {
            format!(
                "the tokenizer has {size} tokens and the model's embedding {vocab_size}: a row with a token beyond them is \
                 refused"
            )
        })
    }

    /// Steps that see a row more than once.
    fn repeated_rows(&self) -> Option<String> {
        let (step, epoch) = (self.recipe.rows_per_step(), self.train.rows());
        (step > epoch && epoch > 0).then(|| {
            format!(
                "a step takes {step} rows (train.batch_size × train.accumulate) and an epoch has {epoch}: every step repeats \
                 rows"
            )
        })
    }
}
