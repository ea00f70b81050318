//! Figures and rows: what was measured, what was to be reached, and how both compare.

use serde::Serialize;

use crate::machine::{Calibration, median};

/// What a row's figures mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Thousands of operations per second.
    KiloPerSecond,
    /// Operations per second.
    PerSecond,
    /// Microseconds.
    Microseconds,
    /// Gigabytes per second.
    GigabytesPerSecond,
    /// Seconds.
    Seconds,
    /// Mebibytes.
    Mebibytes,
    /// Percent of a core.
    Percent,
}

impl Unit {
    /// How it is written behind a figure.
    pub fn symbol(self) -> &'static str {
        match self {
            Self::KiloPerSecond => "K/s",
            Self::PerSecond => "/s",
            Self::Microseconds => "us",
            Self::GigabytesPerSecond => "GB/s",
            Self::Seconds => "s",
            Self::Mebibytes => "MiB",
            Self::Percent => "%",
        }
    }

    /// Whether more is better.
    pub fn more_is_better(self) -> bool {
        matches!(self, Self::KiloPerSecond | Self::PerSecond | Self::GigabytesPerSecond)
    }
}

/// What one server reached in a row.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Figure {
    /// Median of the rounds.
    pub value: f64,
    /// Smallest and largest round: how steady the machine was.
    pub range: (f64, f64),
    /// 99th percentile where `value` is a median latency.
    pub p99: Option<f64>,
    /// The server's CPU time per operation in microseconds.
    pub cpu_us: Option<f64>,
}

impl Figure {
    /// From the figures of the rounds.
    pub fn of_rounds(mut values: Vec<f64>, mut p99: Vec<f64>, mut cpu_us: Vec<f64>) -> Self {
        let value = median(&mut values);
        let range = (values.first().copied().unwrap_or(value), values.last().copied().unwrap_or(value));
        let optional = |values: &mut Vec<f64>| (!values.is_empty()).then(|| median(values));
        Self { value, range, p99: optional(&mut p99), cpu_us: optional(&mut cpu_us) }
    }
}

/// What a row must reach.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Goal {
    /// A figure in the row's unit.
    Figure(f64),
    /// So many times as good as the peer.
    TimesPeer(f64),
    /// So many times as good as the reference of the row.
    TimesReference(f64),
    /// The server's CPU time per operation is at most this part of the peer's.
    CpuOfPeer(f64),
}

/// A row of a table.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Name, as on the command line.
    pub name: String,
    /// The question it answers.
    pub what: String,
    /// Unit of its figures.
    pub unit: Unit,
    /// vhostfs.
    pub ours: Option<Figure>,
    /// virtiofsd.
    pub peer: Option<Figure>,
    /// Something else that was measured beside: which, and its figure.
    pub reference: Option<(String, f64)>,
    /// What is to be reached.
    pub goals: Vec<Goal>,
    /// Why there is no figure, if there is none.
    pub failures: Vec<String>,
}

impl Row {
    /// How many times as good as the peer; above 1 is better, whatever the unit.
    ///
    /// Nothing times as good as nothing is no number.
    pub fn ratio(&self) -> Option<f64> {
        let ratio = self.times(self.ours?.value, self.peer?.value);
        Some(ratio).filter(|ratio| ratio.is_finite() && *ratio > 0.0)
    }

    /// Our CPU time per operation as a part of the peer's.
    pub fn cpu_ratio(&self) -> Option<f64> {
        Some(self.ours?.cpu_us? / self.peer?.cpu_us?)
    }

    /// Whether a goal is reached; `None` if something to judge it by is missing.
    pub fn reached(&self, goal: Goal) -> Option<bool> {
        let ours = self.ours?;
        Some(match goal {
            Goal::Figure(goal) => self.times(ours.value, goal) >= 1.0,
            Goal::TimesPeer(times) => self.ratio()? >= times,
            Goal::TimesReference(times) => self.times(ours.value, self.reference.as_ref()?.1) >= times,
            Goal::CpuOfPeer(part) => self.cpu_ratio()? <= part,
        })
    }

    /// How many times as good a figure is as another one.
    pub fn times(&self, value: f64, other: f64) -> f64 {
        if self.unit.more_is_better() { value / other } else { other / value }
    }
}

/// Rows that were measured in the same way.
#[derive(Debug, Clone, Serialize)]
pub struct Table {
    /// Short name, as on the command line.
    pub name: &'static str,
    /// How its rows were measured.
    pub caption: String,
    /// The rows.
    pub rows: Vec<Row>,
}

/// Everything a run found.
#[derive(Debug, Clone, Serialize)]
pub struct Results {
    /// The machine and the programs.
    pub environment: Vec<(String, String)>,
    /// What the machine can do at best.
    pub calibration: Calibration,
    /// The tables.
    pub tables: Vec<Table>,
}
