use std::time::Duration;

use form_api::client::Timeouts;
use form_types::SecretKey;
use serde::Serialize;

use crate::{
    context::{PassphraseSource, load_identity},
    failure::{Failure, Outcome},
    session::Session,
    ui::Record,
};

/// Show the versions of this program and of the agent it talks to
#[derive(Debug, clap::Args)]
pub struct Args {}

#[derive(Serialize)]
struct Versions {
    client: &'static str,
    /// `null` when no agent answers.
    agent: Option<String>,
}

const TIMEOUTS: Timeouts = Timeouts { connect: Duration::from_secs(1), request: Duration::from_secs(1), deadline: None };

pub async fn run(_: &Args, session: &Session) -> Outcome {
    // No agent is no error: the program has a version all the same.
    let agent = match session.target().and_then(|target| target.client(TIMEOUTS, || silently(session))) {
        Ok(client) => {
            session.keep(&client);
            client.host().await.ok().map(|host| host.version)
        }
        Err(_) => None,
    };
    let client = env!("CARGO_PKG_VERSION");
    let record = Record::new(client).field("form", client).field("form-agent", agent.as_deref().unwrap_or("no agent answers"));
    session.terminal.show(&Versions { client, agent }, &record)?;
    Ok(0)
}

/// A version is not worth the question for a passphrase.
fn silently(session: &Session) -> Result<SecretKey, Failure> {
    load_identity()?.unlock(&PassphraseSource::of_the_key(session.global.passphrase_file.as_deref(), None))
}
