use std::str::FromStr;

use clap_complete::engine::ArgValueCompleter;
use form_api::{
    ErrorCode,
    deploy::{RollbackRequest, VmVersion},
};
use form_types::{IdempotencyKey, ImageReference, Name};
use jiff::Timestamp;

use crate::{
    args::vm_name,
    cmd::deploy,
    complete,
    deploy::plan_view,
    failure::{Failure, Outcome},
    session::Session,
    ui::{Table, age},
};

/// Make a VM again what it was before, as its host keeps it
///
/// Without VERSION that is what it last was healthy as, before the present one: a second rollback takes back the first. It shows the plan and asks,
/// as a deploy does, and when the VM does not become healthy what ran before is put back. A new image means a new root disk.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    vm: Name,
    /// The image that it ran from: a version (3), or NAME:VERSION
    #[arg(conflicts_with = "list")]
    version: Option<Version>,
    /// Show what it can go back to, the latest first
    #[arg(long)]
    list: bool,
}

/// An image, by its version and maybe its name.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Version {
    name: Option<Name>,
    number: u32,
}

impl FromStr for Version {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no version of an image: write 3, or NAME:3");
        let qualified = if text.contains(':') { text.to_owned() } else { format!("image:{text}") };
        let reference: ImageReference = qualified.parse().map_err(|_| wrong())?;
        Ok(Self { number: reference.version.ok_or_else(wrong)?, name: text.contains(':').then_some(reference.name) })
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.name {
            Some(name) => write!(formatter, "{name}:{}", self.number),
            None => write!(formatter, "version {}", self.number),
        }
    }
}

impl Version {
    fn is_of(&self, version: &VmVersion) -> bool {
        let of = |image: &ImageReference| image.version == Some(self.number) && self.name.as_ref().is_none_or(|name| *name == image.name);
        version.image.as_ref().is_some_and(of)
    }
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let versions = client.versions(&args.vm).await?;
    if args.list {
        if versions.is_empty() {
            session.terminal.note(format!("there is nothing that {} could go back to", args.vm));
        }
        session.terminal.list(&versions, &table(&versions))?;
        return Ok(0);
    }
    let version = chosen(&args.vm, args.version.as_ref(), versions)?;
    let request = RollbackRequest { to: version.request };
    let plan = client.plan(&request.to).await?;
    session.terminal.note(plan_view::text(&plan, &session.terminal).trim_end());
    session.terminal.confirm("Go back?")?;
    let key = IdempotencyKey::random().map_err(|error| Failure::failed(format!("no randomness: {error}")))?;
    let operation = client.rollback(&args.vm, &request, key).await?;
    deploy::carry_out(session, &client, &request.to, operation).await
}

fn chosen(vm: &Name, wanted: Option<&Version>, versions: Vec<VmVersion>) -> Result<VmVersion, Failure> {
    if versions.is_empty() {
        return Err(Failure::new(ErrorCode::Conflict, format!("there is nothing that vm/{vm} could go back to"))
            .hint("a version is kept when another one has become healthy after it; deploy what you want with `form deploy`"));
    }
    let list = format!("`form rollback {vm} --list` shows what there is");
    let found = versions.into_iter().find(|version| wanted.is_none_or(|wanted| wanted.is_of(version)));
    let Some(version) = found else {
        let wanted = wanted.map(ToString::to_string).unwrap_or_default();
        return Err(Failure::not_found(format!("vm/{vm} has no {wanted} to go back to")).hint(list));
    };
    if version.is_there {
        return Ok(version);
    }
    Err(Failure::not_found(format!("the host does not have {} any more, which vm/{vm} ran", name(&version)))
        .hint(format!("{list}; or build it again and run `form deploy`")))
}

fn digest(version: &VmVersion) -> String {
    version.request.image().map(form_types::Digest::short).unwrap_or_default()
}

/// The image that it ran from, as good as it is known.
fn name(version: &VmVersion) -> String {
    version.image.as_ref().map_or_else(|| digest(version), ToString::to_string)
}

fn table(versions: &[VmVersion]) -> Table {
    let mut table = Table::new(&["IMAGE", "DIGEST", "HEALTHY SINCE", "STATE"], &["VCPUS", "MEMORY", "DISK"]);
    for version in versions {
        let resources = &version.request.spec.resources;
        table.row([
            name(version),
            digest(version),
            version.deployed_at.map(|at| format!("{} ago", age(at, Timestamp::now()))).unwrap_or_default(),
            if version.is_there { "kept" } else { "gone" }.to_owned(),
            resources.vcpus.to_string(),
            format!("{} MiB", resources.memory_mib),
            format!("{} GiB", resources.disk_gib),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_a_number_or_an_image() {
        assert_eq!("3".parse(), Ok(Version { name: None, number: 3 }));
        assert_eq!("web:3".parse(), Ok(Version { name: Some("web".parse().unwrap()), number: 3 }));
        for bad in ["", "web", "0", "-1", "web:", "web:0", ":3", "1.2", "3x"] {
            assert!(bad.parse::<Version>().is_err(), "{bad}");
        }
    }
}
