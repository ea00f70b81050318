//! Results for people and for programs: on the terminal, as JSON, as a Markdown table, as a picture.

pub mod markdown;
pub mod picture;
pub mod terminal;

use std::{fs, path::Path};

use anyhow::Context as _;

use crate::result::{Figure, Goal, Results, Row};

/// Writes `results.json`, `results.md` and `results.svg` into a folder, which is made.
pub fn write(results: &Results, folder: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let put = |name: &str, text: String| {
        fs::write(folder.join(name), text).with_context(|| folder.join(name).display().to_string())
    };
    put("results.json", serde_json::to_string_pretty(results)? + "\n")?;
    put("results.md", markdown::render(results))?;
    put("results.svg", picture::render(results)?)
}

/// The cells of a row: name, what, ours, peer, ratio, CPU of ours, of the peer, goals and whether they are reached.
fn cells(row: &Row) -> [String; 8] {
    let figure = |figure: Option<Figure>| figure.map_or("-".into(), |figure| value(&figure, row));
    let cpu = |figure: Option<Figure>| {
        let cpu = figure.and_then(|figure| figure.cpu_us);
        cpu.map_or("-".into(), |cpu| format!("{} us", significant(cpu)))
    };
    [
        row.name.clone(),
        row.what.clone(),
        figure(row.ours),
        figure(row.peer),
        row.ratio().map_or("-".into(), |ratio| format!("{}x", significant(ratio))),
        cpu(row.ours),
        cpu(row.peer),
        goals(row),
    ]
}

/// What the columns of [`cells`] are called.
const HEADINGS: [&str; 8] =
    ["row", "what", "vhostfs", "virtiofsd", "ratio", "cpu/op", "peer cpu/op", "goals"];

fn value(figure: &Figure, row: &Row) -> String {
    let tail = figure.p99.map_or(String::new(), |p99| format!(" (p99 {})", significant(p99)));
    format!("{} {}{tail}", significant(figure.value), row.unit.symbol())
}

/// Each goal with `ok` or `short`, and what it was compared with; without a goal, what the row is compared with.
fn goals(row: &Row) -> String {
    let one = |goal: &Goal| {
        let unit = row.unit.symbol();
        let sign = if row.unit.more_is_better() { ">=" } else { "<=" };
        let text = match goal {
            Goal::Figure(goal) => format!("{sign} {} {unit}", significant(*goal)),
            Goal::TimesPeer(times) => format!(">= {}x peer", significant(*times)),
            Goal::TimesReference(times) => match &row.reference {
                Some((name, value)) => {
                    format!(">= {}x {name} ({} {unit})", significant(*times), significant(*value))
                }
                None => format!(">= {}x reference", significant(*times)),
            },
            Goal::CpuOfPeer(part) => format!("cpu <= {} of peer", significant(*part)),
        };
        let verdict = match row.reached(*goal) {
            Some(true) => "ok",
            Some(false) => "SHORT",
            None => "?",
        };
        format!("{text} {verdict}")
    };
    match (&row.reference, row.ours) {
        (Some((name, value)), Some(ours)) if row.goals.is_empty() => {
            let times = row.times(ours.value, *value);
            format!("{}x {name}: {} {}", significant(times), significant(*value), row.unit.symbol())
        }
        _ => row.goals.iter().map(one).collect::<Vec<_>>().join(", "),
    }
}

/// Three significant digits, without an exponent.
fn significant(value: f64) -> String {
    let decimals = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 || size == 0.0 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::result::Unit;

    fn row(unit: Unit, ours: f64, peer: f64, goals: Vec<Goal>) -> Row {
        let figure = |value| Some(Figure { value, range: (value, value), p99: None, cpu_us: Some(value) });
        let (ours, peer) = (figure(ours), figure(peer));
        let reference = Some(("fio".into(), 10.0));
        Row { name: "n".into(), what: "w".into(), unit, ours, peer, reference, goals, failures: vec![] }
    }

    #[test]
    fn a_ratio_above_one_is_better_whatever_the_unit() {
        assert_eq!(row(Unit::KiloPerSecond, 20.0, 10.0, vec![]).ratio(), Some(2.0));
        assert_eq!(row(Unit::Microseconds, 5.0, 10.0, vec![]).ratio(), Some(2.0));
    }

    #[test]
    fn goals_say_whether_they_are_reached() {
        let all =
            vec![Goal::Figure(3.0), Goal::TimesPeer(2.5), Goal::TimesReference(0.9), Goal::CpuOfPeer(0.5)];
        let shown = goals(&row(Unit::Microseconds, 4.0, 9.0, all));
        assert_eq!(
            shown,
            "<= 3.00 us SHORT, >= 2.50x peer SHORT, >= 0.900x fio (10.0 us) ok, cpu <= 0.500 of peer ok"
        );
    }

    #[test]
    fn a_row_without_goals_is_compared_with_its_reference() {
        assert_eq!(goals(&row(Unit::KiloPerSecond, 5.0, 9.0, vec![])), "0.500x fio: 10.0 K/s");
    }

    #[test]
    fn without_a_peer_its_goal_is_open() {
        let mut row = row(Unit::KiloPerSecond, 4.0, 9.0, vec![Goal::TimesPeer(1.0)]);
        row.peer = None;
        assert_eq!(goals(&row), ">= 1.00x peer ?");
    }
}
