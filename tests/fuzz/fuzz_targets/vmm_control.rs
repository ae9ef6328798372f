//! What a VM process is told on its control socket, and the saved state of a machine: any bytes.

#![no_main]

use std::time::{Duration, Instant};

use form_vmm::{
    config::VmConfig,
    control::{ControlReply, ControlRequest, ExitRecord, MAX_MESSAGE, channel::Channel},
    machine::state::MachineState,
};
use libfuzzer_sys::fuzz_target;
use std::os::fd::AsFd;

fuzz_target!(|bytes: &[u8]| {
    let _ = serde_json::from_slice::<VmConfig>(bytes);
    let _ = serde_json::from_slice::<MachineState>(bytes);
    let _ = serde_json::from_slice::<ExitRecord>(bytes);
    let Ok((one, other)) = Channel::pair() else { return };
    if bytes.is_empty() || bytes.len() > MAX_MESSAGE || rustix::io::write(one.as_fd(), bytes).is_err() {
        return;
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    match other.receive::<ControlRequest>(deadline) {
        Ok(Some((request, _))) => {
            // What was understood means the same when it is said again.
            one.send(&request, &[], deadline).expect("room for one message");
            let (again, _) = other.receive::<ControlRequest>(deadline).expect("a message").expect("an open socket");
            assert_eq!(request, again);
        }
        Ok(None) => panic!("a message was taken for the end"),
        Err(_) => {
            let _ = serde_json::from_slice::<ControlReply>(bytes);
        }
    }
});
