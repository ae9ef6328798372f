//! What a process has in memory, as the kernel says in `/proc/PID/smaps` (proc_pid_smaps(5)). Sizes are in bytes.

/// Resident memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// All of it, shared with other processes or not.
    pub total: u64,
    /// What belongs to no file.
    pub anonymous: u64,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SmapsError {
    #[error("the kernel's list of mappings has a line that cannot be read: {0}")]
    Line(String),
    #[error("{found} mappings have the size of the guest's memory, one was expected")]
    GuestMemory { found: usize },
}

#[derive(Default)]
struct Mapping {
    size: u64,
    resident: Resident,
}

/// What is resident outside the guest's memory, which is the one mapping of `guest` bytes.
pub fn outside_guest(smaps: &str, guest: u64) -> Result<Resident, SmapsError> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let unreadable = || SmapsError::Line(line.to_owned());
        let mut words = line.split_ascii_whitespace();
        let first = words.next().ok_or_else(unreadable)?;
        let Some(field) = first.strip_suffix(':') else {
            let (start, end) = first.split_once('-').ok_or_else(unreadable)?;
            let address = |text| u64::from_str_radix(text, 16).map_err(|_| unreadable());
            let size = address(end)?.checked_sub(address(start)?).ok_or_else(unreadable)?;
            mappings.push(Mapping { size, ..Mapping::default() });
            continue;
        };
        let resident = &mut mappings.last_mut().ok_or_else(unreadable)?.resident;
        let value = match field {
            "Rss" => &mut resident.total,
            "Anonymous" => &mut resident.anonymous,
            _ => continue,
        };
        *value = words.next().and_then(|word| word.parse::<u64>().ok()).ok_or_else(unreadable)? << 10;
    }
    match mappings.iter().filter(|mapping| mapping.size == guest).count() {
        1 => {}
        found => return Err(SmapsError::GuestMemory { found }),
    }
    let outside = mappings.iter().filter(|mapping| mapping.size != guest).map(|mapping| mapping.resident);
    Ok(outside.fold(Resident::default(), |sum, one| Resident { total: sum.total + one.total, anonymous: sum.anonymous + one.anonymous }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d0c0a00000-55d0c0a71000 r--p 00000000 00:1c 12                         /usr/lib/formation/form-vmm
Size:                452 kB
Rss:                 232 kB
Anonymous:             0 kB
VmFlags: rd mr mw me sd
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Size:             262144 kB
Rss:               78360 kB
Anonymous:         78360 kB
VmFlags: rd wr mr mw me ac dd
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
Rss:                  12 kB
Anonymous:            12 kB
";

    #[test]
    fn the_guests_memory_is_left_out() {
        assert_eq!(outside_guest(SMAPS, 256 << 20), Ok(Resident { total: 244 << 10, anonymous: 12 << 10 }));
    }

    #[test]
    fn a_guest_that_is_not_found_is_an_error() {
        assert_eq!(outside_guest(SMAPS, 128 << 20), Err(SmapsError::GuestMemory { found: 0 }));
        assert_eq!(outside_guest("Rss: 1 kB\n", 1), Err(SmapsError::Line("Rss: 1 kB".to_owned())));
        assert!(outside_guest("00-zz rw-p\n", 1).is_err());
    }
}
