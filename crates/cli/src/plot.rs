//! Line plots and heatmaps as SVG, for browsers and papers. They are 500 wide, what a page in two columns or a phone
//! has, so that their letters stay legible there.

use std::fmt::Write;
use std::ops::Range;

/// A named line.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// A line plot.
#[derive(Clone, Debug)]
pub(crate) struct Plot {
    pub(crate) title: String,
    /// Name of the x axis.
    pub(crate) x: String,
    /// Name of the y axis, usually its unit.
    pub(crate) y: String,
    /// The first is drawn last, over the others.
    pub(crate) lines: Vec<Line>,
    pub(crate) mark: Option<Mark>,
    pub(crate) axes: Axes,
}

/// A dashed line across a plot, and its name.
#[derive(Clone, Debug)]
pub(crate) enum Mark {
    /// Vertical.
    X(f64, String),
    /// Horizontal.
    Y(f64, String),
}

/// The scales of a plot's axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Axes {
    /// x counts steps; y starts at 0.
    FromZero,
    /// x counts steps; y starts near its least value.
    Tight,
    /// x is logarithmic; y starts near its least value.
    LogX,
}

/// A table of numbers as colors: rows by name.
#[derive(Clone, Debug)]
pub(crate) struct Heatmap {
    pub(crate) title: String,
    pub(crate) x: String,
    pub(crate) rows: Vec<(String, Vec<f64>)>,
    /// The number that the darkest color stands for.
    pub(crate) most: f64,
}

const CHART_WIDTH: f64 = 500.0;
/// Left and right of the drawing: tick labels and the name of the y axis fit on the left, half a label on the right.
const FRAME: [f64; 2] = [66.0, 476.0];
/// Height of the drawing of a plot.
const CHART_HEIGHT: f64 = 220.0;
/// From one line of text to the next.
const ROW: f64 = 18.0;
/// Width of a letter of the text, on average and rather too large: browsers choose the font.
const LETTER: f64 = 7.0;
/// Between two names of a legend.
const GAP: f64 = 16.0;
/// Okabe and Ito's colors, which color-blind people tell apart.
const COLORS: [&str; 5] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"];
/// Most steps between ticks on an axis.
const TICKS: f64 = 6.0;

/// A tick: where on its axis, and its label.
type Tick = (f64, String);

impl Plot {
    /// The whole file. Points that are not finite are left out.
    pub(crate) fn to_svg(&self) -> String {
        let [left, right] = FRAME;
        let mut header = String::new();
        let legend = title(&mut header, &self.title);
        let top = self.legend(&mut header, legend) + 8.0;
        let bottom = top + CHART_HEIGHT;
        let (xs, ys) = self.ranges();
        let at_x = |x: f64| left + (self.along_x(x) - xs[0]) / (xs[1] - xs[0]) * (right - left);
        let at_y = |y: f64| bottom - (y - ys[0]) / (ys[1] - ys[0]) * (bottom - top);

        let mut svg = head(bottom + 44.0) + &header;
        for (y, label) in ticks(ys, step(ys)) {
            path(&mut svg, &[(left, at_y(y)), (right, at_y(y))], GRID);
            text(&mut svg, [left - 6.0, at_y(y) + 4.0], "end", &label);
        }
        let x_ticks = match self.axes {
            Axes::LogX => log_ticks(xs),
            Axes::FromZero | Axes::Tight => ticks(xs, step(xs).max(1.0)),
        };
        for (along, label) in x_ticks {
            let x = left + (along - xs[0]) / (xs[1] - xs[0]) * (right - left);
            path(&mut svg, &[(x, bottom), (x, bottom + 4.0)], GRID);
            text(&mut svg, [x, bottom + 18.0], "middle", &label);
        }
        let middle = (left + right) / 2.0;
        text(&mut svg, [middle, bottom + 36.0], "middle", &self.x);
        upward(&mut svg, [14.0, (top + bottom) / 2.0], &self.y);

        for (i, line) in self.lines.iter().enumerate().rev() {
            let is_drawn = |(x, y): &&(f64, f64)| self.along_x(*x).is_finite() && y.is_finite();
            let points = line.points.iter().filter(is_drawn);
            let points: Vec<_> = points.map(|(x, y)| (at_x(*x), at_y(*y))).collect();
            path(
                &mut svg,
                &points,
                Stroke {
                    color: color(i),
                    dashes: "",
                },
            );
        }
        if let Some(mark) = &self.mark {
            let at = match mark {
                Mark::X(x, _) => at_x(*x),
                Mark::Y(y, _) => at_y(*y),
            };
            mark.draw(&mut svg, at, [top, bottom]);
        }
        svg + "</svg>\n"
    }

    /// The names of the lines, in rows below a height. Returns where they end.
    fn legend(&self, svg: &mut String, top: f64) -> f64 {
        let named = self
            .lines
            .iter()
            .enumerate()
            .filter(|(_, line)| !line.name.is_empty());
        let items: Vec<_> = named.map(|(i, line)| (color(i), &line.name)).collect();
        let widths: Vec<_> = items.iter().map(|(_, name)| width(name) + 20.0).collect();
        let mut y = top;
        for row in rows(&widths, GAP) {
            y += ROW;
            // One text for the whole row, so that the spacing is even in whatever font.
            let mut names = String::new();
            for (i, (color, name)) in items[row].iter().enumerate() {
                let gap = if i == 0 { 0.0 } else { GAP };
                let _ = write!(
                    names,
                    "<tspan dx=\"{gap}\" fill=\"{color}\" font-weight=\"bold\">—</tspan>\
                     <tspan dx=\"4\">{}</tspan>",
                    escaped(name)
                );
            }
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{y:.1}\">{names}</text>",
                FRAME[0]
            );
        }
        y
    }

    /// Where a number is on the x axis.
    fn along_x(&self, x: f64) -> f64 {
        match self.axes {
            Axes::LogX => x.log10(),
            Axes::FromZero | Axes::Tight => x,
        }
    }

    /// The least and largest x and y that are drawn: x as the axis has it, y from tick to tick.
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
        let (mark_x, mark_y) = match &self.mark {
            Some(Mark::X(x, _)) => (Some(self.along_x(*x)), None),
            Some(Mark::Y(y, _)) => (None, Some(*y)),
            None => (None, None),
        };
        let nothing = [f64::INFINITY, f64::NEG_INFINITY];
        let start = match self.axes {
            Axes::FromZero => [0.0, 0.0],
            Axes::Tight | Axes::LogX => nothing,
        };
        let xs = points().map(|(x, _)| self.along_x(*x));
        let ys = points().map(|(_, y)| *y);
        let [low, high] = range(&mut ys.chain(mark_y), start);
        let step = step([low, high]);
        let ys = [
            (low / step + INEXACTNESS).floor() * step,
            (high / step - INEXACTNESS).ceil() * step,
        ];
        (range(&mut xs.chain(mark_x), nothing), ys)
    }
}

impl Mark {
    /// Draws the line at a place in a drawing between two heights.
    fn draw(&self, svg: &mut String, at: f64, [top, bottom]: [f64; 2]) {
        let [left, right] = FRAME;
        match self {
            Self::X(_, name) => {
                path(svg, &[(at, top), (at, bottom)], MARK);
                // On the side that has more room.
                let (x, anchor) = if at < (left + right) / 2.0 {
                    (at + 5.0, "start")
                } else {
                    (at - 5.0, "end")
                };
                mark_name(svg, [x, top + 12.0], anchor, name);
            }
            Self::Y(_, name) => {
                path(svg, &[(left, at), (right, at)], MARK);
                mark_name(svg, [right, at - 4.0], "end", name);
            }
        }
    }
}

impl Heatmap {
    /// The whole file. A row has a line of its own, 14 high.
    pub(crate) fn to_svg(&self) -> String {
        const LINE: f64 = 14.0;
        let [left, right] = FRAME;
        let n_cols = self
            .rows
            .iter()
            .map(|(_, row)| row.len())
            .max()
            .unwrap_or(0);
        let mut header = String::new();
        let top = title(&mut header, &self.title) + 8.0;
        let bottom = top + LINE * self.rows.len() as f64;
        let width = (right - left) / n_cols.max(1) as f64;
        let mut svg = head(bottom + 40.0) + &header;
        for (i, (name, row)) in self.rows.iter().enumerate() {
            let y = top + LINE * i as f64;
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
        let columns = [0.0, n_cols.saturating_sub(1) as f64];
        for (column, label) in ticks(columns, step(columns).max(1.0)) {
            let x = left + (column + 0.5) * width;
            text(&mut svg, [x, bottom + 16.0], "middle", &label);
        }
        let middle = (left + right) / 2.0;
        text(&mut svg, [middle, bottom + 32.0], "middle", &self.x);
        svg + "</svg>\n"
    }
}

/// The start of a file, on white.
fn head(height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{CHART_WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {CHART_WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{CHART_WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    )
}

/// A title, in as many rows as it needs. Returns where it ends.
fn title(svg: &mut String, title: &str) -> f64 {
    let words: Vec<&str> = title.split_whitespace().collect();
    let widths: Vec<_> = words.iter().map(|word| width(word)).collect();
    let mut y = 4.0;
    for row in rows(&widths, LETTER) {
        y += ROW;
        text(svg, [FRAME[0], y], "start", &words[row].join(" "));
    }
    y
}

/// The width of a text, estimated.
fn width(text: &str) -> f64 {
    LETTER * text.chars().count() as f64
}

/// Which things of some widths stand in one row, with gaps between them. What is too wide has a row of its own.
fn rows(widths: &[f64], gap: f64) -> Vec<Range<usize>> {
    let room = CHART_WIDTH - FRAME[0];
    let mut rows: Vec<Range<usize>> = Vec::new();
    let mut used = 0.0;
    for (i, width) in widths.iter().enumerate() {
        match rows.last_mut() {
            Some(row) if used + gap + width <= room => {
                row.end = i + 1;
                used += gap + width;
            }
            _ => {
                rows.push(i..i + 1);
                used = *width;
            }
        }
    }
    rows
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

fn text(svg: &mut String, [x, y]: [f64; 2], anchor: &str, text: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>",
        escaped(text)
    );
}

/// A text on white, since lines may run behind it.
fn mark_name(svg: &mut String, [x, y]: [f64; 2], anchor: &str, name: &str) {
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" stroke=\"white\" \
         stroke-width=\"4\" paint-order=\"stroke\">{}</text>",
        escaped(name)
    );
}

/// A text that reads from bottom to top.
fn upward(svg: &mut String, [x, y]: [f64; 2], text: &str) {
    if !text.is_empty() {
        let _ = writeln!(
            svg,
            "<text transform=\"translate({x:.1} {y:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            escaped(text)
        );
    }
}

#[derive(Clone, Copy)]
struct Stroke<'a> {
    color: &'a str,
    dashes: &'a str,
}

const GRID: Stroke<'_> = Stroke {
    color: "#dddddd",
    dashes: "",
};
const MARK: Stroke<'_> = Stroke {
    color: "black",
    dashes: "5 4",
};

fn color(line: usize) -> &'static str {
    COLORS[line % COLORS.len()]
}

/// A line, or a dot if it has one point.
fn path(svg: &mut String, points: &[(f64, f64)], Stroke { color, dashes }: Stroke<'_>) {
    if let [(x, y)] = points {
        let _ = writeln!(
            svg,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{color}\"/>"
        );
        return;
    }
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

/// How far from a whole number a quotient counts as one: its numbers are not exact.
const INEXACTNESS: f64 = 1e-6;

/// A round distance of ticks: 1, 2 or 5 times a power of ten.
fn step([low, high]: [f64; 2]) -> f64 {
    let rough = (high - low) / TICKS;
    let power = 10f64.powf(rough.log10().floor());
    let nice = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .find(|nice| nice * power >= rough * (1.0 - INEXACTNESS));
    nice.unwrap_or(10.0) * power
}

/// Ticks at the multiples of a step, with as many digits as tell them apart.
fn ticks([low, high]: [f64; 2], step: f64) -> Vec<Tick> {
    let first = (low / step - INEXACTNESS).ceil() as i64;
    let last = (high / step + INEXACTNESS).floor() as i64;
    let most = low.abs().max(high.abs());
    let label = |value: f64| {
        let (digit, step_digit) = (value.abs().log10(), step.log10());
        let [digit, step_digit] = [digit, step_digit].map(|d| (d + INEXACTNESS).floor());
        if value == 0.0 {
            "0".to_owned()
        } else if (0.01..100_000.0).contains(&most) {
            format!("{value:.*}", (-step_digit).max(0.0) as usize)
        } else {
            format!("{value:.*e}", (digit - step_digit).max(0.0) as usize)
        }
    };
    let tick = |i: i64| (i as f64 * step, label(i as f64 * step));
    (first..=last).map(tick).collect()
}

/// Ticks of a logarithmic axis, in powers of ten: the powers, or 1, 2 and 5 times them where the axis is short.
fn log_ticks([low, high]: [f64; 2]) -> Vec<Tick> {
    let factors: &[f64] = if high - low < 3.0 {
        &[1.0, 2.0, 5.0]
    } else {
        &[1.0]
    };
    let every = ((high - low) / TICKS).ceil().max(1.0) as usize;
    let powers = (low.floor() as i64..=high.ceil() as i64).step_by(every);
    let all = powers.flat_map(|power| {
        let tick = move |factor: &f64| (power as f64 + factor.log10(), format!("{factor}e{power}"));
        factors.iter().map(tick)
    });
    let is_within = |(at, _): &Tick| *at >= low - INEXACTNESS && *at <= high + INEXACTNESS;
    all.filter(is_within).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str, points: &[(f64, f64)]) -> Line {
        Line {
            name: name.into(),
            points: points.to_vec(),
        }
    }

    fn plot(axes: Axes, lines: Vec<Line>) -> Plot {
        Plot {
            title: "title".into(),
            x: "step".into(),
            y: "%".into(),
            lines,
            mark: None,
            axes,
        }
    }

    /// The numbers under a name, of all elements that have it.
    fn numbers(svg: &str, name: &str) -> Vec<f64> {
        let key = format!(" {name}=\"");
        let values = svg.split(&key).skip(1);
        values
            .map(|rest| rest.split('"').next().unwrap().parse().unwrap())
            .collect()
    }

    #[test]
    fn points_lie_in_the_frame_and_names_are_escaped() {
        let mut plot = plot(
            Axes::FromZero,
            vec![line(
                "a < b & c",
                &[(1.0, 0.0), (2.0, f64::NAN), (3.0, 0.5)],
            )],
        );
        plot.mark = Some(Mark::Y(0.25, "bar".into()));
        let svg = plot.to_svg();
        assert!(svg.contains("points=\"66.0,268.0 476.0,48.0\""), "{svg}");
        assert!(svg.contains("points=\"66.0,158.0 476.0,158.0\""), "{svg}");
        assert!(svg.contains("a &lt; b &amp; c") && !svg.contains("NaN"));
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    }

    #[test]
    fn nothing_and_single_points_can_be_drawn() {
        for points in [vec![], vec![(5.0, 0.0)], vec![(f64::NAN, f64::INFINITY)]] {
            let svg = plot(Axes::FromZero, vec![line("", &points)]).to_svg();
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            let is_dot = points.first().is_some_and(|(x, _)| x.is_finite());
            assert_eq!(svg.contains("<circle"), is_dot, "{svg}");
        }
    }

    #[test]
    fn axes_run_as_they_are_told() {
        let svg = |axes| {
            let mut plot = plot(
                axes,
                vec![line("", &[(1e-4, 2.0), (1e-3, 4.0), (1e-2, 3.0)])],
            );
            plot.mark = Some(Mark::X(1e-3, "here".into()));
            plot.to_svg()
        };
        let (log, tight) = (svg(Axes::LogX), svg(Axes::Tight));
        let points = "points=\"66.0,250.0 271.0,30.0 476.0,140.0\"";
        assert!(log.contains(points), "{log}");
        let points = "points=\"66.0,250.0 103.3,30.0 476.0,140.0\"";
        assert!(tight.contains(points), "{tight}");
        // The mark goes from the top to the bottom where its number is, and says what it is.
        assert!(log.contains("points=\"271.0,30.0 271.0,250.0\""), "{log}");
        assert!(
            tight.contains("points=\"103.3,30.0 103.3,250.0\""),
            "{tight}"
        );
        assert!(
            log.contains(">here<") && log.contains(">step<") && log.contains(">%<"),
            "{log}"
        );
    }

    #[test]
    fn titles_and_legends_are_as_wide_as_the_picture_and_no_wider() {
        let names = [
            "smoothed",
            "validation",
            "training",
            "a name of some length",
            "b",
            "another of some length",
        ];
        let lines = names.map(|name| line(name, &[(1.0, 1.0), (2.0, 2.0)]));
        let mut plot = plot(Axes::Tight, lines.to_vec());
        plot.title =
            "A title of so many words that no single row of this picture has room for it, ever"
                .into();
        let svg = plot.to_svg();
        let legends: Vec<&str> = svg.lines().filter(|line| line.contains("<tspan")).collect();
        assert_eq!(legends.len(), 2, "{svg}");
        for name in names {
            assert_eq!(
                legends.concat().matches(&format!(">{name}<")).count(),
                1,
                "{svg}"
            );
        }
        for row in &legends {
            let names = row.split("dx=\"4\">").skip(1);
            let names: Vec<_> = names.map(|rest| rest.split('<').next().unwrap()).collect();
            let gaps = GAP * (names.len() - 1) as f64;
            let all = names.iter().map(|name| width(name) + 20.0).sum::<f64>() + gaps;
            assert!(FRAME[0] + all <= CHART_WIDTH, "{all}: {row}");
            // The same gap between any two.
            let gaps = numbers(row, "dx").into_iter().step_by(2).skip(1);
            assert!(gaps.eq(vec![GAP; names.len() - 1]), "{row}");
        }
        let title = svg
            .lines()
            .filter(|line| line.contains("\"start\""))
            .count();
        assert_eq!(title, 2, "{svg}");
        // Rows of text are below each other, and above the drawing.
        let ys: Vec<f64> = numbers(&svg, "y").into_iter().take(4).collect();
        assert_eq!(ys, [22.0, 40.0, 58.0, 76.0], "{svg}");
        assert!(svg.contains("476.0,84.0"), "{svg}");
        assert_eq!(numbers(&svg, "width")[0], CHART_WIDTH);
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
        // Experts have whole numbers.
        let labels: Vec<_> = ["0", "1", "2", "0.5"]
            .map(|n| svg.contains(&format!(">{n}<")))
            .into();
        assert_eq!(labels, [true, true, true, false], "{svg}");
    }

    #[test]
    fn ticks_are_round_even_and_told_apart() {
        let labels = |range: [f64; 2]| -> Vec<String> {
            let ticks = ticks(range, step(range));
            let gaps: Vec<f64> = ticks.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
            let even = |gap: &f64| (gap / gaps[0] - 1.0).abs() < 1e-6;
            assert!(gaps.iter().all(even), "{gaps:?}");
            ticks.into_iter().map(|(_, label)| label).collect()
        };
        assert_eq!(labels([5.0, 40.0]), ["10", "20", "30", "40"]);
        assert_eq!(labels([0.0, 1.0]), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(
            labels([-4.0, -2.0]),
            ["-4.0", "-3.5", "-3.0", "-2.5", "-2.0"]
        );
        assert_eq!(
            labels([5.0, 5.002]),
            ["5.0000", "5.0005", "5.0010", "5.0015", "5.0020"]
        );
        assert_eq!(
            labels([0.0, 2e-4]),
            ["0", "5e-5", "1.0e-4", "1.5e-4", "2.0e-4"]
        );
        assert_eq!(
            labels([0.0, 3e6]),
            ["0", "5e5", "1.0e6", "1.5e6", "2.0e6", "2.5e6", "3.0e6"]
        );
        assert!(labels([1e300, 2e300]).len() > 2);
    }

    #[test]
    fn logarithmic_ticks_are_powers_of_ten() {
        let labels = |low: f64, high: f64| -> Vec<String> {
            let ticks = log_ticks([low.log10(), high.log10()]);
            ticks.into_iter().map(|(_, label)| label).collect()
        };
        assert_eq!(labels(1e-6, 1e-2), ["1e-6", "1e-5", "1e-4", "1e-3", "1e-2"]);
        assert_eq!(labels(1e-4, 3e-3), ["1e-4", "2e-4", "5e-4", "1e-3", "2e-3"]);
        assert_eq!(
            labels(1e-12, 1.0),
            ["1e-12", "1e-10", "1e-8", "1e-6", "1e-4", "1e-2", "1e0"]
        );
    }

    #[test]
    fn steps_have_whole_numbers() {
        let svg = plot(Axes::Tight, vec![line("", &[(1.0, 1.0), (3.0, 2.0)])]).to_svg();
        let below: Vec<_> = svg
            .lines()
            .filter(|line| line.contains("y=\"268.0\""))
            .collect();
        assert_eq!(below.len(), 3, "{svg}");
        assert!(
            [">1<", ">2<", ">3<"]
                .iter()
                .zip(below)
                .all(|(label, line)| line.contains(label)),
            "{svg}"
        );
    }
}
