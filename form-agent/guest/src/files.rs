//! Writing files of the image so that a crash leaves the old or the new one, never half of one.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Component, Path},
};

use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{AtFlags, Gid, Mode, OFlags, Uid},
};

use crate::error::{Context, Error};

const BLOCK_BEGIN: &str = "# Written by Formation at each start; lines between these marks are replaced.";
const BLOCK_END: &str = "# End of what Formation writes.";

/// The path, when it is absolute and has no `..`.
///
/// # Errors
/// [`Error::BadPath`].
pub fn absolute(path: &str) -> Result<&Path, Error> {
    let checked = Path::new(path);
    let good = checked.is_absolute() && !path.contains('\0') && !checked.components().any(|part| part == Component::ParentDir);
    if good { Ok(checked) } else { Err(Error::BadPath { path: path.to_owned() }) }
}

/// Writes a file beside its place and moves it there. The owner of a file that is replaced stays; `mode` is what it then has, `None`
/// keeps that too (a new one gets 0644). A symbolic link is replaced, not followed.
///
/// # Errors
/// Those of the file system.
pub fn write(path: &Path, content: &[u8], mode: Option<u32>) -> Result<(), Error> {
    let before = fs::symlink_metadata(path).ok().filter(fs::Metadata::is_file);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).at("create", parent)?;
    }
    let mode = mode.or_else(|| before.as_ref().map(|metadata| metadata.mode() & 0o7777)).unwrap_or(0o644);
    let temporary = path.with_file_name(format!(".{}.form-new", path.file_name().unwrap_or_default().to_string_lossy()));
    let _ = fs::remove_file(&temporary);
    let file = write_new(&temporary, content, mode).and_then(|file| {
        if let Some(before) = &before {
            let same = before.uid() == rustix::process::geteuid().as_raw() && before.gid() == rustix::process::getegid().as_raw();
            if !same {
                std::os::unix::fs::fchown(&file, Some(before.uid()), Some(before.gid()))?;
                // A change of owner drops set-id bits.
                file.set_permissions(fs::Permissions::from_mode(mode))?;
            }
        }
        file.sync_all()
    });
    file.and_then(|()| fs::rename(&temporary, path)).at("write", path)
}

fn write_new(path: &Path, content: &[u8], mode: u32) -> io::Result<File> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    file.set_permissions(fs::Permissions::from_mode(mode & 0o7777))?;
    Ok(file)
}

/// As [`write`], and does nothing when the file has this content already.
///
/// # Errors
/// As [`write`].
pub fn write_if_changed(path: &Path, content: &str, mode: Option<u32>) -> Result<(), Error> {
    let is_file = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_file());
    if is_file && fs::read(path).is_ok_and(|before| before == content.as_bytes()) {
        return Ok(());
    }
    write(path, content.as_bytes(), mode)
}

/// A directory below one that belongs to a user: opened step by step without following a link, because the user can put one there
/// and we write as root.
///
/// # Errors
/// Those of the file system; `ENOTDIR` or `ELOOP` for a link.
pub fn open_user_directory(home: &Path, below: Option<&str>, uid: u32, gid: u32) -> Result<OwnedFd, Error> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
    let home_fd = rustix::fs::open(home, flags, Mode::empty()).at("open", home)?;
    let Some(below) = below else { return Ok(home_fd) };
    let path = home.join(below);
    match rustix::fs::mkdirat(&home_fd, below, Mode::RWXU) {
        Ok(()) => {
            let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            rustix::fs::chownat(&home_fd, below, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW).at("change the owner of", &path)?;
        }
        Err(rustix::io::Errno::EXIST) => {}
        Err(error) => return Err(error).at("create", path),
    }
    rustix::fs::openat(&home_fd, below, flags, Mode::empty()).at("open", path)
}

/// Replaces our block in a file of a user's directory, keeping the user's other lines.
///
/// # Errors
/// Those of the file system; a link in the file's place is replaced by a file.
pub fn update_user_file(directory: impl AsFd, name: &str, lines: &[String], mode: u32, uid: u32, gid: u32) -> Result<(), Error> {
    let before = match rustix::fs::openat(&directory, name, OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty()) {
        Ok(file) => io::read_to_string(File::from(file)).unwrap_or_default(),
        Err(_) => String::new(),
    };
    let after = managed_block(&before, lines);
    if after == before {
        return Ok(());
    }
    let temporary = format!(".{name}.form-new");
    let _ = rustix::fs::unlinkat(&directory, &temporary, AtFlags::empty());
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&directory, &temporary, flags, Mode::RUSR | Mode::WUSR).at("create", name)?;
    let mut file = File::from(file);
    file.write_all(after.as_bytes())
        .and_then(|()| std::os::unix::fs::fchown(&file, Some(uid), Some(gid)))
        .and_then(|()| file.set_permissions(fs::Permissions::from_mode(mode)))
        .and_then(|()| Ok(rustix::fs::renameat(&directory, &temporary, &directory, name)?))
        .at("write", name)
}

/// The text with our block replaced, added at its end, or taken out when there is nothing to say.
pub fn managed_block(before: &str, lines: &[String]) -> String {
    let mut after = String::with_capacity(before.len());
    let mut inside = false;
    for line in before.lines() {
        match line {
            BLOCK_BEGIN => inside = true,
            BLOCK_END if inside => inside = false,
            _ if inside => {}
            other => {
                after.push_str(other);
                after.push('\n');
            }
        }
    }
    if !lines.is_empty() {
        for line in std::iter::once(BLOCK_BEGIN).chain(lines.iter().map(String::as_str)).chain([BLOCK_END]) {
            after.push_str(line);
            after.push('\n');
        }
    }
    after
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        for good in ["/", "/a/b", "/a/./b"] {
            assert!(absolute(good).is_ok(), "{good}");
        }
        for bad in ["", "a", "/a/../b", "/a\0b"] {
            assert!(absolute(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_block_is_added_replaced_and_removed() {
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        let one = managed_block("mine\n", &lines("a\nb"));
        assert_eq!(one, format!("mine\n{BLOCK_BEGIN}\na\nb\n{BLOCK_END}\n"));
        let two = managed_block(&format!("{one}later\n"), &lines("c"));
        assert_eq!(two, format!("mine\nlater\n{BLOCK_BEGIN}\nc\n{BLOCK_END}\n"));
        assert_eq!(managed_block(&two, &lines("c")), two, "nothing changes the second time");
        assert_eq!(managed_block(&two, &[]), "mine\nlater\n");
        assert_eq!(managed_block("no newline", &[]), "no newline\n");
    }

    #[test]
    fn files_are_replaced_whole_with_their_mode() {
        let directory = std::env::temp_dir().join(format!("form-guest-files-{}", std::process::id()));
        let path = directory.join("sub/file");
        write(&path, b"one", Some(0o640)).expect("writable");
        write_if_changed(&path, "two", None).expect("writable");
        assert_eq!(fs::read_to_string(&path).expect("readable"), "two");
        assert_eq!(fs::metadata(&path).expect("there").mode() & 0o7777, 0o640);
        let link = directory.join("link");
        std::os::unix::fs::symlink("sub/file", &link).expect("temporary link");
        write_if_changed(&link, "two", None).expect("writable");
        assert!(fs::symlink_metadata(&link).expect("there").is_file(), "a link is replaced");
        fs::remove_dir_all(&directory).expect("temporary directory");
    }

    #[test]
    fn a_link_in_a_home_is_not_followed() {
        let home = std::env::temp_dir().join(format!("form-guest-home-{}", std::process::id()));
        let elsewhere = home.join("elsewhere");
        fs::create_dir_all(&elsewhere).expect("temporary directory");
        std::os::unix::fs::symlink(&elsewhere, home.join(".ssh")).expect("temporary link");
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        assert!(open_user_directory(&home, Some(".ssh"), uid, gid).is_err());
        let directory = open_user_directory(&home, Some(".other"), uid, gid).expect("creatable");
        update_user_file(&directory, "keys", &["ssh-ed25519 A".to_owned()], 0o600, uid, gid).expect("writable");
        let text = fs::read_to_string(home.join(".other/keys")).expect("readable");
        assert!(text.contains("\nssh-ed25519 A\n"), "{text}");
        fs::remove_dir_all(&home).expect("temporary directory");
    }
}
