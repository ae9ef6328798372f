//! The accounts of `USER`, made in the image: id, home, shell and groups. Passwords and keys are no part of an image; they travel
//! in a machine's settings.

use form_types::spec::User;

use crate::{BuildError, index::Index, tree_path::TreePath};

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

/// The words that make the accounts.
///
/// # Errors
/// When the base has no `useradd`, or a name is none.
pub(crate) fn words(users: &[User], index: &Index) -> Result<Vec<String>, BuildError> {
    let mut words = vec!["/bin/sh".to_owned(), "-c".to_owned(), SCRIPT.to_owned(), "accounts".to_owned()];
    for (name, shell, groups) in essence(users) {
        let refuse = |reason: String| BuildError::Account { user: name.clone(), reason };
        if !has_program(index, "useradd") {
            return Err(refuse(
                "the base has no `useradd`: accounts need a base with the package `passwd`, such as `debian:12`".to_owned(),
            ));
        }
        for word in std::iter::once(&name).chain(&groups) {
            if !is_account_name(word) {
                return Err(refuse(format!("`{word}` is no name of a user or group")));
            }
        }
        if !shell.starts_with('/') || shell.contains([':', '\n']) {
            return Err(refuse(format!("the shell `{shell}` is no absolute path")));
        }
        words.extend([name, shell, groups.join(",")]);
    }
    Ok(words)
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
    fn owners_are_names_or_numbers() {
        let (passwd, group) = ("root:x:0:0::/root:/bin/sh\nweb:x:1001:1002::/home/web:/bin/sh\n", "root:x:0:\nstaff:x:50:web\n");
        assert_eq!(resolve_owner("web", passwd, group), Ok((1001, 1002)));
        assert_eq!(resolve_owner("web:staff", passwd, group), Ok((1001, 50)));
        assert_eq!(resolve_owner("7:8", passwd, group), Ok((7, 8)));
        assert!(resolve_owner("eve", passwd, group).is_err());
        assert!(resolve_owner("web:eve", passwd, group).is_err());
    }
}
