//! One host and its agent under real faults. Runs as root where /dev/kvm runs guests: `tests/kvm-host` makes such a place.

use std::{
    fs,
    process::{Command, Stdio},
};

use form_tests::host::{Host, answers, is_alive, wait};

const SERVE: &str = r#"["/bin/busybox", "httpd", "-f", "-v", "-p", "80", "-h", "/www"]"#;

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_a_vm_outlives_its_agent_and_comes_back_when_its_process_is_killed() {
    let mut host = Host::start();
    let web = host.app("web", SERVE, 18081);
    let _ = host.form(&["deploy", &web, "-y"]).ok();
    assert!(answers(18081));
    let (_, pid) = host.process(&host.vm("web"));

    host.kill_agent();
    assert!(is_alive(pid) && answers(18081), "the VM goes on without its agent");
    host.start_agent();
    wait("the VM is adopted", || host.vm("web")["ready"] == true);
    assert_eq!(host.process(&host.vm("web")).1, pid, "the same process");
    let exec = host.form(&["exec", "web", "--", "/bin/busybox", "echo", "still here"]).ok();
    assert_eq!(exec.stdout, "still here\n");

    Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
    wait("it is started again", || {
        let vm = host.vm("web");
        vm["ready"] == true && vm["restarts"].as_u64() >= Some(1)
    });
    wait("it answers again", || answers(18081));

    let _ = host.form(&["vm", "stop", "web"]).ok();
    assert_eq!(host.vm("web")["state"], "stopped");
    assert!(!answers(18081));
    let _ = host.form(&["vm", "start", "web"]).ok();
    wait("it answers after its start", || answers(18081));

    let _ = host.form(&["destroy", "web", "-y"]).ok();
    host.is_clean();
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_an_agent_killed_in_the_middle_of_a_deploy_finishes_it() {
    let mut host = Host::start();
    let web = host.app("web", SERVE, 18082);
    for step in ["the state is written", "the VM boots"] {
        let mut deploy = host.form_command(&["deploy", &web, "-y"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        match step {
            "the state is written" => wait(step, || host.agent_log().contains("deploy vm/web")),
            _ => wait(step, || host.agent_log().contains("waiting for the guest to start")),
        }
        host.kill_agent();
        let _ = deploy.kill();
        let _ = deploy.wait();
        host.start_agent();
        wait("the operation ends", || {
            let operations = host.form(&["op", "ls", "-o", "json"]).ok().json();
            let deploys: Vec<_> = operations.as_array().unwrap().iter().filter(|operation| operation["kind"] == "deploy").collect();
            deploys.iter().all(|operation| ["completed", "failed"].contains(&operation["status"].as_str().unwrap()))
        });
        let _ = host.form(&["deploy", &web, "-y"]).ok();
        wait("it answers", || answers(18082));
        let _ = host.form(&["destroy", "web", "-y"]).ok();
        host.is_clean();
    }
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_what_cannot_work_is_refused_or_taken_back_with_its_reason() {
    let host = Host::start();
    let web = host.app("web", SERVE, 18083);
    let _ = host.form(&["deploy", &web, "-y"]).ok();

    let other = host.app("other", SERVE, 18083);
    let taken = host.form(&["deploy", &other, "-y"]).exits(5);
    assert!(taken.stderr.contains("18083") && taken.stderr.contains("web"), "{}", taken.stderr);

    let greedy = fs::read_to_string(&other).unwrap().replace("MEM 128", "MEM 200G").replace("18083", "18084");
    fs::write(&other, greedy).unwrap();
    let _ = host.form(&["deploy", &other, "-y"]).exits(1);

    // The new version ends at once: the old one is put back.
    let _ = host.app("web", r#"["/bin/busybox", "sh", "-c", "echo broken on purpose; exit 9"]"#, 18083);
    let broken = host.form(&["deploy", &web, "-y"]).exits(1);
    assert!(broken.stderr.contains("broken on purpose"), "{}", broken.stderr);
    wait("the old version answers", || answers(18083));

    // A first version that ends at once stays, failed, until it is mended or removed.
    let never = host.app("never", r#"["/bin/busybox", "false"]"#, 18085);
    let _ = host.form(&["deploy", &never, "-y"]).exits(1);
    let _ = host.form(&["destroy", "never", "-y"]).ok();
    let _ = host.form(&["destroy", "web", "-y"]).ok();
    let _ = host.form(&["destroy", "web", "-y"]).exits(3);
    host.is_clean();
}
