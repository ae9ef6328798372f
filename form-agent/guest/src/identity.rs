//! Who a process runs as: users and groups of the image, read from its own files (a static program has no name service).

use std::fs;

use crate::{accounts::Table, error::Error, sys::Launch};

/// Where commands are looked for when nobody says otherwise.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    /// `None` for a number without an account.
    pub name: Option<String>,
    pub home: String,
    pub shell: String,
}

impl Identity {
    /// Looks up `USER[:GROUP]`, names or numbers; `None` is root.
    ///
    /// # Errors
    /// When a name is not in the image.
    pub fn lookup(who: Option<&str>) -> Result<Self, Error> {
        let read = |path: &str| Table::parse(&fs::read_to_string(path).unwrap_or_default());
        Self::resolve(who.unwrap_or("0"), &read("/etc/passwd"), &read("/etc/group"))
    }

    /// The account of exactly this name, which somebody outside gave: no number, and no group with it.
    pub fn named(name: &str, passwd: &Table, group: &Table) -> Option<Self> {
        let row = passwd.get(name).filter(|row| !name.is_empty() && row.number(2).is_some() && row.number(3).is_some())?;
        Self::resolve(row.field(0), passwd, group).ok().filter(|identity| identity.name.as_deref() == Some(name))
    }

    fn resolve(who: &str, passwd: &Table, group: &Table) -> Result<Self, Error> {
        let (user, wanted_group) = match who.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (who, None),
        };
        let number = user.parse::<u32>().ok();
        let account = match number {
            Some(uid) => passwd.rows().find(|row| row.number(2) == Some(uid)),
            None => Some(passwd.get(user).ok_or_else(|| Error::NoSuchUser { name: user.to_owned() })?),
        };
        let name = account.map(|row| row.field(0).to_owned());
        let uid = account.and_then(|row| row.number(2)).or(number).ok_or_else(|| Error::NoSuchUser { name: user.to_owned() })?;
        let own_gid = account.and_then(|row| row.number(3)).unwrap_or(0);
        let gid = match wanted_group {
            None => own_gid,
            Some(text) => match text.parse() {
                Ok(gid) => gid,
                Err(_) => group.get(text).and_then(|row| row.number(2)).ok_or_else(|| Error::NoSuchGroup { name: text.to_owned() })?,
            },
        };
        let mut groups: Vec<u32> = vec![gid];
        if let Some(name) = &name {
            let member = |row: &crate::accounts::Row| row.field(3).split(',').any(|member| member == name);
            groups.extend(group.rows().filter(|row| member(row)).filter_map(|row| row.number(2)));
        }
        groups.sort_unstable();
        groups.dedup();
        let text =
            |field: usize, default: &str| account.map(|row| row.field(field)).filter(|text| !text.is_empty()).unwrap_or(default).to_owned();
        Ok(Self { uid, gid, groups, name, home: text(5, "/"), shell: text(6, "/bin/sh") })
    }

    pub fn launch(&self, terminal: bool) -> Launch {
        Launch { uid: self.uid, gid: self.gid, groups: self.groups.clone(), terminal }
    }

    /// The environment that says who one is.
    pub fn env(&self) -> Vec<(String, String)> {
        let mut env = vec![
            ("PATH".to_owned(), DEFAULT_PATH.to_owned()),
            ("HOME".to_owned(), self.home.clone()),
            ("SHELL".to_owned(), self.shell.clone()),
        ];
        if let Some(name) = &self.name {
            env.push(("USER".to_owned(), name.clone()));
            env.push(("LOGNAME".to_owned(), name.clone()));
        }
        env
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nweb:x:1000:1001:,,,:/home/web:\n";
    const GROUP: &str = "root:x:0:\nweb:x:1001:\nvideo:x:44:other,web\nadm:x:4:webby\n";

    fn resolve(who: &str) -> Result<Identity, Error> {
        Identity::resolve(who, &Table::parse(PASSWD), &Table::parse(GROUP))
    }

    #[test]
    fn names_and_numbers() {
        let web = resolve("web").expect("there");
        assert_eq!(
            (web.uid, web.gid, web.groups.as_slice(), web.home.as_str(), web.shell.as_str()),
            (1000, 1001, &[44, 1001][..], "/home/web", "/bin/sh")
        );
        assert_eq!(resolve("1000").expect("there"), web);
        let other = resolve("web:video").expect("there");
        assert_eq!((other.gid, other.groups.as_slice()), (44, &[44][..]));
        let unknown = resolve("4242:7").expect("numbers need no account");
        assert_eq!((unknown.uid, unknown.gid, unknown.name.as_deref(), unknown.home.as_str()), (4242, 7, None, "/"));
        assert!(resolve("nobody").expect_err("missing").to_string().contains("`nobody`"));
        assert!(resolve("web:nogroup").is_err());
        assert!(resolve("").is_err());
    }

    #[test]
    fn a_name_from_outside_is_only_a_name() {
        let named =
            |name| Identity::named(name, &Table::parse("0:x:5:5::/:\nweb:x:1000:1001::/home/web:\nbad:x:::/:\n"), &Table::parse(GROUP));
        assert_eq!(named("web"), Some(resolve("web").expect("there")));
        for other in ["1000", "0", "web:video", "web:0", "bad", "", "nobody"] {
            assert_eq!(named(other), None, "{other}");
        }
    }
}
