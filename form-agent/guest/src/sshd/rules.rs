//! What the settings say about logins, as the server process is told it; and whether there is anything to serve. Pure but for a look at
//! the image's programs.

use std::{
    collections::BTreeMap,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use form_types::settings::{Settings, UserSettings};
use serde::{Deserialize, Serialize};

use crate::accounts::{key_lines, password_usable};

/// Given to the server process on its standard input.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// Whether root may come in at all.
    pub root_login: bool,
    /// Whether anybody may use a password.
    pub passwords: bool,
    pub users: BTreeMap<String, UserRules>,
    /// For every login.
    pub env: BTreeMap<String, String>,
}

/// Of a user of the settings. The image may have others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserRules {
    pub password: bool,
    pub env: BTreeMap<String, String>,
}

impl Rules {
    pub fn of(settings: &Settings) -> Self {
        let users = settings.users.iter().map(|user| {
            let rules = UserRules { password: user.ssh_password_login, env: user.env.clone() };
            (user.name.clone(), rules)
        });
        Self {
            root_login: settings.root_login,
            passwords: settings.users.iter().any(has_password),
            users: users.collect(),
            env: settings.env.clone(),
        }
    }

    /// The same rules as those written for an image's own sshd: passwords are for everybody or nobody, but for users who are excepted.
    pub fn allows_password(&self, name: &str) -> bool {
        self.passwords && self.users.get(name).is_none_or(|user| user.password)
    }
}

fn has_password(user: &UserSettings) -> bool {
    user.ssh_password_login && password_usable(user)
}

/// Whether a user of the settings could log in over SSH.
fn wanted_by(settings: &Settings) -> bool {
    settings.users.iter().any(|user| {
        let root_kept_out = user.name == "root" && !settings.root_login;
        !root_kept_out && (!key_lines(user).is_empty() || has_password(user))
    })
}

/// The rules for our server, when there is somebody to serve and the image has no server of its own.
pub fn wanted(settings: &Settings, root: &Path) -> Option<Rules> {
    (wanted_by(settings) && image_server(root).is_none()).then(|| Rules::of(settings))
}

/// The image's own SSH server, running or not.
pub fn image_server(root: &Path) -> Option<PathBuf> {
    let directories = ["usr/sbin", "sbin", "usr/local/sbin", "usr/bin", "bin", "usr/local/bin"];
    let names = ["sshd", "dropbear", "tinysshd"];
    let paths = directories.iter().flat_map(|directory| names.iter().map(move |name| Path::new(directory).join(name)));
    let is_program =
        |path: &PathBuf| root.join(path).metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0);
    paths.into_iter().find(is_program).map(|path| Path::new("/").join(path))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{accounts::tests::user, settings::tests::empty};

    fn settings(users: Vec<UserSettings>) -> Settings {
        Settings { users, ..empty() }
    }

    #[test]
    fn it_runs_where_somebody_can_come_in() {
        let nowhere = Path::new("/no/such/root");
        let without = UserSettings { passwd_hash: None, ..user("a") };
        let key = UserSettings { ssh_authorized_keys: vec!["ssh-ed25519 AAAA a".into()], ..without.clone() };
        let root_key = UserSettings { name: "root".into(), ..key.clone() };
        let cases = [
            (vec![], false),
            (vec![without.clone()], false),
            (vec![UserSettings { ssh_authorized_keys: vec!["\n".into()], ..without }], false),
            (vec![key], true),
            (vec![user("b")], true),
            (vec![UserSettings { lock_passwd: true, ..user("b") }], false),
            (vec![UserSettings { ssh_password_login: false, ..user("b") }], false),
            (vec![root_key.clone()], true),
        ];
        for (users, wants) in cases {
            assert_eq!(wanted(&settings(users.clone()), nowhere).is_some(), wants, "{users:?}");
        }
        assert!(wanted(&Settings { root_login: false, ..settings(vec![root_key]) }, nowhere).is_none());
    }

    #[test]
    fn an_images_own_server_comes_first() {
        let root = std::env::temp_dir().join(format!("form-guest-sshd-{}", std::process::id()));
        let program = root.join("usr/sbin/sshd");
        fs::create_dir_all(program.parent().unwrap()).unwrap();
        fs::write(&program, "").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(wanted(&settings(vec![user("a")]), &root).is_some(), "it cannot be executed");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(image_server(&root).as_deref(), Some(Path::new("/usr/sbin/sshd")));
        assert!(wanted(&settings(vec![user("a")]), &root).is_none());
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn passwords_are_for_those_whom_sshd_would_let_in() {
        let refused = UserSettings { ssh_password_login: false, ..user("b") };
        let rules = Rules::of(&settings(vec![user("a"), refused.clone()]));
        assert!(rules.allows_password("a") && rules.allows_password("of-the-image") && !rules.allows_password("b"));
        assert!(!Rules::of(&settings(vec![refused])).allows_password("of-the-image"), "nobody of the settings has a password to use");
    }
}
