use clap::builder::PossibleValuesParser;
use clap::builder::TypedValueParser as _;
use form_api::bench::{BenchRequest, BenchRow, DEFAULT_RUNS, MAX_RUNS, Measurement};

use crate::{
    failure::Outcome,
    session::Session,
    ui::{Table, count},
};

/// Measure what VMs and the agent cost on a host
///
/// The agent measures on its own machine, one request at a time: the start of VMs, their memory beside the guest's, the agent's memory,
/// the state, `form ps`. Sizes have budgets; when one is over its budget, or something could not be measured, the exit status is 1. Times
/// are for comparison only.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How often each is repeated
    #[arg(long, default_value_t = DEFAULT_RUNS, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_RUNS)))]
    runs: u32,
    /// Only this; may be repeated
    #[arg(long, value_name = "MEASUREMENT", value_parser = measurements())]
    only: Vec<Measurement>,
}

fn measurements() -> impl clap::builder::TypedValueParser<Value = Measurement> {
    PossibleValuesParser::new(Measurement::ALL.map(Measurement::as_str)).try_map(|name| name.parse::<Measurement>())
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let mut answer = client.bench(&BenchRequest { runs: args.runs, only: args.only }).await?;
    let step = session.terminal.step("measuring: this takes a minute, and minutes in a sandbox");
    let mut rows = Vec::new();
    while let Some(row) = answer.next().await {
        let row = row?;
        step.line(&row.name);
        rows.push(row);
    }
    step.done("");
    session.terminal.list(&rows, &table(&rows))?;
    let bad: Vec<&BenchRow> = rows.iter().filter(|row| !row.is_good()).collect();
    if !bad.is_empty() {
        let names: Vec<&str> = bad.iter().map(|row| row.name.as_str()).collect();
        session.terminal.note(format!("{} over budget or not measured: {}", count(bad.len(), "value"), names.join(", ")));
    }
    Ok(u8::from(!bad.is_empty()))
}

fn table(rows: &[BenchRow]) -> Table {
    let mut table = Table::new(&["NAME", "MIN", "MEDIAN", "MAX", "UNIT", "BUDGET", "PEER", "STATUS"], &["RATIO", "RUNS", "WHAT"]);
    for row in rows {
        let value = |value: f64| if row.fault.is_some() { String::new() } else { number(value) };
        let status = match (&row.fault, row.over) {
            (Some(fault), _) => format!("not measured: {fault}"),
            (None, true) => "over budget".to_owned(),
            (None, false) => "ok".to_owned(),
        };
        table.row([
            row.name.clone(),
            value(row.min),
            value(row.median),
            value(row.max),
            row.unit.as_str().to_owned(),
            row.budget.map(number).unwrap_or_default(),
            row.peer.as_ref().map(|peer| number(peer.value)).unwrap_or_default(),
            status,
            row.peer.as_ref().map(|peer| format!("{:.2}", peer.ratio)).unwrap_or_default(),
            row.samples.to_string(),
            row.what.clone(),
        ]);
    }
    table
}

/// Three digits that mean something.
fn number(value: f64) -> String {
    match value {
        large if large >= 100.0 => format!("{large:.0}"),
        middle if middle >= 10.0 => format!("{middle:.1}"),
        small => format!("{small:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!([1611.9, 22.24, 3.158, 0.04].map(number), ["1612", "22.2", "3.16", "0.04"]);
    }
}
