//! What was measured, as lines of one table that can be printed one by one.

use serde_json::Value;

/// The columns: what stands over them, and how wide they are.
const COLUMNS: [(&str, usize); 10] = [
    ("batch", 5),
    ("seq", 5),
    ("experts", 7),
    ("tokens/s", 8),
    ("(min to max)", 15),
    ("s/step", 7),
    ("peak MiB", 8),
    ("GFLOP/token", 11),
    ("GFLOP/s", 7),
    ("of limit", 13),
];

/// The first line.
pub(super) fn header() -> String {
    line(&COLUMNS.map(|(name, _)| name.to_owned()))
}

/// The line of a result as JSON has it.
pub(super) fn row(result: &Value) -> String {
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let count = |key: &str| {
        result[key]
            .as_u64()
            .map_or_else(|| "–".into(), |n| n.to_string())
    };
    let giga = |key: &str| number(&result[key]) / 1e9;
    let speed = |key: &str| number(&result["tokens_per_second"][key]);
    let peak = result["peak_bytes"].as_u64();
    line(&[
        count("batch"),
        count("seq"),
        count("experts"),
        format!("{:.0}", speed("median")),
        format!("({:.0} to {:.0})", speed("min"), speed("max")),
        format!("{:.3}", number(&result["step_seconds"]["median"])),
        peak.map_or_else(|| "–".into(), |bytes| (bytes >> 20).to_string()),
        format!("{:.3}", giga("flops_per_token")),
        format!("{:.0}", giga("flops_per_second")),
        format!(
            "{:.0} % of {:.0}",
            100.0 * number(&result["fraction_of_limit"]),
            giga("limit_flops_per_second")
        ),
    ])
}

fn line(cells: &[String; COLUMNS.len()]) -> String {
    let aligned = cells.iter().zip(COLUMNS);
    let aligned = aligned.map(|(cell, (_, width))| format!("{cell:>width$}"));
    aligned.collect::<Vec<_>>().join("  ")
}
