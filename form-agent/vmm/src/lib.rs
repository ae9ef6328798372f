//! The virtual machine monitor: one process a VM, on KVM, x86-64.

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod config;
pub mod control;
pub mod cpu;
pub mod descriptors;
pub mod exit;
pub mod jail;
pub mod layout;
pub mod log_ring;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod platform;
pub mod server;
pub mod virtio;
