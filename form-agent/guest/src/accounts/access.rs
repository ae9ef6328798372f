//! What lets a user in or up: SSH keys, sshd's rules, sudo.

use std::{fs, path::Path};

use form_types::settings::{Settings, UserSettings};

use super::database::password_usable;
use crate::{
    error::{Context, Error},
    files,
    report::BootReport,
};

const SSHD_CONFIG: &str = "/etc/ssh/sshd_config";
const SSHD_SNIPPETS: &str = "/etc/ssh/sshd_config.d";

/// The lines for authorized_keys. A key with a line break in it would be two.
pub fn key_lines(user: &UserSettings) -> Vec<String> {
    user.ssh_authorized_keys.iter().map(|key| key.replace(['\n', '\r'], " ").trim().to_owned()).filter(|key| !key.is_empty()).collect()
}

/// The rule of one user, or none. Without a password sudo can ask for nothing.
fn sudo_rule(user: &UserSettings) -> Option<String> {
    let tag = if password_usable(user) { "" } else { "NOPASSWD: " };
    user.sudo.then(|| format!("{} ALL=(ALL:ALL) {tag}ALL\n", user.name))
}

/// Writes or removes the user's file in sudoers.d.
pub fn sudo(user: &UserSettings, report: &mut BootReport) -> Result<(), Error> {
    let path = format!("/etc/sudoers.d/form-{}", user.name);
    let path = Path::new(&path);
    let Some(rule) = sudo_rule(user) else {
        return match fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).at("remove", path),
            _ => Ok(()),
        };
    };
    if !["/usr/bin/sudo", "/bin/sudo", "/usr/local/bin/sudo"].iter().any(|program| Path::new(program).exists()) {
        report.warn("users", format_args!("{} may use sudo and the image has none: add `INSTALL sudo`", user.name));
    }
    files::write_if_changed(path, &rule, Some(0o440))
}

/// The rules for sshd: whether root may come in, and who may use a password.
fn sshd_rules(settings: &Settings) -> String {
    let mut rules = format!("PermitRootLogin {}\n", if settings.root_login { "yes" } else { "no" });
    if settings.users.is_empty() {
        return rules;
    }
    let with_password = |user: &&UserSettings| user.ssh_password_login && password_usable(user);
    let any = settings.users.iter().any(|user| with_password(&user));
    rules.push_str(if any { "PasswordAuthentication yes\n" } else { "PasswordAuthentication no\nKbdInteractiveAuthentication no\n" });
    let refused: Vec<&str> = settings.users.iter().filter(|user| !user.ssh_password_login).map(|user| user.name.as_str()).collect();
    if any && !refused.is_empty() {
        rules.push_str(&format!(
            "Match User {}\n    PasswordAuthentication no\n    KbdInteractiveAuthentication no\nMatch all\n",
            refused.join(",")
        ));
    }
    rules
}

/// Writes them where sshd is installed, first among the snippets because sshd takes the first word it reads.
pub fn sshd(settings: &Settings) -> Result<(), Error> {
    let Ok(config) = fs::read_to_string(SSHD_CONFIG) else { return Ok(()) };
    files::write_if_changed(&Path::new(SSHD_SNIPPETS).join("00-form.conf"), &sshd_rules(settings), Some(0o644))?;
    let included = config.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.next().is_some_and(|word| word.eq_ignore_ascii_case("include")) && words.any(|word| word.starts_with(SSHD_SNIPPETS))
    });
    if included {
        return Ok(());
    }
    files::write_if_changed(Path::new(SSHD_CONFIG), &format!("Include {SSHD_SNIPPETS}/*.conf\n{config}"), None)
}

#[cfg(test)]
mod tests {
    use super::{super::database::tests::user, *};

    fn settings(users: Vec<UserSettings>, root_login: bool) -> Settings {
        Settings { users, root_login, ..crate::settings::tests::empty() }
    }

    #[test]
    fn sudo_asks_for_a_password_only_where_there_is_one() {
        assert_eq!(sudo_rule(&user("web")), None);
        let admin = UserSettings { sudo: true, ..user("web") };
        assert_eq!(sudo_rule(&admin).as_deref(), Some("web ALL=(ALL:ALL) ALL\n"));
        for without in [UserSettings { passwd_hash: None, ..admin.clone() }, UserSettings { lock_passwd: true, ..admin }] {
            assert_eq!(sudo_rule(&without).as_deref(), Some("web ALL=(ALL:ALL) NOPASSWD: ALL\n"));
        }
    }

    #[test]
    fn sshd_rules_follow_the_users() {
        assert_eq!(sshd_rules(&settings(vec![], true)), "PermitRootLogin yes\n");
        assert_eq!(sshd_rules(&settings(vec![user("a")], false)), "PermitRootLogin no\nPasswordAuthentication yes\n");
        let key_only = UserSettings { passwd_hash: None, ..user("b") };
        assert!(sshd_rules(&settings(vec![key_only], false)).contains("PasswordAuthentication no\n"));
        let refused = UserSettings { ssh_password_login: false, ..user("c") };
        let rules = sshd_rules(&settings(vec![user("a"), refused], false));
        assert!(
            rules.contains("PasswordAuthentication yes\nMatch User c\n    PasswordAuthentication no\n") && rules.ends_with("Match all\n"),
            "{rules}"
        );
    }

    #[test]
    fn keys_are_one_line_each() {
        let wanted = UserSettings { ssh_authorized_keys: vec![" ssh-ed25519 A a\n".into(), "\n".into(), "x\ny".into()], ..user("a") };
        assert_eq!(key_lines(&wanted), ["ssh-ed25519 A a", "x y"]);
    }
}
