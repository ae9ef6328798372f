//! The `nft` program: one transaction in, JSON out.

use std::process::Stdio;

use serde_json::Value;
use tokio::{io::AsyncWriteExt, process::Command};

use crate::{
    attachment::Mark,
    error::{NetError, Result},
};

/// Where Debian's package puts it; the daemon's PATH may lack sbin.
const PROGRAMS: [&str; 2] = ["/usr/sbin/nft", "nft"];

fn command() -> Command {
    let program = PROGRAMS.iter().find(|program| std::path::Path::new(program).exists()).unwrap_or(&PROGRAMS[1]);
    let mut command = Command::new(program);
    command.kill_on_drop(true).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs one transaction: all of it, or nothing.
pub async fn apply(table: &str, transaction: &Value) -> Result<()> {
    let mut child = command().args(["-j", "-f", "-"]).stdin(Stdio::piped()).spawn().map_err(NetError::NoNft)?;
    let text = transaction.to_string();
    if let Some(mut stdin) = child.stdin.take() {
        // A program that dies early closes the pipe; its message says why, and that is what is reported below.
        let _ = stdin.write_all(text.as_bytes()).await;
    }
    let output = child.wait_with_output().await.map_err(NetError::NoNft)?;
    if output.status.success() {
        return Ok(());
    }
    Err(NetError::Nft { table: table.to_owned(), message: message_of(&output.stderr) })
}

/// The tables of this machine that agents made: `form_` and a mark, family inet.
pub async fn tables() -> Result<Vec<Mark>> {
    let output = command().args(["-j", "list", "tables"]).stdin(Stdio::null()).output().await.map_err(NetError::NoNft)?;
    if !output.status.success() {
        return Err(NetError::Nft { table: "list".to_owned(), message: message_of(&output.stderr) });
    }
    let listing: Value =
        serde_json::from_slice(&output.stdout).map_err(|error| NetError::Nft { table: "list".to_owned(), message: error.to_string() })?;
    let tables = listing["nftables"].as_array().into_iter().flatten();
    Ok(tables
        .filter(|item| item["table"]["family"] == "inet")
        .filter_map(|item| Mark::new(item["table"]["name"].as_str()?.strip_prefix("form_")?).ok())
        .collect())
}

/// The first lines of what `nft` wrote: behind them it repeats the whole input.
fn message_of(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).take(3).collect();
    let mut message = lines.join("; ");
    if let Some((end, _)) = message.char_indices().nth(400) {
        message.truncate(end);
    }
    message
}
