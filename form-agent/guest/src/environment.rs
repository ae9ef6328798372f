//! ENV: for every process of the machine, and for one user's logins.

use std::{collections::BTreeMap, fmt::Write, path::Path};

use crate::{error::Error, files};

/// In a user's home; read by [`PROFILE`].
pub const USER_FILE: &str = ".form-env";
/// Read by login shells.
const PROFILE: &str = "/etc/profile.d/00-form-env.sh";
/// Read by pam_env(8).
const PAM: &str = "/etc/environment";
/// Read by systemd for all services.
const SYSTEMD: &str = "/run/systemd/system.conf.d/10-form-env.conf";

/// Writes the variables of the whole machine where logins and services look for them.
///
/// # Errors
/// Those of the file system.
pub fn write_system(env: &BTreeMap<String, String>, systemd: bool) -> Result<(), Error> {
    let before = std::fs::read_to_string(PAM).unwrap_or_default();
    let lines = env.iter().filter(|(_, value)| pam_can_say(value)).map(|(key, value)| format!("{key}=\"{value}\"")).collect::<Vec<_>>();
    let after = files::managed_block(&before, &lines);
    if after != before {
        files::write(Path::new(PAM), after.as_bytes(), None)?;
    }
    let mut profile = exports(env).join("\n");
    let _ = write!(profile, "\nif [ -r \"$HOME/{USER_FILE}\" ]; then . \"$HOME/{USER_FILE}\"; fi\n");
    files::write_if_changed(Path::new(PROFILE), profile.trim_start(), Some(0o644))?;
    if systemd && !env.is_empty() {
        files::write_if_changed(Path::new(SYSTEMD), &systemd_text(env), Some(0o644))?;
    }
    Ok(())
}

/// Lines of a shell script, safe for any value.
pub fn exports(env: &BTreeMap<String, String>) -> Vec<String> {
    env.iter().map(|(key, value)| format!("export {key}='{}'", value.replace('\'', r"'\''"))).collect()
}

/// pam_env knows no line breaks and no way to quote a quote.
fn pam_can_say(value: &str) -> bool {
    !value.contains(['\n', '\r', '"', '\\'])
}

/// systemd-system.conf(5): quoted assignments, C-style escapes, `%` doubled.
fn systemd_text(env: &BTreeMap<String, String>) -> String {
    let mut text = "[Manager]\n".to_owned();
    for (key, value) in env {
        let value = value.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', r"\n").replace('%', "%%");
        let _ = writeln!(text, "DefaultEnvironment=\"{key}={value}\"");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_quoted_for_whoever_reads_them() {
        let env = BTreeMap::from([("A".to_owned(), "it's 5% \"x\"".to_owned())]);
        assert_eq!(exports(&env), [r#"export A='it'\''s 5% "x"'"#]);
        assert_eq!(systemd_text(&env), "[Manager]\nDefaultEnvironment=\"A=it's 5%% \\\"x\\\"\"\n");
        assert!(!pam_can_say("a\"b") && !pam_can_say("a\nb") && pam_can_say("it's"));
    }
}
