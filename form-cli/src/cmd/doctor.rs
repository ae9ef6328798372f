use form_api::host::{CheckStatus, DoctorReport};

use crate::{
    failure::Outcome,
    session::Session,
    ui::{Table, count},
};

/// Find out what a host lacks, and what was left behind on it
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Mend what can be mended
    #[arg(long)]
    fix: bool,
}

pub async fn run(args: &Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let report = if args.fix { client.doctor_fix().await? } else { client.doctor().await? };
    session.terminal.list(&report.checks, &table(&report))?;
    let problems = report.checks.iter().filter(|check| check.status == CheckStatus::Problem).count();
    if !session.terminal.is_machine_readable() {
        let fixable = report.checks.iter().filter(|check| check.status == CheckStatus::Problem && check.fixable).count();
        match (problems, fixable) {
            (0, _) => session.terminal.note("No problems."),
            (_, 0) => session.terminal.note(format!("{}.", count(problems, "problem"))),
            _ => session.terminal.note(format!("{}; `form doctor --fix` mends {fixable}.", count(problems, "problem"))),
        }
    }
    Ok(u8::from(!report.is_clean()))
}

fn table(report: &DoctorReport) -> Table {
    let mut table = Table::new(&["CHECK", "STATUS", "MESSAGE", "HINT"], &["FIXABLE"]);
    for check in &report.checks {
        let status = match check.status {
            CheckStatus::Ok => "ok",
            CheckStatus::Warning => "warning",
            CheckStatus::Problem => "problem",
        };
        table.row([
            check.name.clone(),
            status.to_owned(),
            check.message.clone(),
            check.hint.clone().unwrap_or_default(),
            if check.fixable { "yes" } else { "no" }.to_owned(),
        ]);
    }
    table
}
