//! The descriptors that came with a configuration, each taken once.

use std::os::fd::OwnedFd;

use crate::config::Fd;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the configuration's {what} is descriptor {index}, which was not passed or is used twice")]
pub struct DescriptorError {
    pub what: &'static str,
    pub index: u16,
}

pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    #[must_use]
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        Descriptors(fds.into_iter().map(Some).collect())
    }

    /// # Errors
    /// When there is no such descriptor (any more).
    pub fn take(&mut self, fd: Fd, what: &'static str) -> Result<OwnedFd, DescriptorError> {
        self.0.get_mut(usize::from(fd.0)).and_then(Option::take).ok_or(DescriptorError { what, index: fd.0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_descriptor_is_taken_once() {
        let mut descriptors = Descriptors::new(vec![std::fs::File::open("/dev/null").unwrap().into()]);
        assert!(descriptors.take(Fd(1), "kernel").is_err());
        descriptors.take(Fd(0), "kernel").unwrap();
        assert_eq!(descriptors.take(Fd(0), "disk").unwrap_err(), DescriptorError { what: "disk", index: 0 });
    }
}
