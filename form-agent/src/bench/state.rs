//! The state of a host: how long a change takes, and a host with many VMs on its record for other measurements.

use std::{sync::Arc, time::Instant};

use form_api::{
    bench::{BenchRow, Unit},
    deploy::{Boot, DeployRequest},
    sign::{self, ToSign},
};
use form_state::{Replica, SignedRequest};
use form_types::{Digest, IdempotencyKey, spec};
use jiff::Timestamp;

use super::{Bench, BenchError, row::Line};
use crate::{
    config::Paths,
    desired::{self, AgentRules},
    identity::Identity,
};

/// How many VMs are on the record where it says "recorded".
pub const RECORDED: u32 = 100;

impl Bench<'_> {
    pub(super) fn state(&self) -> Vec<BenchRow> {
        let commit = Line::new("state", "one change of the state: signed, checked and on the disk", Unit::Milliseconds);
        let read = Line::new("state/read", "reading all VMs from the state, 100 recorded", Unit::Milliseconds);
        let paths = Paths::new(self.directory.join("state"));
        let measured = self.fill(&paths, RECORDED).map(|(replica, commits)| {
            let reads: Vec<f64> = (0..self.runs())
                .map(|_| {
                    let begun = Instant::now();
                    let vms = std::hint::black_box(desired::vms(&replica.view())).len();
                    debug_assert_eq!(vms, RECORDED as usize);
                    begun.elapsed().as_secs_f64() * 1e3
                })
                .collect();
            vec![commit.measured(&commits), read.measured(&reads)]
        });
        measured.unwrap_or_else(|error| vec![commit.failed(error.to_string())])
    }

    /// Makes a host with `vms` VMs that were deployed and stopped. The second value are the milliseconds of each change.
    pub(super) fn fill(&self, paths: &Paths, vms: u32) -> Result<(Replica, Vec<f64>), BenchError> {
        let fault = |error: &dyn std::fmt::Display| BenchError::State(error.to_string());
        paths.create_all().map_err(super::io_error("make the agent's directories"))?;
        let identity = Identity::open(paths, None).map_err(|error| fault(&error))?;
        let cluster = identity.cluster();
        let path = paths.database().join("state.redb");
        let replica = Replica::open(&path, identity.key(), cluster, Arc::new(AgentRules { cluster, founder: identity.key().public() }))
            .map_err(|error| fault(&error))?;
        let mut times = Vec::new();
        let mut submit = |path: &str, body: &[u8]| -> Result<(), BenchError> {
            self.stop.check()?;
            let begun = Instant::now();
            let to_sign = ToSign {
                cluster: Some(cluster),
                host: identity.key().public(),
                method: "POST",
                path,
                body,
                idempotency_key: IdempotencyKey::random().map_err(|error| fault(&error))?,
            };
            let envelope = sign::sign_request(&to_sign, identity.key(), Timestamp::now()).map_err(|error| fault(&error))?;
            replica.submit(SignedRequest { envelope, body: body.to_vec() }).map_err(|error| fault(&error))?;
            times.push(begun.elapsed().as_secs_f64() * 1e3);
            Ok(())
        };
        for number in 0..vms {
            let name = format!("vm-{number}");
            let body = serde_json::to_vec(&request(&name)?).map_err(|error| fault(&error))?;
            submit("/v1/deploy", &body)?;
            submit(&format!("/v1/vms/{name}/stop"), b"")?;
        }
        Ok((replica, times))
    }
}

/// What a small service asks for.
fn request(name: &str) -> Result<DeployRequest, BenchError> {
    let spec = spec::Spec {
        name: name.parse().map_err(|error: form_types::name::NameError| BenchError::State(error.to_string()))?,
        description: None,
        from: "debian:12".to_owned(),
        args: Default::default(),
        steps: Vec::new(),
        resources: spec::Resources { vcpus: 1, memory_mib: 256, disk_gib: 1, gpus: Vec::new() },
        users: Vec::new(),
        run_as: None,
        env: Vec::new(),
        workdir: None,
        entrypoint: vec!["/usr/bin/python3".to_owned(), "/srv/app.py".to_owned()],
        cmd: Vec::new(),
        ports: vec![spec::Port { port: 80, protocol: spec::Protocol::Tcp, host_port: None }],
        volumes: Vec::new(),
        networks: Vec::new(),
        replicas: 1,
        restart: spec::Restart { policy: spec::RestartPolicy::Always, max_retries: None },
        healthcheck: None,
        labels: Default::default(),
        model: None,
    };
    Ok(DeployRequest { spec, passwd_hashes: Default::default(), boot: Boot::Image(Digest::of(b"image")), kernel: Digest::of(b"kernel") })
}
