//! What a task says about its metrics and filters.

use super::keys::{Setting, Settings};
use super::pattern::Pattern;
use crate::Result;

/// What a model does with a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputType {
    /// Scores each of some choices after a prompt.
    MultipleChoice,
    /// Scores one text after a prompt.
    Loglikelihood,
    /// Scores a whole text.
    LoglikelihoodRolling,
    /// Writes a text.
    GenerateUntil,
}

impl OutputType {
    pub(super) const ALL: [(&'static str, Self); 4] = [
        ("multiple_choice", Self::MultipleChoice),
        ("loglikelihood", Self::Loglikelihood),
        ("loglikelihood_rolling", Self::LoglikelihoodRolling),
        ("generate_until", Self::GenerateUntil),
    ];

    /// The metrics of a task that names none.
    fn usual(self) -> &'static [Metric] {
        match self {
            Self::MultipleChoice => &[Metric::Acc, Metric::AccNorm],
            Self::Loglikelihood => &[Metric::Perplexity, Metric::Acc],
            Self::LoglikelihoodRolling => &[
                Metric::WordPerplexity,
                Metric::BytePerplexity,
                Metric::BitsPerByte,
            ],
            Self::GenerateUntil => &[Metric::ExactMatch],
        }
    }
}

/// A number that says how good answers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Metric {
    /// The most likely choice is right; of one text, it is the greedy one.
    Acc,
    /// The choice that is most likely per character is right.
    AccNorm,
    /// The choice that is most likely per byte is right.
    AccBytes,
    /// The choice whose likelihood the prompt raises most is right.
    AccMutualInfo,
    /// The answer is the expected one.
    ExactMatch,
    /// F1 of the chosen labels.
    F1,
    /// Matthews' correlation coefficient of the chosen labels.
    Mcc,
    /// The inverse of the likelihood of one text.
    Perplexity,
    /// The inverse of the likelihood per word.
    WordPerplexity,
    /// The inverse of the likelihood per byte.
    BytePerplexity,
    /// Bits that a byte takes.
    BitsPerByte,
    /// BLEU of a corpus.
    Bleu,
    /// chrF of a corpus.
    Chrf,
    /// Translation error rate of a corpus.
    Ter,
}

impl Metric {
    /// Names, and the output types that have them.
    const ALL: [(&'static str, Self, &'static [OutputType]); 14] = [
        (
            "acc",
            Self::Acc,
            &[OutputType::MultipleChoice, OutputType::Loglikelihood],
        ),
        ("acc_norm", Self::AccNorm, &[OutputType::MultipleChoice]),
        ("acc_bytes", Self::AccBytes, &[OutputType::MultipleChoice]),
        (
            "acc_mutual_info",
            Self::AccMutualInfo,
            &[OutputType::MultipleChoice],
        ),
        (
            "exact_match",
            Self::ExactMatch,
            &[OutputType::GenerateUntil, OutputType::MultipleChoice],
        ),
        (
            "f1",
            Self::F1,
            &[OutputType::MultipleChoice, OutputType::GenerateUntil],
        ),
        ("mcc", Self::Mcc, &[OutputType::MultipleChoice]),
        ("perplexity", Self::Perplexity, &[OutputType::Loglikelihood]),
        (
            "word_perplexity",
            Self::WordPerplexity,
            &[OutputType::LoglikelihoodRolling],
        ),
        (
            "byte_perplexity",
            Self::BytePerplexity,
            &[OutputType::LoglikelihoodRolling],
        ),
        (
            "bits_per_byte",
            Self::BitsPerByte,
            &[OutputType::LoglikelihoodRolling],
        ),
        ("bleu", Self::Bleu, &[OutputType::GenerateUntil]),
        ("chrf", Self::Chrf, &[OutputType::GenerateUntil]),
        ("ter", Self::Ter, &[OutputType::GenerateUntil]),
    ];

    /// Its name in task files.
    pub fn name(self) -> &'static str {
        let found = Self::ALL.iter().find(|(_, metric, _)| *metric == self);
        found.map_or("", |(name, ..)| name)
    }

    /// The metric of a name, if there is one.
    pub fn of_name(name: &str) -> Option<Self> {
        let found = Self::ALL.iter().find(|(known, ..)| *known == name);
        found.map(|(_, metric, _)| *metric)
    }

    /// How values of rows become one number, unless a task says otherwise.
    fn usual_aggregation(self) -> Aggregation {
        match self {
            Self::Perplexity => Aggregation::Perplexity,
            Self::WordPerplexity | Self::BytePerplexity => Aggregation::WeightedPerplexity,
            Self::BitsPerByte => Aggregation::BitsPerByte,
            Self::F1 => Aggregation::F1,
            Self::Mcc => Aggregation::Mcc,
            Self::Bleu => Aggregation::Bleu,
            Self::Chrf => Aggregation::Chrf,
            Self::Ter => Aggregation::Ter,
            _ => Aggregation::Mean,
        }
    }

    /// Whether more is better, unless a task says otherwise.
    fn is_higher_better(self) -> bool {
        !matches!(
            self,
            Self::Perplexity
                | Self::WordPerplexity
                | Self::BytePerplexity
                | Self::BitsPerByte
                | Self::Ter
        )
    }
}

/// How values of rows become one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aggregation {
    /// Their mean.
    Mean,
    /// The exponential of minus their mean.
    Perplexity,
    /// The exponential of minus their mean by weights.
    WeightedPerplexity,
    /// Minus their mean by weights, in bits.
    BitsPerByte,
    /// F1 of labels.
    F1,
    /// Matthews' correlation coefficient of labels.
    Mcc,
    /// BLEU of texts.
    Bleu,
    /// chrF of texts.
    Chrf,
    /// Translation error rate of texts.
    Ter,
}

impl Aggregation {
    const ALL: [(&'static str, Self); 9] = [
        ("mean", Self::Mean),
        ("perplexity", Self::Perplexity),
        ("weighted_perplexity", Self::WeightedPerplexity),
        ("bits_per_byte", Self::BitsPerByte),
        ("f1", Self::F1),
        ("matthews_corrcoef", Self::Mcc),
        ("bleu", Self::Bleu),
        ("chrf", Self::Chrf),
        ("ter", Self::Ter),
    ];

    /// Its name in task files.
    pub fn name(self) -> &'static str {
        let found = Self::ALL
            .iter()
            .find(|(_, aggregation)| *aggregation == self);
        found.map_or("", |(name, _)| name)
    }

    /// The aggregation of a name, if there is one.
    pub fn of_name(name: &str) -> Option<Self> {
        let found = Self::ALL.iter().find(|(known, _)| *known == name);
        found.map(|(_, aggregation)| *aggregation)
    }
}

/// A metric as a task wants it.
#[derive(Clone, Debug)]
pub struct MetricUse {
    /// The metric.
    pub metric: Metric,
    /// How values of rows become one number.
    pub aggregation: Aggregation,
    /// Whether more is better.
    pub is_higher_better: bool,
    /// What `exact_match` overlooks.
    pub ignored: Ignored,
}

impl MetricUse {
    /// A metric as it is unless a task says otherwise.
    pub fn usual(metric: Metric) -> Self {
        Self {
            metric,
            aggregation: metric.usual_aggregation(),
            is_higher_better: metric.is_higher_better(),
            ignored: Ignored::default(),
        }
    }
}

/// What a comparison of texts overlooks.
#[derive(Clone, Debug, Default)]
pub struct Ignored {
    /// Upper and lower case.
    pub case: bool,
    /// Punctuation of ASCII.
    pub punctuation: bool,
    /// Digits.
    pub numbers: bool,
    /// What matches one of these.
    pub patterns: Vec<Pattern>,
}

/// The metrics of a task.
pub(super) fn metric_list(list: Option<&Setting>, output: OutputType) -> Result<Vec<MetricUse>> {
    let Some(list) = list else {
        let usual = output.usual().iter();
        return Ok(usual.map(|metric| MetricUse::usual(*metric)).collect());
    };
    let read = |item: &Setting| metric_use(item.map()?, item, output);
    list.list()?.iter().map(read).collect()
}

fn metric_use(mut keys: Settings, item: &Setting, output: OutputType) -> Result<MetricUse> {
    let Some(name) = keys.take("metric") else {
        return Err(item.error("a mapping with `metric`", "none"));
    };
    let of_output = Metric::ALL
        .iter()
        .filter(|(.., outputs)| outputs.contains(&output));
    let known: Vec<(&str, Metric)> = of_output
        .map(|(name, metric, _)| (*name, *metric))
        .collect();
    let metric = name.one_of(&known)?;
    if let Some(other) = keys
        .take("hf_evaluate")
        .filter(|other| !matches!(other.boolean(), Ok(false)))
    {
        return Err(other.error("false", "a metric of another program"));
    }
    let aggregation = keys.read("aggregation", |of| of.one_of(&Aggregation::ALL))?;
    let is_higher_better = keys.read("higher_is_better", Setting::boolean)?;
    // It says how a group weighs its tasks, which the group says itself.
    _ = keys.take("weight_by_size");
    let mut ignored = Ignored::default();
    if metric == Metric::ExactMatch {
        ignored = Ignored {
            case: keys.read("ignore_case", Setting::boolean)?.unwrap_or(false),
            punctuation: keys
                .read("ignore_punctuation", Setting::boolean)?
                .unwrap_or(false),
            numbers: keys
                .read("ignore_numbers", Setting::boolean)?
                .unwrap_or(false),
            patterns: keys
                .read("regexes_to_ignore", patterns)?
                .unwrap_or_default(),
        };
    }
    keys.finish()?;
    Ok(MetricUse {
        metric,
        aggregation: aggregation.unwrap_or_else(|| metric.usual_aggregation()),
        is_higher_better: is_higher_better.unwrap_or_else(|| metric.is_higher_better()),
        ignored,
    })
}

fn patterns(of: &Setting) -> Result<Vec<Pattern>> {
    of.items()?.iter().map(Pattern::read).collect()
}

/// What is made of an answer before it is compared, step by step, under a name.
#[derive(Clone, Debug)]
pub struct FilterPipeline {
    /// The name that results have.
    pub name: String,
    /// The steps.
    pub steps: Vec<Filter>,
}

/// A step from the answers to a row to other answers.
#[derive(Clone, Debug)]
pub enum Filter {
    /// The first answer.
    TakeFirst,
    /// The first answers.
    TakeFirstK(usize),
    /// The answer that comes most often.
    MajorityVote,
    /// Without white space around it.
    RemoveWhitespace,
    /// In lower case.
    Lowercase,
    /// In upper case.
    Uppercase,
    /// What a pattern finds.
    Regex(RegexFilter),
    /// What a pattern finds, or else the choice that the answer names.
    MultiChoiceRegex {
        /// The pattern.
        regex: RegexFilter,
        /// What is overlooked while choices are looked for.
        ignored: Ignored,
    },
    /// Another text for each text.
    Map {
        /// Texts, and what stands for them.
        entries: Vec<(String, String)>,
        /// What stands for all others.
        default: String,
    },
}

/// A pattern, and which of its matches counts.
#[derive(Clone, Debug)]
pub struct RegexFilter {
    /// What is looked for.
    pub pattern: Pattern,
    /// Which match, counted from the end if negative.
    pub group_select: i64,
    /// What stands for an answer without a match.
    pub fallback: String,
}

/// The filters of a task.
pub(super) fn filter_list(list: Option<&Setting>) -> Result<Vec<FilterPipeline>> {
    let Some(list) = list else {
        return Ok(vec![FilterPipeline {
            name: "none".into(),
            steps: vec![Filter::TakeFirst],
        }]);
    };
    let pipeline = |item: &Setting| {
        let mut keys = item.map()?;
        let name = keys.read("name", Setting::text)?;
        let steps = keys.read("filter", |steps| {
            let read = |step: &Setting| filter(step.map()?, step);
            steps.list()?.iter().map(read).collect()
        })?;
        keys.finish()?;
        match (name, steps) {
            (Some(name), Some(steps)) => Ok(FilterPipeline { name, steps }),
            _ => Err(item.error("a mapping with `name` and `filter`", "one is missing")),
        }
    };
    list.list()?.iter().map(pipeline).collect()
}

/// Names of filters that have nothing to set, or more than that.
#[derive(Clone, Copy)]
enum FilterKind {
    Plain(fn() -> Filter),
    TakeFirstK,
    Regex,
    MultiChoiceRegex,
    Map,
}

const FILTERS: [(&str, FilterKind); 9] = [
    ("take_first", FilterKind::Plain(|| Filter::TakeFirst)),
    ("take_first_k", FilterKind::TakeFirstK),
    ("majority_vote", FilterKind::Plain(|| Filter::MajorityVote)),
    (
        "remove_whitespace",
        FilterKind::Plain(|| Filter::RemoveWhitespace),
    ),
    ("lowercase", FilterKind::Plain(|| Filter::Lowercase)),
    ("uppercase", FilterKind::Plain(|| Filter::Uppercase)),
    ("regex", FilterKind::Regex),
    ("multi_choice_regex", FilterKind::MultiChoiceRegex),
    ("map", FilterKind::Map),
];

fn filter(mut keys: Settings, step: &Setting) -> Result<Filter> {
    let Some(function) = keys.take("function") else {
        return Err(step.error("a mapping with `function`", "none"));
    };
    let filter = match function.one_of(&FILTERS)? {
        FilterKind::Plain(make) => make(),
        FilterKind::TakeFirstK => match keys.read("k", Setting::count)? {
            Some(k) => Filter::TakeFirstK(k),
            None => return Err(step.error("a mapping with `k`", "none")),
        },
        FilterKind::Regex => Filter::Regex(regex_filter(&mut keys)?),
        FilterKind::MultiChoiceRegex => Filter::MultiChoiceRegex {
            regex: regex_filter(&mut keys)?,
            ignored: Ignored {
                case: keys.read("ignore_case", Setting::boolean)?.unwrap_or(false),
                punctuation: keys
                    .read("ignore_punctuation", Setting::boolean)?
                    .unwrap_or(false),
                numbers: false,
                patterns: keys
                    .read("regexes_to_ignore", patterns)?
                    .unwrap_or_default(),
            },
        },
        FilterKind::Map => map_filter(&mut keys)?,
    };
    keys.finish()?;
    Ok(filter)
}

fn regex_filter(keys: &mut Settings) -> Result<RegexFilter> {
    let pattern = keys.read("regex_pattern", Pattern::read)?;
    Ok(RegexFilter {
        pattern: match pattern {
            Some(pattern) => pattern,
            None => Pattern::usual()?,
        },
        group_select: keys.read("group_select", Setting::integer)?.unwrap_or(0),
        fallback: keys
            .read("fallback", Setting::text)?
            .unwrap_or_else(|| "[invalid]".into()),
    })
}

fn map_filter(keys: &mut Settings) -> Result<Filter> {
    let entries = keys.read("mapping_dict", |map| {
        let entries = map.map()?.rest().into_iter();
        entries.map(|(name, to)| Ok((name, to.scalar()?))).collect()
    })?;
    Ok(Filter::Map {
        entries: entries.unwrap_or_default(),
        // What Python prints for no value.
        default: keys
            .read("default_value", Setting::scalar)?
            .unwrap_or_else(|| "None".into()),
    })
}
