//! What may be asked of a VM in each of its states: one table, so that no pair is forgotten. Pure.

use form_api::{ApiError, ErrorCode, vm::VmState};
use form_types::Name;

use crate::desired::DesiredVm;

/// What somebody asks of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Deploy,
    Start,
    Stop,
    Restart,
    Pause,
    Resume,
    Reset,
    Rename,
    /// Labels, restart policy: what needs no start.
    Set,
    /// vCPUs, memory: what a start brings.
    Resize,
    /// Network interfaces that come and go.
    Plug,
    Snapshot,
    /// Going back to a snapshot.
    Restore,
    Destroy,
    /// Copying its disk for another VM.
    Clone,
    Exec,
    Copy,
    Forward,
    Console,
    Logs,
    Stats,
}

impl Action {
    #[cfg(test)]
    pub const ALL: [Self; 21] = [
        Self::Deploy,
        Self::Start,
        Self::Stop,
        Self::Restart,
        Self::Pause,
        Self::Resume,
        Self::Reset,
        Self::Rename,
        Self::Set,
        Self::Resize,
        Self::Plug,
        Self::Snapshot,
        Self::Restore,
        Self::Destroy,
        Self::Clone,
        Self::Exec,
        Self::Copy,
        Self::Forward,
        Self::Console,
        Self::Logs,
        Self::Stats,
    ];
}

/// What the table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Do,
    /// It is so already, or on its way there: nothing is changed.
    Already,
    Refuse(Instead),
}

/// What to do instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instead {
    Start,
    Stop,
    Resume,
    /// Wait until it runs.
    WaitUntilRunning,
    WaitUntilStopped,
}

/// The table. A VM that starts, is asked and does not answer yet is the guest's matter: exec and its like are tried.
pub const fn judge(action: Action, state: VmState) -> Verdict {
    use Action::{
        Clone, Console, Copy, Deploy, Destroy, Exec, Forward, Logs, Pause, Plug, Rename, Reset, Resize, Restart, Restore, Resume, Set,
        Snapshot, Start, Stats, Stop,
    };
    use VmState::{Failed, Paused, Pending, Running, Starting, Stopped, Stopping};
    match (action, state) {
        // What should be changes, what is follows: in every state.
        (Deploy | Destroy | Rename | Set | Logs | Stats, Pending | Starting | Running | Paused | Stopping | Stopped | Failed) => {
            Verdict::Do
        }

        (Start, Starting | Running) => Verdict::Already,
        (Start, Pending | Stopping | Stopped | Failed) => Verdict::Do,
        (Start, Paused) => Verdict::Refuse(Instead::Resume),

        // A paused guest is let go on, so that it can shut down.
        (Stop | Restart, Pending | Starting | Running | Paused | Stopping | Stopped | Failed) => Verdict::Do,

        (Pause, Running) => Verdict::Do,
        (Pause, Paused) => Verdict::Already,
        (Pause, Pending | Starting) => Verdict::Refuse(Instead::WaitUntilRunning),
        (Pause, Stopping | Stopped | Failed) => Verdict::Refuse(Instead::Start),

        (Resume, Paused) => Verdict::Do,
        (Resume, Running) => Verdict::Already,
        (Resume, Pending | Starting) => Verdict::Refuse(Instead::WaitUntilRunning),
        (Resume, Stopping | Stopped | Failed) => Verdict::Refuse(Instead::Start),

        // A guest that hangs at its start is what a reset is for.
        (Reset, Starting | Running) => Verdict::Do,
        (Reset, Paused) => Verdict::Refuse(Instead::Resume),
        (Reset, Pending) => Verdict::Refuse(Instead::WaitUntilRunning),
        (Reset, Stopping | Stopped | Failed) => Verdict::Refuse(Instead::Start),

        (Resize, Pending | Starting | Running | Stopped | Failed) => Verdict::Do,
        (Resize, Paused) => Verdict::Refuse(Instead::Resume),
        (Resize, Stopping) => Verdict::Refuse(Instead::WaitUntilStopped),

        // The guest has to take part, or there is none.
        (Plug, Running | Stopped | Failed) => Verdict::Do,
        (Plug, Pending | Starting) => Verdict::Refuse(Instead::WaitUntilRunning),
        (Plug, Paused) => Verdict::Refuse(Instead::Resume),
        (Plug, Stopping) => Verdict::Refuse(Instead::WaitUntilStopped),

        // Of one that does not run the disk alone. One that failed is about to be started again, or may be.
        (Snapshot, Running | Paused | Stopped) => Verdict::Do,
        (Snapshot, Pending | Starting) => Verdict::Refuse(Instead::WaitUntilRunning),
        (Snapshot, Stopping) => Verdict::Refuse(Instead::WaitUntilStopped),
        (Snapshot, Failed) => Verdict::Refuse(Instead::Start),

        // A guest that hangs or fails is what one goes back from.
        (Restore, Starting | Running | Paused | Stopped | Failed) => Verdict::Do,
        (Restore, Pending) => Verdict::Refuse(Instead::WaitUntilRunning),
        (Restore, Stopping) => Verdict::Refuse(Instead::WaitUntilStopped),

        // Only a guest that has shut down has written everything.
        (Clone, Stopped) => Verdict::Do,
        (Clone, Stopping) => Verdict::Refuse(Instead::WaitUntilStopped),
        (Clone, Pending | Starting | Running | Paused | Failed) => Verdict::Refuse(Instead::Stop),

        (Exec | Copy | Forward, Starting | Running) => Verdict::Do,
        (Exec | Copy | Forward, Pending) => Verdict::Refuse(Instead::WaitUntilRunning),
        (Exec | Copy | Forward, Paused) => Verdict::Refuse(Instead::Resume),
        (Exec | Copy | Forward, Stopping | Stopped | Failed) => Verdict::Refuse(Instead::Start),

        (Console, Starting | Running | Paused | Stopping) => Verdict::Do,
        (Console, Pending) => Verdict::Refuse(Instead::WaitUntilRunning),
        (Console, Stopped | Failed) => Verdict::Refuse(Instead::Start),
    }
}

/// What cannot be asked of a VM that runs a kernel of its own, in whatever state: why not, after "without Formation's guest", and what to do
/// instead, with `NAME` for the VM's.
const fn lacks(action: Action) -> Option<(&'static str, &'static str)> {
    match action {
        Action::Exec => Some(("which runs commands", "log in at its console: `form vm console NAME`")),
        Action::Copy => {
            Some(("which copies files", "bring them to it on a volume, or over the network: `form vm show NAME` says its address"))
        }
        Action::Forward => Some(("which leads connections into it", "connect to the address that `form vm show NAME` says")),
        Action::Logs => Some(("which keeps its log", "see its serial console: `form logs NAME --console`")),
        Action::Deploy => Some(("which a Formfile is for", "choose another name, or remove it with `form vm rm NAME`")),
        Action::Clone => Some((
            "and has no root disk to copy",
            "make another one with `form vm create --kernel`, with clones of its volumes (NAME's are in `form volume ls`)",
        )),
        Action::Start | Action::Stop | Action::Restart | Action::Pause | Action::Resume | Action::Reset | Action::Destroy => None,
        Action::Rename
        | Action::Set
        | Action::Resize
        | Action::Plug
        | Action::Snapshot
        | Action::Restore
        | Action::Console
        | Action::Stats => None,
    }
}

/// A conflict: `why` follows on "vm/web runs a kernel of its own without Formation's guest".
pub fn no_guest(name: &Name, why: &str) -> ApiError {
    ApiError::new(ErrorCode::Conflict, format!("vm/{name} runs a kernel of its own without Formation's guest, {why}"))
}

/// Whether there is something to do with `vm`, which is in `state`.
///
/// # Errors
/// A conflict that names the state, or that our guest is not in the VM, and says what to do instead.
pub fn check_vm(action: Action, state: VmState, vm: &DesiredVm) -> Result<bool, ApiError> {
    match lacks(action).filter(|_| !vm.request.has_guest()) {
        Some((why, instead)) => Err(no_guest(vm.name(), why).hint(instead.replace("NAME", vm.name().as_str()))),
        None => check(action, state, vm.name()),
    }
}

/// # Errors
/// A conflict that names the state and says what to do instead.
fn check(action: Action, state: VmState, name: &Name) -> Result<bool, ApiError> {
    let hint = match judge(action, state) {
        Verdict::Do => return Ok(true),
        Verdict::Already => return Ok(false),
        Verdict::Refuse(Instead::Start) => format!("start it with `form vm start {name}`"),
        Verdict::Refuse(Instead::Stop) => format!("stop it with `form vm stop {name}`"),
        Verdict::Refuse(Instead::Resume) => format!("let it go on with `form vm resume {name}`"),
        Verdict::Refuse(Instead::WaitUntilRunning) => format!("wait for it with `form wait vm/{name} --for=running`"),
        Verdict::Refuse(Instead::WaitUntilStopped) => format!("wait for it with `form wait vm/{name} --for=stopped`"),
    };
    Err(ApiError::new(ErrorCode::Conflict, format!("vm/{name} is {}", state.as_str())).hint(hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Columns: pending, starting, running, paused, stopping, stopped, failed. `+` do, `=` already so; refused: `s` start it, `x` stop it, `r` resume
    /// it, `w` wait until it runs, `e` wait until it has ended.
    const TABLE: [(Action, &str); 21] = [
        (Action::Deploy, "+++++++"),
        (Action::Start, "+==r+++"),
        (Action::Stop, "+++++++"),
        (Action::Restart, "+++++++"),
        (Action::Pause, "ww+=sss"),
        (Action::Resume, "ww=+sss"),
        (Action::Reset, "w++rsss"),
        (Action::Rename, "+++++++"),
        (Action::Set, "+++++++"),
        (Action::Resize, "+++re++"),
        (Action::Plug, "ww+re++"),
        (Action::Snapshot, "ww++e+s"),
        (Action::Restore, "w+++e++"),
        (Action::Destroy, "+++++++"),
        (Action::Clone, "xxxxe+x"),
        (Action::Exec, "w++rsss"),
        (Action::Copy, "w++rsss"),
        (Action::Forward, "w++rsss"),
        (Action::Console, "w++++ss"),
        (Action::Logs, "+++++++"),
        (Action::Stats, "+++++++"),
    ];

    const STATES: [VmState; 7] =
        [VmState::Pending, VmState::Starting, VmState::Running, VmState::Paused, VmState::Stopping, VmState::Stopped, VmState::Failed];

    #[test]
    fn every_action_in_every_state() {
        assert_eq!(TABLE.map(|(action, _)| action), Action::ALL);
        for (action, row) in TABLE {
            let judged: String = STATES
                .iter()
                .map(|state| match judge(action, *state) {
                    Verdict::Do => '+',
                    Verdict::Already => '=',
                    Verdict::Refuse(Instead::Start) => 's',
                    Verdict::Refuse(Instead::Stop) => 'x',
                    Verdict::Refuse(Instead::Resume) => 'r',
                    Verdict::Refuse(Instead::WaitUntilRunning) => 'w',
                    Verdict::Refuse(Instead::WaitUntilStopped) => 'e',
                })
                .collect();
            assert_eq!(judged, row, "{action:?}");
        }
    }

    /// What may not be asked of a VM that runs a kernel of its own, whatever its state.
    const NEEDS_GUEST: [Action; 6] = [Action::Deploy, Action::Clone, Action::Exec, Action::Copy, Action::Forward, Action::Logs];

    #[test]
    fn without_a_guest_what_needs_it_is_refused_in_every_state() {
        let with = crate::testing::vm("web");
        let mut without = with.clone();
        without.request = crate::testing::own_kernel("web");
        for action in Action::ALL {
            for state in STATES {
                let judged = check_vm(action, state, &without);
                if !NEEDS_GUEST.contains(&action) {
                    assert_eq!(judged, check_vm(action, state, &with), "{action:?} {state:?}");
                    continue;
                }
                let error = judged.unwrap_err();
                assert_eq!((error.code, error.code.exit_code()), (ErrorCode::Conflict, 5));
                assert!(error.message.starts_with("vm/web runs a kernel of its own without Formation's guest, "), "{}", error.message);
                assert!(error.hint.is_some_and(|hint| hint.contains("web") && !hint.contains("NAME")), "{action:?}");
            }
        }
    }

    #[test]
    fn a_refusal_names_the_state_and_the_way_out() {
        let name: Name = "web".parse().unwrap();
        for action in Action::ALL {
            for state in STATES {
                let Err(error) = check(action, state, &name) else { continue };
                assert_eq!((error.code, error.code.exit_code()), (ErrorCode::Conflict, 5));
                assert_eq!(error.message, format!("vm/web is {}", state.as_str()));
                assert!(error.hint.is_some_and(|hint| hint.contains("`form ") && hint.contains("web")), "{action:?} {state:?}");
            }
        }
        assert!(check(Action::Pause, VmState::Running, &name).unwrap());
        assert!(!check(Action::Pause, VmState::Paused, &name).unwrap());
    }
}
