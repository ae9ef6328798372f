//! Documents that hold another one of several kinds.

use serde_json::{Value, json};

/// A digest in text.
pub const DIGEST: &str = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";

/// What a Formfile with everything in it means.
pub fn spec() -> Value {
    json!({
        "name": "web",
        "description": "a site",
        "from": "debian:12",
        "args": {"VERSION": "7", "MODE": null},
        "steps": [
            {"kind": "install", "args": {"packages": ["nginx", "curl=7.88"]}, "line": 2},
            {"kind": "run", "args": {"command": {"shell": "make"}, "env": [["A", "b"]], "workdir": "/srv"}, "line": 3},
            {"kind": "copy", "args": {
                "sources": [{"path": "app/*.py"}, {"inline": {"name": "motd", "text": "hi\n"}}],
                "to": "/srv/", "chown": "www:www", "chmod": "0755",
            }, "line": 4},
        ],
        "resources": {"vcpus": 2, "memory_mib": 512, "disk_gib": 5, "gpus": [{"model": "a100", "count": 1}]},
        "users": [{
            "name": "ada", "sudo": true, "shell": "/bin/bash", "groups": ["adm"], "ssh_authorized_keys": ["ssh-ed25519 AAAA ada"],
            "lock_passwd": false, "ssh_pwauth": true, "disable_root": true, "chpasswd_expire": true, "has_passwd": true,
        }],
        "run_as": "ada",
        "env": [
            {"scope": "system", "key": "LANG", "value": "C.UTF-8"},
            {"scope": "user:ada", "key": "EDITOR", "value": "vi"},
            {"scope": "service:web", "key": "PORT", "value": "80"},
        ],
        "workdir": "/srv",
        "entrypoint": ["python3", "-m"],
        "cmd": ["http.server"],
        "ports": [{"port": 80, "protocol": "tcp", "host_port": 8080}, {"port": 53, "protocol": "udp", "host_port": null}],
        "volumes": [{"name": "data", "path": "/data", "size_bytes": 1_073_741_824}],
        "networks": ["default"],
        "replicas": 1,
        "restart": {"policy": "on-failure", "max_retries": 3},
        "healthcheck": {
            "kind": "http", "port": 80, "path": "/", "command": null,
            "interval_ms": 1000, "timeout_ms": 500, "retries": 3, "start_period_ms": 0,
        },
        "labels": {"tier": "front"},
        "model": {"id": "small", "required": false},
    })
}

/// A file of 200,000 bytes: two blocks, a hole, the short last one.
pub fn blocks() -> Value {
    json!({"size": 200_000, "runs": [{"start": 0, "digests": [DIGEST, DIGEST]}, {"start": 3, "digests": [DIGEST]}]})
}
