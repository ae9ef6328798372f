//! The accounts of `USER`, made in the image: id, home, shell and groups. Passwords and keys are no part of an image; they travel
//! in a machine's settings.

use form_types::spec::User;

use crate::{
    BuildError,
    copy::add_parents,
    diff::{Diff, Entry, Kind, Meta},
    index::Index,
    layer::Layer,
    tarball::Spool,
    tree_path::TreePath,
};

/// As Debian's `login.defs` and the guest have them.
const USER_IDS: std::ops::Range<u32> = 1000..60_000;
const SYSTEM_IDS: std::ops::Range<u32> = 100..1000;

/// Runs as a script of the image; the arguments are name, shell and groups of each user. Groups that do not exist are made.
/// `/etc/*-`: the copies that the account tools leave.
const SCRIPT: &str = r#"
set -eu
while [ $# -gt 0 ]; do
    name=$1 shell=$2 groups=$3; shift 3
    for group in $(printf %s "$groups" | tr , ' '); do
        grep -q "^$group:" /etc/group || groupadd --system "$group"
    done
    if grep -q "^$name:" /etc/passwd; then
        usermod --shell "$shell" "$name"
    elif grep -q "^$name:" /etc/group; then
        useradd --no-log-init --create-home --shell "$shell" --gid "$name" "$name"
    else
        useradd --no-log-init --create-home --shell "$shell" --user-group "$name"
    fi
    if [ -n "$groups" ]; then usermod --append --groups "$groups" "$name"; fi
done
rm -f /etc/passwd- /etc/group- /etc/shadow- /etc/gshadow- /etc/subuid- /etc/subgid-
"#;

/// What of the users the image depends on: name, shell, groups.
pub(crate) fn essence(users: &[User]) -> Vec<(String, String, Vec<String>)> {
    users
        .iter()
        .map(|user| {
            let mut groups = user.groups.clone();
            groups.sort();
            groups.dedup();
            (user.name.clone(), user.shell.clone(), groups)
        })
        .collect()
}

/// Whether the image's own programs can make accounts. Without them we write the files: [`written`].
pub(crate) fn has_tools(index: &Index) -> bool {
    has_program(index, "useradd")
}

/// # Errors
/// When a name is none, or a shell is no path.
pub(crate) fn check(users: &[User]) -> Result<(), BuildError> {
    for (name, shell, groups) in essence(users) {
        let refuse = |reason: String| BuildError::Account { user: name.clone(), reason };
        for word in std::iter::once(&name).chain(&groups) {
            if !is_account_name(word) {
                return Err(refuse(format!("`{word}` is no name of a user or group")));
            }
        }
        if !shell.starts_with('/') || shell.contains([':', '\n']) {
            return Err(refuse(format!("the shell `{shell}` is no absolute path")));
        }
    }
    Ok(())
}

/// The words that make the accounts with the programs of the image. The users are [`check`]ed.
pub(crate) fn words(users: &[User]) -> Vec<String> {
    let mut words = vec!["/bin/sh".to_owned(), "-c".to_owned(), SCRIPT.to_owned(), "accounts".to_owned()];
    for (name, shell, groups) in essence(users) {
        words.extend([name, shell, groups.join(",")]);
    }
    words
}

/// The layer with the accounts, for an image without account tools such as `scratch`: lines of `/etc/passwd` and `/etc/group`, and the
/// homes. What is secret or may change (`/etc/shadow`, keys, sudo) is the guest's work at each start.
///
/// # Errors
/// When no number is left, a path of the accounts is something else in the image, or the disk is full.
pub(crate) fn written(users: &[User], index: &Index, parent: &Layer, spool: &Spool) -> Result<Diff, BuildError> {
    let mut files = Files::new(&parent.passwd, &parent.group);
    let mut entries = std::collections::BTreeMap::new();
    for (name, shell, groups) in essence(users) {
        let refuse = |reason: &str| BuildError::Account { user: name.clone(), reason: reason.to_owned() };
        let (uid, gid) = files.ensure(&name, &shell, &groups).ok_or_else(|| refuse("no number is left for it or a group of it"))?;
        let home = tree_path(&format!("home/{name}"))?;
        if index.get(&home).is_none() {
            entries.insert(home.clone(), Entry { path: home, meta: Meta::new(0o700, uid, gid), kind: Kind::Directory { opaque: false } });
        }
    }
    for (file, text) in [("etc/passwd", &files.passwd), ("etc/group", &files.group)] {
        let path = tree_path(file)?;
        let (size, digest) = spool.add(&mut text.as_bytes())?;
        entries.insert(path.clone(), Entry { path, meta: Meta::new(0o644, 0, 0), kind: Kind::File { size, digest } });
    }
    add_parents(&mut entries, index).map_err(|reason| BuildError::FileSystem { reason })?;
    Ok(Diff { removed: Vec::new(), entries: entries.into_values().collect() })
}

fn tree_path(text: &str) -> Result<TreePath, BuildError> {
    TreePath::parse(text.as_bytes()).map_err(|error| BuildError::FileSystem { reason: error.to_string() })
}

/// The two account files that everybody may read.
struct Files {
    passwd: String,
    group: String,
}

impl Files {
    /// An image without any gets root: what it runs is run by somebody.
    fn new(passwd: &str, group: &str) -> Self {
        let or = |text: &str, root: &str| match text {
            "" => root.to_owned(),
            text if text.ends_with('\n') => text.to_owned(),
            text => format!("{text}\n"),
        };
        Self { passwd: or(passwd, "root:x:0:0:root:/root:/bin/sh\n"), group: or(group, "root:x:0:\n") }
    }

    /// Makes sure of a user and its groups. Gives its number and its first group's; `None` when no number is left.
    fn ensure(&mut self, name: &str, shell: &str, groups: &[String]) -> Option<(u32, u32)> {
        let (uid, gid) = match find_user(&self.passwd, name) {
            Some(ids) => {
                self.passwd = edit(&self.passwd, name, 6, |_| shell.to_owned());
                ids
            }
            None => {
                let uid = free_id(&self.passwd, USER_IDS)?;
                let gid = self.ensure_group(name, Some(uid), USER_IDS)?;
                self.passwd.push_str(&format!("{name}:x:{uid}:{gid}::/home/{name}:{shell}\n"));
                (uid, gid)
            }
        };
        for group in groups {
            self.ensure_group(group, None, SYSTEM_IDS)?;
            self.group = edit(&self.group, group, 3, |members| match members {
                "" => name.to_owned(),
                members if members.split(',').any(|member| member == name) => members.to_owned(),
                members => format!("{members},{name}"),
            });
        }
        Some((uid, gid))
    }

    /// The number of a group, which is made when there is none: with the wished number when it is free.
    fn ensure_group(&mut self, name: &str, wished: Option<u32>, range: std::ops::Range<u32>) -> Option<u32> {
        if let Some(gid) = find_group(&self.group, name) {
            return Some(gid);
        }
        let taken: Vec<u32> = ids(&self.group).collect();
        let gid = wished.filter(|gid| !taken.contains(gid)).or_else(|| free_id(&self.group, range))?;
        self.group.push_str(&format!("{name}:x:{gid}:\n"));
        Some(gid)
    }
}

/// The third field of every line.
fn ids(text: &str) -> impl Iterator<Item = u32> {
    text.lines().filter_map(|line| line.split(':').nth(2)?.parse().ok())
}

/// The number after the largest one of the range, else one that is free: as the guest counts.
fn free_id(text: &str, mut range: std::ops::Range<u32>) -> Option<u32> {
    let taken: Vec<u32> = ids(text).filter(|id| range.contains(id)).collect();
    let after = taken.iter().max().map_or(range.start, |id| id + 1);
    if range.contains(&after) { Some(after) } else { range.rfind(|id| !taken.contains(id)) }
}

/// The text with one field of one line changed; a line that is too short stays.
fn edit(text: &str, name: &str, field: usize, change: impl Fn(&str) -> String) -> String {
    let line = |line: &str| {
        let mut fields: Vec<String> = line.split(':').map(str::to_owned).collect();
        if fields.first().is_some_and(|first| first == name)
            && let Some(value) = fields.get_mut(field)
        {
            *value = change(value);
        }
        fields.join(":") + "\n"
    };
    text.lines().map(line).collect()
}

fn is_account_name(text: &str) -> bool {
    let first = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
    text.len() <= 32
        && text.bytes().next().is_some_and(first)
        && text.bytes().all(|byte| first(byte) || byte.is_ascii_digit() || byte == b'-')
}

/// Whether the image has a program in one of the usual directories.
pub(crate) fn has_program(index: &Index, name: &str) -> bool {
    ["usr/sbin", "usr/bin", "sbin", "bin", "usr/local/bin"].iter().any(|directory| {
        let path = TreePath::parse(format!("{directory}/{name}").as_bytes()).ok().and_then(|path| index.resolve(&path));
        path.is_some_and(|path| index.get(&path).is_some())
    })
}

/// The number of a user and of its first group, from the text of `/etc/passwd`.
pub(crate) fn find_user(passwd: &str, name: &str) -> Option<(u32, u32)> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then_some(())?;
        Some((fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?))
    })
}

/// The number of a group, from the text of `/etc/group`.
pub(crate) fn find_group(group: &str, name: &str) -> Option<u32> {
    group.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then_some(())?;
        fields.nth(1)?.parse().ok()
    })
}

/// What `--chown=USER[:GROUP]` means in an image: names or numbers; without a group the user's own.
pub(crate) fn resolve_owner(owner: &str, passwd: &str, group: &str) -> Result<(u32, u32), String> {
    let (user, group_name) = owner.split_once(':').map_or((owner, None), |(user, group)| (user, Some(group)));
    let (uid, own_gid) = match user.parse() {
        Ok(uid) => (uid, uid),
        Err(_) => find_user(passwd, user).ok_or_else(|| format!("`--chown={owner}`: the image has no user `{user}` at this step"))?,
    };
    let gid = match group_name {
        None => own_gid,
        Some(name) => match name.parse() {
            Ok(gid) => gid,
            Err(_) => find_group(group, name).ok_or_else(|| format!("`--chown={owner}`: the image has no group `{name}` at this step"))?,
        },
    };
    Ok((uid, gid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_written_where_no_program_makes_them() {
        let mut files = Files::new("", "");
        assert_eq!(files.ensure("ada", "/bin/sh", &["adm".to_owned()]), Some((1000, 1000)));
        assert_eq!(files.ensure("bob", "/server", &["adm".to_owned(), "ada".to_owned()]), Some((1001, 1001)));
        assert_eq!(files.passwd, "root:x:0:0:root:/root:/bin/sh\nada:x:1000:1000::/home/ada:/bin/sh\nbob:x:1001:1001::/home/bob:/server\n");
        assert_eq!(files.group, "root:x:0:\nada:x:1000:bob\nadm:x:100:ada,bob\nbob:x:1001:\n");
        let before = (files.passwd.clone(), files.group.clone());
        assert_eq!(files.ensure("bob", "/server", &["adm".to_owned()]), Some((1001, 1001)));
        assert_eq!((files.passwd, files.group), before, "the second time changes nothing");
    }

    #[test]
    fn accounts_of_the_image_keep_their_numbers() {
        let mut files = Files::new("web:x:33:33:web:/var/www:/bin/false", "web:x:33:\nvideo:x:44\nclash:x:1000:\n");
        assert_eq!(files.ensure("web", "/bin/sh", &[]), Some((33, 33)));
        assert_eq!(files.ensure("ada", "/bin/sh", &["video".to_owned()]), Some((1000, 1001)));
        assert!(files.passwd.starts_with("web:x:33:33:web:/var/www:/bin/sh\n"), "{}", files.passwd);
        assert!(files.group.contains("video:x:44\n"), "a line that is too short stays: {}", files.group);
        assert_eq!(free_id("a:x:59999:\nb:x:59998:\n", USER_IDS), Some(59_997));
        assert_eq!(free_id("a:x:100:\n", 100..101), None);
    }

    #[test]
    fn owners_are_names_or_numbers() {
        let (passwd, group) = ("root:x:0:0::/root:/bin/sh\nweb:x:1001:1002::/home/web:/bin/sh\n", "root:x:0:\nstaff:x:50:web\n");
        assert_eq!(resolve_owner("web", passwd, group), Ok((1001, 1002)));
        assert_eq!(resolve_owner("web:staff", passwd, group), Ok((1001, 50)));
        assert_eq!(resolve_owner("7:8", passwd, group), Ok((7, 8)));
        assert!(resolve_owner("eve", passwd, group).is_err());
        assert!(resolve_owner("web:eve", passwd, group).is_err());
    }
}
