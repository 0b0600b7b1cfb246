//! The `README.md` of a merged model.

use std::path::Path;

use checkpoint::{Adapter, CARD_NAME, Folder, ModelCard, Relation, code, model_label};
use model::export::MergeReport;
use train::RunRecord;

/// What was merged into what.
pub(super) struct Merged<'a> {
    pub(super) base: &'a Folder,
    pub(super) adapter: &'a Adapter,
    pub(super) adapter_path: &'a Path,
    /// The name of the weight format.
    pub(super) format: &'a str,
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
        let base = self.base.path();
        let record = RunRecord::of_adapter(self.adapter_path);
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
            code(&model_label(self.adapter_path)),
            code(&self.adapter.sha256()?)
        ));
        card.adapter(&self.adapter.config, &self.adapter.notes);
        if let Some(record) = record {
            record.describe(&mut card);
        }
        self.describe_merge(&mut card);
        Ok(card.to_text())
    }

    fn describe_merge(&self, card: &mut ModelCard) {
        let report = self.report;
        card.heading(2, "Merge");
        let row = |name: &str, value: String| vec![name.to_owned(), value];
        let mut rows = vec![
            row("of the merge", "value".to_owned()),
            row("weight format", self.format.to_owned()),
            row("tensors", report.tensors.to_string()),
            row("tensors with an update", report.adapted.to_string()),
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
