//! The picture of an evaluation: right answers by size of the pool, a line for each policy, over all problems and for each set.
//!
//! Drawn with a font that is part of the program: it looks the same on a machine that has none.

use std::sync::Once;

use lemma_engine::eval::summary::{ByProblem, difference, means};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};

use super::report::{Column, Report};

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;
type Outcome = Result<(), Box<dyn std::error::Error>>;

const FONT: &str = "sans-serif";
/// Width and height of a panel.
const PANEL: (u32, u32) = (440, 330);

/// Told apart by people who see colours differently too (Okabe and Ito's palette).
const COLORS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(120, 94, 240),
    RGBColor(90, 90, 90),
];

/// A PNG, or nothing if there is nothing to draw.
pub(super) fn accuracy(report: &Report) -> Option<Vec<u8>> {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| {
        let _ = register_font(FONT, FontStyle::Normal, dejavu::sans::regular());
        let _ = register_font(FONT, FontStyle::Bold, dejavu::sans::bold());
    });
    let sets: Vec<&str> = report.set_names().collect();
    // A single set is all problems.
    let small = if sets.len() > 1 { &sets[..] } else { &[] };
    let columns = 3usize;
    let rows = small.len().div_ceil(columns);
    let (width, top) = (PANEL.0 * columns as u32, 520);
    let height = top + rows as u32 * PANEL.1;
    let mut pixels = vec![255; (width * height * 3) as usize];
    let drawn = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
    let picture = || -> Outcome {
        drawn.fill(&WHITE)?;
        let (head, rest) = drawn.split_vertically(top);
        let title = format!(
            "Right answers by size of the KV pool · {}",
            report.model_name()
        );
        panel(&head, report, &title, &|c| c.results.clone(), true)?;
        let areas = rest.split_evenly((rows.max(1), columns));
        for (set, area) in small.iter().zip(&areas) {
            panel(area, report, set, &|c| report.within(c, set), false)?;
        }
        drawn.present()?;
        Ok(())
    };
    let made = picture();
    drop(drawn);
    if let Err(e) = made {
        log::warn!("the picture could not be drawn: {e}");
        return None;
    }
    encode(&pixels, width, height)
}

fn encode(pixels: &[u8], width: u32, height: u32) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header().ok()?;
    writer.write_image_data(pixels).ok()?;
    writer.finish().ok()?;
    Some(out)
}

/// One chart; `of` picks the results of a column that it shows. Whiskers are the interval of the difference against full, around the
/// accuracy.
fn panel(
    area: &Area<'_>,
    report: &Report,
    title: &str,
    of: &dyn Fn(&Column) -> ByProblem,
    large: bool,
) -> Outcome {
    let budgets = report.budgets();
    let size = if large { 17 } else { 13 };
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, size + 4))
        .margin(10)
        .margin_right(if large { 260 } else { 12 })
        .x_label_area_size(size * 2)
        .y_label_area_size(size * 3)
        .build_cartesian_2d(-0.3f64..budgets.len() as f64 - 0.7, -0.02f64..1.02)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .y_labels(6)
        .y_label_formatter(&|y| format!("{y:.1}"))
        .label_style((FONT, size))
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(225, 225, 225))
        .draw()?;
    let full = report.columns.iter().find(|c| c.budget.is_none());
    let full = full.map(of).unwrap_or_default();
    if !full.is_empty() {
        let y = means(&full).right;
        let ends = [(-0.3, y), (budgets.len() as f64 - 0.7, y)];
        chart.draw_series(DashedLineSeries::new(ends, 7, 5, BLACK.stroke_width(1)))?;
    }
    let labels = policies(report);
    for (i, name) in labels.iter().enumerate() {
        let color = COLORS[i % COLORS.len()];
        // Side by side, so that whiskers do not hide one another.
        let shift = (i as f64 - labels.len() as f64 / 2.0 + 0.5) * 0.04;
        let mut points = Vec::new();
        for c in report.columns.iter().filter(|c| c.label == *name) {
            let own = of(c);
            let x = c.budget.and_then(|b| budgets.iter().position(|o| *o == b));
            let (Some(x), false) = (x, own.is_empty()) else {
                continue;
            };
            let (x, y) = (x as f64 + shift, means(&own).right);
            points.push((x, y));
            if let Some(d) = difference(&own, &full) {
                let (low, high) = (y + d.low - d.mean, y + d.high - d.mean);
                let whisker = PathElement::new([(x, low.max(0.0)), (x, high.min(1.0))], color);
                chart.draw_series([whisker])?;
            }
        }
        let line = LineSeries::new(points.iter().copied(), color.stroke_width(2));
        chart.draw_series(line)?;
        let dots = points.iter().map(|&p| Circle::new(p, 3, color.filled()));
        chart.draw_series(dots)?;
    }
    let base = area.get_base_pixel();
    let at = |x: f64, y: f64| {
        let (x, y) = chart.backend_coord(&(x, y));
        (x - base.0, y - base.1)
    };
    for (i, budget) in budgets.iter().enumerate() {
        let (x, y) = at(i as f64, -0.02);
        area.draw(&PathElement::new([(x, y), (x, y + 5)], BLACK))?;
        text(area, &budget.to_string(), (x, y + 8), size, HPos::Center)?;
    }
    if large {
        let (x, mut y) = at(budgets.len() as f64 - 0.7, 1.0);
        let full = [("full", BLACK)].into_iter().filter(|_| !full.is_empty());
        let lines = labels.iter().enumerate();
        let lines = lines.map(|(i, &name)| (name, COLORS[i % COLORS.len()]));
        for (name, color) in full.chain(lines) {
            let ends = [(x + 16, y), (x + 40, y)];
            area.draw(&PathElement::new(ends, color.stroke_width(2)))?;
            text(area, name, (x + 48, y - size as i32 / 2), size, HPos::Left)?;
            y += size as i32 * 3 / 2;
        }
    }
    Ok(())
}

fn text(area: &Area<'_>, what: &str, at: (i32, i32), size: u32, h: HPos) -> Outcome {
    let style = TextStyle::from((FONT, size)).pos(Pos::new(h, VPos::Top));
    area.draw(&Text::new(what.to_owned(), at, style))?;
    Ok(())
}

/// Policies that have a line, in order.
fn policies(report: &Report) -> Vec<&str> {
    let mut out: Vec<&str> = Vec::new();
    for c in report.columns.iter().filter(|c| c.budget.is_some()) {
        if !out.contains(&c.label.as_str()) {
            out.push(&c.label);
        }
    }
    out
}
