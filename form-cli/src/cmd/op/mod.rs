//! `form op …`

pub mod ls;
pub mod show;
pub mod wait;

use clap::Subcommand;
use form_api::operation::Operation;

use crate::{failure::Outcome, session::Session, ui::Record};

#[derive(Debug, Subcommand)]
pub enum Verb {
    Ls(ls::Args),
    Show(show::Args),
    Wait(wait::Args),
}

impl Verb {
    pub async fn run(self, session: &Session) -> Outcome {
        match self {
            Self::Ls(args) => ls::run(&args, session).await,
            Self::Show(args) => show::run(&args, session).await,
            Self::Wait(args) => wait::run(&args, session).await,
        }
    }
}

fn record(operation: &Operation) -> Record {
    Record::new(operation.id.to_string())
        .field("id", operation.id)
        .field("kind", operation.kind.as_str())
        .field("subject", &operation.subject)
        .field("status", operation.status.as_str())
        .optional("error", operation.error.as_ref())
        .optional("hint", operation.error.as_ref().and_then(|error| error.hint.as_ref()))
        .field("actor", &operation.actor)
        .optional("request", operation.request.as_ref().map(|request| format!("{} {}", request.method, request.path)))
        .optional("body", operation.request.as_ref().and_then(|request| request.body.as_ref()).map(body))
        .optional("steps", (!operation.steps.is_empty()).then(|| operation.steps.join("; ")))
        .field("created", operation.created_at)
        .optional("started", operation.started_at)
        .optional("finished", operation.finished_at)
        .wide("idempotency key", operation.idempotency_key)
}

/// Whole Formfiles are for programs to read.
fn body(body: &serde_json::Value) -> String {
    let text = body.to_string();
    if text.len() <= 400 { text } else { format!("{} bytes: `-o json` shows them", text.len()) }
}
