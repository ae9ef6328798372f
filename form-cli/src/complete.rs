//! Completion in the shell, with the names of what there is right now.

use std::{ffi::OsStr, time::Duration};

use clap::CommandFactory;
use clap_complete::{CompleteEnv, engine::CompletionCandidate};
use form_api::{
    client::{Client, ClientError, Timeouts},
    operation::OperationsQuery,
};

use crate::{
    cli::Cli,
    cmd::image,
    context::{ConfigFile, LOCAL_SOCKET, PassphraseSource, load_identity, resolve},
};

/// Who presses a key does not wait longer than this.
const PATIENCE: Duration = Duration::from_millis(700);

/// Ends the program when a shell asks for completions (through the variable that its script sets).
pub fn answer_the_shell() {
    CompleteEnv::with_factory(Cli::command).bin("form").complete();
}

fn candidates(names: impl IntoIterator<Item = String>, typed: &OsStr) -> Vec<CompletionCandidate> {
    let typed = typed.to_string_lossy();
    names.into_iter().filter(|name| name.starts_with(typed.as_ref())).map(CompletionCandidate::new).collect()
}

/// Asks the host. Whatever goes wrong means no suggestions: there is nobody to tell.
fn ask<F>(question: impl FnOnce(Client) -> F) -> Vec<String>
where
    F: Future<Output = Result<Vec<String>, ClientError>>,
{
    // The flags on the line being typed are not known here; the environment is.
    let context = std::env::var("FORM_CONTEXT").ok().and_then(|name| name.parse().ok());
    let host = std::env::var("FORM_HOST").ok();
    let answer = || {
        let file = ConfigFile::load().ok()?;
        let target = resolve(&file.config, context.as_ref(), host.as_deref(), LOCAL_SOCKET.as_ref()).ok()?;
        let timeouts = Timeouts { connect: PATIENCE, request: PATIENCE, deadline: None };
        // Nobody is asked for a passphrase in the middle of a line.
        let client = target.client(timeouts, || load_identity()?.unlock(&PassphraseSource::of_the_key(None, None))).ok()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
        runtime.block_on(async {
            let answer = tokio::time::timeout(PATIENCE, question(client.clone())).await.ok()?.ok();
            client.close().await;
            answer
        })
    };
    answer().unwrap_or_default()
}

fn vm_names() -> Vec<String> {
    ask(|client| async move { Ok(client.vms().await?.into_iter().map(|vm| vm.name.to_string()).collect()) })
}

pub fn vms(typed: &OsStr) -> Vec<CompletionCandidate> {
    candidates(vm_names(), typed)
}

pub fn vm_references(typed: &OsStr) -> Vec<CompletionCandidate> {
    candidates(vm_names().into_iter().map(|name| format!("vm/{name}")), typed)
}

pub fn images(typed: &OsStr) -> Vec<CompletionCandidate> {
    let names = ask(|client| async move {
        Ok(client.images().await?.into_iter().map(|image| format!("{}:{}", image.name, image.version)).collect())
    });
    candidates(names, typed)
}

pub fn local_images(typed: &OsStr) -> Vec<CompletionCandidate> {
    let records = image::store().ok().and_then(|store| store.list().ok()).unwrap_or_default();
    candidates(records.into_iter().map(|record| format!("{}:{}", record.name, record.version)), typed)
}

/// Those of this machine and those of the host.
pub fn all_images(typed: &OsStr) -> Vec<CompletionCandidate> {
    let mut both = local_images(typed);
    both.extend(images(typed));
    both.sort();
    both.dedup();
    both
}

pub fn volumes(typed: &OsStr) -> Vec<CompletionCandidate> {
    let names = ask(|client| async move { Ok(client.volumes().await?.into_iter().map(|volume| volume.name.to_string()).collect()) });
    candidates(names, typed)
}

pub fn snapshots(typed: &OsStr) -> Vec<CompletionCandidate> {
    let names =
        ask(|client| async move { Ok(client.all_snapshots().await?.into_iter().map(|snapshot| snapshot.name.to_string()).collect()) });
    candidates(names, typed)
}

pub fn volume_snapshots(typed: &OsStr) -> Vec<CompletionCandidate> {
    let names = ask(|client| async move {
        Ok(client.all_volume_snapshots().await?.into_iter().map(|snapshot| snapshot.name.to_string()).collect())
    });
    candidates(names, typed)
}

pub fn pools(typed: &OsStr) -> Vec<CompletionCandidate> {
    let names = ask(|client| async move { Ok(client.pools().await?.into_iter().map(|pool| pool.name.to_string()).collect()) });
    candidates(names, typed)
}

pub fn operations(typed: &OsStr) -> Vec<CompletionCandidate> {
    let names = ask(|client| async move {
        let operations = client.operations(&OperationsQuery::default()).await?;
        Ok(operations.into_iter().map(|operation| operation.id.short()).collect())
    });
    candidates(names, typed)
}

pub fn contexts(typed: &OsStr) -> Vec<CompletionCandidate> {
    let config = ConfigFile::load().map(|file| file.config).unwrap_or_default();
    candidates(config.contexts.into_iter().map(|context| context.name.to_string()), typed)
}

pub fn hosts(typed: &OsStr) -> Vec<CompletionCandidate> {
    let config = ConfigFile::load().map(|file| file.config).unwrap_or_default();
    let hosts = config.contexts.into_iter().flat_map(|context| context.hosts);
    candidates(hosts.map(|host| host.label().to_owned()), typed)
}
