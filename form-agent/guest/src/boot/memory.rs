//! What the kernel does with memory that comes while the machine runs.

use std::{fs, path::Path};

use crate::error::{Context, Error};

/// New memory is used at once. Three times as much as the machine booted with is kept free of the kernel's own data, so that it can be taken
/// away again; the kernel needs the rest, to account for so much memory (kernel documentation: `admin-guide/mm/memory-hotplug`).
const POLICIES: [(&str, &str); 2] =
    [("sys/module/memory_hotplug/parameters/online_policy", "auto-movable"), ("sys/devices/system/memory/auto_online_blocks", "online")];

/// Tells the kernel what to do with memory that the host gives. A kernel that cannot get any has nothing to be told.
///
/// # Errors
/// When it does not take it.
pub fn use_what_comes(root: &Path) -> Result<(), Error> {
    for (file, policy) in POLICIES.map(|(file, policy)| (root.join(file), policy)) {
        if file.exists() {
            fs::write(&file, policy).doing(format!("write {}", file.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_told_as_far_as_it_can_be() {
        let root = std::env::temp_dir().join(format!("form-guest-memory-{}", std::process::id()));
        use_what_comes(&root).unwrap();
        let file = root.join(POLICIES[1].0);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, "offline").unwrap();
        use_what_comes(&root).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "online");
        assert!(!root.join(POLICIES[0].0).exists());
        fs::remove_dir_all(&root).unwrap();
    }
}
