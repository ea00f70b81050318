//! The tables for a repository page.

use crate::result::{Results, Table};

use super::{HEADINGS, cells};

/// A page with everything.
pub fn render(results: &Results) -> String {
    let mut page = String::from("# Results\n\n![ratios](results.svg)\n\n");
    for (name, value) in &results.environment {
        page.push_str(&format!("- {name}: {value}\n"));
    }
    let calibration = &results.calibration;
    page.push_str(&format!(
        "- calibration: memcpy {:.1} GB/s, eventfd round trip between the cores {:.1} us\n\n\
         Ratio: how many times as good as virtiofsd, above 1 is better. CPU: of the server per operation.\n",
        calibration.memcpy_gb_s, calibration.eventfd_round_trip_us
    ));
    for Table { name, caption, rows } in &results.tables {
        page.push_str(&format!("\n## {name}\n\n{caption}\n\n"));
        page.push_str(&line(&HEADINGS.map(String::from)));
        page.push_str(&line(&HEADINGS.map(|_| "---".into())));
        for row in rows {
            page.push_str(&line(&cells(row)));
        }
        for row in rows {
            for failure in &row.failures {
                let failure = failure.lines().next().unwrap_or_default();
                page.push_str(&format!("\n{}: {failure}\n", row.name));
            }
        }
    }
    page
}

fn line(cells: &[String; 8]) -> String {
    format!("| {} |\n", cells.each_ref().map(|cell| cell.replace('|', "\\|")).join(" | "))
}
