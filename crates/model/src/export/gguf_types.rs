//! What a GGUF says about its own types and size.

use checkpoint::GgufTensor;

use super::mix::{GgufType, Mix, MixScheme};
use crate::config::ModelConfig;

/// The number of parameters as hubs show it, those of one expert of each layer once: `16B`, `8x7.0B`.
pub(super) fn size_label(tensors: &[GgufTensor]) -> String {
    let (mut shared, mut of_one, mut experts) = (0.0, 0.0, 0);
    for tensor in tensors {
        let n = tensor.shape.iter().product::<usize>() as f64;
        if tensor.name.contains("_exps.") {
            experts = tensor.keys.len();
            of_one += n / experts.max(1) as f64;
        } else {
            shared += n;
        }
    }
    let of_one: f64 = of_one;
    let (parameters, prefix) = match experts {
        0 => (shared, String::new()),
        n => (shared + of_one, format!("{n}x")),
    };
    let units = [(1e12, "T"), (1e9, "B"), (1e6, "M")];
    let unit = units.into_iter().find(|unit| parameters > unit.0);
    let (unit, suffix) = unit.unwrap_or((1e3, "K"));
    let scaled = parameters / unit;
    // Two digits.
    let decimals = usize::from(scaled.round() < 10.0) + usize::from(scaled.round() < 1.0);
    format!("{prefix}{scaled:.decimals$}{suffix}")
}

/// The types of a file's matrices.
#[derive(Default)]
pub(super) struct TypesInUse {
    /// Types, and how many matrices have them; the most frequent first.
    pub(super) counts: Vec<(String, usize)>,
    /// Types that do not fit the width of rows, the types in their place, and how many matrices it concerns.
    pub(super) replaced: Vec<(String, String, usize)>,
    /// The most frequent type.
    most: Option<GgufType>,
    /// Whether a matrix has the type of the scheme.
    has_wanted: bool,
}

impl TypesInUse {
    pub(super) fn of(mix: &Mix, tensors: &[GgufTensor], config: &ModelConfig) -> Self {
        let mut types = Self::default();
        let mut most = 0;
        for tensor in tensors.iter().filter(|tensor| tensor.shape.len() > 1) {
            let [wanted, found] = mix.wanted_and_found(tensor, config);
            types.has_wanted |= found == mix.scheme.most();
            let place = match types.counts.iter().position(|t| t.0 == found.name()) {
                Some(place) => place,
                None => {
                    types.counts.push((found.name().into(), 0));
                    types.counts.len() - 1
                }
            };
            types.counts[place].1 += 1;
            if types.counts[place].1 > most {
                (most, types.most) = (types.counts[place].1, Some(found));
            }
            if wanted != found {
                let same = |known: &&mut (String, String, usize)| {
                    known.0 == wanted.name() && known.1 == found.name()
                };
                match types.replaced.iter_mut().find(same) {
                    Some(known) => known.2 += 1,
                    None => {
                        let names = (wanted.name().into(), found.name().into(), 1);
                        types.replaced.push(names);
                    }
                }
            }
        }
        types.counts.sort_by_key(|of| std::cmp::Reverse(of.1));
        types
    }

    /// The number of the scheme, or of the most frequent type if no matrix has the scheme's.
    pub(super) fn file_type(&self, scheme: MixScheme) -> u32 {
        match self.most {
            Some(most) if !self.has_wanted => MixScheme::Plain(most).file_type(),
            _ => scheme.file_type(),
        }
    }
}
