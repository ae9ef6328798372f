//! A registry that holds one image, and counts what it is asked for.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    sync::{Arc, Mutex},
    thread,
};

use sha2::{Digest, Sha256};

pub struct Registry {
    pub address: String,
    asked: Arc<Mutex<Vec<String>>>,
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

impl Registry {
    /// Serves `tools/hello:1`: one file, `/etc/hello`, and a configuration with these execution parameters.
    pub fn start(parameters: &serde_json::Value) -> Self {
        let mut layer = Vec::new();
        let mut archive = tar::Builder::new(&mut layer);
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(6);
        archive.append_data(&mut header, "etc/hello", b"hello\n".as_slice()).unwrap();
        archive.finish().unwrap();
        drop(archive);
        let rootfs = serde_json::json!({"type": "layers", "diff_ids": [digest(&layer)]});
        let config = serde_json::json!({"architecture": "amd64", "os": "linux", "config": parameters, "rootfs": rootfs}).to_string();
        let descriptor = |kind: &str, bytes: &[u8]| serde_json::json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest(bytes), "size": bytes.len()});
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "config": descriptor("config.v1+json", config.as_bytes()),
            "layers": [descriptor("layer.v1.tar", &layer)],
        })
        .to_string();
        let mut files = BTreeMap::new();
        for bytes in [config.into_bytes(), layer] {
            files.insert(format!("/v2/tools/hello/blobs/{}", digest(&bytes)), bytes);
        }
        for name in ["1".to_owned(), digest(manifest.as_bytes())] {
            files.insert(format!("/v2/tools/hello/manifests/{name}"), manifest.clone().into_bytes());
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        thread::spawn(move || serve(&listener, &files, &log));
        Self { address, asked }
    }

    /// What was asked since the last time: `HEAD /v2/…`.
    pub fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

/// One request a connection, until the test ends.
fn serve(listener: &TcpListener, files: &BTreeMap<String, Vec<u8>>, log: &Mutex<Vec<String>>) {
    while let Ok((stream, _)) = listener.accept() {
        let mut reader = BufReader::new(stream);
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) <= 2 {
                break;
            }
            lines.push(line);
        }
        let Some((method, rest)) = lines.first().and_then(|line| line.split_once(' ')) else { continue };
        let path = rest.split(' ').next().unwrap_or_default();
        log.lock().unwrap().push(format!("{method} {path}"));
        let (status, body) = match files.get(path) {
            Some(body) => ("200 OK", body.as_slice()),
            None => ("404 Not Found", [].as_slice()),
        };
        let id = digest(body);
        let head =
            format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nDocker-Content-Digest: {id}\r\nConnection: close\r\n\r\n", body.len());
        let body = if method == "HEAD" { &[] } else { body };
        let _ = reader.get_mut().write_all(&[head.as_bytes(), body].concat());
    }
}
