//! Line plots as SVG, for files that a browser or a paper takes.

use std::fmt::Write;

/// A named line.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// What is drawn, and what stands beside it.
#[derive(Clone, Debug)]
pub(crate) struct Plot {
    pub(crate) title: String,
    pub(crate) x: String,
    pub(crate) y: String,
    pub(crate) lines: Vec<Line>,
    /// A height to be marked, and its name.
    pub(crate) mark: Option<(f64, String)>,
    /// How the axes run.
    pub(crate) axes: Axes,
}

/// How the axes of a plot run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Axes {
    /// Both evenly, y from 0.
    FromZero,
    /// Both evenly, y from its least value.
    Tight,
    /// x by powers of ten, y from its least value.
    LogX,
}

/// A table of numbers as colors: rows by name.
#[derive(Clone, Debug)]
pub(crate) struct Heatmap {
    pub(crate) title: String,
    pub(crate) x: String,
    pub(crate) rows: Vec<(String, Vec<f64>)>,
    /// What the darkest color stands for.
    pub(crate) most: f64,
}

const SIZE: [f64; 2] = [760.0, 420.0];
/// Left, top, right and bottom of the drawing.
const FRAME: [f64; 4] = [70.0, 40.0, 740.0, 370.0];
/// Okabe and Ito's colors, which color-blind people tell apart.
const COLORS: [&str; 5] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"];
/// About as many ticks on an axis.
const TICKS: f64 = 6.0;

impl Plot {
    /// The whole file. Points that are not finite are left out.
    pub(crate) fn to_svg(&self) -> String {
        let [_, height] = SIZE;
        let [left, top, right, bottom] = FRAME;
        let (xs, ys) = self.ranges();
        let at_x = |x: f64| left + (self.along_x(x) - xs[0]) / (xs[1] - xs[0]) * (right - left);
        let at_y = |y: f64| bottom - (y - ys[0]) / (ys[1] - ys[0]) * (bottom - top);
        let mut svg = head(SIZE);
        let title = [self.title.as_str(), &self.y].join(if self.y.is_empty() { "" } else { ", " });
        text(&mut svg, [left, 24.0], "start", &title);
        let middle = (left + right) / 2.0;
        text(&mut svg, [middle, height - 12.0], "middle", &self.x);
        for y in ticks(ys) {
            let ends = [(left, at_y(y)), (right, at_y(y))];
            path(&mut svg, &ends, "#dddddd", "");
            text(&mut svg, [left - 6.0, at_y(y) + 4.0], "end", &short(y));
        }
        for along in ticks(xs) {
            let x = left + (along - xs[0]) / (xs[1] - xs[0]) * (right - left);
            let is_log = self.axes == Axes::LogX;
            let name = if is_log { 10f64.powf(along) } else { along };
            text(&mut svg, [x, bottom + 18.0], "middle", &short(name));
        }
        if let Some((y, name)) = &self.mark {
            path(
                &mut svg,
                &[(left, at_y(*y)), (right, at_y(*y))],
                "black",
                "5 4",
            );
            text(&mut svg, [right, at_y(*y) - 4.0], "end", name);
        }
        let mut name_end = right;
        for (i, line) in self.lines.iter().enumerate().rev() {
            let color = COLORS[i % COLORS.len()];
            let points = line
                .points
                .iter()
                .filter(|(x, y)| x.is_finite() && y.is_finite());
            let points: Vec<_> = points.map(|(x, y)| (at_x(*x), at_y(*y))).collect();
            path(&mut svg, &points, color, "");
            if line.name.is_empty() {
                continue;
            }
            // Beside the title, where no line runs; seven pixels a letter are enough.
            text(&mut svg, [name_end, 24.0], "end", &line.name);
            let start = name_end - 7.0 * line.name.chars().count() as f64 - 22.0;
            path(&mut svg, &[(start, 20.0), (start + 16.0, 20.0)], color, "");
            name_end = start - 14.0;
        }
        svg + "</svg>\n"
    }

    /// Where a number is on the x axis.
    fn along_x(&self, x: f64) -> f64 {
        if self.axes == Axes::LogX {
            x.log10()
        } else {
            x
        }
    }

    /// The least and largest x and y that are drawn, x as the axis runs.
    fn ranges(&self) -> ([f64; 2], [f64; 2]) {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let range = |values: &mut dyn Iterator<Item = f64>, start: [f64; 2]| {
            let finite = values.filter(|v| v.is_finite());
            let [low, high] = finite.fold(start, |[a, b], v| [a.min(v), b.max(v)]);
            // A range of nothing, or of no width, is drawn as one of width 1.
            match high - low {
                width if width > 0.0 => [low, high],
                0.0 => [low, low + 1.0],
                _ => [0.0, 1.0],
            }
        };
        let mark = self.mark.iter().map(|(y, _)| *y);
        let nothing = [f64::INFINITY, f64::NEG_INFINITY];
        let start = if self.axes == Axes::FromZero {
            [0.0, 0.0]
        } else {
            nothing
        };
        (
            range(&mut points().map(|(x, _)| self.along_x(*x)), nothing),
            range(&mut points().map(|(_, y)| *y).chain(mark), start),
        )
    }
}

impl Heatmap {
    /// The whole file. A row has a line of its own, 14 high.
    pub(crate) fn to_svg(&self) -> String {
        const ROW: f64 = 14.0;
        let [left, top, right, _] = FRAME;
        let n_cols = self
            .rows
            .iter()
            .map(|(_, row)| row.len())
            .max()
            .unwrap_or(0);
        let bottom = top + ROW * self.rows.len() as f64;
        let width = (right - left) / n_cols.max(1) as f64;
        let mut svg = head([SIZE[0], bottom + 36.0]);
        text(&mut svg, [left, 24.0], "start", &self.title);
        for (i, (name, row)) in self.rows.iter().enumerate() {
            let y = top + ROW * i as f64;
            text(&mut svg, [left - 6.0, y + 11.0], "end", name);
            for (j, value) in row.iter().enumerate() {
                let x = left + width * j as f64;
                let share = (value / self.most).clamp(0.0, 1.0);
                // From white to the first color.
                let [r, g, b] = [0.0, 114.0, 178.0].map(|c| 255.0 + share * (c - 255.0));
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{y:.0}\" width=\"{width:.1}\" height=\"13\" \
                     fill=\"#{:02x}{:02x}{:02x}\"/>",
                    r as u8, g as u8, b as u8
                );
            }
        }
        for name in ticks([0.0, n_cols.saturating_sub(1).max(1) as f64]) {
            let x = left + (name + 0.5) * width;
            text(&mut svg, [x, bottom + 14.0], "middle", &short(name));
        }
        text(
            &mut svg,
            [(left + right) / 2.0, bottom + 30.0],
            "middle",
            &self.x,
        );
        svg + "</svg>\n"
    }
}

/// The start of a file, on white.
fn head([width, height]: [f64; 2]) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
    )
}

fn text(svg: &mut String, [x, y]: [f64; 2], anchor: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    // Writing to a string does not fail.
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
    );
}

fn path(svg: &mut String, points: &[(f64, f64)], color: &str, dashes: &str) {
    let points: Vec<String> = points
        .iter()
        .map(|(x, y)| format!("{x:.1},{y:.1}"))
        .collect();
    let _ = writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"1.5\" \
         stroke-dasharray=\"{dashes}\"/>",
        points.join(" ")
    );
}

/// Round numbers within a range: multiples of 1, 2 or 5 times a power of ten.
fn ticks([low, high]: [f64; 2]) -> Vec<f64> {
    let rough = (high - low) / TICKS;
    let power = 10f64.powf(rough.log10().floor());
    let nice = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .find(|nice| nice * power >= rough);
    let step = nice.unwrap_or(10.0) * power;
    let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
    (first..=last).map(|i| i as f64 * step).collect()
}

/// A number of a tick.
fn short(value: f64) -> String {
    if value == 0.0 || (0.01..100_000.0).contains(&value.abs()) {
        let text = format!("{value:.3}");
        text.trim_end_matches('0').trim_end_matches('.').into()
    } else {
        format!("{value:.1e}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(points: Vec<(f64, f64)>) -> String {
        let line = Line {
            name: "a < b & c".into(),
            points,
        };
        Plot {
            title: "title".into(),
            x: "step".into(),
            y: "%".into(),
            lines: vec![line],
            mark: Some((0.25, "bar".into())),
            axes: Axes::FromZero,
        }
        .to_svg()
    }

    #[test]
    fn points_lie_in_the_frame_and_names_are_escaped() {
        let svg = plot(vec![(1.0, 0.0), (2.0, f64::NAN), (3.0, 0.5)]);
        assert!(svg.contains("points=\"70.0,370.0 740.0,40.0\""), "{svg}");
        assert!(svg.contains("a &lt; b &amp; c") && !svg.contains("NaN"));
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    }

    #[test]
    fn nothing_and_single_points_can_be_drawn() {
        for points in [vec![], vec![(5.0, 0.0)], vec![(f64::NAN, f64::INFINITY)]] {
            let svg = plot(points);
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn axes_run_as_they_are_told() {
        let svg = |axes| {
            let points = vec![(1e-4, 2.0), (1e-3, 4.0), (1e-2, 3.0)];
            let name = String::new();
            let lines = vec![Line {
                name: name.clone(),
                points,
            }];
            let [title, x, y] = [name.clone(), name.clone(), name];
            Plot {
                title,
                x,
                y,
                lines,
                mark: None,
                axes,
            }
            .to_svg()
        };
        let (log, tight) = (svg(Axes::LogX), svg(Axes::Tight));
        assert!(
            log.contains("points=\"70.0,370.0 405.0,40.0 740.0,205.0\""),
            "{log}"
        );
        assert!(
            tight.contains("points=\"70.0,370.0 130.9,40.0 740.0,205.0\""),
            "{tight}"
        );
    }

    #[test]
    fn a_heatmap_is_darkest_where_the_numbers_are_largest() {
        let map = Heatmap {
            title: "load".into(),
            x: "expert".into(),
            rows: vec![
                ("3".into(), vec![0.0, 2.0, 9.0]),
                ("4".into(), vec![f64::NAN]),
            ],
            most: 2.0,
        };
        let svg = map.to_svg();
        let colors: Vec<&str> = svg
            .lines()
            .skip(2)
            .filter_map(|line| line.split_once("fill=\""))
            .map(|(_, c)| &c[..7])
            .collect();
        assert_eq!(colors, ["#ffffff", "#0072b2", "#0072b2", "#000000"]);
    }

    #[test]
    fn ticks_are_round_and_within_the_range() {
        assert_eq!(ticks([5.0, 40.0]), [10.0, 20.0, 30.0, 40.0]);
        assert_eq!(ticks([0.0, 1.0]).len(), 6);
        assert_eq!(ticks([-4.0, -2.0]), [-4.0, -3.5, -3.0, -2.5, -2.0]);
        assert!(ticks([1e300, 2e300]).len() > 2);
    }

    #[test]
    fn ticks_are_short() {
        assert_eq!(
            [0.0, 0.05, 1.5, 1000.0, 1e-5].map(short),
            ["0", "0.05", "1.5", "1000", "1.0e-5"]
        );
    }
}
