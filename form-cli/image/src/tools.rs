//! The programs that a build calls, looked for before it begins.

use std::{env, path::PathBuf};

use crate::BuildError;

/// A program and the Debian package that has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tool {
    pub name: &'static str,
    pub package: &'static str,
}

const fn tool(name: &'static str, package: &'static str) -> Tool {
    Tool { name, package }
}

pub(crate) const ALWAYS: &[Tool] = &[
    tool("unshare", "util-linux"),
    tool("setpriv", "util-linux"),
    tool("tar", "tar"),
    tool("stdbuf", "coreutils"),
    tool("mke2fs", "e2fsprogs"),
    tool("debugfs", "e2fsprogs"),
    tool("e2fsck", "e2fsprogs"),
    tool("resize2fs", "e2fsprogs"),
];
pub(crate) const UNPRIVILEGED: &[Tool] = &[tool("newuidmap", "uidmap"), tool("newgidmap", "uidmap")];
pub(crate) const BOOTSTRAP: &[Tool] = &[tool("mmdebstrap", "mmdebstrap"), tool("apt-config", "apt")];
pub(crate) const KERNEL: &[Tool] = &[tool("apt-get", "apt"), tool("apt-cache", "apt"), tool("dpkg-deb", "dpkg")];

/// # Errors
/// Names the first program that is not there.
pub(crate) fn require(tools: &[Tool]) -> Result<(), BuildError> {
    for Tool { name, package } in tools.iter().copied() {
        if find(name).is_none() {
            return Err(BuildError::MissingTool { tool: name, package });
        }
    }
    Ok(())
}

/// `PATH`, and the system directories that the `PATH` of an ordinary user lacks.
fn find(name: &str) -> Option<PathBuf> {
    env::split_paths(&search_path()).map(|directory| directory.join(name)).find(|path| path.is_file())
}

/// The `PATH` for every program we start.
pub(crate) fn search_path() -> std::ffi::OsString {
    let mut path = env::var_os("PATH").unwrap_or_default();
    for directory in ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin"] {
        if !path.is_empty() {
            path.push(":");
        }
        path.push(directory);
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tool_names_its_package() {
        let error = require(&[tool("form-no-such-tool", "form-no-such-package")]).unwrap_err();
        assert_eq!(error.to_string(), "`form-no-such-tool` is missing: install the package `form-no-such-package`");
        assert!(require(&[tool("sh", "dash")]).is_ok());
    }
}
