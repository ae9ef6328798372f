//! `form`: builds images from Formfiles and runs them as microVMs on your hosts.

mod args;
mod cli;
mod cmd;
mod complete;
mod context;
mod deploy;
mod failure;
mod formfile_source;
mod operation;
mod sandbox;
mod session;
mod ui;
mod vm_view;

use clap::{CommandFactory, FromArgMatches};

use crate::{cli::Cli, session::Session, ui::Terminal};

fn main() {
    complete::answer_the_shell();
    let matches = Cli::command().get_matches();
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
