//! The four account files as one value, and the changes that the settings ask for. No I/O besides load and store.

use std::{fs, path::Path};

use form_types::settings::UserSettings;

use super::table::Table;
use crate::{error::Error, files};

const USER_IDS: std::ops::Range<u32> = 1000..60_000;
const SYSTEM_IDS: std::ops::Range<u32> = 100..1000;

/// No password opens the account, a key does. (`!` would also stop keys where sshd does not use PAM.)
const NO_PASSWORD: &str = "*";

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accounts {
    pub passwd: Table,
    pub shadow: Table,
    pub group: Table,
    pub gshadow: Table,
}

/// What is known of an account once it exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    pub uid: u32,
    pub gid: u32,
    pub home: String,
}

impl Accounts {
    pub fn load() -> Self {
        let read = |path: &str| Table::parse(&fs::read_to_string(path).unwrap_or_default());
        Self { passwd: read("/etc/passwd"), shadow: read("/etc/shadow"), group: read("/etc/group"), gshadow: read("/etc/gshadow") }
    }

    /// Writes the files that differ. The order is such that a crash in between leaves no account without its group or password entry.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn store(&self, before: &Self) -> Result<(), Error> {
        // A new file of secrets is for root alone; an old one keeps its mode (Debian: readable by group shadow).
        let secret = |path: &str| if Path::new(path).exists() { None } else { Some(0o600) };
        let files = [
            ("/etc/gshadow", &self.gshadow, &before.gshadow, secret("/etc/gshadow")),
            ("/etc/group", &self.group, &before.group, None),
            ("/etc/shadow", &self.shadow, &before.shadow, secret("/etc/shadow")),
            ("/etc/passwd", &self.passwd, &before.passwd, None),
        ];
        for (path, table, before, mode) in files {
            if table != before {
                files::write(Path::new(path), table.render().as_bytes(), mode)?;
            }
        }
        Ok(())
    }

    /// Makes sure the account is there with this shell and these groups. Its number and home are the image's when it has the account.
    ///
    /// # Errors
    /// When no number is left.
    pub fn ensure_user(&mut self, user: &UserSettings) -> Result<Account, Error> {
        if self.passwd.get(&user.name).is_none() {
            self.add_user(user)?;
        }
        for name in &user.groups {
            if self.group.get(name).is_none() {
                self.add_group(name, &[], SYSTEM_IDS)?;
            }
            if let Some(row) = self.group.get_mut(name) {
                row.add_member(3, &user.name);
            }
            if let Some(row) = self.gshadow.get_mut(name) {
                row.add_member(3, &user.name);
            }
        }
        let row = self.passwd.get_mut(&user.name).ok_or_else(|| Error::NoSuchUser { name: user.name.clone() })?;
        row.set(6, &user.shell);
        // Passwords are looked for in shadow only when this says so.
        row.set(1, "x");
        let number = |position| row.number(position).ok_or_else(|| Error::NoSuchUser { name: user.name.clone() });
        Ok(Account { uid: number(2)?, gid: number(3)?, home: row.field(5).to_owned() })
    }

    /// The password and its expiry. `today`: days since 1970.
    pub fn set_password(&mut self, user: &UserSettings, today: u64) {
        let field = match (&user.passwd_hash, user.lock_passwd) {
            (Some(hash), true) => format!("!{hash}"),
            (Some(hash), false) => hash.clone(),
            (None, true) => "!*".to_owned(),
            (None, false) => NO_PASSWORD.to_owned(),
        };
        // Without a usable password there is nothing to change at the first login, and the demand would keep a key out.
        let expires = user.expire_passwd && password_usable(user);
        let changed = if expires { "0".to_owned() } else { today.max(1).to_string() };
        self.shadow_row(&user.name, &changed);
        if let Some(row) = self.shadow.get_mut(&user.name) {
            row.set(1, &field);
            row.set(2, &changed);
        }
    }

    /// Takes the password away from an account, as `passwd -l` does.
    pub fn lock_password(&mut self, name: &str) {
        if let Some(row) = self.shadow.get_mut(name)
            && !row.field(1).starts_with(['!', '*'])
        {
            let locked = format!("!{}", row.field(1));
            row.set(1, &locked);
        }
    }

    fn shadow_row(&mut self, name: &str, changed: &str) {
        if self.shadow.get(name).is_none() {
            self.shadow.push([name, NO_PASSWORD, changed, "0", "99999", "7", "", "", ""]);
        }
    }

    fn add_user(&mut self, user: &UserSettings) -> Result<(), Error> {
        let uid = self.free_id(&self.passwd, USER_IDS).ok_or_else(|| Error::NoFreeId { file: "/etc/passwd", name: user.name.clone() })?;
        let gid = match self.group.get(&user.name).and_then(|row| row.number(2)) {
            Some(gid) => gid,
            None => self.add_group(&user.name, &[uid], USER_IDS)?,
        };
        let home = format!("/home/{}", user.name);
        self.passwd.push([&user.name, "x", &uid.to_string(), &gid.to_string(), "", &home, &user.shell]);
        Ok(())
    }

    /// Adds a group with the first of the wished numbers that is free, else one of the range.
    fn add_group(&mut self, name: &str, wished: &[u32], range: std::ops::Range<u32>) -> Result<u32, Error> {
        let taken = |id: &u32| self.group.rows().any(|row| row.number(2) == Some(*id));
        let gid = match wished.iter().copied().find(|id| !taken(id)) {
            Some(gid) => gid,
            None => self.free_id(&self.group, range).ok_or_else(|| Error::NoFreeId { file: "/etc/group", name: name.to_owned() })?,
        };
        self.group.push([name, "x", &gid.to_string(), ""]);
        if !self.gshadow.is_empty() {
            self.gshadow.push([name, "!", "", ""]);
        }
        Ok(gid)
    }

    /// Users get the number after the largest one, as useradd does, so that a deleted account's files find no new owner.
    fn free_id(&self, table: &Table, range: std::ops::Range<u32>) -> Option<u32> {
        let taken: Vec<u32> = table.rows().filter_map(|row| row.number(2)).collect();
        let after = taken.iter().filter(|id| range.contains(id)).max().map_or(range.start, |id| id + 1);
        if range.contains(&after) { Some(after) } else { range.rev().find(|id| !taken.contains(id)) }
    }
}

/// Whether the settings let the user in with a password.
pub fn password_usable(user: &UserSettings) -> bool {
    user.passwd_hash.is_some() && !user.lock_passwd
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn user(name: &str) -> UserSettings {
        UserSettings {
            name: name.to_owned(),
            passwd_hash: Some("$6$salt$hash".to_owned()),
            lock_passwd: false,
            expire_passwd: false,
            ssh_password_login: true,
            ssh_authorized_keys: Vec::new(),
            sudo: false,
            shell: "/bin/bash".to_owned(),
            groups: Vec::new(),
            env: std::collections::BTreeMap::new(),
        }
    }

    fn image() -> Accounts {
        Accounts {
            passwd: Table::parse("root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/:/x\nold:x:1004:1004::/srv/old:/bin/sh\n"),
            shadow: Table::parse("root:$6$r:19000:0:99999:7:::\nold:!:19000:0:99999:7:::\n"),
            group: Table::parse("root:x:0:\nvideo:x:44:\nold:x:1004:\nclash:x:1005:\n"),
            gshadow: Table::parse("root:*::\nvideo:*::\n"),
        }
    }

    #[test]
    fn a_new_user_gets_the_next_number_and_a_group() {
        let mut accounts = image();
        let wanted = UserSettings { groups: vec!["video".into(), "docker".into()], ..user("web") };
        let account = accounts.ensure_user(&wanted).expect("numbers are free");
        accounts.set_password(&wanted, 20_000);
        assert_eq!(account, Account { uid: 1005, gid: 1006, home: "/home/web".into() });
        assert!(accounts.passwd.render().ends_with("web:x:1005:1006::/home/web:/bin/bash\n"));
        assert!(accounts.shadow.render().ends_with("web:$6$salt$hash:20000:0:99999:7:::\n"));
        assert!(accounts.group.render().contains("video:x:44:web\n"));
        assert!(accounts.group.render().ends_with("web:x:1006:\ndocker:x:100:web\n"));
        assert!(accounts.gshadow.render().contains("video:*::web\n") && accounts.gshadow.render().ends_with("docker:!::web\n"));
        let once = accounts.clone();
        assert_eq!(accounts.ensure_user(&wanted).expect("there"), account);
        assert_eq!(accounts, once, "the second time changes nothing");
    }

    #[test]
    fn an_old_user_keeps_number_and_home() {
        let mut accounts = image();
        let account = accounts.ensure_user(&user("old")).expect("there");
        assert_eq!(account, Account { uid: 1004, gid: 1004, home: "/srv/old".into() });
        assert!(accounts.passwd.render().contains("old:x:1004:1004::/srv/old:/bin/bash\n"));
    }

    #[test]
    fn passwords() {
        let cases = [
            (user("old"), "old:$6$salt$hash:20000:"),
            (UserSettings { expire_passwd: true, ..user("old") }, "old:$6$salt$hash:0:"),
            (UserSettings { lock_passwd: true, expire_passwd: true, ..user("old") }, "old:!$6$salt$hash:20000:"),
            (UserSettings { passwd_hash: None, expire_passwd: true, ..user("old") }, "old:*:20000:"),
            (UserSettings { passwd_hash: None, lock_passwd: true, ..user("old") }, "old:!*:20000:"),
        ];
        for (wanted, line) in cases {
            let mut accounts = image();
            accounts.set_password(&wanted, 20_000);
            assert!(accounts.shadow.render().contains(line), "{wanted:?}: {}", accounts.shadow.render());
        }
    }

    #[test]
    fn root_is_locked_once() {
        let mut accounts = image();
        accounts.lock_password("root");
        accounts.lock_password("root");
        assert!(accounts.shadow.render().starts_with("root:!$6$r:19000:"));
    }

    #[test]
    fn full_ranges_fall_back_to_gaps() {
        let accounts = image();
        let table = Table::parse("a:x:59999:\nb:x:59998:\n");
        assert_eq!(accounts.free_id(&table, USER_IDS), Some(59_997));
        assert_eq!(accounts.free_id(&Table::parse("a:x:1:\n"), 1..2), None);
    }
}
