//! HEALTHCHECK: what a row of probes means. No clock and no I/O of its own.

use std::time::Duration;

use form_guest::protocol::HealthState;
use form_types::spec::Healthcheck;

/// Until the first success probes come at least this often, so that a deploy need not wait a whole interval to see it.
const EAGER: Duration = Duration::from_secs(1);

/// The state of one run of the service. Times are since its start.
#[derive(Debug)]
pub struct Health {
    interval: Duration,
    start_period: Duration,
    retries: u32,
    state: HealthState,
    failures: u32,
    /// When the last failure that counted was.
    counted: Option<Duration>,
}

impl Health {
    pub fn new(check: &Healthcheck) -> Self {
        Self {
            interval: Duration::from_millis(check.interval_ms.max(100)),
            start_period: Duration::from_millis(check.start_period_ms),
            retries: check.retries.max(1),
            state: HealthState::Starting,
            failures: 0,
            counted: None,
        }
    }

    /// The state after a probe that ended at `now`.
    pub fn record(&mut self, now: Duration, success: bool) -> HealthState {
        if success {
            self.failures = 0;
            self.counted = None;
            self.state = HealthState::Healthy;
            return self.state;
        }
        let starting = self.state == HealthState::Starting;
        // Eager probes see the same fault many times; it counts once an interval.
        let due = self.counted.is_none_or(|counted| !starting || now.saturating_sub(counted) >= self.interval);
        if due && !(starting && now < self.start_period) {
            self.failures = self.failures.saturating_add(1);
            self.counted = Some(now);
        }
        if self.failures >= self.retries {
            self.state = HealthState::Unhealthy;
        }
        self.state
    }

    /// How long to wait before the next probe.
    pub fn pause(&self) -> Duration {
        if self.state == HealthState::Starting { self.interval.min(EAGER) } else { self.interval }
    }
}

#[cfg(test)]
mod tests {
    use form_types::spec::HealthcheckKind;

    use super::*;

    fn check(start_period_ms: u64) -> Healthcheck {
        Healthcheck {
            kind: HealthcheckKind::Tcp,
            port: Some(80),
            path: None,
            command: None,
            interval_ms: 30_000,
            timeout_ms: 1000,
            retries: 3,
            start_period_ms,
        }
    }

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_first_success_is_seen_soon() {
        let mut health = Health::new(&check(0));
        assert_eq!(health.record(seconds(0), false), HealthState::Starting);
        assert_eq!(health.pause(), seconds(1));
        assert_eq!(health.record(seconds(1), false), HealthState::Starting);
        assert_eq!(health.record(seconds(2), true), HealthState::Healthy);
        assert_eq!(health.pause(), seconds(30));
    }

    #[test]
    fn eager_failures_count_once_an_interval() {
        let mut health = Health::new(&check(0));
        for second in 0..60 {
            assert_eq!(health.record(seconds(second), false), HealthState::Starting, "{second}");
        }
        assert_eq!(health.record(seconds(60), false), HealthState::Unhealthy);
    }

    #[test]
    fn the_start_period_forgives() {
        let mut health = Health::new(&check(100_000));
        for second in 0..160 {
            assert_eq!(health.record(seconds(second), false), HealthState::Starting, "{second}");
        }
        assert_eq!(health.record(seconds(160), false), HealthState::Unhealthy);
        assert_eq!(health.record(seconds(190), true), HealthState::Healthy);
    }

    #[test]
    fn a_healthy_service_gets_its_retries() {
        let mut health = Health::new(&check(0));
        health.record(seconds(0), true);
        assert_eq!(health.record(seconds(30), false), HealthState::Healthy);
        assert_eq!(health.record(seconds(60), false), HealthState::Healthy);
        assert_eq!(health.record(seconds(90), false), HealthState::Unhealthy);
        assert_eq!(health.record(seconds(120), true), HealthState::Healthy);
    }
}
