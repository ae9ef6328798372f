//! Logins for registries, from Docker's configuration file: `{"auths": {"HOST": {"auth": BASE64(USER:PASSWORD)}}}`.

use std::{collections::BTreeMap, fmt, fs, io, path::Path};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Deserialize;

use super::OciError;

/// A user name and a password. Its debug form hides the password.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Login {
    user: String,
    password: String,
}

impl fmt::Debug for Login {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Login({}, …)", self.user)
    }
}

impl Login {
    /// The value of an `Authorization` header (RFC 7617).
    pub fn header(&self) -> String {
        format!("Basic {}", STANDARD.encode(format!("{}:{}", self.user, self.password)))
    }
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    auths: BTreeMap<String, Auth>,
}

#[derive(Deserialize)]
struct Auth {
    #[serde(default)]
    auth: Option<String>,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<String>,
}

/// The login for a registry; `None` when there is no file or none for it. Credential helpers are not asked.
///
/// # Errors
/// When the file cannot be read or understood. What it holds is in no message.
pub(crate) fn find(path: &Path, registry: &str) -> Result<Option<Login>, OciError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(OciError::Io { action: format!("read {}", path.display()), source }),
    };
    let wrong = |reason: &str| OciError::Settings { reason: format!("{}: {reason}", path.display()) };
    // serde's own message could repeat a part of the file.
    let file: File =
        serde_json::from_slice(&bytes).map_err(|error| wrong(&format!("no configuration of Docker, line {}", error.line())))?;
    let Some((_, entry)) = file.auths.iter().find(|(key, _)| is_for(key, registry)) else { return Ok(None) };
    let (user, password) = match (&entry.auth, &entry.username, &entry.password) {
        (Some(auth), _, _) if !auth.is_empty() => {
            let decoded = STANDARD.decode(auth.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
            let text = decoded.ok_or_else(|| wrong(&format!("the `auth` of {registry} is not Base64")))?;
            let (user, password) = text.split_once(':').ok_or_else(|| wrong(&format!("the `auth` of {registry} has no password")))?;
            (user.to_owned(), password.trim_end_matches('\0').to_owned())
        }
        (_, Some(user), Some(password)) => (user.clone(), password.clone()),
        // An entry that only says that a helper has the password.
        _ => return Ok(None),
    };
    Ok(Some(Login { user, password }))
}

/// Keys are hosts, or URLs of the first version of the protocol, whose host began with `index.`.
fn is_for(key: &str, registry: &str) -> bool {
    let host = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let host = host.split('/').next().unwrap_or_default();
    host == registry || host.strip_prefix("index.") == Some(registry)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find_in(text: &str, registry: &str) -> Result<Option<Login>, OciError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        fs::write(&path, text).unwrap();
        find(&path, registry)
    }

    #[test]
    fn logins_are_found_by_host() {
        let text = r#"{"auths":{"https://index.hub.example/v1/":{"auth":"YTpi"},"registry.example:5000":{"auth":"dTpwOnc="},"c.example":{"username":"c","password":"d"},"helper.example":{}},"credsStore":"x"}"#;
        let header = |registry| find_in(text, registry).unwrap().map(|login| login.header());
        assert_eq!(header("hub.example").as_deref(), Some("Basic YTpi"));
        // A password may hold a colon.
        assert_eq!(header("registry.example:5000").as_deref(), Some("Basic dTpwOnc="));
        assert_eq!(header("c.example").as_deref(), Some("Basic Yzpk"));
        assert_eq!((header("registry.example"), header("helper.example"), header("example")), (None, None, None));
        assert_eq!(find(Path::new("/nonexistent/config.json"), "x").unwrap(), None);
    }

    #[test]
    fn a_damaged_file_is_named_and_not_repeated() {
        for text in [r#"{"auths":{"r.example":{"auth":"hunter2!"}}}"#, r#"{"auths":{"r.example":{"auth":"aHVudGVyMg=="}}}"#, "hunter2"] {
            let message = find_in(text, "r.example").unwrap_err().to_string();
            assert!(message.contains("config.json") && !message.contains("hunter2") && !message.contains("aHVu"), "{message}");
        }
    }
}
