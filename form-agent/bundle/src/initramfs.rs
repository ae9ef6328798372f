//! The initramfs of a VM: uncompressed cpio archives in `newc` form, one behind the other, as the kernel reads them
//! (kernel documentation: `driver-api/early-userspace/buffer-format`).
//!
//! Segment 1 depends on the kernel bundle and the guest binary alone, so it is made once; segment 2 holds the settings of
//! one VM. Both are deterministic: inode numbers count up, times are zero.

use form_types::settings::Settings;

/// The directory of modules: `/modules/000-virtio.ko`, to be loaded in the order of the names.
pub const MODULES_DIR: &str = "modules";
/// Where the guest reads its settings.
pub const SETTINGS_PATH: &str = "form/settings.json";

const FILE: u32 = 0o100_000;
const DIR: u32 = 0o040_000;
const SYMLINK: u32 = 0o120_000;

#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    #[error("`{0}` is too long for an initramfs: a file there is at most 4 GiB")]
    TooLong(String),
    #[error("the settings have no JSON form")]
    Settings(#[from] serde_json::Error),
}

/// Writes one cpio archive into memory.
#[derive(Debug, Default)]
pub struct Cpio {
    bytes: Vec<u8>,
    inode: u32,
}

impl Cpio {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory; `path` has no leading slash. Parents come first.
    ///
    /// # Errors
    /// None for a path under 4 GiB.
    pub fn directory(&mut self, path: &str, permissions: u32) -> Result<(), InitramfsError> {
        self.entry(path, DIR | (permissions & 0o7777), 2, &[])
    }

    /// Adds a regular file.
    ///
    /// # Errors
    /// When it has 4 GiB or more.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> Result<(), InitramfsError> {
        self.entry(path, FILE | (permissions & 0o7777), 1, content)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// None for a target under 4 GiB.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<(), InitramfsError> {
        self.entry(path, SYMLINK | 0o777, 1, target.as_bytes())
    }

    /// The archive with its trailer, padded to 512 bytes: another one may follow directly.
    ///
    /// # Errors
    /// None.
    pub fn finish(mut self) -> Result<Vec<u8>, InitramfsError> {
        self.inode = u32::MAX;
        self.entry("TRAILER!!!", 0, 1, &[])?;
        let padded = self.bytes.len().next_multiple_of(512);
        self.bytes.resize(padded, 0);
        Ok(self.bytes)
    }

    fn entry(&mut self, path: &str, mode: u32, links: u32, content: &[u8]) -> Result<(), InitramfsError> {
        let length = u32::try_from(content.len()).map_err(|_| InitramfsError::TooLong(path.to_owned()))?;
        let name_length = u32::try_from(path.len() + 1).map_err(|_| InitramfsError::TooLong(path.chars().take(80).collect()))?;
        self.inode = self.inode.wrapping_add(1);
        self.bytes.extend_from_slice(b"070701");
        // Inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name length, checksum.
        for field in [self.inode, mode, 0, 0, links, 0, length, 0, 0, 0, 0, name_length, 0] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        let padded = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(padded, 0);
    }
}

/// Segment 1: `/init` (the guest binary) and `/modules/NNN-NAME.ko` in the order given, which must be the load order
/// ([`crate::KernelManifest::load_order`]).
///
/// # Errors
/// When a file has 4 GiB or more.
pub fn system_segment<'a>(init: &[u8], modules: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Result<Vec<u8>, InitramfsError> {
    let mut archive = Cpio::new();
    for mount_point in ["dev", "proc", "sys", "run", "root", MODULES_DIR] {
        archive.directory(mount_point, 0o755)?;
    }
    archive.file("init", 0o755, init)?;
    for (number, (name, content)) in modules.into_iter().enumerate() {
        archive.file(&format!("{MODULES_DIR}/{number:03}-{name}.ko"), 0o644, content)?;
    }
    archive.finish()
}

/// Segment 2: `/form/settings.json`, readable by root alone because it holds password hashes.
///
/// # Errors
/// Never in practice: every field of the settings has a JSON form.
pub fn settings_segment(settings: &Settings) -> Result<Vec<u8>, InitramfsError> {
    let mut archive = Cpio::new();
    archive.directory("form", 0o700)?;
    archive.file(SETTINGS_PATH, 0o600, &serde_json::to_vec(settings)?)?;
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_newc() {
        let bytes = system_segment(b"#!init", [("virtio", b"abc".as_slice()), ("virtio_ring", b"defgh".as_slice())]).unwrap();
        assert_eq!(bytes.len() % 512, 0);
        assert_eq!(
            names(&bytes),
            ["dev", "proc", "sys", "run", "root", "modules", "init", "modules/000-virtio.ko", "modules/001-virtio_ring.ko"]
        );
        assert_eq!(bytes, system_segment(b"#!init", [("virtio", b"abc".as_slice()), ("virtio_ring", b"defgh".as_slice())]).unwrap());
    }

    #[test]
    fn segments_follow_each_other() {
        let mut bytes = system_segment(b"init", []).unwrap();
        let settings = serde_json::json!({
            "hostname": "web", "root_serial": null, "grow_root": false, "interfaces": [], "nameservers": [], "search_domains": [],
            "hosts": [], "users": [], "root_login": false, "files": [], "volumes": [], "service": null, "env": {},
            "shutdown_timeout_ms": 1000
        });
        let settings: Settings = serde_json::from_value(settings).unwrap();
        let second = settings_segment(&settings).unwrap();
        assert_eq!(&second[14..22], format!("{:08x}", DIR | 0o700).as_bytes());
        bytes.extend_from_slice(&second);
        assert_eq!(names(&bytes).last().unwrap(), SETTINGS_PATH);
    }

    /// A reader of its own: walks the archives as the kernel does.
    fn names(mut bytes: &[u8]) -> Vec<String> {
        let mut names = Vec::new();
        while let Some(start) = bytes.iter().position(|byte| *byte != 0) {
            bytes = &bytes[start..];
            assert_eq!(&bytes[..6], b"070701");
            let field =
                |index: usize| usize::from_str_radix(std::str::from_utf8(&bytes[6 + 8 * index..14 + 8 * index]).unwrap(), 16).unwrap();
            let (size, name_length) = (field(6), field(11));
            let name = std::str::from_utf8(&bytes[110..110 + name_length - 1]).unwrap().to_owned();
            bytes = &bytes[(110 + name_length).next_multiple_of(4)..];
            bytes = &bytes[size.next_multiple_of(4)..];
            if name != "TRAILER!!!" {
                names.push(name);
            }
        }
        names
    }
}
