//! Twins of Python functions that tasks of the harness name: the same, by the hash of the file that defines them.
//!
//! No Python is run. A file of any other hash is refused, even if it differs by a comment: what it does is not known.
//!
//! Source: EleutherAI/lm-evaluation-harness 0.4.13: the files in lm_eval/tasks that are named below.

use std::path::Path;
use std::sync::LazyLock;

use regex::Regex;
use serde_json::Value as Json;

use super::keys::Setting;
use super::sha256::sha256;
use super::task_row::TaskRow;
use super::yaml::YamlValue;
use crate::file::require_text;
use crate::jinja::{Value, is_space};
use crate::{Error, Result};

/// The largest file of functions.
const MODULE_BYTES: u64 = 1 << 20;

/// Files whose functions are known: their hashes, and the functions by their names.
const TWIN_MODULES: [(&str, &[(&str, TwinFunction)]); 5] = [
    // hellaswag/utils.py
    (
        "07d23b60b28f2a4f658dcf8440623a63fe6644854ce9b846a114dde980dc1214",
        &[("process_docs", TwinFunction::Rows(RowsTwin::Hellaswag))],
    ),
    // winogrande/preprocess_winogrande.py
    (
        "e55327629264a98f1d383fda24645b6779afb53fa0bce2150042b9416b1ae006",
        &[
            ("doc_to_text", TwinFunction::Row(RowTwin::WinograndeText)),
            (
                "doc_to_target",
                TwinFunction::Row(RowTwin::WinograndeTarget),
            ),
            (
                "doc_to_choice",
                TwinFunction::Row(RowTwin::WinograndeChoice),
            ),
        ],
    ),
    // wikitext/preprocess_wikitext.py
    (
        "a44020374b172159bf5be80a64d2c4194c9d5c77284f696ac666361338c8da7d",
        &[
            ("wikitext_detokenizer", TwinFunction::Row(RowTwin::Wikitext)),
            (
                "process_results",
                TwinFunction::Results(ResultsTwin::OriginalPage),
            ),
        ],
    ),
    // truthfulqa/utils.py
    (
        "d3c827d1e2cd442a1e4738b527a18effd48cbb2aed478c12a652311b5ea4dbc8",
        &[(
            "process_results_mc2",
            TwinFunction::Results(ResultsTwin::TrueMass),
        )],
    ),
    // mmlu_pro/utils.py
    (
        "d47eae06ecf1e9535b033394de62185327a1dca977cb29049003699adeb92801",
        &[
            ("doc_to_text", TwinFunction::Row(RowTwin::MmluProQuestion)),
            (
                "fewshot_to_text",
                TwinFunction::Row(RowTwin::MmluProQuestion),
            ),
            (
                "fewshot_to_target",
                TwinFunction::Row(RowTwin::MmluProThoughts),
            ),
            (
                "process_biology",
                TwinFunction::Rows(RowsTwin::Category("biology")),
            ),
            (
                "process_business",
                TwinFunction::Rows(RowsTwin::Category("business")),
            ),
            (
                "process_chemistry",
                TwinFunction::Rows(RowsTwin::Category("chemistry")),
            ),
            (
                "process_computer_science",
                TwinFunction::Rows(RowsTwin::Category("computer science")),
            ),
            (
                "process_economics",
                TwinFunction::Rows(RowsTwin::Category("economics")),
            ),
            (
                "process_engineering",
                TwinFunction::Rows(RowsTwin::Category("engineering")),
            ),
            (
                "process_health",
                TwinFunction::Rows(RowsTwin::Category("health")),
            ),
            (
                "process_history",
                TwinFunction::Rows(RowsTwin::Category("history")),
            ),
            ("process_law", TwinFunction::Rows(RowsTwin::Category("law"))),
            (
                "process_math",
                TwinFunction::Rows(RowsTwin::Category("math")),
            ),
            (
                "process_other",
                TwinFunction::Rows(RowsTwin::Category("other")),
            ),
            (
                "process_philosophy",
                TwinFunction::Rows(RowsTwin::Category("philosophy")),
            ),
            (
                "process_physics",
                TwinFunction::Rows(RowsTwin::Category("physics")),
            ),
            (
                "process_psychology",
                TwinFunction::Rows(RowsTwin::Category("psychology")),
            ),
        ],
    ),
];

/// What a function makes of what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TwinFunction {
    Rows(RowsTwin),
    Row(RowTwin),
    Results(ResultsTwin),
}

/// Other rows of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RowsTwin {
    Hellaswag,
    /// Those of a category.
    Category(&'static str),
}

/// A value of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RowTwin {
    WinograndeText,
    WinograndeTarget,
    WinograndeChoice,
    Wikitext,
    MmluProQuestion,
    MmluProThoughts,
}

/// Metrics of a row and its answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResultsTwin {
    /// The likelihood of a text by the words and bytes of the row's `page`, which the text was made of.
    OriginalPage,
    /// The share of probability of the choices that `mc2_targets` call true.
    TrueMass,
}

/// The function that a setting names.
fn function(of: &Setting, wanted: &str) -> Result<TwinFunction> {
    let YamlValue::Tagged(tag, name) = &of.yaml.value else {
        return Err(of.wrong(wanted));
    };
    let ("function", Some((module, name))) = (tag.as_str(), name.rsplit_once('.')) else {
        return Err(of.wrong(wanted));
    };
    let folder = of.file.parent().unwrap_or(Path::new(""));
    let path = folder.join(format!("{}.py", module.replace('.', "/")));
    let not_run = |why: String| {
        let found = format!("`!function {module}.{name}`: Python is not run, and {why}");
        of.error(wanted, found)
    };
    let text = require_text(&path, MODULE_BYTES).map_err(|problem| not_run(problem.to_string()))?;
    let hash = sha256(&text);
    let functions = TWIN_MODULES.iter().find(|(known, _)| *known == hash);
    let functions = functions.map_or(&[][..], |(_, functions)| *functions);
    let known = functions.iter().find(|(known, _)| *known == name);
    let known = known.map(|(_, function)| *function);
    known.ok_or_else(|| {
        not_run(format!(
            "no twin of this function is known (SHA-256 {hash})"
        ))
    })
}

impl RowsTwin {
    pub(super) fn read(of: &Setting) -> Result<Self> {
        match function(of, "a known function of rows")? {
            TwinFunction::Rows(twin) => Ok(twin),
            _ => Err(of.wrong("a function of rows")),
        }
    }

    /// # Errors
    /// If a row has not the columns that the function reads.
    pub(super) fn apply(self, rows: Vec<TaskRow>) -> Result<Vec<TaskRow>> {
        match self {
            Self::Hellaswag => rows.into_iter().map(|row| hellaswag(&row)).collect(),
            Self::Category(wanted) => {
                let categories: Vec<bool> = rows
                    .iter()
                    .map(|row| Ok(text(row, "category")? == wanted))
                    .collect::<Result<_>>()?;
                let kept = rows
                    .into_iter()
                    .zip(categories)
                    .filter(|(_, is_kept)| *is_kept);
                Ok(kept.map(|(row, _)| row).collect())
            }
        }
    }
}

impl RowTwin {
    pub(super) fn read(of: &Setting) -> Result<Self> {
        match function(of, "a known function of a row")? {
            TwinFunction::Row(twin) => Ok(twin),
            _ => Err(of.wrong("a function of a row")),
        }
    }

    /// # Errors
    /// If the row has not the columns that the function reads.
    pub(super) fn value(self, row: &TaskRow) -> Result<Value> {
        let of_text = |text: String| Value::of_json(&Json::String(text));
        let sentence = || -> Result<(&str, &str)> {
            let sentence = text(row, "sentence")?;
            let parts = sentence.split_once('_');
            parts.ok_or_else(|| Error::schema("a `_` in `sentence`", format!("`{sentence}`")))
        };
        Ok(match self {
            Self::WinograndeText => match text(row, "answer")? {
                "1" => Value::Int(0),
                "2" => Value::Int(1),
                other => {
                    return Err(Error::schema(
                        "`1` or `2` as `answer`",
                        format!("`{other}`"),
                    ));
                }
            },
            Self::WinograndeTarget => of_text(sentence()?.1.trim_matches(is_space).to_owned()),
            Self::WinograndeChoice => {
                let before = sentence()?.0;
                let choices =
                    ["option1", "option2"].map(|name| Ok(format!("{before}{}", text(row, name)?)));
                let choices = choices.into_iter().collect::<Result<Vec<String>>>()?;
                Value::of_json(&choices.into())
            }
            Self::Wikitext => of_text(wikitext(text(row, "page")?)),
            Self::MmluProQuestion => of_text(mmlu_pro(row)?),
            Self::MmluProThoughts => {
                let thoughts = text(row, "cot_content")?;
                of_text(thoughts.replace("A: Let's think step by step. ", ""))
            }
        })
    }
}

impl ResultsTwin {
    pub(super) fn read(of: &Setting) -> Result<Self> {
        match function(of, "a known function of results")? {
            TwinFunction::Results(twin) => Ok(twin),
            _ => Err(of.wrong("a function of results")),
        }
    }
}

impl TaskRow {
    /// The original text of a page.
    ///
    /// # Errors
    /// If there is none.
    pub fn page(&self) -> Result<&str> {
        text(self, "page")
    }

    /// Which choices are true.
    ///
    /// # Errors
    /// If the row does not say it.
    pub fn true_choices(&self) -> Result<Vec<bool>> {
        let labels = self
            .values()
            .get("mc2_targets")
            .and_then(|targets| targets.get("labels"));
        let labels = labels.and_then(Json::as_array);
        let labels =
            labels.ok_or_else(|| Error::schema("a list as `mc2_targets.labels`", "none"))?;
        Ok(labels
            .iter()
            .map(|label| label.as_f64() == Some(1.0))
            .collect())
    }
}

/// A text in a column.
fn text<'a>(row: &'a TaskRow, name: &str) -> Result<&'a str> {
    let found = row.values().get(name);
    found.and_then(Json::as_str).ok_or_else(|| {
        let found = found.map_or("none".to_owned(), crate::file::describe);
        Error::schema(format!("a text as `{name}`"), found)
    })
}

/// `str.capitalize`.
fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    let Some(first) = chars.next() else {
        return String::new();
    };
    let mut first = first.to_uppercase();
    let upper = first.next().into_iter();
    let rest: String = first.chain(chars).collect();
    upper.chain(rest.to_lowercase().chars()).collect()
}

fn hellaswag(row: &TaskRow) -> Result<TaskRow> {
    static BRACKETS: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\[.*?\]").expect("a pattern"));
    let preprocess = |text: &str| {
        let text = text.trim_matches(is_space).replace(" [title]", ". ");
        BRACKETS.replace_all(&text, "").replace("  ", " ")
    };
    let context = format!(
        "{} {}",
        text(row, "ctx_a")?,
        capitalized(text(row, "ctx_b")?)
    );
    let query = preprocess(&format!("{}: {context}", text(row, "activity_label")?));
    let endings = row.values().get("endings").and_then(Json::as_array);
    let endings = endings.and_then(|all| all.iter().map(Json::as_str).collect::<Option<Vec<_>>>());
    let endings =
        endings.ok_or_else(|| Error::schema("a list of texts as `endings`", "another value"))?;
    let label = match row.values().get("label") {
        Some(Json::Number(number)) => number.as_i64(),
        Some(Json::String(text)) => text.trim_matches(is_space).parse().ok(),
        _ => None,
    };
    let label = label.ok_or_else(|| Error::schema("a whole number as `label`", "another value"))?;
    let mut values = row.values().clone();
    values.insert("query".into(), query.into());
    let choices: Vec<String> = endings.into_iter().map(preprocess).collect();
    values.insert("choices".into(), choices.into());
    values.insert("gold".into(), label.into());
    Ok(TaskRow::new(values))
}

/// A page without the marks of its tokenization.
fn wikitext(page: &str) -> String {
    // Python's white space.
    const SPACE: &str = r"[\s\x1c-\x1f]*";
    static PAIRS: LazyLock<[(Regex, &str); 6]> = LazyLock::new(|| {
        let pattern = |text: &str| Regex::new(&text.replace("SPACE", SPACE)).expect("a pattern");
        [
            (pattern("/' [0-9]/"), "/'[0-9]/"),
            (pattern(r"\(SPACE([^)]*?)SPACE\)"), "(${1})"),
            (pattern(r"\[SPACE([^\]]*?)SPACE\]"), "[${1}]"),
            (pattern(r"\{SPACE([^}]*?)SPACE\}"), "{${1}}"),
            (pattern("\"SPACE([^\"]*?)SPACE\""), "\"${1}\""),
            (pattern("'SPACE([^']*?)SPACE'"), "'${1}'"),
        ]
    });
    let [contraction, brackets @ ..] = &*PAIRS;
    let replace = |text: String, pairs: &[(&str, &str)]| {
        pairs
            .iter()
            .fold(text, |text, (from, to)| text.replace(from, to))
    };
    let text = page.replace("s '", "s'");
    let text = contraction.0.replace_all(&text, contraction.1).into_owned();
    let text = replace(
        text,
        &[
            (" @-@ ", "-"),
            (" @,@ ", ","),
            (" @.@ ", "."),
            (" : ", ": "),
            (" ; ", "; "),
            (" . ", ". "),
            (" ! ", "! "),
            (" ? ", "? "),
            (" , ", ", "),
        ],
    );
    let text = brackets.iter().fold(text, |text, (pattern, to)| {
        pattern.replace_all(&text, *to).into_owned()
    });
    replace(
        text,
        &[
            ("= = = =", "===="),
            ("= = =", "==="),
            ("= =", "=="),
            (" \u{b0} ", "\u{b0}"),
            (" \n", "\n"),
            ("\n ", "\n"),
            (" N ", " 1 "),
            (" 's", "'s"),
        ],
    )
}

fn mmlu_pro(row: &TaskRow) -> Result<String> {
    let options = row.values().get("options").and_then(Json::as_array);
    let options = options.and_then(|all| all.iter().map(Json::as_str).collect::<Option<Vec<_>>>());
    let options =
        options.ok_or_else(|| Error::schema("a list of texts as `options`", "another value"))?;
    let options = ('A'..='J')
        .zip(options)
        .map(|(letter, option)| format!("{letter}. {}\n", option.trim_matches(is_space)));
    Ok(format!(
        "Question:\n{}\nOptions:\n{}Answer: Let's think step by step.",
        text(row, "question")?,
        options.collect::<String>()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(values: &Json) -> TaskRow {
        TaskRow::new(values.as_object().unwrap().clone())
    }

    fn function_of(module: &str, name: &str) -> TwinFunction {
        let files = [
            "hellaswag/utils.py",
            "winogrande/preprocess_winogrande.py",
            "wikitext/preprocess_wikitext.py",
            "truthfulqa/utils.py",
            "mmlu_pro/utils.py",
        ];
        let at = files.iter().position(|file| *file == module).unwrap();
        let functions = TWIN_MODULES[at].1.iter();
        functions
            .clone()
            .find(|(known, _)| *known == name)
            .unwrap()
            .1
    }

    /// What Python makes of rows, by the harness's own functions.
    #[test]
    fn twins_give_what_python_gives() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../tests/goldens/harness_tasks/twins.json");
        let golden: Json = serde_json::from_str(&std::fs::read_to_string(golden).unwrap()).unwrap();
        let mut seen = 0;
        for (module, functions) in golden.as_object().unwrap() {
            for (name, pairs) in functions.as_object().unwrap() {
                let function = function_of(module, name);
                for pair in pairs.as_array().unwrap() {
                    let (given, expected) = (row(&pair[0]), &pair[1]);
                    seen += 1;
                    match function {
                        TwinFunction::Rows(twin) => {
                            let found = twin.apply(vec![given]).unwrap();
                            let found = Json::Object(found[0].values().clone());
                            assert_eq!(found, *expected, "{module} {name}");
                        }
                        TwinFunction::Row(twin) => {
                            let found = twin.value(&given).unwrap();
                            let [found, expected] =
                                [found, Value::of_json(expected)].map(|value| format!("{value:?}"));
                            assert_eq!(found, expected, "{module} {name}");
                        }
                        TwinFunction::Results(_) => unreachable!("they make no values"),
                    }
                }
            }
        }
        assert_eq!(seen, 14);
    }

    #[test]
    fn rows_of_a_category_are_kept_and_missing_columns_named() {
        let rows = ["law", "biology", "law"]
            .map(|category| row(&serde_json::json!({"category": category})));
        let found = RowsTwin::Category("law").apply(rows.to_vec()).unwrap();
        assert_eq!(found, [rows[0].clone(), rows[2].clone()]);
        let problem = RowTwin::Wikitext.value(&rows[0]).unwrap_err().to_string();
        assert_eq!(problem, "expected a text as `page`, found none");
        let problem = RowsTwin::Hellaswag
            .apply(rows.to_vec())
            .unwrap_err()
            .to_string();
        assert_eq!(problem, "expected a text as `ctx_a`, found none");
    }
}
