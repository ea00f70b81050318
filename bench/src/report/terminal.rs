//! Aligned rows, shown as they come.

use crate::result::{Results, Row, Table};

use super::{HEADINGS, cells};

/// Columns of the cells, wide enough for what usually stands in them; the last is open.
const WIDTHS: [usize; 8] = [31, 54, 22, 22, 7, 9, 12, 0];

/// The headings, aligned as the rows.
pub fn headings() -> String {
    align(&HEADINGS.map(String::from))
}

/// A row, and on lines of their own what went wrong in it.
pub fn line(row: &Row) -> String {
    let mut text = align(&cells(row));
    for failure in &row.failures {
        text.push_str(&format!("\n    ! {failure}"));
    }
    text
}

/// The whole of a run: environment, calibration, tables.
pub fn render(results: &Results) -> String {
    let mut text = environment(results);
    for Table { caption, rows, .. } in &results.tables {
        text.push_str(&format!("\n{caption}\n{}\n", headings()));
        rows.iter().for_each(|row| text.push_str(&(line(row) + "\n")));
    }
    text
}

/// Machine, programs and calibration.
pub fn environment(results: &Results) -> String {
    let mut text = String::new();
    for (name, value) in &results.environment {
        text.push_str(&format!("{name:12} {value}\n"));
    }
    let calibration = &results.calibration;
    text.push_str(&format!(
        "calibration  memcpy {:.1} GB/s, eventfd round trip between the cores {:.1} us\n",
        calibration.memcpy_gb_s, calibration.eventfd_round_trip_us
    ));
    text
}

fn align(cells: &[String; 8]) -> String {
    let padded = cells.iter().zip(WIDTHS).map(|(cell, width)| format!("{cell:width$}"));
    padded.collect::<Vec<_>>().join(" ").trim_end().to_owned()
}
