//! `form`: builds images from Formfiles and runs them as microVMs on your hosts.

mod args;
mod cli;
mod cmd;
mod complete;
mod context;
mod deploy;
mod disk_file;
mod disk_source;
mod failure;
mod formfile_source;
mod operation;
mod sandbox;
mod session;
mod signals;
mod ui;
mod vm_view;

use clap::{CommandFactory, FromArgMatches};

use crate::{cli::Cli, session::Session, ui::Terminal};

fn main() {
    complete::answer_the_shell();
    let matches = Cli::command().try_get_matches().unwrap_or_else(|error| usage(&error));
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let terminal = Terminal::new(cli.global.wishes());
    // The connection is kept alive on a thread of its own while this one may be blocked by a terminal that does not take more.
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            terminal.failure(&failure::Failure::failed(format!("the program cannot start: {error}")));
            std::process::exit(1);
        }
    };
    let session = Session::new(terminal, cli.global);
    let outcome = runtime.block_on(async {
        let outcome = cli.command.run(&session).await;
        session.close().await;
        outcome
    });
    let code = outcome.unwrap_or_else(|failure| {
        session.terminal.failure(&failure);
        failure.exit_code()
    });
    // Not a return: a thread may still wait for standard input.
    std::process::exit(i32::from(code));
}

/// Ends the program with what is wrong with its arguments, or with the help that was asked for.
fn usage(error: &clap::Error) -> ! {
    if !error.use_stderr() || !wishes_json() {
        error.exit();
    }
    let text = error.render().to_string();
    // The first paragraph says what is wrong, the others how it is used.
    let message = text.split("\n\n").next().unwrap_or_default().trim().trim_start_matches("error: ").to_owned();
    let terminal = Terminal::new(ui::Wishes { format: ui::Format::Json, ..ui::Wishes::default() });
    let failure = failure::Failure::usage(message).hint("the command's `--help` shows how it is used");
    terminal.failure(&failure);
    std::process::exit(i32::from(failure.exit_code()))
}

/// Whether `-o json` is among the arguments, which cannot be parsed, or in the environment.
fn wishes_json() -> bool {
    let arguments: Vec<String> = std::env::args().skip(1).take_while(|argument| argument != "--").collect();
    let mut given = arguments.windows(2).filter(|pair| pair[0] == "-o" || pair[0] == "--output").map(|pair| pair[1].as_str());
    let joined = arguments
        .iter()
        .find_map(|argument| argument.strip_prefix("--output=").or_else(|| argument.strip_prefix("-o")).filter(|rest| !rest.is_empty()));
    match given.next_back().or(joined) {
        Some(format) => format == "json",
        None => std::env::var("FORM_OUTPUT").is_ok_and(|format| format == "json"),
    }
}
