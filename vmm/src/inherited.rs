//! The inherited descriptors of a configuration. Each can be taken once.

use std::collections::BTreeMap;
use std::os::fd::{FromRawFd, OwnedFd};

use crate::config::{ConfigError, VmConfig};

/// A validated configuration with its descriptors.
pub struct Inherited {
    /// The configuration.
    pub(crate) config: VmConfig,
    /// The descriptors that were not taken yet.
    pub(crate) descriptors: Descriptors,
}

impl Inherited {
    /// Validates `config` and takes all of its descriptors.
    ///
    /// # Errors
    ///
    /// When the configuration is not valid, or a descriptor is not open.
    ///
    /// # Safety
    ///
    /// No other value in this process owns a descriptor of `config`: they were inherited, and this
    /// function is called once.
    pub unsafe fn new(config: VmConfig) -> Result<Self, ConfigError> {
        config.validate()?;
        let numbers = config.descriptors();
        for fd in &numbers {
            // SAFETY: reading the flags of a number touches no memory, open or not.
            if unsafe { libc::fcntl(*fd, libc::F_GETFD) } < 0 {
                return Err(ConfigError::Closed(*fd));
            }
        }
        let owned = numbers.into_iter().map(|fd| {
            // SAFETY: the descriptor is open, the caller guarantees that nothing else owns it, and
            // a valid configuration names each number once.
            (fd, unsafe { OwnedFd::from_raw_fd(fd) })
        });
        let descriptors = Descriptors(owned.collect());
        Ok(Self { config, descriptors })
    }

    /// Returns the configuration.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Takes the control socket's descriptor.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Closed`] when it was taken before.
    pub fn take_control(&mut self) -> Result<OwnedFd, ConfigError> {
        self.descriptors.take(self.config.control_fd)
    }
}

/// Owned descriptors by number.
pub(crate) struct Descriptors(BTreeMap<i32, OwnedFd>);

impl Descriptors {
    /// Takes a descriptor. [`ConfigError::Closed`] if it was taken before.
    pub(crate) fn take(&mut self, fd: i32) -> Result<OwnedFd, ConfigError> {
        self.0.remove(&fd).ok_or(ConfigError::Closed(fd))
    }
}
