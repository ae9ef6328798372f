//! When a service that ended is started again. No clock of its own.

use std::time::Duration;

use form_guest::protocol::ExitStatus;
use form_types::spec::{Restart, RestartPolicy};

const FIRST_DELAY: Duration = Duration::from_millis(100);
const LAST_DELAY: Duration = Duration::from_secs(10);
/// A service that ran so long had started well: what happened before is forgotten.
const GOOD_RUN: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    StartAgain { after: Duration },
    GiveUp(Reason),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// RESTART says never.
    Never,
    /// RESTART says on failure only, and it did not fail.
    Succeeded,
    /// It failed this often in a row.
    TooOften(u32),
}

#[derive(Debug)]
pub struct Restarts {
    rule: Restart,
    in_a_row: u32,
}

impl Restarts {
    pub fn new(rule: Restart) -> Self {
        Self { rule, in_a_row: 0 }
    }

    /// From now on the rule is another.
    pub fn set_rule(&mut self, rule: Restart) {
        self.rule = rule;
    }

    /// What to do after a run of this length ended so.
    pub fn after(&mut self, exit: ExitStatus, ran: Duration) -> Decision {
        if ran >= GOOD_RUN {
            self.in_a_row = 0;
        }
        match self.rule.policy {
            RestartPolicy::Never => return Decision::GiveUp(Reason::Never),
            RestartPolicy::OnFailure if exit.success() => return Decision::GiveUp(Reason::Succeeded),
            RestartPolicy::OnFailure if self.rule.max_retries.is_some_and(|max| self.in_a_row >= max) => {
                return Decision::GiveUp(Reason::TooOften(self.in_a_row));
            }
            RestartPolicy::OnFailure | RestartPolicy::Always => {}
        }
        // Seven doublings are beyond the last delay already.
        let after = (FIRST_DELAY * (1 << self.in_a_row.min(7))).min(LAST_DELAY);
        self.in_a_row = self.in_a_row.saturating_add(1);
        Decision::StartAgain { after }
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Never => formatter.write_str("RESTART is never"),
            Self::Succeeded => formatter.write_str("it succeeded and RESTART is on-failure"),
            Self::TooOften(count) => write!(formatter, "it failed again after {count} restarts"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(5);
    const FAILED: ExitStatus = ExitStatus::Code(1);

    fn restarts(policy: RestartPolicy, max_retries: Option<u32>) -> Restarts {
        Restarts::new(Restart { policy, max_retries })
    }

    fn delays(restarts: &mut Restarts, count: usize) -> Vec<u128> {
        let mut delays = Vec::new();
        for _ in 0..count {
            if let Decision::StartAgain { after } = restarts.after(FAILED, SHORT) {
                delays.push(after.as_millis());
            }
        }
        delays
    }

    #[test]
    fn the_delay_doubles_up_to_its_limit_and_starts_anew_after_a_good_run() {
        let mut always = restarts(RestartPolicy::Always, None);
        assert_eq!(delays(&mut always, 9), [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        assert_eq!(always.after(FAILED, GOOD_RUN), Decision::StartAgain { after: FIRST_DELAY });
        assert_eq!(always.after(ExitStatus::Code(0), SHORT), Decision::StartAgain { after: FIRST_DELAY * 2 });
    }

    #[test]
    fn policies() {
        assert_eq!(restarts(RestartPolicy::Never, None).after(FAILED, SHORT), Decision::GiveUp(Reason::Never));
        let mut on_failure = restarts(RestartPolicy::OnFailure, Some(2));
        assert_eq!(on_failure.after(ExitStatus::Code(0), SHORT), Decision::GiveUp(Reason::Succeeded));
        assert_eq!(delays(&mut on_failure, 2), [100, 200]);
        assert_eq!(on_failure.after(ExitStatus::Signal(9), SHORT), Decision::GiveUp(Reason::TooOften(2)));
        assert!(matches!(on_failure.after(FAILED, GOOD_RUN), Decision::StartAgain { .. }), "a good run gives new tries");
        let mut changed = restarts(RestartPolicy::Always, None);
        changed.set_rule(Restart { policy: RestartPolicy::Never, max_retries: None });
        assert_eq!(changed.after(FAILED, SHORT), Decision::GiveUp(Reason::Never));
        assert_eq!(restarts(RestartPolicy::OnFailure, Some(0)).after(FAILED, SHORT), Decision::GiveUp(Reason::TooOften(0)));
    }
}
