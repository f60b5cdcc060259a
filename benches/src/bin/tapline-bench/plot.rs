//! The plot of loss against offered load, as SVG.

use std::fmt::Write as _;

/// Colours that people who confuse some can tell apart (Okabe and Ito).
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"];

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 460.0;
/// Around the plot: left, top, right, bottom.
const MARGIN: [f64; 4] = [64.0, 44.0, 200.0, 52.0];

/// One curve: its name, and offered rates in packets a second with the part that was lost.
pub(crate) type Curve<'a> = (&'a str, Vec<(f64, f64)>);

/// Draws them: rates from left to right, losses from 0 at the bottom to the largest.
pub(crate) fn draw(title: &str, curves: &[Curve<'_>]) -> String {
    let points = || curves.iter().flat_map(|(_, points)| points);
    let most_rate = points().map(|(rate, _)| *rate).fold(1.0, f64::max);
    let most_loss = points().map(|(_, loss)| *loss).fold(0.01, f64::max);
    let (rate_step, loss_step) = (step(most_rate), step(most_loss));
    let [left, top, right, bottom] = MARGIN;
    let x = |rate: f64| left + rate / most_rate * (WIDTH - left - right);
    let y = |loss: f64| HEIGHT - bottom - loss / most_loss * (HEIGHT - top - bottom);

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n\
         <text x=\"{left}\" y=\"24\" font-size=\"15\">{title}</text>\n"
    );
    let (x_end, y_end) = (WIDTH - right, HEIGHT - bottom);
    for tick in ticks(most_rate, rate_step) {
        let at = x(tick);
        let _ = writeln!(
            svg,
            "<path d=\"M{at:.1} {top}V{y_end}\" stroke=\"#ddd\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{:.0}</text>",
            y_end + 18.0,
            tick / 1e3
        );
    }
    for tick in ticks(most_loss, loss_step) {
        let at = y(tick);
        let percent = format!("{:.2}", tick * 100.0);
        let _ = writeln!(
            svg,
            "<path d=\"M{left} {at:.1}H{x_end}\" stroke=\"#ddd\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            left - 8.0,
            at + 4.0,
            percent.trim_end_matches('0').trim_end_matches('.')
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">offered, thousand packets a second</text>\
         <text x=\"8\" y=\"{:.1}\">lost, %</text>",
        f64::midpoint(left, x_end),
        HEIGHT - 12.0,
        top - 8.0
    );
    for (at, (name, points)) in curves.iter().enumerate() {
        let colour = COLOURS[at % COLOURS.len()];
        let mut path = String::new();
        for (at, (rate, loss)) in points.iter().enumerate() {
            let _ =
                write!(path, "{}{:.1} {:.1}", if at == 0 { 'M' } else { 'L' }, x(*rate), y(*loss));
        }
        let row = top + 14.0 + 20.0 * u32::try_from(at).map_or(0.0, f64::from);
        let _ = writeln!(
            svg,
            "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\
             <path d=\"M{:.1} {:.1}h22\" stroke=\"{colour}\" stroke-width=\"3\"/>\
             <text x=\"{:.1}\" y=\"{row:.1}\">{name}</text>",
            x_end + 14.0,
            row - 4.0,
            x_end + 42.0
        );
    }
    svg.push_str("</svg>\n");
    svg
}

/// The distance of ticks: 1, 2 or 5 times a power of ten, of which 4 to 10 reach up to `most`.
fn step(most: f64) -> f64 {
    let power = 10_f64.powf((most / 4.0).log10().floor());
    [5.0, 2.0]
        .into_iter()
        .map(|times| times * power)
        .find(|step| most / step >= 4.0)
        .unwrap_or(power)
}

fn ticks(most: f64, step: f64) -> impl Iterator<Item = f64> {
    (0..).map(move |tick| f64::from(tick) * step).take_while(move |tick| *tick <= most * 1.001)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_few() {
        for (most, want) in [(4.0, 1.0), (10.0, 2.0), (25.0, 5.0), (0.9, 0.2), (2_100_000.0, 5e5)] {
            assert!((step(most) / want - 1.0).abs() < 1e-9, "{most}: {}", step(most));
            assert!((4..=11).contains(&ticks(most, step(most)).count()), "{most}");
        }
    }

    #[test]
    fn every_curve_is_drawn_and_named() {
        let svg = draw("a title", &[("one", vec![(1e5, 0.0), (2e5, 0.5)]), ("two", vec![])]);
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
        for part in ["a title", ">one<", ">two<", "thousand packets"] {
            assert!(svg.contains(part), "{part}");
        }
    }
}
