//! Dies where `FORM_FAILPOINT` says: `NAME`, or `NAME:COUNT` for the COUNTth time that the point is reached. Only in builds with debug
//! assertions; a test's way to what a power failure leaves behind.

use std::{
    str::FromStr,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use form_types::{Failpoint, failpoint};
use rustix::process::{Signal, getpid, kill_process};

const VARIABLE: &str = "FORM_FAILPOINT";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fuse {
    point: Failpoint,
    count: u64,
}

impl FromStr for Fuse {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, count) = text.split_once(':').unwrap_or((text, "1"));
        let count = count.parse().ok().filter(|count| *count > 0).ok_or_else(|| format!("`{count}` is no count: write NAME:COUNT"))?;
        Ok(Self { point: name.parse()?, count })
    }
}

static FUSE: OnceLock<Fuse> = OnceLock::new();
static REACHED: AtomicU64 = AtomicU64::new(0);

/// Reads the variable.
///
/// # Errors
/// When it names no failpoint: a test that waits for one that is not there would wait in vain.
pub fn arm() -> Result<(), String> {
    let Ok(text) = std::env::var(VARIABLE) else { return Ok(()) };
    let fuse = text.parse().map_err(|error| format!("{VARIABLE}: {error}"))?;
    let _ = FUSE.set(fuse);
    failpoint::on_reach(|point| {
        let Some(fuse) = FUSE.get().filter(|fuse| fuse.point == point) else { return };
        if REACHED.fetch_add(1, Ordering::AcqRel) + 1 == fuse.count {
            eprintln!("form-agent: killed at the failpoint {}", point.as_str());
            // No destructor runs and nothing is flushed: as `kill -9`.
            let _ = kill_process(getpid(), Signal::KILL);
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fuse_has_a_name_and_a_count() {
        assert_eq!("disk.made".parse(), Ok(Fuse { point: Failpoint::DiskMade, count: 1 }));
        assert_eq!("upload.block-kept:5".parse(), Ok(Fuse { point: Failpoint::BlockKept, count: 5 }));
        for bad in ["", "disk", "disk.made:0", "disk.made:x"] {
            assert!(bad.parse::<Fuse>().is_err(), "{bad}");
        }
    }
}
