use clap_complete::engine::ArgValueCompleter;
use form_types::ImageReference;

use crate::{
    complete,
    failure::Outcome,
    session::Session,
    ui::{Table, bytes},
};

/// Show the steps that an image on the host was built by, the base first
#[derive(Debug, clap::Args)]
pub struct Args {
    /// NAME or NAME:VERSION
    #[arg(add = ArgValueCompleter::new(complete::images))]
    image: ImageReference,
}

pub async fn run(args: &Args, session: &Session) -> Outcome {
    let config = session.client()?.image_config(&args.image).await?;
    let mut table = Table::new(&["STEP", "CHANGED", "LAYER"], &[]);
    for layer in &config.layers {
        table.row([layer.step.clone(), bytes(layer.changed_bytes), layer.layer.short()]);
    }
    session.terminal.list(&config.layers, &table)?;
    Ok(0)
}
