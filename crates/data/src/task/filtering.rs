//! What filters make of answers.
//!
//! Source: EleutherAI/lm-evaluation-harness 0.4.13: lm_eval/filters, and lm_eval/api/metrics.py, `exact_match_hf_evaluate`.

use std::collections::HashMap;

use super::metric::{Filter, FilterPipeline, Ignored, RegexFilter};
use super::pattern::Pattern;
use super::task_row::TaskRow;
use crate::jinja::is_space;
use crate::{Error, Result};

/// What is left of the answers to a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Filtered {
    /// One of them.
    One(String),
    /// All of them, or some.
    Many(Vec<String>),
}

impl FilterPipeline {
    /// What is left of the answers to a row.
    ///
    /// # Errors
    /// If there are fewer answers or matches than are wanted, a pattern takes too many steps, or a step comes after one answer was
    /// taken.
    pub fn apply(&self, answers: &[String], row: &TaskRow) -> Result<Filtered> {
        let mut answers = answers.to_vec();
        for (number, step) in self.steps.iter().enumerate() {
            if matches!(step, Filter::TakeFirst) {
                let rest = self.steps.len() - number - 1;
                let first = answers.into_iter().next().filter(|_| rest == 0);
                return first.map(Filtered::One).ok_or_else(|| {
                    Error::schema(
                        "an answer, and no filter after `take_first`",
                        format!("{rest} filters"),
                    )
                });
            }
            answers = apply(step, answers, row)?;
        }
        Ok(Filtered::Many(answers))
    }

    /// Whether it takes answers as they are: scores have no text that could be changed.
    pub fn is_plain(&self) -> bool {
        let mut steps = self.steps.iter();
        steps.all(|step| matches!(step, Filter::TakeFirst))
    }
}

fn apply(step: &Filter, answers: Vec<String>, row: &TaskRow) -> Result<Vec<String>> {
    let of_each =
        |change: &dyn Fn(&str) -> String| answers.iter().map(|text| change(text)).collect();
    Ok(match step {
        Filter::TakeFirst => answers.into_iter().take(1).collect(),
        Filter::TakeFirstK(k) if answers.len() < *k => {
            let expected = format!("at least {k} answers (`repeats`)");
            return Err(Error::schema(expected, answers.len().to_string()));
        }
        Filter::TakeFirstK(k) => answers.into_iter().take(*k).collect(),
        Filter::MajorityVote => vec![majority(answers)],
        Filter::RemoveWhitespace => of_each(&|text| strip(text).to_owned()),
        Filter::Lowercase => of_each(&str::to_lowercase),
        Filter::Uppercase => of_each(&str::to_uppercase),
        Filter::Regex(regex) => {
            let found =
                |text: &String| Ok(regex.find(text)?.unwrap_or_else(|| regex.fallback.clone()));
            answers.iter().map(found).collect::<Result<_>>()?
        }
        Filter::MultiChoiceRegex { regex, ignored } => {
            let choices = ChoicePatterns::of_row(row, ignored)?;
            let found = |text: &String| choices.find(text, regex, ignored);
            answers.iter().map(found).collect::<Result<_>>()?
        }
        Filter::Map { entries, default } => of_each(&|text| {
            let known = entries.iter().find(|(name, _)| name == text);
            known.map_or(default, |(_, to)| to).clone()
        }),
    })
}

/// `str.strip`.
fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// The text that comes most often; of several, the first.
fn majority(answers: Vec<String>) -> String {
    let mut counts: HashMap<&String, usize> = HashMap::new();
    for answer in &answers {
        *counts.entry(answer).or_default() += 1;
    }
    let best = answers.iter().rev().max_by_key(|answer| counts[answer]);
    best.cloned().unwrap_or_default()
}

fn failed(problem: String) -> Error {
    Error::schema("a match of a regular expression", problem)
}

impl RegexFilter {
    /// The match that counts, without white space around it; none if there is none.
    fn find(&self, text: &str) -> Result<Option<String>> {
        let groups = chosen(&self.pattern, text, self.group_select)?;
        let first = |groups: Vec<String>| match groups.as_slice() {
            [whole] => Some(whole.clone()),
            several => several.iter().find(|group| !group.is_empty()).cloned(),
        };
        Ok(groups.and_then(first).map(|found| strip(&found).to_owned()))
    }
}

/// The groups of the match that counts.
fn chosen(pattern: &Pattern, text: &str, number: i64) -> Result<Option<Vec<String>>> {
    let mut found = pattern.find_all(text).map_err(failed)?;
    if found.is_empty() {
        return Ok(None);
    }
    let at = if number < 0 {
        number + found.len() as i64
    } else {
        number
    };
    match usize::try_from(at).ok().filter(|at| *at < found.len()) {
        Some(at) => Ok(Some(found.swap_remove(at))),
        None => {
            let expected = format!("a match with the number `group_select: {number}`");
            Err(Error::schema(expected, format!("{} matches", found.len())))
        }
    }
}

/// Patterns that find the choices of a row in an answer: by their texts, and by a letter after a colon.
struct ChoicePatterns {
    texts: Pattern,
    /// The letters of texts.
    letters: HashMap<String, String>,
    letter: Pattern,
}

impl ChoicePatterns {
    fn of_row(row: &TaskRow, ignored: &Ignored) -> Result<Self> {
        let choices = row
            .values()
            .get("choices")
            .and_then(|choices| choices.as_array());
        let choices: Option<Vec<&str>> =
            choices.and_then(|choices| choices.iter().map(|choice| choice.as_str()).collect());
        let choices = choices.filter(|choices| (1..=26).contains(&choices.len()));
        let Some(choices) = choices else {
            return Err(Error::schema(
                "1 to 26 texts in `choices` for `multi_choice_regex`",
                "others",
            ));
        };
        let names: Vec<char> = ('A'..='Z').take(choices.len()).collect();
        let mut texts = Vec::new();
        let mut letters = HashMap::new();
        for (choice, name) in choices.iter().zip(&names) {
            let text = ignored.without(strip(choice), Punctuation::Unicode)?;
            letters.insert(text.clone(), format!("({name})"));
            texts.push(regex::escape(&text));
        }
        // A text that another one begins with comes after it.
        texts.sort_by_key(|text| std::cmp::Reverse(text.chars().count()));
        let names: Vec<String> = names.iter().map(char::to_string).collect();
        Ok(Self {
            texts: Pattern::new(&texts.join("|")).map_err(failed)?,
            letters,
            letter: Pattern::new(&format!(r":[\s]*({})", names.join("|"))).map_err(failed)?,
        })
    }

    fn find(&self, answer: &str, regex: &RegexFilter, ignored: &Ignored) -> Result<String> {
        let is_found = |found: &String| !found.is_empty();
        if let Some(found) = regex.find(answer)?.filter(is_found) {
            return Ok(found);
        }
        let text = ignored.without(answer, Punctuation::Unicode)?;
        let by = |pattern: &Pattern, text: &str| -> Result<Option<String>> {
            let groups = chosen(pattern, text, regex.group_select)?;
            let first = groups.and_then(|groups| groups.into_iter().next());
            Ok(first.map(|found| strip(&found).to_owned()).filter(is_found))
        };
        if let Some(found) = by(&self.texts, &text)? {
            return Ok(self.letters.get(&found).cloned().unwrap_or(found));
        }
        let letter = by(&self.letter, answer)?;
        Ok(letter.map_or_else(|| regex.fallback.clone(), |letter| format!("({letter})")))
    }
}

/// What counts as punctuation.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Punctuation {
    Ascii,
    Unicode,
}

impl Ignored {
    /// A text without what is overlooked when it is compared.
    ///
    /// # Errors
    /// If a pattern takes too many steps.
    pub fn of_match(&self, text: &str) -> Result<String> {
        self.without(text, Punctuation::Ascii)
    }

    fn without(&self, text: &str, punctuation: Punctuation) -> Result<String> {
        let mut text = text.to_owned();
        for pattern in &self.patterns {
            text = pattern.remove_from(&text).map_err(failed)?;
        }
        if self.case {
            text = text.to_lowercase();
        }
        if self.punctuation && punctuation == Punctuation::Ascii {
            text.retain(|c| !c.is_ascii_punctuation());
        } else if self.punctuation {
            let pattern = Pattern::new(r"\p{P}").map_err(failed)?;
            text = pattern.remove_from(&text).map_err(failed)?;
        }
        if self.numbers {
            text.retain(|c| !c.is_ascii_digit());
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn regex(pattern: &str, group_select: i64) -> RegexFilter {
        RegexFilter {
            pattern: Pattern::new(pattern).unwrap(),
            group_select,
            fallback: "[invalid]".into(),
        }
    }

    fn run(steps: Vec<Filter>, answers: &[&str]) -> Result<Filtered, String> {
        let answers: Vec<String> = answers.iter().map(|text| (*text).to_owned()).collect();
        let row = json!({"choices": ["Guilty", "Guilty of Romance", "Not at all!"]});
        let row = TaskRow::new(row.as_object().unwrap().clone());
        let name = "x".to_owned();
        let found = FilterPipeline { name, steps }.apply(&answers, &row);
        found.map_err(|problem| problem.to_string())
    }

    fn one(step: Filter, answer: &str) -> String {
        match run(vec![step, Filter::TakeFirst], &[answer]).unwrap() {
            Filtered::One(text) => text,
            Filtered::Many(texts) => panic!("{texts:?}"),
        }
    }

    // Expected values are those of the harness 0.4.13.
    #[test]
    fn filters_are_those_of_the_harness() {
        let number = r"(-?[$0-9.,]{2,})|(-?[0-9]+)";
        for (pattern, at, answer, expected) in [
            (r"#### (\-?[0-9\.\,]+)", 0, "so #### 1,234.", "1,234."),
            (r"#### (\-?[0-9\.\,]+)", 0, "so 12", "[invalid]"),
            (number, -1, "4 and then 7 apples", "7"),
            (number, -1, "it costs $18.00", "$18.00"),
            (number, 0, "4 and then 7 apples", "4"),
            (r"answer is\s*", 0, "the answer is  x", "answer is"),
        ] {
            assert_eq!(
                one(Filter::Regex(regex(pattern, at)), answer),
                expected,
                "{answer}"
            );
        }
        let multi_choice = |case| Filter::MultiChoiceRegex {
            regex: regex(r"(\([A-Z]\))", 0),
            ignored: Ignored {
                case,
                punctuation: true,
                ..Ignored::default()
            },
        };
        for (case, answer, expected) in [
            (false, "It is (B).", "(B)"),
            (false, "Surely Guilty of Romance", "(B)"),
            (false, "Surely Guilty", "(A)"),
            (true, "NOT AT ALL", "(C)"),
            (false, "NOT AT ALL", "[invalid]"),
            (false, "The answer: C", "(C)"),
        ] {
            assert_eq!(one(multi_choice(case), answer), expected, "{answer}");
        }
        let map = Filter::Map {
            entries: vec![("yes".into(), "1".into())],
            default: "None".into(),
        };
        assert_eq!(
            (one(map.clone(), "yes"), one(map, "no")),
            ("1".into(), "None".into())
        );
        assert_eq!(one(Filter::RemoveWhitespace, " \u{1f}a b\n"), "a b");
        let vote = |answers: &[&str]| run(vec![Filter::MajorityVote, Filter::TakeFirst], answers);
        assert_eq!(vote(&["a", "b", "b"]), Ok(Filtered::One("b".into())));
        assert_eq!(vote(&["c", "a", "a", "c"]), Ok(Filtered::One("c".into())));
        let some = run(vec![Filter::TakeFirstK(2)], &["a", "b", "c"]);
        assert_eq!(some, Ok(Filtered::Many(vec!["a".into(), "b".into()])));
    }

    #[test]
    fn what_filters_cannot_do_is_refused() {
        for (steps, expected) in [
            (
                vec![Filter::TakeFirstK(3)],
                "expected at least 3 answers (`repeats`), found 1",
            ),
            (
                vec![Filter::TakeFirst, Filter::Lowercase],
                "expected an answer, and no filter after `take_first`, found 1 filters",
            ),
            (
                vec![Filter::Regex(regex("[0-9]", 1))],
                "expected a match with the number `group_select: 1`, found 1 matches",
            ),
        ] {
            assert_eq!(run(steps, &["a 1"]).unwrap_err(), expected);
        }
        let explodes = regex(r"(a+)+(?!b)c", 0);
        let answer = "a".repeat(64);
        assert!(run(vec![Filter::Regex(explodes)], &[&answer]).is_err());
    }

    #[test]
    fn matches_overlook_what_they_are_told_to() {
        let ignored = Ignored {
            case: true,
            punctuation: true,
            numbers: true,
            patterns: vec![Pattern::new(r"\$|,").unwrap()],
        };
        assert_eq!(ignored.of_match("$1,2 Ab.C").unwrap(), " abc");
        assert_eq!(Ignored::default().of_match("A.1").unwrap(), "A.1");
    }
}
