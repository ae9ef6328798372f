//! What a guest was asked to let go: a VM process keeps the other end of a pipe open for as long as there is anything of it.

use std::{
    os::fd::AsFd,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

/// Whether it is gone, or the VM process is, before this time is over. Nothing is ever written to `gone`.
pub fn within(gone: impl AsFd, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&gone, PollFlags::IN)], Some(&timeout)) {
            Err(Errno::INTR) => {}
            ended => return ended.is_ok_and(|ready| ready > 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_let_go_when_the_other_end_is_closed() {
        let (gone, kept) = std::io::pipe().unwrap();
        assert!(!within(&gone, Duration::from_millis(10)));
        drop(kept);
        assert!(within(&gone, Duration::from_secs(60)));
    }
}
