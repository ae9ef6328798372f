use crate::{
    deploy::{build::BuildArgs, plan_view, prepare},
    failure::Outcome,
    session::Session,
    ui::Format,
};

/// Show what a deploy would change; exit 8 when it would change something
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    build: BuildArgs,
}

/// The plan has changes.
const CHANGES: u8 = 8;

pub async fn run(args: Args, session: &Session) -> Outcome {
    let (client, prepared) = prepare(session, &args.build).await?;
    let plan = client.plan(&prepared.request).await?;
    let terminal = &session.terminal;
    match terminal.format() {
        Format::Json | Format::Yaml => terminal.data(&plan)?,
        Format::Name => terminal.print(plan.vms.iter().map(|vm| format!("{}\n", vm.name)).collect::<String>()),
        _ => terminal.print(plan_view::text(&plan, terminal)),
    }
    Ok(if plan.is_unchanged() { 0 } else { CHANGES })
}
