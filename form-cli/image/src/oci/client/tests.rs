//! The client against a server that answers as a test says, one connection a request.

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    sync::mpsc,
    thread::JoinHandle,
};

use base64::{Engine, engine::general_purpose::STANDARD};

use super::*;

/// Answers requests with these in turn and gives back what was asked: `GET /path`, then the headers in lower case.
struct Server {
    address: String,
    asked: mpsc::Receiver<Vec<String>>,
    thread: JoinHandle<()>,
}

impl Server {
    /// `ADDRESS` in an answer is the server's address.
    fn start(answers: Vec<String>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (sender, asked) = mpsc::channel();
        let own = address.clone();
        let thread = thread::spawn(move || {
            for answer in answers {
                let (stream, _) = listener.accept().unwrap();
                let mut reader = BufReader::new(stream);
                let mut lines = Vec::new();
                loop {
                    let mut line = String::new();
                    if reader.read_line(&mut line).unwrap_or(0) <= 2 {
                        break;
                    }
                    let line = line.trim_end();
                    lines.push(if lines.is_empty() { line.trim_end_matches(" HTTP/1.1").to_owned() } else { line.to_ascii_lowercase() });
                }
                let length = lines.iter().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
                // A body that nobody reads would break the connection off.
                let _ = reader.read_exact(&mut vec![0; length]);
                sender.send(lines).unwrap();
                let _ = reader.get_mut().write_all(answer.replace("ADDRESS", &own).as_bytes());
            }
        });
        Self { address, asked, thread }
    }

    /// The next request.
    fn asked(&self) -> Vec<String> {
        self.asked.recv_timeout(Duration::from_secs(10)).unwrap()
    }

    /// Every answer was wanted.
    fn finish(self) {
        self.thread.join().unwrap();
    }
}

fn answer(status: &str, headers: &[&str], body: &str) -> String {
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n{body}", body.len())
}

struct Memory {
    bytes: Vec<u8>,
    size: usize,
}

impl Sink for Memory {
    fn received(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn is_complete(&self) -> bool {
        self.bytes.len() == self.size
    }

    fn restart(&mut self) -> Result<(), OciError> {
        self.bytes.clear();
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), OciError> {
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }
}

fn with<T>(server: &Server, registries: &Registries, work: impl FnOnce(&mut Client<'_>) -> T) -> T {
    let reference = OciReference::parse(&format!("{}/team/app:1", server.address), None).unwrap();
    work(&mut Client::new(&reference, registries, &Cancel::new()).unwrap())
}

fn blob(server: &Server, size: usize) -> Result<String, OciError> {
    let mut memory = Memory { bytes: Vec::new(), size };
    with(server, &Registries::default(), |client| client.blob(&OciDigest::of(b""), &mut memory))?;
    Ok(String::from_utf8(memory.bytes).unwrap())
}

#[test]
fn an_anonymous_token_is_fetched_and_used_again() {
    let challenge = r#"WWW-Authenticate: Bearer realm="http://ADDRESS/token?a=b",service="the registry",scope="repository:team/app:pull""#;
    let digest = OciDigest::of(b"manifest");
    let server = Server::start(vec![
        answer("401 Unauthorized", &[challenge], ""),
        answer("200 OK", &[], r#"{"token":"abc","expires_in":60}"#),
        answer("200 OK", &[&format!("Docker-Content-Digest: {digest}")], ""),
        answer("200 OK", &["Content-Type: application/json"], "{}"),
    ]);
    let found = with(&server, &Registries::default(), |client| (client.resolve("1").unwrap(), client.manifest("1").unwrap().bytes));
    assert_eq!(found, (Some(digest), b"{}".to_vec()));
    let first = server.asked();
    assert_eq!(first[0], "HEAD /v2/team/app/manifests/1");
    assert!(first.iter().any(|line| line.contains("application/vnd.oci.image.index.v1+json")), "{first:?}");
    let token = server.asked();
    assert!(token[0].starts_with("GET /token?a=b&") && token[0].contains("service=the%20registry"), "{token:?}");
    assert!(token[0].contains("scope=repository") && !token.iter().any(|line| line.starts_with("authorization")), "{token:?}");
    for _ in 0..2 {
        assert!(server.asked().contains(&"authorization: bearer abc".to_owned()));
    }
    server.finish();
}

#[test]
fn a_login_goes_to_the_place_for_tokens() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.json");
    let challenge = r#"WWW-Authenticate: Bearer realm="http://ADDRESS/token""#;
    let refused = || vec![answer("401 Unauthorized", &[challenge], ""), answer("401 Unauthorized", &[], "")];
    let server = Server::start(refused());
    let login = STANDARD.encode("ada:hunter2");
    std::fs::write(&path, format!(r#"{{"auths":{{"{}":{{"auth":"{login}"}}}}}}"#, server.address)).unwrap();
    let registries = Registries { credentials: Some(path), ..Registries::default() };
    let error = with(&server, &registries, |client| client.resolve("1").unwrap_err());
    assert!(matches!(error, OciError::Denied { known: true, .. }), "{error}");
    assert!(!server.asked().iter().any(|line| line.starts_with("authorization")));
    assert!(server.asked().contains(&format!("authorization: basic {}", login.to_ascii_lowercase())));
    server.finish();
}

#[test]
fn tokens_are_fetched_over_tls_or_not_at_all() {
    for realm in ["http://token.example/x", "ftp://127.0.0.1/x", "nonsense", "http://127.0.0.1:1@token.example/"] {
        let server = Server::start(vec![answer("401 Unauthorized", &[&format!("WWW-Authenticate: Bearer realm=\"{realm}\"")], "")]);
        let error = with(&server, &Registries::default(), |client| client.resolve("1").unwrap_err());
        assert!(matches!(error, OciError::Login { .. }), "{realm}: {error}");
    }
    let server = Server::start(vec![answer("401 Unauthorized", &["WWW-Authenticate: Negotiate"], "")]);
    let error = with(&server, &Registries::default(), |client| client.resolve("1").unwrap_err());
    assert!(error.to_string().contains("neither Basic nor Bearer"), "{error}");
}

#[test]
fn what_passes_is_waited_for_and_what_does_not_is_told() {
    let server = Server::start(vec![answer("503 Service Unavailable", &[], ""), String::new(), answer("200 OK", &[], "{}")]);
    assert_eq!(with(&server, &Registries::default(), |client| client.manifest("1").unwrap().bytes), b"{}");
    server.finish();
    let server = Server::start(vec![answer("503 Service Unavailable", &[], ""); 4]);
    let error = with(&server, &Registries::default(), |client| client.manifest("1").err().unwrap());
    assert!(matches!(error, OciError::Status { status: 503, .. }), "{error}");
    server.finish();
    let server = Server::start(vec![answer("418 Teapot", &[], "")]);
    let error = with(&server, &Registries::default(), |client| client.manifest("1").err().unwrap());
    assert!(matches!(error, OciError::Status { status: 418, .. }), "{error}");
    server.finish();
}

#[test]
fn a_blob_that_breaks_off_is_taken_up_where_it_did() {
    let cut = answer("200 OK", &[], "0123456789").replace("0123456789", "01234");
    let server = Server::start(vec![cut.clone(), answer("206 Partial Content", &["Content-Range: bytes 5-9/10"], "56789")]);
    assert_eq!(blob(&server, 10).unwrap(), "0123456789");
    assert!(!server.asked().iter().any(|line| line.starts_with("range")));
    assert!(server.asked().contains(&"range: bytes=5-".to_owned()));
    server.finish();
    // A registry that knows no ranges begins anew.
    let server = Server::start(vec![cut, answer("200 OK", &[], "0123456789")]);
    assert_eq!(blob(&server, 10).unwrap(), "0123456789");
    server.finish();
}

#[test]
fn a_redirect_gets_no_login() {
    let challenge = r#"WWW-Authenticate: Basic realm="x""#;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.json");
    let server = Server::start(vec![
        answer("401 Unauthorized", &[challenge], ""),
        answer("307 Temporary Redirect", &["Location: http://ADDRESS/elsewhere?signed=1"], ""),
        answer("200 OK", &[], "content"),
    ]);
    std::fs::write(&path, format!(r#"{{"auths":{{"{}":{{"auth":"{}"}}}}}}"#, server.address, STANDARD.encode("a:b"))).unwrap();
    let registries = Registries { credentials: Some(path), ..Registries::default() };
    let mut memory = Memory { bytes: Vec::new(), size: 7 };
    with(&server, &registries, |client| client.blob(&OciDigest::of(b""), &mut memory)).unwrap();
    assert_eq!(memory.bytes, b"content");
    server.asked();
    assert!(server.asked().iter().any(|line| line.starts_with("authorization: basic")));
    let last = server.asked();
    assert_eq!(last[0], "GET /elsewhere?signed=1");
    assert!(!last.iter().any(|line| line.starts_with("authorization")), "{last:?}");
    server.finish();
}

#[test]
fn a_manifest_without_an_end_is_refused() {
    let long = "x".repeat(usize::try_from(MAX_DOCUMENT).unwrap() + 1);
    let server = Server::start(vec![answer("200 OK", &[], &long)]);
    let error = with(&server, &Registries::default(), |client| client.manifest("1").err().unwrap());
    assert!(matches!(error, OciError::TooLarge { .. }), "{error}");
}

#[test]
fn a_registry_elsewhere_is_spoken_to_with_tls() {
    // The server speaks none, so the first byte of the client says which one it wanted.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let thread = thread::spawn(move || {
        let mut first = [0];
        listener.accept().unwrap().0.read_exact(&mut first).unwrap();
        first[0]
    });
    let reference = OciReference::parse("registry.example/app:1", None).unwrap();
    let hosts = [("registry.example".to_owned(), format!("localhost.localdomain:{}", address.rsplit_once(':').unwrap().1))];
    let registries = Registries { hosts: hosts.into_iter().collect(), ..Registries::default() };
    let cancel = Cancel::new();
    let mut client = Client::new(&reference, &registries, &cancel).unwrap();
    assert!(client.base.starts_with("https://localhost.localdomain:") && !client.plain);
    // By address: the name above need not be known here.
    client.base = client.base.replace("localhost.localdomain", "127.0.0.1");
    let error = client.send(&Request { head: false, path: "x", accept: "*/*", from: 0 }).unwrap_err();
    assert!(matches!(error, OciError::Unreachable { .. }), "{error}");
    const HANDSHAKE: u8 = 22;
    assert_eq!(thread.join().unwrap(), HANDSHAKE);
    // Listed, it goes without.
    let registries = Registries { insecure: BTreeSet::from(["registry.example".to_owned()]), ..Registries::default() };
    let client = Client::new(&reference, &registries, &cancel).unwrap();
    assert!(client.base.starts_with("http://registry.example/v2/app") && client.plain);
}

#[test]
fn a_push_asks_for_a_login_that_may_write() {
    let challenge = r#"WWW-Authenticate: Bearer realm="http://ADDRESS/token",service="r",scope="repository:team/app:pull""#;
    let (blob, manifest) = (OciDigest::of(b"blob"), OciDigest::of(b"manifest"));
    let server = Server::start(vec![
        answer("401 Unauthorized", &[challenge], ""),
        answer("200 OK", &[], r#"{"token":"abc"}"#),
        answer("404 Not Found", &[], ""),
        answer("202 Accepted", &["Location: /v2/team/app/blobs/uploads/1?state=2"], ""),
        answer("201 Created", &[], ""),
        answer("201 Created", &[&format!("Docker-Content-Digest: {manifest}")], ""),
    ]);
    let reference = OciReference::parse(&format!("{}/team/app:1", server.address), None).unwrap();
    let (registries, cancel) = (Registries::default(), Cancel::new());
    let mut client = Client::new(&reference, &registries, &cancel).unwrap().for_writing();
    assert!(!client.has_blob(&blob).unwrap());
    client.put_blob(&blob, b"blob").unwrap();
    client.put_manifest("1", "application/json", b"manifest").unwrap();

    assert_eq!(server.asked()[0], format!("HEAD /v2/team/app/blobs/{blob}"));
    let token = server.asked().remove(0);
    assert!(token.starts_with("GET /token?") && token.contains("pull") && token.contains("push"), "{token}");
    let authorised = |request: &[String]| request.iter().any(|line| line == "authorization: bearer abc");
    let asked: Vec<Vec<String>> = (0..4).map(|_| server.asked()).collect();
    assert!(asked.iter().all(|request| authorised(request)), "{asked:?}");
    let lines: Vec<&str> = asked.iter().map(|request| request[0].as_str()).collect();
    let put = format!("PUT /v2/team/app/blobs/uploads/1?state=2&digest={blob}");
    assert_eq!(lines[1..], ["POST /v2/team/app/blobs/uploads/", put.as_str(), "PUT /v2/team/app/manifests/1"]);
    assert!(asked[3].contains(&"content-type: application/json".to_owned()), "{:?}", asked[3]);
    server.finish();
}

#[test]
fn an_upload_elsewhere_gets_no_login_and_is_as_safe() {
    let put = |location: &str| {
        let basic = "WWW-Authenticate: Basic realm=x";
        let second = TcpListener::bind("127.0.0.1:0").unwrap();
        let elsewhere = second.local_addr().unwrap().to_string();
        let location = format!("Location: {}", location.replace("ELSEWHERE", &elsewhere));
        let server = Server::start(vec![answer("401 Unauthorized", &[basic], ""), answer("202 Accepted", &[&location], "")]);
        let directory = tempfile::tempdir().unwrap();
        let docker = directory.path().join("docker.json");
        let auths = format!(r#"{{"auths":{{"{}":{{"auth":"{}"}}}}}}"#, server.address, STANDARD.encode("ada:secret"));
        std::fs::write(&docker, auths).unwrap();
        let registries = Registries { credentials: Some(docker), ..Registries::default() };
        let taker = thread::spawn(move || {
            second.set_nonblocking(true).unwrap();
            for _ in 0..30 {
                if let Ok((stream, _)) = second.accept() {
                    stream.set_nonblocking(false).unwrap();
                    let mut reader = BufReader::new(stream);
                    let mut lines = Vec::new();
                    let mut line = String::new();
                    while reader.read_line(&mut line).unwrap_or(0) > 2 {
                        lines.push(line.trim_end().to_ascii_lowercase());
                        line.clear();
                    }
                    let _ = reader.read_exact(&mut [0; 4]);
                    let _ = reader.get_mut().write_all(answer("201 Created", &[], "").as_bytes());
                    return lines;
                }
                thread::sleep(Duration::from_millis(20));
            }
            Vec::new()
        });
        let result = with(&server, &registries, |client| client.put_blob(&OciDigest::of(b"blob"), b"blob"));
        assert!(!server.asked().iter().any(|line| line.starts_with("authorization")));
        assert!(server.asked().iter().any(|line| line.starts_with("authorization: basic")));
        server.finish();
        (result, taker.join().unwrap())
    };
    let (result, asked) = put("http://ELSEWHERE/store?key=1");
    result.unwrap();
    assert!(asked[0].starts_with("put /store?key=1&digest=sha256:"), "{asked:?}");
    assert!(!asked.iter().any(|line| line.starts_with("authorization")), "{asked:?}");
    for unsafe_place in ["http://store.example/x", "ftp://ELSEWHERE/x", "http://ada@ELSEWHERE/x", "//ELSEWHERE/x"] {
        let (result, asked) = put(unsafe_place);
        assert!(matches!(&result, Err(OciError::Unsupported { .. })) && asked.is_empty(), "{unsafe_place}: {result:?} {asked:?}");
    }
}

#[test]
fn a_registry_that_keeps_another_manifest_is_found_out() {
    let other = format!("Docker-Content-Digest: {}", OciDigest::of(b"other"));
    let server = Server::start(vec![answer("201 Created", &[&other], ""), answer("403 Forbidden", &[], "")]);
    with(&server, &Registries::default(), |client| {
        let kept = client.put_manifest("1", "application/json", b"manifest");
        assert!(matches!(kept, Err(OciError::Digest { .. })), "{kept:?}");
        let denied = client.put_manifest("1", "application/json", b"manifest");
        assert!(matches!(denied, Err(OciError::Denied { known: false, .. })), "{denied:?}");
    });
    server.finish();
}
