//! The saved state of a vCPU.

use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    #[error("cannot {verb} the {what} of a vCPU")]
    Kvm {
        verb: &'static str,
        what: &'static str,
        #[source]
        source: kvm_ioctls::Error,
    },
    #[error("too many {0} for one call")]
    TooMany(&'static str),
    #[error("this host's time stamp counter runs at {host} kHz, the saved vCPU's at {saved} kHz, and cannot be scaled")]
    TscFrequency { saved: u32, host: u32 },
    #[error("this host does not take model-specific register {0:#x} of the saved vCPU")]
    Msr(u32),
}

/// Everything that KVM keeps of a vCPU, in the order in which it is set again.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    pub cpuid: Vec<kvm_cpuid_entry2>,
    pub mp_state: kvm_mp_state,
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    pub xsave: kvm_xsave,
    pub xcrs: kvm_xcrs,
    pub debug: kvm_debugregs,
    pub lapic: kvm_lapic_state,
    pub msrs: Vec<kvm_msr_entry>,
    pub events: kvm_vcpu_events,
    pub tsc_khz: Option<u32>,
}

fn get(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VcpuStateError {
    move |source| VcpuStateError::Kvm { verb: "read", what, source }
}

fn set(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VcpuStateError {
    move |source| VcpuStateError::Kvm { verb: "set", what, source }
}

/// Reads the state. The vCPU must have left KVM_RUN with no I/O to complete.
///
/// # Errors
/// When KVM refuses. `msr_indices` are those of `KVM_GET_MSR_INDEX_LIST`; ones that this vCPU does not have are left out.
pub fn save(vcpu: &VcpuFd, msr_indices: &[u32]) -> Result<VcpuState, VcpuStateError> {
    // The order matters: reading mp_state lets KVM settle pending INIT and SIPI, which other state then shows.
    let mp_state = vcpu.get_mp_state().map_err(get("run state"))?;
    let events = vcpu.get_vcpu_events().map_err(get("pending events"))?;
    Ok(VcpuState {
        cpuid: vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(get("CPUID"))?.as_slice().to_vec(),
        mp_state,
        regs: vcpu.get_regs().map_err(get("registers"))?,
        sregs: vcpu.get_sregs().map_err(get("system registers"))?,
        xsave: vcpu.get_xsave().map_err(get("extended state"))?,
        xcrs: vcpu.get_xcrs().map_err(get("extended control registers"))?,
        debug: vcpu.get_debug_regs().map_err(get("debug registers"))?,
        lapic: vcpu.get_lapic().map_err(get("local APIC"))?,
        msrs: save_msrs(vcpu, msr_indices)?,
        events,
        tsc_khz: vcpu.get_tsc_khz().ok(),
    })
}

/// KVM stops at the first register that it cannot read; that one is skipped and the rest asked for again.
fn save_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, VcpuStateError> {
    let mut saved: Vec<kvm_msr_entry> = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let entries: Vec<_> = rest.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| VcpuStateError::TooMany("model-specific registers"))?;
        let count = vcpu.get_msrs(&mut msrs).map_err(get("model-specific registers"))?.min(rest.len());
        saved.extend(&msrs.as_slice()[..count]);
        rest = &rest[(count + 1).min(rest.len())..];
    }
    Ok(saved)
}

/// Two counters of one nominal frequency are calibrated to values that differ by less than this: NTP corrects as much.
const TSC_TOLERANCE_PPM: u64 = 250;
const MSR_TSC: u32 = 0x10;

/// Gives the vCPU the frequency that it was saved with.
/// # Errors
/// When this host cannot.
pub fn restore_tsc_frequency(vcpu: &VcpuFd, saved: Option<u32>) -> Result<(), VcpuStateError> {
    let (Some(saved), Ok(host)) = (saved, vcpu.get_tsc_khz()) else { return Ok(()) };
    if !differs(saved, host) {
        return Ok(());
    }
    vcpu.set_tsc_khz(saved).map_err(|_| VcpuStateError::TscFrequency { saved, host })
}

fn differs(saved: u32, host: u32) -> bool {
    u64::from(saved.abs_diff(host)) * 1_000_000 > u64::from(saved) * TSC_TOLERANCE_PPM
}

/// The registers as they would be now, had the time stamp counter gone on.
fn with_time(msrs: &[kvm_msr_entry], tsc_khz: Option<u32>, away: Duration) -> Vec<kvm_msr_entry> {
    let ticks = tsc_khz.map_or(0, |khz| away.as_nanos() * u128::from(khz) / 1_000_000) as u64;
    let mut msrs = msrs.to_vec();
    for msr in msrs.iter_mut().filter(|msr| msr.index == MSR_TSC) {
        msr.data = msr.data.wrapping_add(ticks);
    }
    msrs
}

/// Sets the state of a vCPU that has not run yet and was `away` for so long: its clocks have gone on meanwhile.
///
/// # Errors
/// When this host's KVM does not take it.
pub fn restore(vcpu: &VcpuFd, state: &VcpuState, away: Duration) -> Result<(), VcpuStateError> {
    let cpuid = CpuId::from_entries(&state.cpuid).map_err(|_| VcpuStateError::TooMany("CPUID leaves"))?;
    vcpu.set_cpuid2(&cpuid).map_err(set("CPUID"))?;
    restore_tsc_frequency(vcpu, state.tsc_khz)?;
    vcpu.set_mp_state(state.mp_state).map_err(set("run state"))?;
    vcpu.set_regs(&state.regs).map_err(set("registers"))?;
    vcpu.set_sregs(&state.sregs).map_err(set("system registers"))?;
    // SAFETY: without KVM_CAP_XSAVE2 features switched on by this process the state is the plain 4 KiB that `kvm_xsave` holds.
    unsafe { vcpu.set_xsave(&state.xsave) }.map_err(set("extended state"))?;
    vcpu.set_xcrs(&state.xcrs).map_err(set("extended control registers"))?;
    vcpu.set_debug_regs(&state.debug).map_err(set("debug registers"))?;
    vcpu.set_lapic(&state.lapic).map_err(set("local APIC"))?;
    let msrs = Msrs::from_entries(&with_time(&state.msrs, state.tsc_khz, away))
        .map_err(|_| VcpuStateError::TooMany("model-specific registers"))?;
    let count = vcpu.set_msrs(&msrs).map_err(set("model-specific registers"))?;
    if let Some(refused) = state.msrs.get(count) {
        return Err(VcpuStateError::Msr(refused.index));
    }
    vcpu.set_vcpu_events(&state.events).map_err(set("pending events"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_stamp_counter_goes_on_while_away_and_nothing_else_does() {
        let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
        let saved = [msr(0x1B, 5), msr(MSR_TSC, u64::MAX - 1)];
        let now = with_time(&saved, Some(2_000_000), Duration::from_micros(3));
        assert_eq!((now[0].data, now[1].data), (5, 5_998));
        assert_eq!(with_time(&saved, None, Duration::from_secs(1))[1].data, u64::MAX - 1);
    }

    #[test]
    fn frequencies_are_compared_with_tolerance() {
        assert!(!differs(2_000_000, 2_000_400));
        assert!(differs(2_000_000, 2_001_000));
        assert!(differs(0, 1));
    }
}
