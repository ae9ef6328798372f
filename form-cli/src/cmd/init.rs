use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use form_api::ErrorCode;
use form_types::Name;

use crate::{
    failure::{Failure, Outcome},
    formfile_source::{FILE_NAME, Source, in_directory},
    session::Session,
};

/// Write a Formfile, asking for what the flags do not say
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The directory for it
    #[arg(default_value = ".")]
    directory: PathBuf,
    /// The VM's name; the directory's without it
    #[arg(long)]
    name: Option<String>,
    /// What to begin with: debian:12, ./directory, ./rootfs.tar, scratch, image:NAME
    #[arg(long, value_name = "BASE")]
    from: Option<String>,
    /// Packages to install
    #[arg(long, value_name = "PACKAGE", num_args = 1.., value_delimiter = ',')]
    install: Vec<String>,
    /// Processors
    #[arg(long, value_name = "COUNT")]
    vcpu: Option<String>,
    /// Memory: 512M, 2G
    #[arg(long, value_name = "SIZE")]
    mem: Option<String>,
    /// Disk: 5G, 1T
    #[arg(long, value_name = "SIZE")]
    disk: Option<String>,
    /// A port to open: PORT, or HOSTPORT:PORT to publish it on the host
    #[arg(long, value_name = "PORT", num_args = 1.., value_delimiter = ',')]
    expose: Vec<String>,
    /// The command that the VM runs
    #[arg(long, value_name = "COMMAND")]
    entrypoint: Option<String>,
    /// Replace a Formfile that is there
    #[arg(long)]
    force: bool,
}

/// What goes into the file.
#[derive(Debug)]
struct Answers {
    name: String,
    from: String,
    install: Vec<String>,
    vcpu: String,
    mem: String,
    disk: String,
    expose: Vec<String>,
    entrypoint: String,
}

pub fn run(args: Args, session: &Session) -> Outcome {
    let path = in_directory(&args.directory);
    if path.exists() && !args.force {
        return Err(Failure::new(ErrorCode::Conflict, format!("{} is there already", path.display())).hint("`--force` replaces it"));
    }
    let text = text(&answers(args, session)?);
    let source = Source { path: path.clone(), text };
    // What was answered goes through the same checks as what is written by hand.
    let spec = source.spec(std::collections::BTreeMap::new(), session)?;
    let formatted = formfile::format(&source.text).map_err(|diagnostics| source.faulty(&diagnostics))?;
    write(&path, &formatted)?;
    session.terminal.done(&spec, &path.display().to_string(), &format!("{}: written", path.display()))?;
    session.terminal.note("Go on with `form check` and `form deploy`.");
    Ok(0)
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::io("write", path, &error);
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(failed)?;
    }
    let mut file = fs::File::create(path).map_err(failed)?;
    file.write_all(text.as_bytes()).map_err(failed)
}

/// The directory's name as a VM's, as far as it can be one.
fn suggested_name(directory: &Path) -> String {
    let full = fs::canonicalize(directory).unwrap_or_else(|_| directory.to_owned());
    let name = full.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    let fitting: String = name.chars().map(|character| if character.is_ascii_alphanumeric() { character } else { '-' }).collect();
    let fitting = fitting.trim_start_matches(|character: char| !character.is_ascii_lowercase()).trim_end_matches('-');
    let short: String = fitting.chars().take(63).collect();
    if short.parse::<Name>().is_ok() { short } else { "app".to_owned() }
}

fn answers(args: Args, session: &Session) -> Result<Answers, Failure> {
    let suggested = suggested_name(&args.directory);
    // Flags alone are enough: the wizard comes only to somebody who gave none.
    let told_something = args.name.is_some()
        || args.from.is_some()
        || args.entrypoint.is_some()
        || args.vcpu.is_some()
        || args.mem.is_some()
        || args.disk.is_some()
        || !args.install.is_empty()
        || !args.expose.is_empty();
    if told_something || session.terminal.says_yes() {
        return Ok(Answers {
            name: args.name.unwrap_or(suggested),
            from: args.from.unwrap_or_else(|| "debian:12".to_owned()),
            install: args.install,
            vcpu: args.vcpu.unwrap_or_else(|| "1".to_owned()),
            mem: args.mem.unwrap_or_else(|| "512M".to_owned()),
            disk: args.disk.unwrap_or_else(|| "5G".to_owned()),
            expose: args.expose,
            entrypoint: args.entrypoint.unwrap_or_default(),
        });
    }
    if !session.terminal.can_ask() {
        return Err(Failure::usage("nobody can be asked here for what the Formfile should say")
            .hint("give flags (`form init --name web --expose 8080:80`), or take the defaults with `-y` (FORM_YES=true)"));
    }
    ask(session, &suggested)
}

fn ask(session: &Session, suggested: &str) -> Result<Answers, Failure> {
    let terminal = &session.terminal;
    let name = terminal.input("Name of the VM", suggested, |text| text.parse::<Name>().map(drop).map_err(|error| error.to_string()))?;
    const BASES: [&str; 3] = ["debian:12", "scratch (nothing but what you copy)", "another"];
    let from = match terminal.select("What does it begin with?", &BASES)? {
        0 => "debian:12".to_owned(),
        1 => "scratch".to_owned(),
        _ => terminal.input("Base (./directory, ./rootfs.tar, image:NAME)", "", |text| line_with("FROM", text, false))?,
    };
    let packages = terminal.input("Packages to install (blank for none)", "", |text| line_with("INSTALL", text, true))?;
    let vcpu = terminal.input("Processors", "1", |text| line_with("VCPU", text, false))?;
    let mem = terminal.input("Memory", "512M", |text| line_with("MEM", text, false))?;
    let disk = terminal.input("Disk", "5G", |text| line_with("DISK", text, false))?;
    let ports =
        terminal.input("Ports (8080:80 publishes 80 as 8080 of the host, blank for none)", "", |text| line_with("EXPOSE", text, true))?;
    let entrypoint =
        terminal.input("Command that it runs (blank for the image's own init)", "", |text| line_with("ENTRYPOINT", text, true))?;
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect();
    Ok(Answers { name, from, install: words(&packages), vcpu, mem, disk, expose: words(&ports), entrypoint })
}

/// Whether the language takes `text` as what follows `keyword`.
fn line_with(keyword: &str, text: &str, may_be_blank: bool) -> Result<(), String> {
    if text.trim().is_empty() {
        return if may_be_blank { Ok(()) } else { Err("this cannot be blank".to_owned()) };
    }
    let source = format!("NAME x\n{keyword} {text}\n");
    let checked = formfile::check(FILE_NAME, &source, &formfile::LowerOptions::default());
    match checked.diagnostics.iter().find(|diagnostic| diagnostic.is_error()) {
        Some(diagnostic) => Err(diagnostic.message.clone()),
        None => Ok(()),
    }
}

fn text(answers: &Answers) -> String {
    let mut text =
        format!("NAME {}\nFROM {}\n\nVCPU {}\nMEM {}\nDISK {}\n", answers.name, answers.from, answers.vcpu, answers.mem, answers.disk);
    if !answers.install.is_empty() {
        text.push_str(&format!("\nINSTALL {}\n", answers.install.join(" ")));
    }
    if !answers.entrypoint.is_empty() || !answers.expose.is_empty() {
        text.push('\n');
    }
    if !answers.entrypoint.is_empty() {
        text.push_str(&format!("ENTRYPOINT {}\n", answers.entrypoint));
    }
    if !answers.expose.is_empty() {
        text.push_str(&format!("EXPOSE {}\n", answers.expose.join(" ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_gives_a_name() {
        assert_eq!(suggested_name(Path::new("/nowhere/My_App.2/")), "my-app-2");
        assert_eq!(suggested_name(Path::new("/nowhere/42")), "app");
        assert_eq!(suggested_name(Path::new("/nowhere/9web-")), "web");
    }
}
