//! A bar for each row: how many times as good as the peer, on a logarithmic scale with 1 in the middle.

use anyhow::anyhow;
use plotters::prelude::*;

use crate::result::{Results, Row};

use super::significant;

/// Pixels.
const WIDTH: u32 = 900;
const ROW_HEIGHT: u32 = 22;
const MARGIN: u32 = 60;
const NAMES_WIDTH: i32 = 330;
const BAR_INSET: i32 = 4;

/// Ratios beyond this end at the edge; the number beside the bar still tells.
const RATIO_MAX: f64 = 64.0;

const BETTER: RGBColor = RGBColor(46, 125, 80);
const WORSE: RGBColor = RGBColor(190, 60, 50);

/// The picture as SVG text.
pub fn render(results: &Results) -> anyhow::Result<String> {
    let rows: Vec<&Row> = results.tables.iter().flat_map(|table| &table.rows).collect();
    let rows: Vec<(&Row, f64)> = rows.into_iter().filter_map(|row| Some((row, row.ratio()?))).collect();
    let mut svg = String::new();
    let height = MARGIN + ROW_HEIGHT * u32::try_from(rows.len())?;
    let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
    draw(&area, &rows).map_err(|error| anyhow!("picture: {error}"))?;
    drop(area);
    Ok(svg)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type DrawError<'a> = DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>;

fn draw<'a>(area: &Area<'a>, rows: &[(&Row, f64)]) -> Result<(), DrawError<'a>> {
    area.fill(&WHITE)?;
    let text = ("sans-serif", 13).into_font().color(&BLACK);
    area.draw_text("vhostfs against virtiofsd: times as good (1 = equal, logarithmic)", &text, (10, 12))?;
    let top = MARGIN as i32 - 20;
    for (row, y) in rows.iter().zip((top..).step_by(ROW_HEIGHT as usize)) {
        draw_row(area, row, y)?;
    }
    let bottom = top + (ROW_HEIGHT as usize * rows.len()) as i32;
    for ratio in [1.0, 2.0, 4.0, 8.0, 16.0, 32.0] {
        let style =
            if ratio == 1.0 { BLACK.stroke_width(1) } else { RGBColor(200, 200, 200).stroke_width(1) };
        area.draw(&PathElement::new([(place(ratio), top), (place(ratio), bottom)], style))?;
    }
    area.present()
}

fn draw_row<'a>(area: &Area<'a>, (row, ratio): &(&Row, f64), y: i32) -> Result<(), DrawError<'a>> {
    let text = ("sans-serif", 12).into_font().color(&BLACK);
    let color = if *ratio >= 1.0 { BETTER } else { WORSE };
    let (from, to) = (place(ratio.min(1.0)), place(ratio.max(1.0)));
    let bar = [(from, y + BAR_INSET), (to, y + ROW_HEIGHT as i32 - BAR_INSET)];
    area.draw_text(&row.what, &text, (10, y + BAR_INSET))?;
    area.draw(&Rectangle::new(bar, color.filled()))?;
    area.draw_text(&format!("{}x", significant(*ratio)), &text, (to + 5, y + BAR_INSET))
}

/// Where a ratio lies: the left edge is a quarter, the right one [`RATIO_MAX`].
fn place(ratio: f64) -> i32 {
    const RATIO_MIN: f64 = 0.25;
    let width = f64::from(WIDTH) - f64::from(NAMES_WIDTH) - f64::from(MARGIN);
    let part = (ratio.clamp(RATIO_MIN, RATIO_MAX) / RATIO_MIN).ln() / (RATIO_MAX / RATIO_MIN).ln();
    NAMES_WIDTH + (width * part) as i32
}
