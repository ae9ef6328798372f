//! The agent's documented interface, tried by a fuzzer that knows nothing but the document.

use std::{
    fs,
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use form_tests::host::{Host, enter_own_network};

/// What the fuzzer does not ask for: what leaves HTTP by an Upgrade, what goes on until the client hangs up, what measures for minutes, and
/// what makes things outside of the host's own directory.
const LEFT_OUT: &str = "/(console|copy|exec|forward|contents|import)$|^/v1/(bench|events|pools)$";

/// Copies what comes from one side to the other until it ends.
fn copy(mut from: impl Read, mut to: impl Write, end: impl FnOnce()) {
    let _ = io::copy(&mut from, &mut to);
    end();
}

/// Leads connections of a port of this machine to the agent's socket.
fn forward(socket: PathBuf) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let Ok(agent) = UnixStream::connect(&socket) else { continue };
            let (client_too, agent_too): (TcpStream, UnixStream) = (client.try_clone().unwrap(), agent.try_clone().unwrap());
            let (client_end, agent_end) = (client.try_clone().unwrap(), agent.try_clone().unwrap());
            thread::spawn(move || copy(client, agent_too, move || drop(agent_end.shutdown(Shutdown::Write))));
            thread::spawn(move || copy(agent, client_too, move || drop(client_end.shutdown(Shutdown::Write))));
        }
    });
    port
}

#[test]
#[ignore = "needs root, and Python for the fuzzer: tests/run-system"]
fn system_the_interface_keeps_to_its_document() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    // It may have to be fetched, which this test's own network does not do.
    let install = Command::new(root.join("tests/schemathesis/install")).output().unwrap();
    assert!(install.status.success(), "{}", String::from_utf8_lossy(&install.stderr));
    let schemathesis = String::from_utf8(install.stdout).unwrap();

    enter_own_network();
    let mut host = Host::new();
    host.configure(Host::IMPATIENT);
    host.start_agent();
    let url = format!("http://127.0.0.1:{}", forward(host.socket()));
    // What runs is what is described.
    let document = host.path("openapi.json");
    let described = host.programs.run(host.programs.command("form-agent", ["openapi"])).ok().stdout;
    fs::write(&document, described).unwrap();
    let fuzz = Command::new(schemathesis.trim())
        .current_dir(host.directory.path())
        .arg("--config-file")
        .arg(root.join("tests/schemathesis/schemathesis.toml"))
        .args(["--no-color", "run", "--url", &url, "--exclude-path-regex", LEFT_OUT])
        .arg(&document)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&fuzz.stdout).into_owned();
    assert!(fuzz.status.success(), "{said}{}", String::from_utf8_lossy(&fuzz.stderr));
    // It has asked, and the agent has done things for it.
    let asked = said.lines().find_map(|line| line.trim().split_once(" generated")?.0.parse().ok());
    let asked: u32 = asked.unwrap_or_else(|| panic!("how many requests? {said}"));
    assert!(asked > 1000, "{asked} requests");
    println!("{asked} requests");
    let completed = host.operations().iter().filter(|operation| operation["status"] == "completed").count();
    assert!(completed > 10, "{completed} operations were completed");
    assert!(!host.has_died(), "the agent died");

    // What it made can be found and removed as anything else.
    for volume in host.form(&["volume", "ls", "-o", "json"]).ok().json().as_array().unwrap() {
        let name = volume["name"].as_str().unwrap();
        if !volume["export"].is_null() {
            let _ = host.form(&["volume", "unexport", name]).ok();
        }
        let _ = host.form(&["volume", "rm", name, "--snapshots", "-y"]).ok();
    }
    host.is_clean();
    let checks = host.form(&["doctor", "-o", "json"]).json();
    assert!(checks.as_array().unwrap().iter().all(|check| !check["name"].as_str().unwrap().starts_with("volume/")), "{checks}");
}
