//! Steps that run programs of the image: `RUN`, `INSTALL`, and the accounts of `USER`.

use std::{ffi::OsString, path::Path};

use form_types::spec::Command;

use crate::{
    BuildError, Cancel, apt,
    diff::EPOCH,
    sandbox::{Finished, Input, Job, Sandbox, args},
};

/// `PATH` of a step whose Formfile sets none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// `$1` lower directories, `$2` workspace, `$3` work directory as in the image, `$4` the same without symbolic links, `$5` how many
/// of the following arguments are the environment; the rest is the command. The current directory holds the layers.
///
/// `/run` and `/dev` are not the image's, so nothing in them stays. The file system of the image is moved over the machine's before
/// the change of root, so that going up leads nowhere.
const ENTER: &str = r#"
umask 022
lower=$1 space=$2 workdir=$3 real=$4 count=$5; shift 5
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$space/tree,workdir=$space/work,userxattr" "$space/mnt"
# Not by its full path: what is above the layers may be closed to root inside (a home directory of mode 0700).
cd -P "$space/mnt"
mkdir -p "./$real" proc dev run
mount -t proc -o nosuid,nodev,noexec proc proc 2>/dev/null || mount --rbind /proc proc
mount -t tmpfs -o nosuid,mode=0755,size=1m tmpfs dev
mkdir dev/pts dev/shm
for node in null zero full random urandom tty; do : > "dev/$node"; mount --bind "/dev/$node" "dev/$node"; done
mount -t devpts -o newinstance,nosuid,noexec,ptmxmode=0666,mode=0620 devpts dev/pts
mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s /proc/self/fd/0 dev/stdin
ln -s /proc/self/fd/1 dev/stdout
ln -s /proc/self/fd/2 dev/stderr
mount -t tmpfs -o nosuid,nodev,mode=0755 tmpfs run
mkdir -m 1777 run/lock
if [ -L etc/resolv.conf ]; then
    case $(readlink etc/resolv.conf) in
        /run/*|../run/*) file=$(readlink etc/resolv.conf); file=run/${file#*run/}
            case $file in *..*) ;; *) mkdir -p "${file%/*}"; cat /etc/resolv.conf > "$file" ;; esac ;;
    esac
elif [ -f etc/resolv.conf ] && [ -e /etc/resolv.conf ]; then
    mount --bind /etc/resolv.conf etc/resolv.conf
fi
change_root=$(command -v unshare) environment=$(command -v env)
mount --move . / 2>/dev/null || :
# The environment is the first COUNT arguments; the program goes between it and the command.
total=$# i=0
while [ "$i" -lt "$total" ]; do
    if [ "$i" -eq "$count" ]; then set -- "$@" "$change_root" --root=. "--wd=$workdir" --; fi
    set -- "$@" "$1"; shift; i=$((i + 1))
done
status=0
"$environment" -i "$@" || status=$?
exit "$status"
"#;

/// A program to run in the image that a chain of layers makes.
pub(crate) struct Program<'a> {
    pub sandbox: &'a Sandbox,
    /// The directory of the layers.
    pub layers: &'a Path,
    /// Names of the layers, the top one first, joined by `:`.
    pub lower: &'a str,
    /// Name of the workspace; its `tree` becomes the layer.
    pub workspace: &'a str,
    pub cancel: &'a Cancel,
}

impl Program<'_> {
    /// Runs a command with a work directory: `workdir` as the Formfile has it, `real` with its links followed.
    ///
    /// # Errors
    /// When the sandbox fails or the build is cancelled. A failing command is no error here.
    pub fn run(
        &self,
        command: &[String],
        env: &[(String, String)],
        workdir: (&str, &OsString),
        each_line: impl FnMut(&str),
    ) -> Result<Finished, BuildError> {
        for inner in ["tree", "work", "mnt"] {
            let path = self.layers.join(self.workspace).join(inner);
            if !path.exists() {
                self.sandbox.create_dir(&path)?;
            }
        }
        let mut arguments = args([self.lower, self.workspace, workdir.0]);
        arguments.push(workdir.1.clone());
        arguments.push(env.len().to_string().into());
        arguments.extend(env.iter().map(|(key, value)| OsString::from(format!("{key}={value}"))));
        arguments.extend(args(command));
        let job = Job { directory: self.layers, script: ENTER, args: &arguments, env: &[], input: Input::Null };
        self.sandbox.run_with_output(job, self.cancel, each_line)
    }
}

/// The words of a `RUN`: a shell text goes to the image's own shell.
pub(crate) fn words(command: &Command) -> Vec<String> {
    match command {
        Command::Shell(text) => vec!["/bin/sh".to_owned(), "-c".to_owned(), text.clone()],
        Command::Exec(words) => words.clone(),
    }
}

/// The environment of a step: what it asks for on top of what every program may expect.
pub(crate) fn environment(asked: &[(String, String)]) -> Vec<(String, String)> {
    let defaults = [
        ("PATH", DEFAULT_PATH.to_owned()),
        ("HOME", "/root".to_owned()),
        ("LC_ALL", "C.UTF-8".to_owned()),
        ("SOURCE_DATE_EPOCH", EPOCH.to_string()),
    ];
    let missing = defaults.into_iter().filter(|(key, _)| !asked.iter().any(|(name, _)| name == key));
    missing.map(|(key, value)| (key.to_owned(), value)).chain(asked.iter().cloned()).collect()
}

/// Removes what differs from one installation to the next, and keys that must not be shared by all machines of an image.
const CLEAN: &str = r#"
apt-get clean
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/dpkg.log /var/log/alternatives.log /var/log/bootstrap.log
rm -f /var/cache/ldconfig/aux-cache /var/cache/debconf/*-old /var/lib/dpkg/*-old /etc/*- /var/lib/systemd/random-seed /var/lib/dbus/machine-id
rm -f /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub
if [ -s /etc/machine-id ]; then : > /etc/machine-id; fi
"#;

/// Runs as a script of the image. No service may start while an image is built.
const INSTALL: &str = r#"
set -eu
policy=/usr/sbin/policy-rc.d made=
if [ ! -e "$policy" ]; then printf '#!/bin/sh\nexit 101\n' > "$policy"; chmod 755 "$policy"; made=1; fi
count=$1; shift
options=
while [ "$count" -gt 0 ]; do options="$options $1"; shift; count=$((count - 1)); done
apt-get -q $options update
apt-get -q -y --no-install-recommends -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confold -o Dpkg::Options::=--force-unsafe-io $options install -- "$@"
if [ -n "$made" ]; then rm -f "$policy"; fi
"#;

/// The words that install packages.
///
/// # Errors
/// When a name is no package name, or the machine's apt cannot be asked.
pub(crate) fn install_words(packages: &[String], line: u32) -> Result<Vec<String>, BuildError> {
    for package in packages {
        if !is_package_name(package) {
            let reason =
                format!("`{package}` is no package name: a name has letters, digits, `+`, `-` and `.`, and may be followed by `=VERSION`");
            return Err(BuildError::Install { line, reason });
        }
    }
    let mut options = vec!["-oAPT::Install-Recommends=false".to_owned()];
    for (key, value) in apt::fetch_options()? {
        // Options pass through a word list; a value with blanks is no proxy or number.
        if !value.contains(char::is_whitespace) {
            options.push(format!("-o{key}={value}"));
        }
    }
    let script = format!("{INSTALL}{CLEAN}");
    let mut words = vec!["/bin/sh".to_owned(), "-c".to_owned(), script, "install".to_owned(), options.len().to_string()];
    words.extend(options);
    let mut packages = packages.to_vec();
    packages.sort();
    packages.dedup();
    words.extend(packages);
    Ok(words)
}

/// Debian policy 5.6.7, with an architecture and a version allowed behind it.
fn is_package_name(text: &str) -> bool {
    let (name, version) = text.split_once('=').map_or((text, None), |(name, version)| (name, Some(version)));
    let (name, architecture) = name.split_once(':').map_or((name, None), |(name, architecture)| (name, Some(architecture)));
    let lower = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let good_name =
        name.len() >= 2 && name.bytes().next().is_some_and(lower) && name.bytes().all(|byte| lower(byte) || b"+-.".contains(&byte));
    let good_architecture = architecture.is_none_or(|text| !text.is_empty() && text.bytes().all(|byte| lower(byte) || byte == b'-'));
    let good_version =
        version.is_none_or(|text| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".+-:~".contains(&byte)));
    // A trailing `-` or `+` would tell apt to remove or to install.
    good_name && good_architecture && good_version && !name.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_names_are_checked() {
        for good in ["nginx", "g++", "libc6:amd64", "python3.11", "curl=7.88.1-10+deb12u5", "lib32stdc++-12-dev"] {
            assert!(is_package_name(good), "{good}");
        }
        for bad in ["", "-y", "Nginx", "a b", "x;y", "$(id)", "../x", "nginx-", "a", "curl=", "curl=1 2", "x:"] {
            assert!(!is_package_name(bad), "{bad}");
        }
        assert!(install_words(&["--help".to_owned()], 7).unwrap_err().to_string().starts_with("line 7"));
    }

    #[test]
    fn a_step_may_set_its_own_path() {
        let env = environment(&[("PATH".to_owned(), "/x".to_owned())]);
        assert_eq!(env.iter().filter(|(key, _)| key == "PATH").count(), 1);
        assert!(env.iter().any(|(key, value)| key == "HOME" && value == "/root"));
    }
}
