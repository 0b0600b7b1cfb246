//! Command line options, as clap reads them from the fields of structs.

use std::collections::BTreeMap;

use super::items::source_text;
use super::report_except;
use super::tree::{Crate, File, made_up, repository};

/// Options whose documentation differs from verb to verb.
const HELP: &[(&str, &str)] = &[
    ("adapter", "attached, merged, measured or trained on"),
    ("batch", "per pass, per step, or decoded together"),
    (
        "cache",
        "`logits` reads as `generate` does only if it is given",
    ),
    ("data", "every verb reads other files of the folder"),
    ("ids", "continued, or only read"),
    ("json", "every verb prints something else"),
    (
        "max-length",
        "of a model's context or of two, or of rows without a model",
    ),
    ("max-samples", "scored, looked at or compared on"),
    ("max-tokens", "of a text, or of an answer"),
    ("out", "every verb writes something else"),
    ("reps", "runs of a prompt, or steps"),
    ("seed", "of tokens, or of moments to kill at"),
    ("seq", "of a prompt, or of a training step"),
    ("set", "an override is measured, tried or trained with"),
    ("to", "a format, or the end of a range"),
];
/// Options whose values have several types.
const VALUES: &[(&str, &str)] = &[
    ("to", "a format, or the end of a range"),
    ("adapter", "a folder, or one of several with a name"),
];
/// Second spellings of an option, and the one to write. The second may be a hidden alias.
const SYNONYMS: [(&str, &str); 2] = [("batch-size", "batch"), ("read-ahead", "prefetch-experts")];
/// Second spellings that still stand.
const SPELLINGS: &[(&str, &str)] = &[];

#[test]
fn options_are_documented_alike() {
    let uses = uses(&Crate::parse("cli", &repository()));
    report_except(
        &differing(&uses, "help text", |option| &option.help),
        HELP,
        "HELP",
    );
}

#[test]
fn options_take_one_type_of_value() {
    let uses = uses(&Crate::parse("cli", &repository()));
    report_except(
        &differing(&uses, "type", |option| &option.value),
        VALUES,
        "VALUES",
    );
}

#[test]
fn options_have_one_spelling() {
    let uses = uses(&Crate::parse("cli", &repository()));
    let mut findings = Vec::new();
    for (second, first) in SYNONYMS {
        for (path, option) in uses.get(second).into_iter().flatten() {
            let finding = format!(
                "{path}:{}: `--{second}` is `--{first}` elsewhere; write that, with this as a hidden alias",
                option.line
            );
            findings.push((second.to_owned(), finding));
        }
    }
    report_except(&findings, SPELLINGS, "SPELLINGS");
}

/// A field with a long option.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Opt {
    /// Without the dashes.
    pub(super) name: String,
    pub(super) line: usize,
    /// Of the field, whether it may be absent or be given several times.
    pub(super) value: String,
    /// The documentation, on one line.
    pub(super) help: String,
}

/// The long options of a file, in the order of its lines.
pub(super) fn options(file: &File) -> Vec<Opt> {
    let structs = file.syntax.items.iter().filter_map(|item| match item {
        syn::Item::Struct(item) => Some(item),
        _ => None,
    });
    structs
        .flat_map(|item| &item.fields)
        .filter_map(option)
        .collect()
}

/// The options of a crate by name, with the files they are in.
fn uses(source: &Crate) -> BTreeMap<String, Vec<(String, Opt)>> {
    let mut uses = BTreeMap::<_, Vec<_>>::new();
    for file in &source.files {
        for option in options(file) {
            uses.entry(option.name.clone())
                .or_default()
                .push((file.path.clone(), option));
        }
    }
    uses
}

/// The options for which `part` is not the same wherever they are.
fn differing(
    uses: &BTreeMap<String, Vec<(String, Opt)>>,
    what: &str,
    part: fn(&Opt) -> &str,
) -> Vec<(String, String)> {
    let mut findings = Vec::new();
    for (name, uses) in uses {
        let other = uses
            .iter()
            .find(|(_, option)| part(option) != part(&uses[0].1));
        let Some((path, option)) = other else {
            continue;
        };
        let (first_path, first) = &uses[0];
        let finding = format!(
            "{path}:{}: `--{name}` has another {what} than in {first_path}:{} ({:?} and {:?}); share the field, or name it apart",
            option.line,
            first.line,
            part(option),
            part(first)
        );
        findings.push((name.clone(), finding));
    }
    findings
}

fn option(field: &syn::Field) -> Option<Opt> {
    let ident = field.ident.as_ref()?;
    let mut long = None;
    for attribute in field
        .attrs
        .iter()
        .filter(|attribute| attribute.path().is_ident("arg"))
    {
        let parts = attribute.parse_args_with(
            syn::punctuated::Punctuated::<syn::Meta, syn::Token![,]>::parse_terminated,
        );
        for part in parts
            .into_iter()
            .flatten()
            .filter(|part| part.path().is_ident("long"))
        {
            long = Some(match part {
                syn::Meta::NameValue(syn::MetaNameValue { value, .. }) => {
                    source_text(&value).trim_matches('"').to_owned()
                }
                _ => ident.to_string().replace('_', "-"),
            });
        }
    }
    Some(Opt {
        name: long?,
        line: ident.span().start().line,
        value: bare(&source_text(&field.ty)),
        help: help(&field.attrs),
    })
}

/// The type in an `Option` or a `Vec`.
fn bare(value: &str) -> String {
    let inner = ["Option<", "Vec<"]
        .iter()
        .find_map(|outer| value.strip_prefix(outer)?.strip_suffix('>'));
    inner.map_or_else(|| value.to_owned(), bare)
}

fn help(attributes: &[syn::Attribute]) -> String {
    let lines = attributes
        .iter()
        .filter_map(|attribute| match &attribute.meta {
            syn::Meta::NameValue(doc) if doc.path.is_ident("doc") => match &doc.value {
                syn::Expr::Lit(syn::ExprLit {
                    lit: syn::Lit::Str(line),
                    ..
                }) => Some(line.value()),
                _ => None,
            },
            _ => None,
        });
    let lines: Vec<_> = lines.map(|line| line.trim().to_owned()).collect();
    lines.join(" ")
}

#[test]
fn options_that_differ_are_found() {
    let sources = made_up(&[
        (
            "crates/cli/src/main.rs",
            "mod b;\nstruct A {\n/// Where.\n#[arg(long, value_name = \"DIR\")] out: Option<PathBuf>,\n/// How many.\n#[arg(short, long = \"batch\")] n: Vec<u64>, #[command(flatten)] more: M }",
        ),
        (
            "crates/cli/src/b.rs",
            "struct B {\n/// Elsewhere.\n#[arg(long)] out: PathBuf,\n/// How many.\n#[arg(long)] batch: usize,\n #[arg(required = true)] model: String }",
        ),
    ]);
    let uses = uses(&Crate::parse("cli", &sources));
    let names: Vec<_> = uses.keys().map(String::as_str).collect();
    assert_eq!(names, ["batch", "out"]);
    let keys = |findings: Vec<(String, String)>| {
        findings.into_iter().map(|(key, _)| key).collect::<Vec<_>>()
    };
    assert_eq!(
        keys(differing(&uses, "help text", |option| &option.help)),
        ["out"]
    );
    assert_eq!(
        keys(differing(&uses, "type", |option| &option.value)),
        ["batch"]
    );
}
