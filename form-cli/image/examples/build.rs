//! Builds an image from a spec in JSON and writes what QEMU needs to boot it: for trying things by hand.
//!
//! `cargo run -p form-image --example build -- SPEC.json CONTEXT OUT [GUEST [SETTINGS.json]]` leaves `OUT/disk`, `OUT/vmlinux`, `OUT/initrd`.

use std::{error::Error, fs, path::PathBuf};

use form_bundle::{ModuleSet, initramfs::settings_segment};
use form_image::{BuildEvent, BuildOptions, Builder, CachePaths, Cancel, kernel};
use form_types::{ImageReference, Spec};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [spec, context, out, rest @ ..] = arguments.as_slice() else { return Err("SPEC.json CONTEXT OUT [GUEST [SETTINGS.json]]".into()) };
    let paths = CachePaths::from_environment().ok_or("neither XDG_CACHE_HOME nor HOME is set")?;
    let spec: Spec = serde_json::from_slice(&fs::read(spec)?)?;
    let mut observer = |event: BuildEvent<'_>| match event {
        BuildEvent::Output { line } => println!("   | {line}"),
        other => println!("{other:?}"),
    };
    let builder = Builder::new(paths.clone());
    let image = builder.build(&spec, context, &BuildOptions::default(), &mut observer)?;
    fs::create_dir_all(out)?;
    builder.store().export(&ImageReference { name: image.name.clone(), version: Some(image.version) }, &out.join("disk"))?;
    let bundle = kernel::ensure(&paths, false, &Cancel::new(), &mut observer)?;
    kernel::verify(&bundle)?;
    println!("kernel {} with {} modules for a guest", bundle.manifest.release, bundle.manifest.load_order(ModuleSet::Guest).len());
    fs::copy(bundle.vmlinux(), out.join("vmlinux"))?;
    if let [guest, rest @ ..] = rest {
        let mut initrd = bundle.initramfs(&fs::read(guest)?, ModuleSet::Guest)?;
        if let [settings, ..] = rest {
            initrd.extend(settings_segment(&serde_json::from_slice(&fs::read(settings)?)?)?);
        }
        fs::write(out.join("initrd"), initrd)?;
    }
    Ok(())
}
