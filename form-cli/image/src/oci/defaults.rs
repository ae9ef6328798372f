//! What an image of a registry says about how it runs: the defaults of a Formfile that begins with it.

use form_types::{
    Spec,
    spec::{Env, EnvScope},
};
use serde::{Deserialize, Serialize};

use super::{OciError, document::RunConfig};
use crate::tree_path::TreePath;

/// The most that all variables take together: the kernel gives a program little more.
const MOST_ENVIRONMENT: usize = 128 << 10;

/// Values that count where the Formfile has none. The default of everything is: nothing said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Defaults {
    pub env: Vec<(String, String)>,
    /// Absolute.
    pub workdir: Option<String>,
    /// `USER[:GROUP]`, names or numbers.
    pub run_as: Option<String>,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// `80/tcp`: told, never published.
    pub ports: Vec<String>,
}

fn unusable(what: &str, reason: &str) -> OciError {
    OciError::Unsupported { what: format!("an image whose {what} cannot be used: {reason}") }
}

impl Defaults {
    /// # Errors
    /// When a value could not have been written in a Formfile.
    pub fn new(config: Option<RunConfig>) -> Result<Self, OciError> {
        let config = config.unwrap_or_default();
        let mut env: Vec<(String, String)> = Vec::new();
        for pair in config.env.unwrap_or_default() {
            let (key, value) = pair.split_once('=').unwrap_or((pair.as_str(), ""));
            let first = key.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_');
            if !first || !key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
                return Err(unusable("ENV", &format!("`{}` is no name of a variable", key.escape_default().take(100).collect::<String>())));
            }
            if value.contains('\0') {
                return Err(unusable("ENV", &format!("{key} has a zero byte")));
            }
            // Of two the later one counts, as for a process.
            env.retain(|(other, _)| other != key);
            env.push((key.to_owned(), value.to_owned()));
        }
        if env.iter().map(|(key, value)| key.len() + value.len() + 2).sum::<usize>() > MOST_ENVIRONMENT {
            return Err(unusable("ENV", &format!("it is longer than {MOST_ENVIRONMENT} bytes")));
        }
        let words = |words: Option<Vec<String>>, what: &str| {
            let words = words.unwrap_or_default();
            let total: usize = words.iter().map(|word| word.len() + 1).sum();
            if words.iter().any(|word| word.contains('\0')) || total > MOST_ENVIRONMENT {
                return Err(unusable(what, "a word has a zero byte, or it is too long"));
            }
            Ok(words)
        };
        let run_as = config.user.filter(|user| !user.is_empty());
        if let Some(user) = &run_as
            && (user.len() > 100 || !user.bytes().all(|byte| byte.is_ascii_graphic()))
        {
            return Err(unusable("USER", "it is no user's name or number"));
        }
        let ports = config.exposed_ports.unwrap_or_default().into_keys();
        let is_port = |port: &String| port.len() <= 20 && port.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'/');
        Ok(Self {
            env,
            workdir: workdir(config.working_dir)?,
            run_as,
            entrypoint: words(config.entrypoint, "ENTRYPOINT")?,
            cmd: words(config.cmd, "CMD")?,
            ports: ports.filter(is_port).take(100).collect(),
        })
    }

    /// The meaning of a Formfile on top of these.
    pub fn apply(&self, spec: &Spec) -> Spec {
        let mut spec = spec.clone();
        let own: Vec<Env> = std::mem::take(&mut spec.env);
        let is_own = |key: &str| own.iter().any(|env| env.scope == EnvScope::System && env.key == key);
        let inherited = self.env.iter().filter(|(key, _)| !is_own(key));
        spec.env = inherited.map(|(key, value)| Env { scope: EnvScope::System, key: key.clone(), value: value.clone() }).collect();
        spec.env.extend(own);
        // The order that a Formfile's own have.
        spec.env.sort_by(|left, right| (&left.scope, &left.key).cmp(&(&right.scope, &right.key)));
        spec.workdir = spec.workdir.or_else(|| self.workdir.clone());
        // `USER root` takes back the base's user, and is what nobody means.
        spec.run_as = spec.run_as.or_else(|| self.run_as.clone()).filter(|user| user != "root" && user != "0");
        // As in a Dockerfile: arguments belong to the ENTRYPOINT that they were written for.
        if spec.entrypoint.is_empty() {
            spec.entrypoint.clone_from(&self.entrypoint);
            if spec.cmd.is_empty() {
                spec.cmd.clone_from(&self.cmd);
            }
        }
        spec
    }

    /// The environment of a build step, ordered by name.
    pub fn step_env(&self, own: &[(String, String)]) -> Vec<(String, String)> {
        let mut env: std::collections::BTreeMap<String, String> = self.env.iter().cloned().collect();
        env.extend(own.iter().cloned());
        env.into_iter().collect()
    }
}

/// `None` for the root, where everything begins anyway.
fn workdir(text: Option<String>) -> Result<Option<String>, OciError> {
    let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(None) };
    let path = TreePath::parse(text.as_bytes()).map_err(|error| unusable("WORKDIR", &error.to_string()))?;
    if text.chars().any(char::is_control) {
        return Err(unusable("WORKDIR", "it has control characters"));
    }
    Ok((!path.is_root()).then(|| path.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Result<Defaults, OciError> {
        Defaults::new(Some(serde_json::from_str(text).unwrap()))
    }

    fn spec(lines: &str) -> Spec {
        let text = format!("NAME web\n{lines}\n");
        formfile::check("Formfile", &text, &formfile::LowerOptions::default()).spec.unwrap()
    }

    const FULL: &str = r#"{"User":"app:1000","Env":["PATH=/opt/bin:/bin","A=1","A=2","EMPTY"],"Entrypoint":["/entry"],"Cmd":["serve","x"],"WorkingDir":"/srv/","ExposedPorts":{"80/tcp":{},"53/udp":{}}}"#;

    #[test]
    fn a_configuration_gives_what_a_formfile_leaves_out() {
        let defaults = config(FULL).unwrap();
        assert_eq!(defaults.ports, ["53/udp", "80/tcp"]);
        let spec = defaults.apply(&spec("FROM registry.example/a"));
        let env: Vec<(&str, &str)> = spec.env.iter().map(|env| (env.key.as_str(), env.value.as_str())).collect();
        assert_eq!(env, [("A", "2"), ("EMPTY", ""), ("PATH", "/opt/bin:/bin")]);
        assert_eq!((spec.workdir.as_deref(), spec.run_as.as_deref()), (Some("/srv"), Some("app:1000")));
        assert_eq!((spec.entrypoint, spec.cmd), (vec!["/entry".to_owned()], vec!["serve".to_owned(), "x".to_owned()]));
        assert!(spec.ports.is_empty());
    }

    #[test]
    fn a_formfile_counts_more() {
        let defaults = config(FULL).unwrap();
        let own = defaults
            .apply(&spec("FROM registry.example/a\nENV A=3\nENV --scope=service:web PATH=/x\nWORKDIR /own\nUSER root\nCMD [\"own\"]"));
        let env: Vec<(&str, &str)> = own.env.iter().map(|env| (env.key.as_str(), env.value.as_str())).collect();
        assert_eq!(env, [("A", "3"), ("EMPTY", ""), ("PATH", "/opt/bin:/bin"), ("PATH", "/x")]);
        assert_eq!((own.workdir.as_deref(), own.run_as.as_deref()), (Some("/own"), None));
        // A CMD alone is for the base's ENTRYPOINT; an ENTRYPOINT leaves the base's CMD behind.
        assert_eq!((own.entrypoint, own.cmd), (vec!["/entry".to_owned()], vec!["own".to_owned()]));
        let own = defaults.apply(&spec("ENTRYPOINT [\"/mine\"]"));
        assert_eq!((own.entrypoint, own.cmd), (vec!["/mine".to_owned()], vec![]));
        assert_eq!(Defaults::default().apply(&spec("ENV A=1")), spec("ENV A=1"));
    }

    #[test]
    fn steps_see_the_environment_of_the_base_below_their_own() {
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let env = config(FULL).unwrap().step_env(&[pair("A", "9"), pair("B", "1")]);
        assert_eq!(env, [pair("A", "9"), pair("B", "1"), pair("EMPTY", ""), pair("PATH", "/opt/bin:/bin")]);
    }

    #[test]
    fn what_no_formfile_could_say_is_refused() {
        for (text, word) in [
            (r#"{"Env":["A B=1"]}"#, "ENV"),
            (r#"{"Env":["=x"]}"#, "ENV"),
            (r#"{"Env":["A=\u0000"]}"#, "zero byte"),
            (r#"{"WorkingDir":"/a/../../b"}"#, "WORKDIR"),
            (r#"{"User":"a b"}"#, "USER"),
            (r#"{"Cmd":["a\u0000"]}"#, "CMD"),
        ] {
            let error = config(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
        assert!(config(&format!(r#"{{"Env":["A={}"]}}"#, "x".repeat(MOST_ENVIRONMENT))).is_err());
        assert_eq!(config("{}").unwrap(), Defaults::default());
        assert_eq!(config(r#"{"Env":null,"WorkingDir":"/","User":""}"#).unwrap(), Defaults::default());
    }
}
