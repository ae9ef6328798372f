//! What a newcomer does, on a machine without hardware virtualisation: sandbox hosts, a deploy, a look, a change, and away with it.

use std::{
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    time::{Duration, Instant},
};

use form_tests::programs::Programs;

/// What an HTTP server on this machine answers to `GET /`, tried until it does.
fn answer(port: u16) -> String {
    let deadline = Instant::now() + Duration::from_secs(180);
    loop {
        let got = TcpStream::connect(("127.0.0.1", port)).and_then(|mut stream| {
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        });
        match got {
            Ok(text) if text.contains("200 OK") => return text,
            other if Instant::now() > deadline => panic!("port {port} does not answer: {other:?}"),
            _ => std::thread::sleep(Duration::from_millis(500)),
        }
    }
}

/// Takes the sandbox down however the test ends.
struct Sandbox<'a>(&'a Programs);

impl Drop for Sandbox<'_> {
    fn drop(&mut self) {
        self.0.form(["sandbox", "down", "-y"]);
    }
}

fn write_app(directory: &Path, greeting: &str, entrypoint: &str) {
    write_app_called("greeter", 18080, directory, greeting, entrypoint);
}

fn write_app_called(name: &str, port: u16, directory: &Path, greeting: &str, entrypoint: &str) {
    let formfile = format!(
        "NAME {name}\nFROM debian:12\nMEM 256\nINSTALL python3\nCOPY app.py /app/app.py\nENV GREETING=\"{greeting}\"\nENTRYPOINT {entrypoint}\n\
         EXPOSE {port}:8080\nHEALTHCHECK --interval=5s --timeout=5s --start-period=60s http 8080 /\n"
    );
    std::fs::write(directory.join("Formfile"), formfile).unwrap();
    let app = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/hello/app.py");
    std::fs::copy(app, directory.join("app.py")).unwrap();
}

#[test]
#[ignore = "starts a host in QEMU: make test-system"]
fn system_sandbox_hosts_run_apps_and_leave_nothing_behind() {
    let home = tempfile::tempdir().unwrap();
    let form = Programs::new(home.path());
    let _down = Sandbox(&form);
    let _ = form.form(["sandbox", "up", "--hosts", "2"]).ok();
    let again = form.form(["sandbox", "up"]).ok();
    assert!(again.stderr.contains("already") || again.stdout.contains("already"), "a second up says that it is there: {again:?}");
    let _ = form.form(["sandbox", "up", "--hosts", "1"]).exits(5);
    let _ = form.form(["sandbox", "up", "--hosts", "3"]).exits(5);
    let status = form.form(["sandbox", "status", "-o", "json"]).ok().json();
    let of = |host: usize| (status["hosts"][host]["name"].as_str().unwrap(), status["hosts"][host]["answers"].as_bool().unwrap());
    assert_eq!((of(0), of(1)), (("sandbox", true), ("sandbox-2", true)));

    let app = tempfile::tempdir().unwrap();
    let file = app.path().join("Formfile");
    let deploy = || form.form(["deploy", file.to_str().unwrap(), "-y", "--timeout", "600s"]);
    write_app(app.path(), "Good morning", r#"["python3", "-u", "/app/app.py"]"#);
    let _ = deploy().ok();
    assert!(answer(18080).contains("Good morning, greeter!"));

    let vms = form.form(["ps", "-o", "json"]).ok().json();
    assert_eq!((&vms[0]["name"], &vms[0]["state"], &vms[0]["health"]), (&"greeter".into(), &"running".into(), &"healthy".into()));
    assert!(form.form(["logs", "greeter"]).ok().stdout.contains("listening on port 8080"));
    assert_eq!(form.form(["exec", "greeter", "--", "hostname"]).ok().stdout.trim(), "greeter");
    let _ = form.form(["exec", "greeter", "--", "sh", "-c", "exit 7"]).exits(7);
    let _ = form.form(["logs", "nobody"]).exits(3);

    let unchanged = deploy().ok();
    assert!(format!("{}{}", unchanged.stdout, unchanged.stderr).contains("unchanged"));

    // A new greeting is a change of its environment: it restarts, and keeps its address and its disk.
    let _ = form.form(["exec", "greeter", "--", "touch", "/root/kept"]).ok();
    let address = vms[0]["ipv4"].clone();
    write_app(app.path(), "Good evening", r#"["python3", "-u", "/app/app.py"]"#);
    let _ = form.form(["plan", file.to_str().unwrap()]).exits(8);
    let _ = deploy().ok();
    assert!(answer(18080).contains("Good evening"));
    let _ = form.form(["exec", "greeter", "--", "test", "-e", "/root/kept"]).ok();
    assert_eq!(form.form(["ps", "-o", "json"]).ok().json()[0]["ipv4"], address);

    // A version that does not work is taken back, and says why.
    write_app(app.path(), "Good night", r#"["sh", "-c", "echo it is broken; exit 3"]"#);
    let broken = deploy().exits(1);
    assert!(broken.stderr.contains("it is broken"), "the tail of its log: {}", broken.stderr);
    assert!(answer(18080).contains("Good evening"));

    // The other host is another host, and its VMs reach what the first one publishes.
    let other = tempfile::tempdir().unwrap();
    write_app_called("other", 18081, other.path(), "Hello", r#"["python3", "-u", "/app/app.py"]"#);
    let second = other.path().join("Formfile");
    let _ = form.form(["--host", "sandbox-2", "deploy", second.to_str().unwrap(), "-y", "--timeout", "600s"]).ok();
    assert!(answer(18081).contains("Hello, other!"));
    assert_eq!(form.form(["ps", "-o", "json"]).ok().json().as_array().unwrap().len(), 1);
    let fetch = "import urllib.request as u; print(u.urlopen('http://10.0.3.1:18080/', timeout=120).read().decode())";
    let fetched = form.form(["--host", "sandbox-2", "exec", "other", "--", "python3", "-c", fetch]).ok();
    assert!(fetched.stdout.contains("Good evening"), "{fetched:?}");
    let _ = form.form(["--host", "sandbox-2", "destroy", "other", "-y"]).ok();
    let _ = form.form(["--host", "sandbox-2", "doctor"]).ok();

    let _ = form.form(["destroy", "greeter", "-y"]).ok();
    let _ = form.form(["doctor"]).ok();
    let _ = form.form(["sandbox", "down", "-y"]).ok();
    let data = home.path().join("data/form/sandbox");
    let left = std::fs::read_dir(&data).map_or(0, Iterator::count);
    assert_eq!(left, 0, "{} is not empty", data.display());
    assert!(form.form(["ps"]).code != Some(0), "the context is gone with the sandbox");
}
