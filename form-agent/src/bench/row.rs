//! From samples to rows: order statistics, budgets, and what the peer needs.

use form_api::bench::{BenchRow, Peer, Unit};

/// Measured on the kind of host that docs/bench.md describes.
const PEER: &str = "Firecracker 1.16";

/// What is known about a row before anything is measured.
#[derive(Clone, Copy, Debug)]
pub struct Line {
    pub name: &'static str,
    pub what: &'static str,
    pub unit: Unit,
    pub budget: Option<f64>,
    pub peer: Option<f64>,
}

impl Line {
    pub const fn new(name: &'static str, what: &'static str, unit: Unit) -> Self {
        Self { name, what, unit, budget: None, peer: None }
    }

    pub const fn budget(self, budget: f64) -> Self {
        Self { budget: Some(budget), ..self }
    }

    pub const fn peer(self, peer: f64) -> Self {
        Self { peer: Some(peer), ..self }
    }

    /// The row of these samples, in the line's unit.
    pub fn measured(self, samples: &[f64]) -> BenchRow {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (Some(min), Some(max)) = (sorted.first().copied(), sorted.last().copied()) else {
            return self.failed("nothing was measured".to_owned());
        };
        let median = median(&sorted);
        BenchRow {
            samples: u32::try_from(sorted.len()).unwrap_or(u32::MAX),
            min,
            median,
            max,
            peer: self.peer.map(|value| peer(value, median)),
            over: self.unit.is_enforced() && self.budget.is_some_and(|budget| median > budget),
            fault: None,
            ..self.empty()
        }
    }

    pub fn failed(self, fault: String) -> BenchRow {
        BenchRow { fault: Some(fault), ..self.empty() }
    }

    fn empty(self) -> BenchRow {
        BenchRow {
            name: self.name.to_owned(),
            what: self.what.to_owned(),
            unit: self.unit,
            samples: 0,
            min: 0.0,
            median: 0.0,
            max: 0.0,
            budget: self.budget,
            peer: None,
            over: false,
            fault: None,
        }
    }
}

/// What the peer needs, beside a median of ours.
pub fn peer(value: f64, median: f64) -> Peer {
    Peer { name: PEER.to_owned(), value, ratio: median / value }
}

/// Of sorted values; the mean of the middle two when there is no middle one.
fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) { (sorted[middle - 1] + sorted[middle]) / 2.0 } else { sorted[middle] }
}

/// A number of bytes in megabytes.
pub fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_min_median_max() {
        let line = Line::new("x", "an x", Unit::Megabytes).budget(4.0).peer(2.0);
        let row = line.measured(&[5.0, 1.0, 3.0]);
        assert_eq!((row.samples, row.min, row.median, row.max), (3, 1.0, 3.0, 5.0));
        assert_eq!((row.peer.unwrap().ratio, row.over), (1.5, false));
        assert_eq!(line.measured(&[4.0, 1.0]).median, 2.5);
        assert!(!line.measured(&[]).is_good());
    }

    #[test]
    fn only_what_is_enforced_can_be_over() {
        let samples = [9.0, 8.0, 10.0];
        assert!(Line::new("x", "an x", Unit::Megabytes).budget(8.5).measured(&samples).over);
        assert!(Line::new("x", "an x", Unit::MillionInstructions).budget(8.5).measured(&samples).over);
        assert!(!Line::new("x", "an x", Unit::Megabytes).budget(9.0).measured(&samples).over);
        assert!(!Line::new("x", "an x", Unit::Megabytes).measured(&samples).over);
        assert!(!Line::new("x", "an x", Unit::Milliseconds).budget(8.5).measured(&samples).over);
    }
}
