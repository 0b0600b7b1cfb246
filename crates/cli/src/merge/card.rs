//! The `README.md` of a merged model.

use std::path::Path;

use checkpoint::{Adapter, CARD_NAME, Folder, ModelCard, Relation, code, model_label};
use model::export::MergeReport;
use train::RunRecord;

/// What was merged into what.
pub(super) struct Merged<'a> {
    pub(super) base: &'a Folder,
    /// The adapter's folder.
    pub(super) adapter: &'a Path,
    /// The name of the weight format; none if every tensor keeps its own.
    pub(super) format: Option<&'a str>,
    pub(super) report: &'a MergeReport,
}

impl Merged<'_> {
    /// Writes the card into the merged model's folder, which has none: a merge copies no `README.md`.
    ///
    /// # Errors
    /// If the adapter cannot be read, or writing fails.
    pub(super) fn write_card(&self, out: &Path) -> anyhow::Result<()> {
        let text = self.card(&model_label(out))?;
        Ok(checkpoint::write_file(
            &out.join(CARD_NAME),
            text.as_bytes(),
        )?)
    }

    fn card(&self, name: &str) -> anyhow::Result<String> {
        let (base, adapter) = (self.base.path(), Adapter::open(self.adapter)?);
        let record = RunRecord::of_adapter(self.adapter);
        let tags: Vec<&str> = record.as_ref().map(RunRecord::tag).into_iter().collect();
        let mut card = ModelCard::new(Some(base), Relation::Finetune, &tags);
        card.heading(1, &code(name));
        card.paragraph(&format!(
            "{} with a LoRA adapter merged into it by {}.",
            code(&model_label(base)),
            ModelCard::PROGRAM
        ));
        card.base(Some(base));
        card.heading(2, "Adapter");
        card.paragraph(&format!(
            "{}; SHA-256 of its tensors' file: {}.",
            code(&model_label(self.adapter)),
            code(&adapter.sha256()?)
        ));
        card.adapter(&adapter.config, &adapter.notes);
        if let Some(record) = record {
            record.describe(&mut card);
        }
        self.describe_merge(&mut card);
        Ok(card.to_text())
    }

    fn describe_merge(&self, card: &mut ModelCard) {
        const KEPT: &str = "every tensor keeps its own; FP8 and GGUF's quantized types become bf16";

        let report = self.report;
        card.heading(2, "Merge");
        let row = |name: &str, value: String| vec![name.to_owned(), value];
        let mut rows = vec![
            row("of the merge", "value".to_owned()),
            row("weight format", self.format.unwrap_or(KEPT).to_owned()),
            row("tensors", report.tensors.to_string()),
            row("tensors with an update", report.adapted.to_string()),
            row(
                "tensors of the adapter that went into them",
                report.folded.to_string(),
            ),
        ];
        if let Some(largest) = report.largest_error {
            rows.push(row(
                "largest error against base plus adapter, of a row's magnitude",
                format!("{largest:.1e}"),
            ));
        }
        card.table(&rows);
    }
}
