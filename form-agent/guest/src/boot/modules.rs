//! Kernel modules: `/modules/NNN-name.ko`, inserted in the order of their numbers.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use rustix::io::Errno;

use crate::report::BootReport;

pub const DIRECTORY: &str = "/modules";

/// Inserts every module. One that is there already, or whose device is not, is no fault.
pub fn insert_all(report: &mut BootReport) {
    let names = match fs::read_dir(DIRECTORY) {
        Ok(entries) => entries.filter_map(Result::ok).filter_map(|entry| entry.file_name().into_string().ok()).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
        Err(error) => return report.warn("modules", format_args!("cannot read {DIRECTORY}: {error}")),
    };
    for name in in_order(names) {
        let path = Path::new(DIRECTORY).join(name);
        if let Err(error) = insert(&path) {
            report.warn("modules", format_args!("cannot insert {}: {error}. It must be of the running kernel's bundle", path.display()));
        }
    }
}

fn insert(path: &PathBuf) -> std::io::Result<()> {
    let file = File::open(path)?;
    match rustix::system::finit_module(&file, c"", 0) {
        Ok(()) | Err(Errno::EXIST | Errno::NODEV) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The modules by number, those without one last; anything that is no module is left out.
fn in_order(names: Vec<String>) -> Vec<String> {
    let number = |name: &str| name.split_once('-').and_then(|(number, _)| number.parse::<u32>().ok()).unwrap_or(u32::MAX);
    let mut names: Vec<String> = names.into_iter().filter(|name| name.ends_with(".ko")).collect();
    names.sort_by(|a, b| number(a).cmp(&number(b)).then_with(|| a.cmp(b)));
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_go_by_number() {
        let names = ["010-b.ko", "9-a.ko", "zz.ko", "README", "100-c.ko"].map(str::to_owned).to_vec();
        assert_eq!(in_order(names), ["9-a.ko", "010-b.ko", "100-c.ko", "zz.ko"]);
    }
}
