//! Whether an account may be used at all, as sshd and PAM's pam_unix look at passwd(5) and shadow(5).

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use super::{
    authorized_keys::{self, KeyOptions},
    rules::Rules,
};
use crate::{
    accounts::{Row, Table},
    identity::Identity,
};

/// An account that may be used by whoever can show that it is his.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    pub identity: Identity,
    /// What its password is compared with.
    pub hash: Option<String>,
    /// The password has to be changed before anything else is done.
    pub expired: bool,
}

/// Why an account is not opened. For the machine's console; the client is not told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Closed {
    #[error("there is no such user")]
    NoSuchUser,
    #[error("root may not log in: `disable_root` of the Formfile")]
    Root,
    #[error("its shell is no program of the image")]
    Shell,
    #[error("the account has expired")]
    Expired,
    #[error("/etc/nologin is there")]
    NoLogin,
}

/// An account of the machine whose files are below `root`.
///
/// # Errors
/// Why nobody may use it.
pub fn open(root: &Path, rules: &Rules, name: &str) -> Result<Account, Closed> {
    let read = |path: &str| Table::parse(&fs::read_to_string(root.join(path)).unwrap_or_default());
    let identity = Identity::named(name, &read("etc/passwd"), &read("etc/group")).ok_or(Closed::NoSuchUser)?;
    if identity.uid == 0 && !rules.root_login {
        return Err(Closed::Root);
    }
    if identity.uid != 0 && root.join("etc/nologin").exists() {
        return Err(Closed::NoLogin);
    }
    let is_program = fs::metadata(&identity.shell).is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0);
    if !identity.shell.starts_with('/') || !is_program {
        return Err(Closed::Shell);
    }
    let shadow = read("etc/shadow");
    let Some(row) = shadow.get(name) else { return Ok(Account { identity, hash: None, expired: false }) };
    let expired = must_change(row, today()).ok_or(Closed::Expired)?;
    Ok(Account { identity, hash: Some(row.field(1).to_owned()), expired })
}

impl Account {
    pub fn key_options(&self, key: &russh::keys::PublicKey) -> Option<KeyOptions> {
        authorized_keys::find(Path::new(&self.identity.home), self.identity.uid, key)
    }
}

fn today() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() / 86_400)
}

/// Whether the password has to be changed (shadow(5)); `None` when the account is closed. Days since 1970.
fn must_change(row: &Row, today: u64) -> Option<bool> {
    let number = |field| row.number(field).map(u64::from);
    if number(7).is_some_and(|closes| today >= closes) {
        return None;
    }
    let Some(changed) = number(2) else { return Some(false) };
    if changed == 0 {
        return Some(true);
    }
    let Some(due) = number(4).map(|valid| changed + valid).filter(|due| today > *due) else { return Some(false) };
    if number(6).is_some_and(|inactive| today > due + inactive) { None } else { Some(true) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_of_passwords() {
        let cases = [
            ("a:x:20000:0:99999:7:::", Some(false)),
            ("a:x::::::", Some(false)),
            ("a:x", Some(false)),
            ("a:x:0:0:99999:7:::", Some(true)),
            ("a:x:19000:0:90:7:::", Some(true)),
            ("a:x:19000:0:90:7:10::", None),
            ("a:x:19990:0:90:7:10:20001:", Some(false)),
            ("a:x:19990:0:90:7:10:20000:", None),
            ("a:x:4294967295:0:4294967295:7:4294967295::", Some(false)),
        ];
        for (line, expected) in cases {
            assert_eq!(must_change(Table::parse(line).rows().next().unwrap(), 20_000), expected, "{line}");
        }
    }

    #[test]
    fn only_accounts_that_may_be_used_are_opened() {
        let root = std::env::temp_dir().join(format!("form-guest-account-{}", std::process::id()));
        fs::create_dir_all(root.join("etc")).unwrap();
        let passwd = "root:x:0:0::/root:/bin/sh\nada:x:1000:1000::/home/ada:/bin/sh\nold:x:1001:1001::/:/bin/sh\n\
                      odd:x:1002:1002::/:/no/such/shell\nrelative:x:1003:1003::/:sh\ntoor:x:0:0::/root:/bin/sh\n";
        fs::write(root.join("etc/passwd"), passwd).unwrap();
        fs::write(root.join("etc/group"), "staff:x:50:ada\nada:x:1000:\n").unwrap();
        fs::write(root.join("etc/shadow"), "ada:hash:0:0:99999:7:::\nold:*:1:0:99999:7::1:\n").unwrap();
        let rules = Rules { root_login: false, ..Rules::default() };
        let ada = open(&root, &rules, "ada").unwrap();
        assert_eq!((ada.identity.uid, ada.identity.groups.as_slice()), (1000, &[50, 1000][..]));
        assert_eq!((ada.hash.as_deref(), ada.expired), (Some("hash"), true));
        let closed = [
            ("root", Closed::Root),
            ("toor", Closed::Root),
            ("old", Closed::Expired),
            ("odd", Closed::Shell),
            ("relative", Closed::Shell),
            ("eve", Closed::NoSuchUser),
            // None of these is a name, whatever they mean elsewhere.
            ("0", Closed::NoSuchUser),
            ("1000", Closed::NoSuchUser),
            ("ada:root", Closed::NoSuchUser),
            ("ada:x:1000", Closed::NoSuchUser),
            ("", Closed::NoSuchUser),
        ];
        for (name, reason) in closed {
            assert_eq!(open(&root, &rules, name), Err(reason), "{name}");
        }
        assert_eq!(open(&root, &Rules { root_login: true, ..Rules::default() }, "root").unwrap().identity.uid, 0);
        fs::write(root.join("etc/nologin"), "").unwrap();
        assert_eq!(open(&root, &rules, "ada"), Err(Closed::NoLogin));
        fs::remove_dir_all(&root).unwrap();
    }
}
