//! The agent killed at every named step, and started again: what was under way goes on or fails cleanly, nothing is left behind, and the
//! same command then succeeds.
//!
//! `system_…` walks the steps that need no running guest, each by itself, on a machine whose `/dev/kvm` may not be able to run one.
//! `kvm_…` walks those of a VM's whole life with a guest that answers, each agent dying at the next step.

use std::{
    fs,
    process::{Child, Stdio},
};

use form_tests::host::{Host, SERVE, answers, enter_own_network, wait};
use form_types::Failpoint::{self, *};

/// What has to be asked for so that the agent comes to a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// A deploy to a host that has no kernel yet.
    FirstUpload,
    /// A deploy of an image that the host does not have.
    Upload,
    /// A deploy.
    Deploy,
    /// A destroy.
    Destroy,
    /// Only with a guest that runs.
    Guest,
}

/// No point is forgotten: one without a way does not compile.
const fn way(point: Failpoint) -> Way {
    match point {
        KernelAssembled | KernelPublished => Way::FirstUpload,
        BlockKept | ImageAssembled | ImageVersionTaken | ImagePublished => Way::Upload,
        OperationRecorded | OperationEnded | StateSigned | StateStored | DeployRemembered | DeploySubmitted | DeployRecorded => Way::Deploy,
        DiskRecorded | DiskDrafted | DiskMade => Way::Deploy,
        LaunchOpened | LaunchDirectoryMade | LaunchRulesSet | LaunchTapMade | LaunchCgroupMade => Way::Deploy,
        LaunchProcessSpawned | LaunchProcessRecorded | LaunchBooted | LaunchBootRecorded => Way::Deploy,
        LifecycleSubmitted | StopAsked | StopProcessGone => Way::Destroy,
        CleanTapRemoved | CleanDirectoryRemoved | CleanCgroupRemoved => Way::Destroy,
        RemoveDiskRemoved | RemoveDirectoryRemoved | RemoveLogRemoved => Way::Destroy,
        DiskRetired | GuestReady | DeployHealthy | DeployKept | RollbackSubmitted => Way::Guest,
    }
}

/// Of a point that a flow passes more than once, the time that counts.
fn fuse(point: Failpoint) -> String {
    let time = match point {
        // In the middle of the upload.
        BlockKept => 5,
        // The image's import is an operation too; the deploy's comes after it.
        OperationRecorded => 2,
        _ => 1,
    };
    format!("{}:{time}", point.as_str())
}

/// A client that is not waited for.
fn spawn(host: &Host, arguments: &[&str]) -> Child {
    host.form_command(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// The agent, armed, dies of the command; its client with it.
fn dies_of(host: &mut Host, point: Failpoint, arguments: &[&str]) {
    host.start_agent_with(Some(&fuse(point)));
    let mut client = spawn(host, arguments);
    let died = host.dies_at(point.as_str(), |_| false);
    let _ = client.kill();
    let _ = client.wait();
    assert!(died, "{arguments:?} does not come to {}", point.as_str());
}

/// Whether the VM's process is on record as started. On a machine that runs no guests a VM comes no further.
fn has_started(host: &Host, name: &str) -> bool {
    host.vm(name)["started_at"].is_string()
}

/// After a crash: the command that was broken off is done, or is being done, or has failed cleanly and now succeeds.
fn deploys(host: &Host, file: &str, name: &str) {
    let ran = host.form(&["deploy", file, "-y", "--no-wait"]);
    match ran.code {
        Some(0) => {}
        Some(5) => assert!(ran.stderr.contains("form op wait"), "a conflict that does not say what is under way: {ran:?}"),
        _ => panic!("{ran:?}"),
    }
    wait("the VM is started", || has_started(host, name));
}

fn change_page(host: &Host, name: &str, page: &str) {
    fs::write(host.path(name).join("index.html"), format!("it works\n{page}\n")).unwrap();
}

fn survives(host: &mut Host, point: Failpoint) {
    println!("=== {}", point.as_str());
    // A name of its own, and with it an image that the host does not have.
    let name = format!("p-{}", point.as_str().replace('.', "-"));
    let file = host.app(&name, SERVE, 18090);
    change_page(host, &name, &name);
    let deploy = ["deploy", file.as_str(), "-y", "--no-wait"];
    match way(point) {
        Way::FirstUpload | Way::Upload | Way::Deploy => dies_of(host, point, &deploy),
        Way::Destroy => {
            host.start_agent();
            deploys(host, &file, &name);
            host.kill_agent();
        }
        Way::Guest => unreachable!("not walked here"),
    }
    if way(point) == Way::Destroy {
        dies_of(host, point, &["destroy", &name, "-y"]);
        host.start_agent();
        wait("the destroy ends", || {
            host.operations().iter().all(|operation| operation["kind"] != "vm-destroy" || operation["status"] != "executing")
        });
        let again = host.form(&["destroy", &name, "-y"]);
        assert!(matches!(again.code, Some(0 | 3)), "{again:?}");
    } else {
        host.start_agent();
        deploys(host, &file, &name);
        // A deploy that still waits for its guest does not keep anybody from giving it up.
        let _ = host.form(&["destroy", &name, "-y"]).ok();
    }
    wait("every operation ends", || host.no_operation_is_under_way());
    host.is_clean();
    host.kill_agent();
}

#[test]
#[ignore = "needs root, and a kernel bundle in the build cache: tests/run-system"]
fn system_the_agent_is_killed_at_every_step_and_nothing_is_left() {
    enter_own_network();
    let points = |wanted: fn(Way) -> bool| Failpoint::ALL.iter().copied().filter(move |point| wanted(way(*point)));
    for point in points(|way| way == Way::FirstUpload) {
        survives(&mut Host::new(), point);
    }
    let mut host = Host::new();
    for point in points(|way| !matches!(way, Way::FirstUpload | Way::Guest)) {
        survives(&mut host, point);
    }
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_a_vm_lives_through_the_death_of_its_agent_at_every_step() {
    let mut host = Host::new();
    let web = host.app("web", SERVE, 18091);
    let deploy = ["deploy", web.as_str(), "-y"];
    let mut walked = vec![DiskRetired, RollbackSubmitted];

    // The agent dies at one step after the other of one deploy.
    let steps = [
        DeploySubmitted,
        DiskRecorded,
        DiskDrafted,
        DiskMade,
        LaunchOpened,
        LaunchDirectoryMade,
        LaunchRulesSet,
        LaunchTapMade,
        LaunchCgroupMade,
        LaunchProcessSpawned,
        LaunchProcessRecorded,
        LaunchBooted,
        LaunchBootRecorded,
        GuestReady,
        DeployHealthy,
        DeployKept,
        OperationEnded,
    ];
    walked.extend(steps);
    dies_of(&mut host, steps[0], &deploy);
    for step in &steps[1..] {
        println!("=== {}", step.as_str());
        host.start_agent_with(Some(step.as_str()));
        assert!(host.dies_at(step.as_str(), |_| false));
    }
    host.start_agent();
    assert_eq!(newest(&host, "deploy")["status"], "completed");
    wait("it answers", || answers(18091));
    let again = host.form(&deploy).ok();
    assert!(again.stderr.contains("unchanged"), "{again:?}");

    // Another image: the old disk is gone when the agent dies.
    host.kill_agent();
    change_page(&host, "web", "the second page");
    dies_of(&mut host, DiskRetired, &deploy);
    host.start_agent();
    wait("the deploy ends", || host.no_operation_is_under_way());
    assert_eq!(newest(&host, "deploy")["status"], "completed");
    wait("it answers", || answers(18091));
    let page = host.form(&["exec", "web", "--", "/bin/busybox", "cat", "/www/index.html"]).ok();
    assert!(page.stdout.contains("the second page"), "{page:?}");

    // A version that does not work is taken back; the agent dies in the middle of that.
    host.kill_agent();
    let _ = host.app("web", r#"["/bin/busybox", "sh", "-c", "echo broken on purpose; exit 9"]"#, 18091);
    change_page(&host, "web", "the second page");
    dies_of(&mut host, RollbackSubmitted, &deploy);
    host.start_agent();
    wait("the deploy ends", || host.no_operation_is_under_way());
    let failed = newest(&host, "deploy");
    assert_eq!(failed["status"], "failed");
    assert!(failed["error"]["message"].as_str().unwrap().contains("broken on purpose"), "{failed}");
    wait("the old version answers", || answers(18091));

    // Stopped, with the agent dying between the removal of the runtime directory and that of the cgroup.
    host.kill_agent();
    dies_of(&mut host, StopProcessGone, &["vm", "restart", "web"]);
    host.start_agent();
    wait("it answers again", || answers(18091));
    wait("the restart ends", || host.no_operation_is_under_way());
    assert_eq!(newest(&host, "vm-restart")["status"], "completed");
    host.kill_agent();
    dies_of(&mut host, CleanDirectoryRemoved, &["vm", "stop", "web"]);
    host.start_agent();
    wait("the stop ends", || host.no_operation_is_under_way());
    assert_eq!(host.vm("web")["state"], "stopped");
    let running: Vec<String> = host.leftovers().into_iter().filter(|left| !left.contains("formation")).collect();
    assert_eq!(running, Vec::<String>::new(), "a stopped VM has a disk and a log and nothing else");
    let _ = host.form(&["vm", "start", "web"]).ok();

    // And the end of it, step by step.
    host.kill_agent();
    dies_of(&mut host, LifecycleSubmitted, &["destroy", "web", "-y"]);
    for step in [StopAsked, CleanTapRemoved, CleanCgroupRemoved, RemoveDiskRemoved, RemoveDirectoryRemoved, RemoveLogRemoved] {
        println!("=== {}", step.as_str());
        host.start_agent_with(Some(step.as_str()));
        assert!(host.dies_at(step.as_str(), |_| false));
    }
    host.start_agent();
    wait("the destroy ends", || host.no_operation_is_under_way());
    assert_eq!(newest(&host, "vm-destroy")["status"], "completed");
    let _ = host.form(&["destroy", "web", "-y"]).exits(3);
    let doctor = host.form(&["doctor"]);
    host.is_clean();
    let _ = doctor.ok();
    for point in Failpoint::ALL.iter().filter(|point| way(**point) == Way::Guest) {
        assert!(walked.contains(point), "{} is walked nowhere", point.as_str());
    }
}

/// The newest operation of a kind.
fn newest(host: &Host, kind: &str) -> serde_json::Value {
    host.operations().into_iter().find(|operation| operation["kind"] == kind).expect("an operation")
}
