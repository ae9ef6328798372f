//! Operations as an audit: many at once, each of them recorded with who asked for what, when, and how it ended.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::net::UnixStream,
    process::{Child, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::Duration,
};

use form_tests::host::{Host, enter_own_network, wait};
use opentelemetry_proto::tonic::{
    collector::{metrics::v1::ExportMetricsServiceRequest, trace::v1::ExportTraceServiceRequest},
    common::v1::{KeyValue, any_value},
};
use prost::Message;
use serde_json::{Value, json};

/// Begins all of these before it waits for any, and gives their exit codes.
fn at_once(host: &Host, commands: &[Vec<String>]) -> Vec<i32> {
    let begin = |command: &Vec<String>| {
        let arguments: Vec<&str> = command.iter().map(String::as_str).collect();
        host.form_command(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let children: Vec<Child> = commands.iter().map(begin).collect();
    children.into_iter().map(|mut child| child.wait().unwrap().code().unwrap()).collect()
}

fn words(command: &str) -> Vec<String> {
    command.split(' ').map(str::to_owned).collect()
}

/// The newest so many operations, the oldest of them first.
fn newest(host: &Host, count: usize) -> Vec<Value> {
    let mut operations = host.form(&["op", "ls", "--limit", &count.to_string(), "-o", "json"]).ok().json().as_array().unwrap().clone();
    operations.reverse();
    operations
}

fn is_whole(operation: &Value) -> bool {
    let time =
        |field: &str| operation[field].as_str().unwrap_or_else(|| panic!("no {field}: {operation}")).parse::<jiff::Timestamp>().unwrap();
    operation["actor"] == "local:0"
        && operation["request"]["path"].as_str().is_some_and(|path| path.starts_with("/v1/"))
        && time("created_at") <= time("started_at")
        && time("started_at") <= time("finished_at")
}

#[test]
#[ignore = "needs root, and a kernel bundle in the build cache: tests/run-system"]
fn system_ten_operations_on_a_vm_and_a_hundred_on_a_host_are_each_on_record() {
    enter_own_network();
    let mut host = Host::new();
    host.configure(Host::IMPATIENT);
    host.start_agent();
    host.stopped_vms(&["web"]);

    // A hundred on a host: ten things are each wanted by ten. One of them gets it, the others are told why not.
    let before = newest(&host, 1000).len();
    let hundred: Vec<_> = (0..100).map(|number| words(&format!("volume create data{} -s 16M", number / 10))).collect();
    let codes = at_once(&host, &hundred);
    for ten in codes.chunks(10) {
        assert!(ten.iter().filter(|code| **code == 0).count() == 1 && ten.iter().all(|code| [0, 5].contains(code)), "{codes:?}");
    }
    let volumes = host.form(&["volume", "ls", "-o", "json"]).ok().json();
    assert_eq!(volumes.as_array().unwrap().len(), 10);
    // What was refused before anything was begun is no operation.
    let created = newest(&host, 1000).split_off(before);
    let completed = created.iter().filter(|operation| operation["status"] == "completed").count();
    assert!(completed == 10 && created.iter().all(is_whole), "{created:?}");
    assert_eq!(created[0]["request"]["method"], "POST");
    assert_eq!(created[0]["request"]["body"]["size_bytes"], 16 << 20);

    // Ten on one VM: each volume is another subject, so all of them are done.
    let before = newest(&host, 1000).len();
    let ten: Vec<_> = (0..10).map(|number| words(&format!("volume attach data{number} web /mnt/data{number}"))).collect();
    assert_eq!(at_once(&host, &ten), [0; 10]);
    let mut paths: Vec<Value> = (0..10)
        .map(|number| host.form(&["volume", "show", &format!("data{number}"), "-o", "json"]).ok().json()["attachment"]["path"].clone())
        .collect();
    paths.sort_by_key(ToString::to_string);
    assert_eq!(paths, (0..10).map(|number| json!(format!("/mnt/data{number}"))).collect::<Vec<_>>());
    let attached = newest(&host, 1000).split_off(before);
    assert!(attached.len() == 10 && attached.iter().all(|operation| operation["status"] == "completed" && is_whole(operation)));
    // What is asked of the VM itself is done one after the other or refused, never mixed.
    let labels: Vec<_> = (0..10).map(|number| words(&format!("vm set web --label turn={number}"))).collect();
    let codes = at_once(&host, &labels);
    assert!(codes.contains(&0) && codes.iter().all(|code| [0, 5].contains(code)), "{codes:?}");
    let last = newest(&host, 1).remove(0);
    assert_eq!(last["request"]["path"], "/v1/vms/web");
    assert_eq!(host.vm("web")["labels"], last["request"]["body"]["labels"], "{last}");

    // Who shows an operation sees what was asked, and none of what is secret.
    let _ = host.form(&["vm", "create", "db", "--image", "web", "--no-start", "--no-volumes", "-e", "PASSWORD=hunter2"]).ok();
    let create = newest(&host, 1).remove(0);
    assert!(
        create["kind"] == "vm-create" && create.to_string().contains("PASSWORD") && !create.to_string().contains("hunter2"),
        "{create}"
    );
    let shown = host.form(&["op", "show", last["id"].as_str().unwrap()]).ok().stdout;
    assert!(shown.contains("/v1/vms/web") && shown.contains("turn"), "{shown}");

    let checks = host.form(&["doctor", "-o", "json"]).json();
    let wrong: Vec<&Value> =
        checks.as_array().unwrap().iter().filter(|check| check["name"].as_str().unwrap().starts_with("volume/")).collect();
    assert_eq!(wrong, Vec::<&Value>::new());
    for name in ["db", "web"] {
        let _ = host.form(&["destroy", name, "-y"]).ok();
    }
    host.is_clean();
}

/// Which status it answers with, by the path.
type Answers = Arc<Mutex<fn(&str) -> u16>>;

/// A collector of OpenTelemetry: the bodies that it took, by path.
struct Collector {
    port: u16,
    answers: Answers,
    bodies: mpsc::Receiver<(String, Vec<u8>)>,
}

impl Collector {
    fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let answers: Answers = Arc::new(Mutex::new(|_| 503));
        let (sender, bodies) = mpsc::channel();
        let answers_too = Arc::clone(&answers);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (sender, answers) = (sender.clone(), Arc::clone(&answers_too));
                thread::spawn(move || Self::serve(stream, &sender, &answers));
            }
        });
        Self { port, answers, bodies }
    }

    /// One connection, for as many requests as there are.
    fn serve(stream: TcpStream, sender: &mpsc::Sender<(String, Vec<u8>)>, answers: &Answers) -> Option<()> {
        let mut back = stream.try_clone().ok()?;
        let mut reader = BufReader::new(stream);
        loop {
            let head: Vec<String> = reader.by_ref().lines().map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
            let path = head.first()?.split(' ').nth(1)?.to_owned();
            let header =
                |name: &str| head.iter().find_map(|line| line.to_ascii_lowercase().strip_prefix(name).map(|value| value.trim().to_owned()));
            assert_eq!(header("content-type:").as_deref(), Some("application/x-protobuf"));
            assert_eq!(header("authorization:").as_deref(), Some("bearer hunter2"));
            let mut body = vec![0; header("content-length:")?.parse().ok()?];
            reader.read_exact(&mut body).ok()?;
            let status = answers.lock().unwrap()(&path);
            if status == 200 {
                sender.send((path, body)).ok()?;
            }
            write!(back, "HTTP/1.1 {status} Said\r\nContent-Length: 0\r\n\r\n").ok()?;
        }
    }

    fn next(&self, path: &str) -> Vec<u8> {
        loop {
            let (of, body) = self.bodies.recv_timeout(Duration::from_secs(120)).expect("the collector is sent something");
            if of == path {
                return body;
            }
        }
    }
}

#[test]
#[ignore = "needs root: tests/run-system"]
fn system_metrics_and_operations_go_to_a_collector() {
    enter_own_network();
    let collector = Collector::start();
    let mut host = Host::new();
    let endpoint = format!("http://127.0.0.1:{}", collector.port);
    host.configure(&format!(
        "opentelemetry: {{ endpoint: '{endpoint}', interval_seconds: 1, headers: {{ authorization: Bearer hunter2 }} }}\n"
    ));
    host.start_agent();
    // What it does not take is kept for it, and the agent says that something is wrong.
    let _ = host.form(&["volume", "create", "data", "-s", "16M"]).ok();
    let _ = host.form(&["volume", "create", "huge", "-s", "16E"]);
    let health = || -> Value {
        let mut socket = UnixStream::connect(host.socket()).unwrap();
        socket.write_all(b"GET /v1/health HTTP/1.0\r\nHost: agent\r\n\r\n").unwrap();
        let answer = std::io::read_to_string(&socket).unwrap();
        let health: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        health["parts"].as_array().unwrap().iter().find(|part| part["name"] == "opentelemetry").cloned().unwrap()
    };
    wait("the agent knows that the collector refuses", || health()["message"].as_str().unwrap().contains("503"));
    assert_eq!(health()["healthy"], false);
    *collector.answers.lock().unwrap() = |_| 200;

    let traces = ExportTraceServiceRequest::decode(collector.next("/v1/traces").as_slice()).unwrap();
    let of_host = &traces.resource_spans[0];
    let spans = &of_host.scope_spans[0].spans;
    let span = spans.iter().find(|span| span.name == "volume-create").expect("the volume's span");
    let operation = host.operations().into_iter().find(|operation| operation["subject"] == "volume/data").unwrap();
    let id: String = span.trace_id.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(operation["id"], *id);
    assert!(span.span_id.len() == 8 && 0 < span.start_time_unix_nano && span.start_time_unix_nano <= span.end_time_unix_nano);
    let has = |attributes: &[KeyValue], name: &str, value: &str| {
        attributes.iter().any(|attribute| {
            attribute.key == name
                && matches!(attribute.value.as_ref().and_then(|any| any.value.as_ref()), Some(any_value::Value::StringValue(found)) if found == value)
        })
    };
    assert!(has(&span.attributes, "form.subject", "volume/data") && has(&span.attributes, "form.actor", "local:0"), "{span:?}");
    assert!(has(&of_host.resource.as_ref().unwrap().attributes, "service.name", "form-agent"));
    let metrics = ExportMetricsServiceRequest::decode(collector.next("/v1/metrics").as_slice()).unwrap();
    let names: Vec<&str> = metrics.resource_metrics[0].scope_metrics[0].metrics.iter().map(|metric| metric.name.as_str()).collect();
    assert!(names.contains(&"form_host_memory_bytes") && names.contains(&"form_operations_total"), "{names:?}");
    wait("all is well again", || health()["healthy"] == true);

    // One that has no use for metrics gets traces all the same.
    *collector.answers.lock().unwrap() = |path| if path == "/v1/metrics" { 404 } else { 200 };
    let _ = host.form(&["volume", "create", "more", "-s", "16M"]).ok();
    let traces = ExportTraceServiceRequest::decode(collector.next("/v1/traces").as_slice()).unwrap();
    let spans = &traces.resource_spans[0].scope_spans[0].spans;
    assert!(spans.iter().any(|span| has(&span.attributes, "form.subject", "volume/more")), "{spans:?}");

    // One that does not answer holds nothing up.
    drop(collector);
    let _ = host.form(&["volume", "rm", "data", "more", "-y"]).ok();
    assert!(!host.agent_log().contains("hunter2"));
}
