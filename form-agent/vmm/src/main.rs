//! `form-vmm`: the process of one VM.

mod arguments;
mod open;

use std::process::ExitCode;

use arguments::Command;
use form_vmm::machine::explain;
use form_vmm::server::Server;

fn main() -> ExitCode {
    form_vmm::exit::catch_panics();
    // One heap for all threads: they allocate little, and each further arena costs memory a VM. Tables of disk images (64 KiB) are
    // mappings of their own, which end with them: in the heap they left holes.
    // SAFETY: `mallopt` only sets parameters of the allocator, `signal` ignores a signal; no other thread runs yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 10);
        // The copies of this process that write its memory are waited for by nobody.
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
    }
    let command = match arguments::parse(lexopt::Parser::from_env()) {
        Ok(command) => command,
        Err(error) => {
            eprintln!("form-vmm: {error}\n{}", arguments::USAGE);
            return ExitCode::from(2);
        }
    };
    let started = match command {
        Command::Help => {
            println!("{}", arguments::USAGE);
            return ExitCode::SUCCESS;
        }
        Command::Serve { control_fd } => open::inherited_listener(control_fd).map(|listener| (Server::new(Some(listener), None), None)),
        Command::Run(run) => open::standalone(&run),
    };
    let (mut server, boot) = match started {
        Ok(started) => started,
        Err(error) => {
            eprintln!("form-vmm: {}", explain(&error));
            return ExitCode::FAILURE;
        }
    };
    if let Some((config, fds)) = boot
        && let Err(error) = server.boot(&config, fds)
    {
        return server.fail(&error);
    }
    server.run()
}
