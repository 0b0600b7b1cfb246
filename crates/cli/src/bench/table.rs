//! Measurements as lines of a table that are printed one by one.

use serde_json::Value;

/// A column: its header, its width, and its cell for a result in JSON.
#[derive(Clone, Copy, Debug)]
pub(super) struct Column(
    pub(super) &'static str,
    pub(super) usize,
    pub(super) fn(&Value) -> String,
);

/// The header.
pub(super) fn header(columns: &[Column]) -> String {
    line(columns, |Column(name, ..)| (*name).to_owned())
}

/// The line of a result.
pub(super) fn row(columns: &[Column], result: &Value) -> String {
    line(columns, |Column(.., cell)| cell(result))
}

fn line(columns: &[Column], cell: impl Fn(&Column) -> String) -> String {
    let cells = columns.iter().map(|column| {
        let (cell, width) = (cell(column), column.1);
        format!("{cell:>width$}")
    });
    cells.collect::<Vec<_>>().join("  ")
}

/// A whole number, or a dash.
pub(super) fn count(value: &Value) -> String {
    value
        .as_u64()
        .map_or_else(|| "–".into(), |count| count.to_string())
}

/// Bytes in MiB, or a dash.
pub(super) fn mebibytes(value: &Value) -> String {
    let mib = value.as_u64().map(|bytes| Value::from(bytes >> 20));
    count(&mib.unwrap_or_default())
}

/// Memory of the process, and that of a GPU.
pub(super) const PEAK: Column = Column("peak MiB", 8, |result| mebibytes(&result["peak_bytes"]));
pub(super) const DEVICE: Column = Column("GPU MiB", 7, |result| mebibytes(&result["device_bytes"]));

/// Energy of a token, where the machine tells.
pub(super) const JOULES: Column = Column("J/token", 7, |result| {
    let joules = result["joules_per_token"].as_f64();
    joules.map_or_else(|| "–".into(), |joules| format!("{joules:.3}"))
});

/// Where it was measured, for the line above the table.
pub(super) fn place(measured: &Value) -> String {
    match measured["adapter"].as_str() {
        Some(adapter) => format!(
            "device {} ({adapter})",
            measured["device"].as_str().unwrap_or_default()
        ),
        None if measured["threads"] == 1 => "1 thread".into(),
        None => format!("{} threads", measured["threads"]),
    }
}

/// Seconds.
pub(super) fn seconds(value: &Value) -> String {
    format!("{:.2}", number(value))
}

/// A number in billions.
pub(super) fn giga(value: &Value) -> f64 {
    number(value) / 1e9
}

/// The median of a spread.
pub(super) fn median(value: &Value) -> f64 {
    number(&value["median"])
}

/// The ends of a spread of speeds.
pub(super) fn spread(value: &Value) -> String {
    let [min, max] = ["min", "max"].map(|end| number(&value[end]));
    // Low speeds differ in the first decimal.
    let digits = usize::from(min < 100.0);
    format!("({min:.digits$} to {max:.digits$})")
}

/// The share of a peak rate that a result reaches, and the peak in billions; a dash if there is none.
pub(super) fn fraction_of(result: &Value, peak: &str) -> String {
    if result[peak].is_null() {
        return "–".into();
    }
    let fraction = 100.0 * number(&result["fraction_of_peak"]);
    let peak = giga(&result[peak]);
    let digits = usize::from(peak < 100.0);
    format!("{fraction:.0} % of {peak:.digits$}")
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

/// The share of the best speed from which more sequences are of little use.
const KNEE: f64 = 0.9;

/// The smallest batch with nearly the best speed, if batches of one length were measured.
pub(super) fn knee(results: &Value) -> Option<String> {
    let results = results.as_array()?;
    let is_alike = |result: &Value| {
        let first = &results[0];
        ["seq", "experts"]
            .iter()
            .all(|key| result[*key] == first[*key])
    };
    if results.len() < 3 || !results.iter().all(is_alike) {
        return None;
    }
    let speed = |result: &Value| median(&result["tokens_per_second"]);
    let best = results.iter().map(speed).fold(0.0, f64::max);
    let enough = results.iter().filter(|result| speed(result) >= KNEE * best);
    let knee = enough.min_by_key(|result| result["batch"].as_u64())?;
    Some(format!(
        "knee: a batch of {} has {:.0} % of the best speed",
        count(&knee["batch"]),
        100.0 * speed(knee) / best
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_knee_is_the_smallest_batch_with_nearly_the_best_speed() {
        let result = |batch: u64, seq: u64, speed: f64| json!({"batch": batch, "seq": seq, "tokens_per_second": {"median": speed}});
        let speeds = [(1, 50.0), (2, 95.0), (4, 170.0), (8, 180.0), (16, 181.0)];
        let of = |seq: fn(u64) -> u64| {
            let results = speeds.map(|(batch, speed)| result(batch, seq(batch), speed));
            knee(&json!(results))
        };
        let expected = "knee: a batch of 4 has 94 % of the best speed";
        assert_eq!(of(|_| 256).as_deref(), Some(expected));
        assert_eq!(of(|batch| batch), None);
        assert_eq!(knee(&json!([result(1, 256, 50.0)])), None);
    }
}
