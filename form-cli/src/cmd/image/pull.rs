use std::path::PathBuf;

use form_image::{BuildOptions, Builder, Cancel, OciReference, Pulled, Registries};
use form_types::{Name, Spec};
use formfile::LowerOptions;

use crate::{
    args::gibibytes,
    cmd::build::show,
    context::registries,
    deploy::build::{cache, failure, image_of, observed},
    failure::{Failure, Outcome},
    session::Session,
};

/// Make an image on this machine out of one in an OCI registry
///
/// What `form image push` sent is taken in as it was, with the same digest. Of another image it makes what a build of a Formfile with this FROM and
/// nothing else makes. `form vm create --image NAME` runs it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// HOST[:PORT]/PATH[:TAG][@sha256:DIGEST]
    reference: String,
    /// What to call it; by default what it was called before it was pushed, or the last part of its path
    #[arg(long, value_name = "NAME")]
    name: Option<Name>,
    /// Size of the root disk of its VMs, which what is in the image must fit: 10G. Not of one that was pushed: that has its own
    #[arg(long, value_name = "SIZE", value_parser = gibibytes)]
    disk: Option<u64>,
    /// Fetch and unpack it again
    #[arg(long)]
    no_cache: bool,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let registries = registries()?;
    let reference = reference(&args, &registries)?;
    let spec = spec(&args, &reference)?;
    let (builder, cancel) = (Builder::new(cache()?), Cancel::new());
    let (name, target, stop, hosts) = (args.name.clone(), reference.clone(), cancel.clone(), registries.clone());
    let pulled = observed(session, &cancel, move |observer| builder.pull(&target, name.as_ref(), &hosts, &stop, observer));
    let digest = match pulled.await? {
        Pulled::Image(image) => {
            if args.disk.is_some() {
                session.terminal.warn("it has a size of its own: --disk has no effect; `form vm create --disk` gives a VM more");
            }
            return show(&image, session);
        }
        Pulled::Another(digest) => digest,
    };
    let base = Some(digest);
    let options =
        BuildOptions { no_cache: args.no_cache, refresh: false, locked: false, lock_file: None, cancel: Cancel::new(), registries, base };
    // It has no files to copy.
    let image = image_of(session, &spec, PathBuf::from("."), options).await?;
    show(&image, session)
}

fn reference(args: &Args, registries: &Registries) -> Result<OciReference, Failure> {
    OciReference::parse(&args.reference, registries.default.as_deref())
        .map_err(|source| failure(&form_image::BuildError::Registry { from: args.reference.clone(), source }))
}

/// What the shortest Formfile with this base means.
fn spec(args: &Args, reference: &OciReference) -> Result<Spec, Failure> {
    let name = match &args.name {
        Some(name) => name.clone(),
        None => {
            let last = reference.repository.rsplit('/').next().unwrap_or_default();
            last.parse().map_err(|_| Failure::usage(format!("`{last}` is no name of an image")).hint("choose one with `--name NAME`"))?
        }
    };
    let disk = args.disk.map(|gib| format!("DISK {gib}\n")).unwrap_or_default();
    let text = format!("NAME {name}\nFROM {reference}\n{disk}");
    let checked = formfile::check("Formfile", &text, &LowerOptions::default());
    checked.spec.ok_or_else(|| {
        let problem = checked.diagnostics.first().map(|diagnostic| diagnostic.message.clone()).unwrap_or_default();
        Failure::usage(format!("{reference} cannot be pulled: {problem}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a pull would build.
    fn built(args: &Args, registries: &Registries) -> Result<Spec, Failure> {
        spec(args, &reference(args, registries)?)
    }

    fn args(reference: &str, name: Option<&str>) -> Args {
        Args { reference: reference.to_owned(), name: name.map(|name| name.parse().unwrap()), disk: Some(20), no_cache: false }
    }

    #[test]
    fn a_pull_is_a_build_of_its_base() {
        let found = built(&args("registry.example:5000/team/app:1.2", None), &Registries::default()).unwrap();
        assert_eq!((found.name.as_str(), found.from.as_str()), ("app", "registry.example:5000/team/app:1.2"));
        assert_eq!((found.resources.disk_gib, found.steps.len()), (20, 0));
        let registries = Registries { default: Some("registry.example".to_owned()), ..Registries::default() };
        let found = built(&args("my_app", Some("mine")), &registries).unwrap();
        assert_eq!((found.name.as_str(), found.from.as_str()), ("mine", "registry.example/my_app:latest"));
    }

    #[test]
    fn what_cannot_be_pulled_is_refused_with_a_way_out() {
        let hint = |reference, registries: &Registries| built(&args(reference, None), registries).unwrap_err().error.hint.unwrap();
        assert!(hint("debian:12", &Registries::default()).contains("HOST/PATH:TAG"));
        assert!(hint("registry.example/my_app", &Registries::default()).contains("--name"));
    }
}
