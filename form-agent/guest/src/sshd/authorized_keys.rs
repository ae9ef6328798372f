//! Which keys open an account: `~/.ssh/authorized_keys`, as sshd(8) describes it under "AUTHORIZED_KEYS FILE FORMAT".

use std::{
    fs,
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
};

use russh::keys::{PublicKey, ssh_key::public::KeyData};
use rustix::fs::OFlags;

use crate::report::say;

/// The longest file that is read, in bytes.
const LONGEST: u64 = 1 << 20;

/// What a key may be used for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyOptions {
    /// Runs in the place of whatever is asked for.
    pub command: Option<String>,
    pub terminal: bool,
    pub forwarding: bool,
}

impl Default for KeyOptions {
    fn default() -> Self {
        Self { command: None, terminal: true, forwarding: true }
    }
}

/// What the key may be used for by the user with this home and number; `None` when it opens nothing.
pub fn find(home: &Path, uid: u32, key: &PublicKey) -> Option<KeyOptions> {
    let text = match read(home, uid) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            say(format_args!("sshd: {} is not used: {error}", home.join(".ssh/authorized_keys").display()));
            return None;
        }
    };
    text.lines().filter_map(|line| options_for(line, key.key_data())).next()
}

/// The file, when nobody but its user and root could have written it (`StrictModes` of sshd_config(5)).
fn read(home: &Path, uid: u32) -> io::Result<String> {
    let directory = home.join(".ssh");
    for path in [home, &directory] {
        check(&fs::metadata(path)?, uid, true).map_err(|reason| io::Error::other(format!("{} {reason}", path.display())))?;
    }
    // A pipe in its place must not hold us up.
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let file = fs::OpenOptions::new().read(true).custom_flags(flags).open(directory.join("authorized_keys"))?;
    check(&file.metadata()?, uid, false).map_err(|reason| io::Error::other(format!("it {reason}")))?;
    let mut text = Vec::new();
    file.take(LONGEST).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn check(metadata: &fs::Metadata, uid: u32, directory: bool) -> Result<(), &'static str> {
    if directory != metadata.is_dir() || !directory && !metadata.is_file() {
        Err(if directory { "is no directory" } else { "is no regular file" })
    } else if metadata.uid() != uid && metadata.uid() != 0 {
        Err("belongs to another user")
    } else if metadata.mode() & 0o022 != 0 {
        Err("may be written by others: chmod go-w")
    } else {
        Ok(())
    }
}

/// What a line allows the key; `None` for every other key, for comments, and for lines that ask for what is not known here.
fn options_for(line: &str, key: &KeyData) -> Option<KeyOptions> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return None;
    }
    if let Ok(listed) = PublicKey::from_openssh(line) {
        return (listed.key_data() == key).then(KeyOptions::default);
    }
    let (options, rest) = split_options(line)?;
    let listed = PublicKey::from_openssh(rest.trim_start()).ok()?;
    if listed.key_data() != key {
        return None;
    }
    let parsed = parse_options(options);
    if let Err(option) = &parsed {
        // To open the account without it could be more than its user wanted.
        say(format_args!("sshd: a key is not used because of its option `{option}`, which this server does not know"));
    }
    parsed.ok()
}

/// The first word, in which blanks stand between quotes.
fn split_options(line: &str) -> Option<(&str, &str)> {
    let end = unquoted(line, |byte| byte == b' ' || byte == b'\t')?;
    Some(line.split_at(end))
}

/// Where the first such byte is that does not stand between quotes.
fn unquoted(text: &str, wanted: impl Fn(u8) -> bool) -> Option<usize> {
    let (mut quoted, mut escaped) = (false, false);
    text.bytes().position(|byte| {
        let found = !quoted && wanted(byte);
        if byte == b'"' && !escaped {
            quoted = !quoted;
        }
        escaped = byte == b'\\' && !escaped;
        found
    })
}

/// The option that is not understood is the error.
fn parse_options(text: &str) -> Result<KeyOptions, String> {
    let mut options = KeyOptions::default();
    let mut rest = text;
    while !rest.is_empty() {
        let end = unquoted(rest, |byte| byte == b',').unwrap_or(rest.len());
        let (option, after) = rest.split_at(end);
        rest = after.strip_prefix(',').unwrap_or(after);
        let (name, value) = option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value)));
        match (name.to_ascii_lowercase().as_str(), value) {
            ("command", Some(value)) => options.command = Some(unquote(value).ok_or_else(|| name.to_owned())?),
            ("restrict", None) => {
                options.terminal = false;
                options.forwarding = false;
            }
            ("no-pty", None) => options.terminal = false,
            ("pty", None) => options.terminal = true,
            ("no-port-forwarding", None) => options.forwarding = false,
            ("port-forwarding", None) => options.forwarding = true,
            // What they are about does not exist here.
            (
                "no-agent-forwarding"
                | "agent-forwarding"
                | "no-x11-forwarding"
                | "x11-forwarding"
                | "no-user-rc"
                | "user-rc"
                | "no-touch-required",
                None,
            ) => {}
            // As sshd does where PermitUserEnvironment is off, which is how it is delivered.
            ("environment", Some(_)) => {}
            _ => return Err(name.to_owned()),
        }
    }
    Ok(options)
}

fn unquote(value: &str) -> Option<String> {
    let inner = value.strip_prefix('"')?.strip_suffix('"')?;
    Some(inner.replace("\\\"", "\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADA: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f";
    const EVE: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP/+/fz7+vn49/b19PPy8fDv7u3s6+rp6Ofm5eTj4uHg";

    fn allows(line: &str) -> Option<KeyOptions> {
        options_for(line, PublicKey::from_openssh(ADA).unwrap().key_data())
    }

    #[test]
    fn lines_of_the_file() {
        let plain = KeyOptions::default();
        let bound = KeyOptions { command: Some(r#"say "a, b" # c"#.to_owned()), terminal: false, forwarding: false };
        let cases = [
            (format!("{ADA} ada@home"), Some(plain.clone())),
            (format!("  {ADA} ada at home, with\tblanks # and more "), Some(plain.clone())),
            (format!("# {ADA}"), None),
            (format!("{EVE} eve"), None),
            (format!(r#"restrict,command="say \"a, b\" # c" {ADA} ada"#), Some(bound.clone())),
            (format!(r#"no-pty,no-port-forwarding,no-X11-forwarding,command="say \"a, b\" # c" {ADA}"#), Some(bound)),
            (format!("restrict,pty,port-forwarding {ADA}"), Some(plain.clone())),
            (format!(r#"environment="A=b" {ADA}"#), Some(plain)),
            // Less would be allowed than what is understood.
            (format!(r#"from="10.0.0.1" {ADA}"#), None),
            (format!("cert-authority {ADA}"), None),
            (format!(r#"command="unfinished {ADA}"#), None),
            (format!("command {ADA}"), None),
            (String::new(), None),
            ("ssh-ed25519".to_owned(), None),
            (format!("ssh-rsa {}", ADA.split(' ').nth(1).unwrap()), None),
        ];
        for (line, expected) in cases {
            assert_eq!(allows(&line), expected, "{line}");
        }
    }

    #[test]
    fn a_file_that_others_could_have_written_is_not_used() {
        use std::os::unix::fs::PermissionsExt;

        let home = std::env::temp_dir().join(format!("form-guest-keys-{}", std::process::id()));
        let directory = home.join(".ssh");
        let file = directory.join("authorized_keys");
        fs::create_dir_all(&directory).unwrap();
        fs::write(&file, format!("{EVE}\n{ADA}\n")).unwrap();
        let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        let uid = rustix::process::geteuid().as_raw();
        let key = PublicKey::from_openssh(ADA).unwrap();
        let opens = |uid| find(&home, uid, &key).is_some();
        for path in [&home, &directory, &file] {
            set(path, 0o700);
        }
        assert!(opens(uid));
        for path in [&home, &directory, &file] {
            set(path, 0o720);
            assert!(!opens(uid), "{}", path.display());
            set(path, 0o700);
        }
        if uid != 0 {
            assert!(!opens(uid + 1), "the file is somebody else's");
        }
        fs::remove_file(&file).unwrap();
        assert!(!opens(uid));
        rustix::fs::mknodat(rustix::fs::CWD, &file, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        assert!(!opens(uid), "a pipe is no file");
        fs::remove_dir_all(&home).unwrap();
    }
}
