use super::*;
use crate::testing::vm;

fn desired(run: Run, starts: u64) -> DesiredVm {
    DesiredVm { run, starts, ..vm("web") }
}

fn observed(state: VmState, ready: bool, boot: &DesiredVm) -> Observed {
    Observed { state, ready, boot: Some(boot.boot_digest()), ..Observed::new() }
}

fn progress(change: Change, boot: &DesiredVm) -> Progress {
    Progress { vm: boot.id, boot: boot.boot_digest(), change }
}

#[test]
fn an_operation_ends_when_the_vm_is_as_asked() {
    let (before, again) = (desired(Run::Running, 1), desired(Run::Running, 2));
    let is =
        |change: Change, vm: &DesiredVm, observed: Observed| is_reached(&progress(change, &before), Some(vm), Some(&observed)).unwrap();
    assert!(!is(Change::Restart, &again, observed(VmState::Running, true, &before)), "the old run is not the new one");
    let restore = || Change::Restore(RestoreRequest { snapshot: "before".parse().unwrap() });
    assert!(!is(restore(), &again, observed(VmState::Running, true, &before)), "the old run is not the restored one");
    assert!(!is(restore(), &again, observed(VmState::Paused, false, &again)), "it is held until it is let go on");
    assert!(is(restore(), &again, observed(VmState::Running, true, &again)));
    assert!(!is(Change::Reset, &again, observed(VmState::Running, false, &again)));
    assert!(is(Change::Reset, &again, observed(VmState::Running, true, &again)));
    let paused = desired(Run::Paused, 1);
    assert!(!is(Change::Pause, &paused, observed(VmState::Running, true, &before)));
    assert!(is(Change::Pause, &paused, observed(VmState::Paused, false, &before)));
    assert!(!is(Change::Resume, &before, observed(VmState::Paused, false, &before)));
    assert!(is(Change::Resume, &before, observed(VmState::Running, false, &before)));
    assert!(is(Change::Set(SetRequest::default()), &before, observed(VmState::Running, true, &before)), "nothing has to start");
    assert!(!is(Change::Set(SetRequest::default()), &again, observed(VmState::Stopping, false, &before)));
    assert!(is(Change::Set(SetRequest::default()), &desired(Run::Stopped, 2), observed(VmState::Stopped, false, &before)));
}

#[test]
fn an_operation_fails_when_the_vm_never_will_be() {
    let vm = desired(Run::Running, 1);
    let mut ended = observed(VmState::Failed, false, &vm);
    ended.gave_up = true;
    ended.fault = Some("no kernel".to_owned());
    for change in [Change::Start, Change::Restart, Change::Reset, Change::Pause] {
        let error = is_reached(&progress(change, &vm), Some(&vm), Some(&ended)).unwrap_err();
        assert!(error.code == ErrorCode::Failed && error.message.contains("no kernel"), "{error:?}");
    }
    let gone = is_reached(&progress(Change::Pause, &vm), None, None).unwrap_err();
    assert_eq!(gone.code, ErrorCode::Conflict);
    assert!(is_reached(&progress(Change::Destroy, &vm), None, None).unwrap());
}

#[test]
fn what_was_not_recorded_is_known_after_a_crash() {
    let vm = desired(Run::Running, 1);
    let boot = vm.boot_digest();
    assert!(!is_recorded(&vm, &Change::Pause, &boot) && is_recorded(&desired(Run::Paused, 1), &Change::Pause, &boot));
    assert!(!is_recorded(&vm, &Change::Restart, &boot) && is_recorded(&desired(Run::Running, 2), &Change::Restart, &boot));
    assert!(!is_recorded(&vm, &Change::Rename("app".parse().unwrap()), &boot));
    assert!(is_recorded(&vm, &Change::Rename("web".parse().unwrap()), &boot));
    let set = SetRequest { vcpus: Some(2), ..SetRequest::default() };
    assert!(!is_recorded(&vm, &Change::Set(set), &boot));
    let set = Change::Set(SetRequest { net_bytes_per_second: Some(Some(1 << 20)), ..SetRequest::default() });
    let limited = DesiredVm { limits: VmLimits { net_bytes_per_second: Some(1 << 20), ..VmLimits::default() }, ..desired(Run::Running, 1) };
    assert!(!is_recorded(&vm, &set, &boot) && is_recorded(&limited, &set, &boot));
    assert!(!is_recorded(&vm, &Change::Destroy, &boot));
}
