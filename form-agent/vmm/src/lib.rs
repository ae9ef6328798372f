//! The virtual machine monitor: one process a VM, on KVM, x86-64.

pub mod config;
pub mod control;
pub mod jail;
pub mod virtio;
