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
}

const SIZE: [f64; 2] = [760.0, 420.0];
/// Left, top, right and bottom of the drawing.
const FRAME: [f64; 4] = [70.0, 40.0, 740.0, 370.0];
/// Okabe and Ito's colors, which color-blind people tell apart.
const COLORS: [&str; 5] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"];
const TICKS: usize = 5;

impl Plot {
    /// The whole file. Points that are not finite are left out.
    pub(crate) fn to_svg(&self) -> String {
        let [width, height] = SIZE;
        let [left, top, right, bottom] = FRAME;
        let (xs, ys) = self.ranges();
        let at_x = |x: f64| left + (x - xs[0]) / (xs[1] - xs[0]) * (right - left);
        let at_y = |y: f64| bottom - (y - ys[0]) / (ys[1] - ys[0]) * (bottom - top);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
             font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
        );
        text(&mut svg, [left, 24.0], "start", &self.title);
        text(
            &mut svg,
            [(left + right) / 2.0, height - 12.0],
            "middle",
            &self.x,
        );
        text(&mut svg, [left, top - 4.0], "end", &self.y);
        for tick in 0..=TICKS {
            let part = tick as f64 / TICKS as f64;
            let (x, y) = (
                xs[0] + part * (xs[1] - xs[0]),
                ys[0] + part * (ys[1] - ys[0]),
            );
            path(
                &mut svg,
                &[(left, at_y(y)), (right, at_y(y))],
                "#dddddd",
                "",
            );
            text(&mut svg, [left - 6.0, at_y(y) + 4.0], "end", &short(y));
            text(&mut svg, [at_x(x), bottom + 18.0], "middle", &short(x));
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
        for (i, line) in self.lines.iter().enumerate() {
            let color = COLORS[i % COLORS.len()];
            let points = line
                .points
                .iter()
                .filter(|(x, y)| x.is_finite() && y.is_finite());
            let points: Vec<_> = points.map(|(x, y)| (at_x(*x), at_y(*y))).collect();
            path(&mut svg, &points, color, "");
            let y = top + 16.0 * (i as f64 + 1.0);
            path(
                &mut svg,
                &[(left + 10.0, y - 4.0), (left + 34.0, y - 4.0)],
                color,
                "",
            );
            text(&mut svg, [left + 40.0, y], "start", &line.name);
        }
        svg + "</svg>\n"
    }

    /// The least and largest x and y that are drawn; y from 0.
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
        (
            range(&mut points().map(|(x, _)| *x), nothing),
            range(&mut points().map(|(_, y)| *y).chain(mark), [0.0, 0.0]),
        )
    }
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
    fn ticks_are_short() {
        assert_eq!(
            [0.0, 0.05, 1.5, 1000.0, 1e-5].map(short),
            ["0", "0.05", "1.5", "1000", "1.0e-5"]
        );
    }
}
