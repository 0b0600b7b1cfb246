//! Jinja's filters for lists and dictionaries.

use crate::jinja::arguments::{CallValues, int_or, str_or};
use crate::jinja::budget::Budget;
use crate::jinja::operators::arithmetic;
use crate::jinja::python::text_of;
use crate::jinja::render::Renderer;
use crate::jinja::value::{SeqKind, Value};
use crate::jinja::{Error, Result, ast};
use std::cmp::Ordering;

/// Their names.
pub(super) const SEQUENCE_FILTERS: [&str; 24] = [
    "batch",
    "count",
    "dictsort",
    "first",
    "groupby",
    "items",
    "join",
    "last",
    "length",
    "list",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "reverse",
    "select",
    "selectattr",
    "slice",
    "sort",
    "sum",
    "unique",
    "random",
    "pprint",
];

/// The most parts, and the largest, of `batch` and `slice`.
const MAX_PARTS: usize = 100_000;

pub(super) fn apply(
    renderer: &mut Renderer<'_>,
    name: &str,
    value: Value,
    values: CallValues,
) -> Result<Value> {
    match name {
        "map" => return map(renderer, &value, values),
        "select" | "reject" => return select(renderer, name, &value, values),
        "selectattr" | "rejectattr" => return select(renderer, name, &value, values),
        "join" => return join(renderer, &value, values),
        "sort" => return sort(renderer, &value, values),
        "unique" => return unique(renderer, &value, values),
        "min" | "max" => return extreme(renderer, name, &value, values),
        "groupby" => return group_by(renderer, &value, values),
        "sum" => return sum(renderer, &value, values),
        "dictsort" => return sorted_entries(&value, values, &renderer.budget),
        "batch" | "slice" => return parts(name, &value, values, &renderer.budget),
        _ => {}
    }
    let budget = &renderer.budget;
    let [] = values.bind(name, [])?;
    match name {
        "length" | "count" => Ok(Value::Int(value.length()? as i128)),
        "list" => Value::list(value.elements(budget)?),
        "items" => match &value {
            Value::Undefined(_) => Ok(Value::iter_of([])),
            Value::Dict(dict) => {
                let pairs = dict.entries.iter();
                let pairs: Result<Vec<Value>> = pairs
                    .map(|(key, value)| Value::tuple(vec![key.clone(), value.clone()]))
                    .collect();
                Ok(Value::iter_of(pairs?))
            }
            _ => Err(Error::new("Can only get item pairs from a mapping.")),
        },
        "first" => {
            let mut elements = first_of(&value, budget)?;
            Ok(elements
                .pop()
                .unwrap_or_else(|| Value::undefined("first item")))
        }
        "last" => match &value {
            Value::Iter(_) => Err(Error::new("'generator' object is not reversible")),
            other => Ok(other
                .elements(budget)?
                .pop()
                .unwrap_or_else(|| Value::undefined("last item"))),
        },
        "reverse" => match &value {
            Value::Str(text) => {
                budget.text(text.len())?;
                Ok(Value::str(text.chars().rev().collect::<String>()))
            }
            other => Ok(Value::iter_of(other.elements(budget)?.into_iter().rev())),
        },
        other => Err(Error::new(format!("the filter '{other}' is not supported"))),
    }
}

/// The first element, if there is one.
fn first_of(value: &Value, budget: &Budget) -> Result<Vec<Value>> {
    if let Value::Iter(rest) = value {
        return Ok(rest.borrow_mut().pop_front().into_iter().collect());
    }
    let mut elements = value.elements(budget)?;
    elements.truncate(1);
    Ok(elements)
}

/// What an attribute, a key, or a path of them (`function.name`) leads to.
fn follow(renderer: &Renderer<'_>, value: &Value, path: &Value) -> Result<Value> {
    let Value::Str(path) = path else {
        return renderer.item(value, path);
    };
    let mut value = value.clone();
    for part in path.split('.') {
        let index = match part.parse() {
            Ok(index) if part.bytes().all(|byte| byte.is_ascii_digit()) => Value::Int(index),
            _ => Value::str(part),
        };
        value = renderer.item(&value, &index)?;
    }
    Ok(value)
}

fn map(renderer: &mut Renderer<'_>, value: &Value, mut values: CallValues) -> Result<Value> {
    // Nothing is looked at before there is an element: none and 0 have no elements either.
    if !value.is_true() {
        return Ok(Value::iter_of([]));
    }
    let elements = value.elements(&renderer.budget)?;
    let mut mapped = Vec::with_capacity(elements.len());
    if values.positional.is_empty() {
        let [attribute, default] = values.bind("map", ["attribute", "default"])?;
        let Some(attribute) = attribute else {
            return Err(Error::new("map requires a filter argument"));
        };
        for element in elements {
            renderer.budget.step()?;
            mapped.push(match (follow(renderer, &element, &attribute)?, &default) {
                (Value::Undefined(_), Some(default)) => default.clone(),
                (found, _) => found,
            });
        }
        return Ok(Value::iter_of(mapped));
    }
    let name = values.positional.remove(0);
    let name = text_of(&name, &renderer.budget)?;
    for element in elements {
        renderer.budget.step()?;
        let again = CallValues {
            positional: values.positional.clone(),
            named: values.named.clone(),
        };
        renderer.budget.deeper()?;
        mapped.push(renderer.filter(&name, element, again)?);
        renderer.budget.shallower();
    }
    Ok(Value::iter_of(mapped))
}

fn select(
    renderer: &Renderer<'_>,
    name: &str,
    value: &Value,
    mut values: CallValues,
) -> Result<Value> {
    if !value.is_true() {
        return Ok(Value::iter_of([]));
    }
    let (wanted, by_attribute) = (name.starts_with("select"), name.ends_with("attr"));
    let attribute = match (by_attribute, values.positional.is_empty()) {
        (true, true) => return Err(Error::new("Missing parameter for attribute name")),
        (true, false) => Some(values.positional.remove(0)),
        (false, _) => None,
    };
    let test = match values.positional.is_empty() {
        true => None,
        false => Some(text_of(&values.positional.remove(0), &renderer.budget)?),
    };
    let mut kept = Vec::new();
    for element in value.elements(&renderer.budget)? {
        renderer.budget.step()?;
        let seen = match &attribute {
            Some(attribute) => follow(renderer, &element, attribute)?,
            None => element.clone(),
        };
        let holds = match &test {
            Some(test) => {
                let again = CallValues {
                    positional: values.positional.clone(),
                    named: values.named.clone(),
                };
                renderer.test(test, &seen, again)?
            }
            None => seen.is_true(),
        };
        if holds == wanted {
            kept.push(element);
        }
    }
    Ok(Value::iter_of(kept))
}

fn join(renderer: &Renderer<'_>, value: &Value, values: CallValues) -> Result<Value> {
    let [separator, attribute] = values.bind("join", ["d", "attribute"])?;
    let budget = &renderer.budget;
    let separator = separator
        .map(|separator| text_of(&separator, budget))
        .transpose()?;
    let separator = separator.unwrap_or_default();
    let mut out = String::new();
    for (index, element) in value.elements(budget)?.into_iter().enumerate() {
        if index > 0 {
            budget.text(separator.len())?;
            out.push_str(&separator);
        }
        let element = match &attribute {
            Some(attribute) => follow(renderer, &element, attribute)?,
            None => element,
        };
        out.push_str(&text_of(&element, budget)?);
    }
    Ok(Value::str(out))
}

/// What an element is sorted by: in lower case unless the case counts.
fn sort_key(
    renderer: &Renderer<'_>,
    value: &Value,
    attribute: Option<&Value>,
    case_sensitive: bool,
) -> Result<Value> {
    let lower = |value: Value| match &value {
        Value::Str(text) | Value::Markup(text) if !case_sensitive => {
            Value::str(text.to_lowercase())
        }
        _ => value,
    };
    match attribute {
        Some(Value::Str(paths)) if paths.contains(',') => {
            let keys = paths
                .split(',')
                .map(|path| follow(renderer, value, &Value::str(path)));
            Value::tuple(keys.map(|key| key.map(lower)).collect::<Result<_>>()?)
        }
        Some(path) => follow(renderer, value, path).map(lower),
        None => Ok(lower(value.clone())),
    }
}

/// Elements with their keys, in order.
fn sorted(mut keyed: Vec<(Value, Value)>, reverse: bool, budget: &Budget) -> Result<Vec<Value>> {
    budget.copy(keyed.len().saturating_mul(16))?;
    let mut unordered = false;
    keyed.sort_by(|(a, _), (b, _)| {
        let order = a.order(b);
        unordered |= order.is_none();
        let order = order.unwrap_or(Ordering::Equal);
        if reverse { order.reverse() } else { order }
    });
    match unordered {
        true => Err(Error::new("cannot sort values of different types")),
        false => Ok(keyed.into_iter().map(|(_, value)| value).collect()),
    }
}

fn is_set(flag: Option<&Value>) -> bool {
    flag.is_some_and(Value::is_true)
}

fn sort(renderer: &Renderer<'_>, value: &Value, values: CallValues) -> Result<Value> {
    let [reverse, case, attribute] =
        values.bind("sort", ["reverse", "case_sensitive", "attribute"])?;
    let attribute = attribute.filter(|attribute| !matches!(attribute, Value::None));
    let mut keyed = Vec::new();
    for element in value.elements(&renderer.budget)? {
        keyed.push((
            sort_key(
                renderer,
                &element,
                attribute.as_ref(),
                is_set(case.as_ref()),
            )?,
            element,
        ));
    }
    Value::list(sorted(keyed, is_set(reverse.as_ref()), &renderer.budget)?)
}

fn unique(renderer: &Renderer<'_>, value: &Value, values: CallValues) -> Result<Value> {
    let [case, attribute] = values.bind("unique", ["case_sensitive", "attribute"])?;
    let (mut seen, mut kept) = (Vec::new(), Vec::new());
    for element in value.elements(&renderer.budget)? {
        let key = sort_key(
            renderer,
            &element,
            attribute.as_ref(),
            is_set(case.as_ref()),
        )?;
        renderer.budget.copy(seen.len())?;
        if !seen.contains(&key) {
            seen.push(key);
            kept.push(element);
        }
    }
    Ok(Value::iter_of(kept))
}

fn extreme(
    renderer: &Renderer<'_>,
    name: &str,
    value: &Value,
    values: CallValues,
) -> Result<Value> {
    let [case, attribute] = values.bind(name, ["case_sensitive", "attribute"])?;
    let mut best: Option<(Value, Value)> = None;
    for element in value.elements(&renderer.budget)? {
        let key = sort_key(
            renderer,
            &element,
            attribute.as_ref(),
            is_set(case.as_ref()),
        )?;
        let wins = match &best {
            None => true,
            Some((other, _)) => {
                let order = key.order(other);
                let order =
                    order.ok_or_else(|| Error::new("cannot compare values of different types"))?;
                order
                    == if name == "min" {
                        Ordering::Less
                    } else {
                        Ordering::Greater
                    }
            }
        };
        if wins {
            best = Some((key, element));
        }
    }
    Ok(best.map_or_else(|| Value::undefined("aggregated item"), |(_, value)| value))
}

fn group_by(renderer: &Renderer<'_>, value: &Value, values: CallValues) -> Result<Value> {
    let [attribute, default, case] =
        values.bind("groupby", ["attribute", "default", "case_sensitive"])?;
    let Some(attribute) = attribute else {
        return Err(Error::new("groupby needs the argument 'attribute'"));
    };
    let case = is_set(case.as_ref());
    let found = |element: &Value, case: bool| match (
        sort_key(renderer, element, Some(&attribute), case)?,
        &default,
    ) {
        (Value::Undefined(_), Some(default)) => sort_key(renderer, default, None, case),
        (key, _) => Ok(key),
    };
    let mut keyed = Vec::new();
    for element in value.elements(&renderer.budget)? {
        keyed.push((found(&element, case)?, element));
    }
    let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
    for element in sorted(keyed, false, &renderer.budget)? {
        let key = found(&element, case)?;
        match groups.last_mut() {
            Some((last, group)) if *last == key => group.push(element),
            _ => groups.push((key, vec![element])),
        }
    }
    let groups = groups.into_iter().map(|(_, group)| {
        let key = found(&group[0], true)?;
        Value::tuple(vec![key, Value::list(group)?])
    });
    Value::list(groups.collect::<Result<_>>()?)
}

fn sum(renderer: &Renderer<'_>, value: &Value, values: CallValues) -> Result<Value> {
    let [attribute, start] = values.bind("sum", ["attribute", "start"])?;
    let mut total = start.unwrap_or(Value::Int(0));
    for element in value.elements(&renderer.budget)? {
        let element = match &attribute {
            Some(attribute) => follow(renderer, &element, attribute)?,
            None => element,
        };
        total = arithmetic(ast::Operator::Add, &total, &element, &renderer.budget)?;
    }
    Ok(total)
}

fn sorted_entries(value: &Value, values: CallValues, budget: &Budget) -> Result<Value> {
    let [case, by, reverse] = values.bind("dictsort", ["case_sensitive", "by", "reverse"])?;
    let Value::Dict(dict) = value else {
        return Err(Error::new(format!(
            "'{}' object has no attribute 'items'",
            value.kind()
        )));
    };
    let by_value = match str_or(by.as_ref(), "key")? {
        "key" => false,
        "value" => true,
        _ => {
            return Err(Error::new(
                "You can only sort by either \"key\" or \"value\"",
            ));
        }
    };
    let mut keyed = Vec::new();
    for (key, value) in &dict.entries {
        let by = match if by_value { value } else { key } {
            Value::Str(text) | Value::Markup(text) if !is_set(case.as_ref()) => {
                Value::str(text.to_lowercase())
            }
            other => other.clone(),
        };
        keyed.push((by, Value::tuple(vec![key.clone(), value.clone()])?));
    }
    Value::list(sorted(keyed, is_set(reverse.as_ref()), budget)?)
}

/// `batch`: parts of a given size; `slice`: a given number of parts.
fn parts(name: &str, value: &Value, values: CallValues, budget: &Budget) -> Result<Value> {
    let [count, fill] = values.bind(name, ["count", "fill_with"])?;
    let count = usize::try_from(int_or(count.as_ref(), 0)?).unwrap_or(0);
    if !(1..=MAX_PARTS).contains(&count) {
        return Err(Error::new(format!(
            "{name} needs a number from 1 to {MAX_PARTS}"
        )));
    }
    let fill = fill.filter(|fill| !matches!(fill, Value::None));
    let elements = value.elements(budget)?;
    let mut parts: Vec<Vec<Value>> = Vec::new();
    if name == "batch" {
        parts.extend(elements.chunks(count).map(<[Value]>::to_vec));
        if let (Some(last), Some(fill)) = (parts.last_mut(), fill) {
            budget.copy(count)?;
            last.resize(count, fill);
        }
    } else {
        budget.copy(count)?;
        let (each, more) = (elements.len() / count, elements.len() % count);
        let mut elements = elements.into_iter();
        for part in 0..count {
            let size = each + usize::from(part < more);
            let mut taken: Vec<Value> = elements.by_ref().take(size).collect();
            if part >= more && more > 0 {
                taken.extend(fill.clone());
            }
            parts.push(taken);
        }
    }
    let parts: Result<Vec<Value>> = parts
        .into_iter()
        .map(|part| Value::seq(SeqKind::List, part))
        .collect();
    Ok(Value::iter_of(parts?))
}
