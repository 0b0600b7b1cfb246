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
