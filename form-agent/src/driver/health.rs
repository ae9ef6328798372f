//! What a guest's status says of how well its service does.

use form_api::vm::Health;
use form_guest::protocol::{HealthState, ServicePhase, StatusReport};

pub const fn health_of(state: HealthState) -> Health {
    match state {
        HealthState::None => Health::None,
        HealthState::Starting => Health::Starting,
        HealthState::Healthy => Health::Healthy,
        HealthState::Unhealthy => Health::Unhealthy,
    }
}

/// What is wrong with the service, after the guest's next status. A service that was started again keeps its fault until its healthcheck
/// knows better: it has proved nothing by running, and who asks between two of its ends should not be told that all is well.
pub fn fault(before: Option<String>, status: &StatusReport) -> Option<String> {
    match (&status.service, status.health) {
        (Some(service), _) if service.phase == ServicePhase::Restarting => {
            let exit = service.last_exit.map_or_else(String::new, |exit| format!(" ({exit})"));
            Some(format!("its service keeps ending{exit}, restarted {} times", service.restarts))
        }
        (_, HealthState::Unhealthy) => Some(format!("its healthcheck fails: {}", status.health_message.as_deref().unwrap_or("no answer"))),
        (Some(service), HealthState::Starting) if service.restarts > 0 => before,
        _ => None,
    }
}

/// What is wrong with a VM whose guest does not answer any more.
pub fn silence(name: &str) -> String {
    format!("its guest does not answer: `form vm stats {name}` shows whether it works, `form vm reset {name}` starts it anew")
}

#[cfg(test)]
pub mod tests {
    use form_guest::protocol::{ExitStatus, Phase, ServiceStatus};

    use super::*;

    pub fn status(phase: ServicePhase, health: HealthState, restarts: u32) -> StatusReport {
        StatusReport {
            protocol: 1,
            phase: Phase::Ready,
            service: Some(ServiceStatus { phase, pid: None, last_exit: Some(ExitStatus::Code(7)), restarts, started_ms: None }),
            health,
            health_message: None,
            uptime_ms: 0,
            memory_total_bytes: 0,
            memory_used_bytes: 0,
            load_hundredths: [0; 3],
            next_log_sequence: 0,
        }
    }

    #[test]
    fn a_service_that_was_started_again_keeps_its_fault_until_its_healthcheck_knows_better() {
        let ended = fault(None, &status(ServicePhase::Restarting, HealthState::Starting, 1));
        assert_eq!(ended.as_deref(), Some("its service keeps ending (exit code 7), restarted 1 times"));
        assert_eq!(fault(ended.clone(), &status(ServicePhase::Running, HealthState::Starting, 1)), ended);
        assert_eq!(fault(ended.clone(), &status(ServicePhase::Running, HealthState::Healthy, 1)), None);
        let unhealthy = fault(ended.clone(), &status(ServicePhase::Running, HealthState::Unhealthy, 1));
        assert_eq!(unhealthy.as_deref(), Some("its healthcheck fails: no answer"));
        // Without a healthcheck nothing else will say that it works; a first start has no fault to keep.
        assert_eq!(fault(ended.clone(), &status(ServicePhase::Running, HealthState::None, 1)), None);
        assert_eq!(fault(ended, &status(ServicePhase::Running, HealthState::Starting, 0)), None);
    }
}
