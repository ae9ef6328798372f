//! PID 1, from the kernel's first instruction in user space to the end of the machine.

use std::{
    fs,
    path::Path,
    sync::{Arc, mpsc::channel},
    thread,
    time::Duration,
};

use form_types::settings::Settings;
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::{
    accounts,
    boot::{handoff, memory, modules, mounts, root, volumes},
    environment,
    error::Error,
    files,
    machine::{Machine, Power, Role},
    network, new_identity, power,
    report::{BootReport, say},
    serve,
    service::{self, log},
    settings, sshd, sys,
};

/// How long the host has to learn why the machine cannot start.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// The whole life of PID 1.
pub fn run() -> ! {
    let mut report = BootReport::default();
    mounts::kernel_file_systems(&mut report);
    if let Err(error) = mounts::take_console() {
        say(format_args!("{error}"));
    }
    report.warn_on("memory", memory::use_what_comes(Path::new("/")));
    modules::insert_all(&mut report);
    // Read before the initramfs is emptied.
    let program = fs::read("/proc/self/exe").unwrap_or_default();
    let settings = match settings::load(Path::new(settings::INITRAMFS_PATH)) {
        Ok(settings) => settings,
        Err(error) => cannot_start("settings", &error, no_settings(), report),
    };
    report.warn_on("names", network::names::set_hostname(&settings.hostname));
    if let Err(error) = root::enter(&settings, &mut report) {
        cannot_start("root", &error, settings, report)
    }
    volumes::attach_all(&settings.volumes, &mut report);
    let init = handoff::image_init().filter(|_| settings.service.is_none());
    configure(&settings, init == Some(handoff::ImageInit::Systemd), &mut report);
    if let Some(init) = init {
        let prepared = handoff::prepare(&settings, &program);
        if report.fatal_on("init", prepared).is_some() {
            let Err(error) = handoff::exec_init(&init, &settings.interfaces, &report);
            report.fatal("init", error);
        }
    }
    drop(program);
    supervise(settings, report)
}

/// Everything that is written into the root or told to the kernel before the first process of the image runs.
fn configure(settings: &Settings, systemd: bool, report: &mut BootReport) {
    if !Path::new("/tmp").exists() {
        report.warn_on("mounts", mounts::temporary_directory());
    }
    if settings.new_identity {
        report.warn_on("identity", new_identity::forget(Path::new("/")));
    }
    report.warn_on("network", network::loopback_up());
    network::configure(&settings.interfaces, report);
    network::names::write_files(settings, report);
    for file in &settings.files {
        let written = files::absolute(&file.path).and_then(|path| files::write(path, file.content.as_bytes(), Some(file.mode)));
        report.fatal_on("files", written);
    }
    if !settings.env.is_empty() || settings.users.iter().any(|user| !user.env.is_empty()) {
        report.fatal_on("env", environment::write_system(&settings.env, systemd));
    }
    accounts::apply(settings, report);
    report.warn_on("ssh", new_identity::host_keys());
}

/// Stays PID 1 and runs the service.
fn supervise(settings: Settings, report: BootReport) -> ! {
    let signals = match sys::block_signals() {
        Ok(signals) => Some(signals),
        Err(error) => {
            say(format_args!("cannot take signals: {error}"));
            None
        }
    };
    // As many open files as servers are used to from their packages.
    let files = Rlimit { current: Some(65_536), maximum: Some(1_048_576) };
    let _ = setrlimit(Resource::Nofile, files);
    // Ctrl-Alt-Del is a signal to us instead of a reset in the middle of everything.
    let _ = rustix::system::reboot(rustix::system::RebootCommand::CadOff);
    let (power, powers) = channel();
    let (log, console) = log::Log::new();
    let machine = Arc::new(Machine::new(Role::Init, settings, report, Arc::new(log), power));
    thread::spawn(move || log::copy_to_console(&console));
    if let Some(signals) = signals {
        let machine = Arc::clone(&machine);
        thread::spawn(move || watch_signals(&machine, &signals));
    }
    {
        let machine = Arc::clone(&machine);
        // Without the module `button` there is no such event, and `shutdown` is asked for over the protocol.
        thread::spawn(move || drop(network::power_button_events(|| machine.end(Power::Off))));
    }
    serve::start(&machine);
    sshd::Keeper::start(&machine);
    start_service(&machine);
    let how = powers.recv().unwrap_or(Power::Off);
    power::end(&machine, how)
}

fn start_service(machine: &Arc<Machine>) {
    let failed = crate::process::lock(&machine.report).failed();
    match machine.settings.service.clone() {
        Some(_) if failed => {
            machine.log.say(format_args!("the service is not started because the machine is not what was asked for"));
            machine.started();
        }
        Some(service) => {
            let machine = Arc::clone(machine);
            thread::spawn(move || service::supervise(&machine, &service));
        }
        None => machine.started(),
    }
}

fn watch_signals(machine: &Machine, signals: &sys::Signals) {
    loop {
        match signals.wait() {
            libc::SIGCHLD => drop(machine.children.collect()),
            // Ctrl-Alt-Del
            libc::SIGINT => machine.end(Power::Restart),
            _ => machine.end(Power::Off),
        }
    }
}

/// Tells the host and the console why there is no machine, and powers off.
fn cannot_start(step: &str, error: &Error, settings: Settings, mut report: BootReport) -> ! {
    report.fatal(step, error);
    say(format_args!("the machine cannot start and powers off in {} s", LAST_WORDS.as_secs()));
    let (power, powers) = channel();
    let settings = Settings { service: None, ..settings };
    let machine = Arc::new(Machine::new(Role::Init, settings, report, Arc::new(log::Log::new().0), power));
    machine.started();
    serve::start(&machine);
    let how = powers.recv_timeout(LAST_WORDS).unwrap_or(Power::Off);
    power::halt(how == Power::Restart)
}

/// For a machine that was not told anything.
fn no_settings() -> Settings {
    Settings {
        hostname: "unnamed".to_owned(),
        root_serial: None,
        grow_root: false,
        interfaces: Vec::new(),
        nameservers: Vec::new(),
        search_domains: Vec::new(),
        hosts: Vec::new(),
        users: Vec::new(),
        root_login: false,
        files: Vec::new(),
        volumes: Vec::new(),
        service: None,
        env: std::collections::BTreeMap::new(),
        new_identity: false,
        shutdown_timeout_ms: 0,
    }
}
