//! Processors that come while the machine runs: its kernel finds them, and leaves it to others to switch them on
//! (`docs.kernel.org/core-api/cpu_hotplug`). Those that the host takes back the kernel switches off by itself.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::{
    boot::devices::{uevents, wait_for_event},
    error::{Context, Error},
};

const SYS_CPU: &str = "/sys/devices/system/cpu";
/// How long the kernel may take to find them.
const LIMIT: Duration = Duration::from_secs(10);

/// Waits until there are `count`, and switches on those that are off.
///
/// # Errors
/// [`Error::ProcessorsMissing`] when there are fewer, or the kernel does not switch one on.
pub fn bring_online(count: u32) -> Result<(), Error> {
    bring_online_in(Path::new(SYS_CPU), count, LIMIT)
}

fn bring_online_in(sys_cpu: &Path, count: u32, limit: Duration) -> Result<(), Error> {
    let start = Instant::now();
    // Opened before the first look, so that none that comes after it is missed. Without it we only look more often.
    let events = uevents().ok();
    loop {
        let has = switch_on(sys_cpu)?;
        if has >= count {
            return Ok(());
        }
        if start.elapsed() >= limit {
            return Err(Error::ProcessorsMissing { has, wanted: count, waited_ms: start.elapsed().as_millis() });
        }
        wait_for_event(events.as_ref(), Duration::from_millis(100));
    }
}

/// Switches on those that are there, and counts them.
fn switch_on(sys_cpu: &Path) -> Result<u32, Error> {
    let mut count = 0;
    for directory in processors(sys_cpu)? {
        let online = directory.join("online");
        // One that cannot be switched off, as the first, has no such file.
        if fs::read_to_string(&online).is_ok_and(|text| text.trim() == "0") {
            fs::write(&online, "1").at("switch on a processor with", &online)?;
        }
        count += 1;
    }
    Ok(count)
}

fn processors(sys_cpu: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = fs::read_dir(sys_cpu).at("read", sys_cpu)?.filter_map(Result::ok);
    let is_one = |name: &str| name.strip_prefix("cpu").is_some_and(|number| number.parse::<u32>().is_ok());
    Ok(entries.filter(|entry| entry.file_name().to_str().is_some_and(is_one)).map(|entry| entry.path()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_that_are_off_are_switched_on_and_those_that_come_are_waited_for() {
        let root = std::env::temp_dir().join(format!("form-guest-cpu-{}", std::process::id()));
        for (name, online) in [("cpu0", None), ("cpu1", Some("0\n")), ("cpu10", Some("1\n")), ("cpufreq", None), ("cpuidle", Some("0\n"))] {
            fs::create_dir_all(root.join(name)).expect("temporary directory");
            if let Some(online) = online {
                fs::write(root.join(name).join("online"), online).expect("temporary file");
            }
        }
        bring_online_in(&root, 3, Duration::ZERO).expect("three are there");
        let state = |name: &str| fs::read_to_string(root.join(name).join("online")).expect("temporary file");
        assert_eq!((state("cpu1").trim(), state("cpu10").trim(), state("cpuidle").trim()), ("1", "1", "0"));
        let text = bring_online_in(&root, 4, Duration::ZERO).expect_err("there is no fourth").to_string();
        assert!(text.contains("3 of 4"), "{text}");
        let late = root.join("cpu2");
        let comes = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            fs::create_dir(&late)
        });
        bring_online_in(&root, 4, Duration::from_secs(60)).expect("it has come");
        comes.join().expect("no panic").expect("temporary directory");
        fs::remove_dir_all(&root).expect("temporary directory");
    }
}
