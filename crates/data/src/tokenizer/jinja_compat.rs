//! The parts of Hugging Face's Python environment for chat templates that minijinja lacks.
//!
//! Templates are written against Jinja2 with Python's values, so their output has Python's habits: `json.dumps` puts a space
//! after `,` and `:` and escapes no HTML, `None` and `True` are capitalized, and `strftime_now` reads the clock. String and list
//! methods come from `minijinja_contrib::pycompat`.
//!
//! Source: huggingface/transformers: utils/chat_template_utils.py.

use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, Output, State, Value};
use serde::Serialize;
use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

/// Maximum number of steps of the template machine in one rendering: a chat of ten thousand messages needs about a million, and
/// an endless loop stops within seconds.
const FUEL: u64 = 10_000_000;

/// An environment in which a template renders as in Hugging Face's library.
pub(crate) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(print_value);
    environment.set_fuel(Some(FUEL));
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", to_json);
    environment
}

fn invalid(message: impl Into<String>) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, message.into())
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(invalid(message))
}

fn print_value(
    out: &mut Output<'_>,
    state: &State<'_, '_>,
    value: &Value,
) -> Result<(), minijinja::Error> {
    let written = match bool::try_from(value.clone()) {
        Ok(flag) if value.kind() == minijinja::value::ValueKind::Bool => {
            out.write_str(if flag { "True" } else { "False" })
        }
        _ if value.is_none() => out.write_str("None"),
        _ => return minijinja::escape_formatter(out, state, value),
    };
    written.map_err(minijinja::Error::from)
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=…, sort_keys=…)`.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    if options.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        return Err(invalid("tojson: `ensure_ascii=true` is not supported"));
    }
    options.assert_all_used()?;

    let mut json = serde_json::to_value(value).map_err(|problem| invalid(problem.to_string()))?;
    if sort_keys == Some(true) {
        json.sort_all_objects();
    }
    let mut out = Vec::new();
    let written = match indent {
        Some(width) => {
            // Wider than any layout; a larger number only eats memory.
            let spaces = " ".repeat(width.min(16));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            json.serialize(&mut serde_json::Serializer::with_formatter(
                &mut out, pretty,
            ))
        }
        None => json.serialize(&mut serde_json::Serializer::with_formatter(
            &mut out, Spaced,
        )),
    };
    written.map_err(|problem| invalid(problem.to_string()))?;
    let text = String::from_utf8(out).map_err(|problem| invalid(problem.to_string()))?;
    Ok(Value::from(text))
}

/// A value as Python's `json.dumps(value, ensure_ascii=False)` writes it.
pub(crate) fn json_text(value: &serde_json::Value) -> String {
    let mut out = Vec::new();
    let written = value.serialize(&mut serde_json::Serializer::with_formatter(
        &mut out, Spaced,
    ));
    let text = written.ok().and_then(|()| String::from_utf8(out).ok());
    text.unwrap_or_else(|| value.to_string())
}

/// One line of JSON with Python's `", "` and `": "`.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

/// Today's date and time in UTC. (Python's is local, but a training file should not depend on the place where it is read.)
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(|problem| invalid(problem.to_string()))?;
    strftime(now.as_secs(), format)
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = [
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
];

/// The directives of `strftime` that templates use, in the C locale.
fn strftime(unix_secs: u64, format: &str) -> Result<String, minijinja::Error> {
    let (days, secs) = (unix_secs / 86_400, unix_secs % 86_400);
    let (year, month, day) = civil_date(days);
    let month_name = MONTHS[(month - 1) as usize % 12];
    let weekday = WEEKDAYS[(days % 7) as usize];
    let (hour, minute, second) = (secs / 3600, secs / 60 % 60, secs % 60);

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(char) = chars.next() {
        if char != '%' {
            out.push(char);
            continue;
        }
        let text = match chars.next() {
            Some('Y') => format!("{year:04}"),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('d') => format!("{day:02}"),
            Some('e') => format!("{day:2}"),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{:02}", (hour + 11) % 12 + 1),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{second:02}"),
            Some('F') => format!("{year:04}-{month:02}-{day:02}"),
            Some('%') => "%".to_owned(),
            other => {
                return Err(invalid(format!(
                    "strftime_now: unknown directive %{}",
                    other.unwrap_or(' ')
                )));
            }
        };
        out.push_str(&text);
    }
    Ok(out)
}

/// Year, month and day of a day counted from 1970-01-01.
///
/// Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
fn civil_date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468; // days since 0000-03-01
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(template: &str, expected: &str) {
        let context = minijinja::context! {
            tool => Value::from_serialize(serde_json::json!({"z": "<a> & 'b'", "a": [1, 2.5, null, true, "é"]})),
            empty => Value::from_serialize(serde_json::json!({})),
        };
        assert_eq!(
            environment().render_str(template, context).unwrap(),
            expected,
            "{template}"
        );
    }

    #[test]
    fn values_print_as_python_prints_them() {
        check(
            "{{ tool|tojson }}",
            r#"{"z": "<a> & 'b'", "a": [1, 2.5, null, true, "é"]}"#,
        );
        check(
            "{{ tool|tojson(sort_keys=true) }}",
            r#"{"a": [1, 2.5, null, true, "é"], "z": "<a> & 'b'"}"#,
        );
        check("{{ [1]|tojson(indent=4) }}", "[\n    1\n]");
        check("{{ empty|tojson }}{{ []|tojson }}", "{}[]");
        check(
            "{{ none }} {{ true }} {{ false }} {{ 1 }}",
            "None True False 1",
        );
        check(
            "{{ ' a|b '.strip().split('|')[-1] }}{{ 'x'.startswith('x') }}",
            "bTrue",
        );
        check(
            "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "01",
        );
        check("  {% if true %}\nx\n  {% endif %}\ny", "x\ny");
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        let check = |secs, expected: &str| {
            assert_eq!(
                strftime(secs, "%a %A %e %d %b %B %m %y %Y %H:%M:%S %I%p %F %%").unwrap(),
                expected
            );
        };
        check(
            0,
            "Thu Thursday  1 01 Jan January 01 70 1970 00:00:00 12AM 1970-01-01 %",
        );
        check(
            1_709_210_096,
            "Thu Thursday 29 29 Feb February 02 24 2024 12:34:56 12PM 2024-02-29 %",
        );
        check(
            4_102_444_799,
            "Thu Thursday 31 31 Dec December 12 99 2099 23:59:59 11PM 2099-12-31 %",
        );
    }

    #[test]
    fn a_template_that_never_ends_is_stopped() {
        let source =
            "{% for i in range(10000) %}{% for j in range(10000) %}{{ j }}{% endfor %}{% endfor %}";
        let problem = environment().render_str(source, ()).unwrap_err();
        assert_eq!(problem.kind(), ErrorKind::OutOfFuel);
    }
}
