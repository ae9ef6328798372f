//! The system calls that each kind of thread may make. Everything else kills the process.
//!
//! Arguments are checked where a call could do more than the thread needs: memory never becomes executable, only the ioctls of a
//! running VM are possible, sockets are only made in connected pairs, signals only go to threads of this process.

use std::collections::BTreeMap;

use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{BackendError, BpfProgram, SeccompAction, SeccompCondition, SeccompFilter, SeccompRule, TargetArch};

use crate::virtio::worker::WorkerKind;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

pub struct Filters {
    pub vcpu: BpfProgram,
    pub main: BpfProgram,
    block: BpfProgram,
    net: BpfProgram,
    vsock: BpfProgram,
    rng: BpfProgram,
    balloon: BpfProgram,
    mem: BpfProgram,
}

impl Filters {
    pub fn compile() -> Result<Self, BackendError> {
        Ok(Filters {
            vcpu: compile(&[RUNTIME, POLLING], &[VCPU_IOCTLS], false)?,
            // Every later thread starts under this filter, so it allows what any of them needs.
            main: compile(&[RUNTIME, POLLING, BLOCK, STREAMS, MAIN], &[MAIN_IOCTLS, VCPU_IOCTLS, VHOST_START], true)?,
            block: compile(&[RUNTIME, POLLING, BLOCK], &[], false)?,
            net: compile(&[RUNTIME, POLLING], &[], false)?,
            vsock: compile(&[RUNTIME, POLLING, STREAMS], &[], false)?,
            rng: compile(&[RUNTIME, POLLING], &[], false)?,
            balloon: compile(&[RUNTIME, POLLING], &[], false)?,
            mem: compile(&[RUNTIME, POLLING], &[&[KVM_SET_USER_MEMORY_REGION]], false)?,
        })
    }

    pub fn worker(&self, kind: WorkerKind) -> &BpfProgram {
        match kind {
            WorkerKind::Block => &self.block,
            WorkerKind::Net => &self.net,
            WorkerKind::Vsock => &self.vsock,
            WorkerKind::Rng => &self.rng,
            WorkerKind::Balloon => &self.balloon,
            WorkerKind::Mem => &self.mem,
        }
    }
}

/// What the language's runtime and the C library need in any thread: memory, locks, time, signals, its own end, and, for a panic,
/// the exit record.
const RUNTIME: &[i64] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_close,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getrandom,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_ftruncate,
    libc::SYS_fdatasync,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Waiting for and making eventfds. vCPUs make one for each interrupt vector that the guest begins to use.
const POLLING: &[i64] = &[
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_dup,
    libc::SYS_fcntl,
];

/// A disk's files.
const BLOCK: &[i64] = &[
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    // In rings that were made and restricted before: none can be made or changed.
    libc::SYS_io_uring_enter,
];

/// Connected stream sockets.
const STREAMS: &[i64] = &[libc::SYS_sendto, libc::SYS_sendmsg, libc::SYS_recvfrom, libc::SYS_recvmsg, libc::SYS_shutdown];

/// Connections that come in, threads, and the copy of the process that writes its memory.
const MAIN: &[i64] = &[libc::SYS_accept4, libc::SYS_clone3, libc::SYS_clone, libc::SYS_getsockopt, libc::SYS_close_range];

const KVM_RUN: u64 = 0xAE80;
const KVM_KVMCLOCK_CTRL: u64 = 0xAEAD;
const KVM_IRQFD: u64 = 0x4020_AE76;
const KVM_IOEVENTFD: u64 = 0x4040_AE79;
const KVM_SET_GSI_ROUTING: u64 = 0x4008_AE6A;
/// What saving a vCPU reads.
const KVM_GET_CPUID2: u64 = 0xC008_AE91;
const KVM_GET_MP_STATE: u64 = 0x8004_AE98;
const KVM_GET_REGS: u64 = 0x8090_AE81;
const KVM_GET_SREGS: u64 = 0x8138_AE83;
const KVM_GET_XSAVE: u64 = 0x9000_AEA4;
const KVM_GET_XCRS: u64 = 0x8188_AEA6;
const KVM_GET_DEBUGREGS: u64 = 0x8080_AEA1;
const KVM_GET_LAPIC: u64 = 0x8400_AE8E;
const KVM_GET_MSRS: u64 = 0xC008_AE88;
const KVM_GET_VCPU_EVENTS: u64 = 0x8040_AE9F;
const KVM_GET_TSC_KHZ: u64 = 0xAEA3;
/// A vCPU that was let go goes back to its first state.
const KVM_SET_MP_STATE: u64 = 0x4004_AE99;
/// What making a further vCPU needs.
const KVM_CREATE_VCPU: u64 = 0xAE41;
const KVM_SET_CPUID2: u64 = 0x4008_AE90;
const KVM_SET_MSRS: u64 = 0x4008_AE89;
const KVM_SET_LAPIC: u64 = 0x4400_AE8F;
const KVM_SET_TSC_KHZ: u64 = 0xAEA2;
/// What saving a VM reads.
const KVM_GET_CLOCK: u64 = 0x8030_AE7C;
const KVM_GET_IRQCHIP: u64 = 0xC208_AE62;
const KVM_GET_DIRTY_LOG: u64 = 0x4010_AE42;

/// A driver that resets its network device stops the host's kernel, which says where the rings stand.
const VHOST_NET_SET_BACKEND: u64 = 0x4008_AF30;
const VHOST_GET_VRING_BASE: u64 = 0xC008_AF12;

const VCPU_IOCTLS: &[u64] = &[
    VHOST_NET_SET_BACKEND,
    VHOST_GET_VRING_BASE,
    KVM_RUN,
    KVM_KVMCLOCK_CTRL,
    KVM_IRQFD,
    KVM_IOEVENTFD,
    KVM_SET_GSI_ROUTING,
    KVM_GET_CPUID2,
    KVM_GET_MP_STATE,
    KVM_GET_REGS,
    KVM_GET_SREGS,
    KVM_GET_XSAVE,
    KVM_GET_XCRS,
    KVM_GET_DEBUGREGS,
    KVM_GET_LAPIC,
    KVM_GET_MSRS,
    KVM_GET_VCPU_EVENTS,
    KVM_GET_TSC_KHZ,
    KVM_SET_MP_STATE,
];

/// Memory that comes and goes.
const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_AE46;
/// A network device that comes looks at its tap; activating it tells the tap what the guest's driver can do.
const TUN_GET_INTERFACE: u64 = 0x8004_54D2;
const TUN_SET_OFFLOAD: u64 = 0x4004_54D0;
const TUN_SET_VNET_HEADER: u64 = 0x4004_54D8;
/// What has the host's kernel move a network device's packets.
const VHOST_START: &[u64] = &[
    0x8008_AF00, // VHOST_GET_FEATURES
    0x4008_AF00, // VHOST_SET_FEATURES
    0xAF01,      // VHOST_SET_OWNER
    0x4008_AF03, // VHOST_SET_MEM_TABLE
    0x4008_AF04, // VHOST_SET_LOG_BASE
    0x4008_AF10, // VHOST_SET_VRING_NUM
    0x4028_AF11, // VHOST_SET_VRING_ADDR
    0x4008_AF12, // VHOST_SET_VRING_BASE
    0x4008_AF20, // VHOST_SET_VRING_KICK
    0x4008_AF21, // VHOST_SET_VRING_CALL
];
/// `FIONBIO`, as the standard library sets sockets non-blocking.
const FILE_NON_BLOCKING: u64 = 0x5421;
/// Beside those of vCPUs: the thread of one that comes later starts under this filter.
const MAIN_IOCTLS: &[u64] = &[
    KVM_GET_CLOCK,
    KVM_GET_IRQCHIP,
    KVM_GET_DIRTY_LOG,
    KVM_SET_USER_MEMORY_REGION,
    KVM_CREATE_VCPU,
    KVM_SET_CPUID2,
    KVM_SET_MSRS,
    KVM_SET_LAPIC,
    KVM_SET_TSC_KHZ,
    TUN_GET_INTERFACE,
    TUN_SET_OFFLOAD,
    TUN_SET_VNET_HEADER,
    FILE_NON_BLOCKING,
];

fn compile(lists: &[&[i64]], ioctls: &[&[u64]], main: bool) -> Result<BpfProgram, BackendError> {
    let mut rules: Rules = lists.iter().flat_map(|list| list.iter()).map(|call| (*call, Vec::new())).collect();
    // PROT_EXEC is argument 2 of both.
    let not_executable = || SeccompCondition::new(2, Dword, MaskedEq(libc::PROT_EXEC as u64), 0);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![SeccompRule::new(vec![not_executable()?])?]);
    }
    // Kicks and `abort` signal threads of this process.
    let own_process = SeccompCondition::new(0, Dword, Eq, u64::from(std::process::id()))?;
    rules.insert(libc::SYS_tgkill, vec![SeccompRule::new(vec![own_process])?]);
    if !ioctls.is_empty() {
        let one = |request: &u64| SeccompRule::new(vec![SeccompCondition::new(1, Dword, Eq, *request)?]);
        rules.insert(libc::SYS_ioctl, ioctls.iter().flat_map(|list| list.iter()).map(one).collect::<Result<_, _>>()?);
    }
    if main {
        let unix = SeccompCondition::new(0, Dword, Eq, libc::AF_UNIX as u64)?;
        rules.insert(libc::SYS_socketpair, vec![SeccompRule::new(vec![unix])?]);
        // A new thread takes its name and enters its own, narrower filter. A copy of the process ends with it.
        let option = |option: libc::c_int| SeccompRule::new(vec![SeccompCondition::new(0, Dword, Eq, option as u64)?]);
        rules.insert(
            libc::SYS_prctl,
            vec![
                option(libc::PR_SET_NAME)?,
                option(libc::PR_SET_NO_NEW_PRIVS)?,
                option(libc::PR_SET_VMA)?,
                option(libc::PR_SET_PDEATHSIG)?,
            ],
        );
        let add_filter = SeccompCondition::new(0, Dword, Eq, u64::from(libc::SECCOMP_SET_MODE_FILTER))?;
        rules.insert(libc::SYS_seccomp, vec![SeccompRule::new(vec![add_filter])?]);
    }
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}
