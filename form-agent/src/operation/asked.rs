//! What somebody asked for, as the record of the operation has it.

use form_api::operation::OperationRequest;
use form_types::Digest;
use serde_json::Value;

/// A longer body is left out of the record.
const MAX_BODY: usize = 8 * 1024;

/// Instead of what is nobody's business.
const MASK: &str = "…";

/// A request: what tells it from others, and what is shown of it.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Of method, path and body.
    pub digest: Digest,
    pub shown: OperationRequest,
}

impl Asked {
    pub fn new(method: &str, path: &str, body: &[u8]) -> Self {
        let digest = Digest::of(format!("{method} {path} {}", Digest::of(body)).as_bytes());
        let mut parsed = (body.len() <= MAX_BODY).then(|| serde_json::from_slice(body).ok()).flatten();
        if let Some(body) = &mut parsed {
            mask(body);
        }
        Self { digest, shown: OperationRequest { method: method.to_owned(), path: path.to_owned(), body: parsed } }
    }
}

/// Hides what may be secret, wherever it is.
fn mask(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            // Those of a build step are no variables.
            let has_arguments = fields.contains_key("kind");
            for (name, value) in fields {
                match name.as_str() {
                    "secret" | "password" | "token" if !value.is_null() => *value = MASK.into(),
                    "env" | "passwd_hashes" => mask_variables(value),
                    "args" if !has_arguments => mask_variables(value),
                    _ => mask(value),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(mask),
        _ => {}
    }
}

/// Names stay; the values are `{"value": …}` or the second of a pair in a list, or those of a map.
fn mask_variables(variables: &mut Value) {
    match variables {
        Value::Array(entries) => {
            for entry in entries {
                match entry {
                    Value::Object(fields) if fields.contains_key("value") => {
                        fields.insert("value".to_owned(), MASK.into());
                    }
                    Value::Array(pair) if pair.len() == 2 => pair[1] = MASK.into(),
                    _ => *entry = MASK.into(),
                }
            }
        }
        Value::Object(fields) => fields.values_mut().filter(|value| !value.is_null()).for_each(|value| *value = MASK.into()),
        _ => *variables = MASK.into(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_request_is_kept_without_its_secrets() {
        let body = json!({
            "token": "3", "secret": "1", "password": null, "name": "web", "passwd_hashes": {"ada": "$6$1"},
            "spec": {
                "env": [{"scope": "all", "key": "KEY", "value": "2"}],
                "args": {"VERSION": "3", "NONE": null},
                "steps": [{"kind": "run", "args": {"command": "make", "env": [["KEY", "2"]], "workdir": "/src"}, "line": 3}]
            }
        });
        let asked = Asked::new("POST", "/v1/vms?x=1", &serde_json::to_vec(&body).unwrap());
        assert_eq!((asked.shown.method.as_str(), asked.shown.path.as_str()), ("POST", "/v1/vms?x=1"));
        let shown = json!({
            "token": "…", "secret": "…", "password": null, "name": "web", "passwd_hashes": {"ada": "…"},
            "spec": {
                "env": [{"scope": "all", "key": "KEY", "value": "…"}],
                "args": {"VERSION": "…", "NONE": null},
                "steps": [{"kind": "run", "args": {"command": "make", "env": [["KEY", "…"]], "workdir": "/src"}, "line": 3}]
            }
        });
        assert_eq!(asked.shown.body, Some(shown));
    }

    #[test]
    fn what_cannot_be_shown_still_tells_requests_apart() {
        let asked = |body: &[u8]| Asked::new("PUT", "/v1/images", body);
        let long = |fill: &str| asked(format!("\"{}\"", fill.repeat(MAX_BODY)).as_bytes());
        assert_eq!((long("a").shown.body, asked(b"").shown.body, asked(b"\xff{").shown.body), (None, None, None));
        assert_ne!(long("a").digest, long("b").digest);
        assert_ne!(asked(b"1").digest, Asked::new("POST", "/v1/images", b"1").digest);
        assert_eq!(asked(b"1").digest, asked(b"1").digest);
    }
}
