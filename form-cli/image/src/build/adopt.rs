//! Starting from an image whose layers are not here: it was made on another machine, or they went with a prune.

use std::{fs, path::Path};

use form_bundle::Manifest;

use super::{OciAlias, Work, text_of};
use crate::{
    BuildError, BuildEvent, BuildObserver,
    artifact::{Artifact, layout, take::Taking},
    diff::Diff,
    error::IoContext,
    ext4::{Ext4, read},
    layer::{Layer, TREE, write_json},
    oci::Defaults,
    sandbox::{Input, Job, args},
    tarball::{self, Spool},
};

impl Work<'_> {
    /// Makes one layer of the whole file system of an image whose blocks are here, and goes on in that very file system: what is built
    /// on it has the blocks that it would have where the image was made.
    ///
    /// # Errors
    /// When the file system is damaged, or none of this builder's.
    pub(super) fn adopt(&mut self, text: &str, manifest: &Manifest) -> Result<bool, BuildError> {
        let key = self.key("image", &manifest.rootfs.digest()?)?;
        if self.cached(&key) {
            return Ok(true);
        }
        let workspace = self.workspace()?;
        let path = workspace.join("disk");
        self.blocks.restore(&manifest.rootfs.blocks, &path, &self.options.cancel)?;
        let disk = Ext4::open(path);
        disk.check()?;
        let spool = self.spool()?;
        let diff = read::read(disk.path(), &spool, self.spec.resources.disk_gib, &self.options.cancel)?;
        self.plant(&workspace, &diff, &spool)?;
        self.index()?;
        if let Some(index) = self.index.as_mut() {
            index.apply(&diff);
        }
        let layer = Layer {
            key,
            parent: None,
            text: text.to_owned(),
            blocks: manifest.rootfs.blocks.clone(),
            changed_blocks: manifest.rootfs.blocks.stored_blocks(),
            packages: manifest.packages.clone(),
            passwd: text_of(&diff, &spool, b"etc/passwd")?.unwrap_or_default(),
            group: text_of(&diff, &spool, b"etc/group")?.unwrap_or_default(),
        };
        self.publish(&workspace, &disk, layer, &diff, &spool)?;
        Ok(false)
    }

    /// Starts from an image of ours that was fetched from a registry: from its files, as `FROM image:NAME` does.
    ///
    /// # Errors
    /// When it is not whole; no block of it is left then.
    pub(super) fn artifact_base(
        &mut self,
        (from, text): (&str, &str),
        artifact: &Artifact,
        alias: &Path,
        observer: &mut dyn BuildObserver,
    ) -> Result<bool, BuildError> {
        let (blocks, oci) = (self.blocks.clone(), self.oci.clone());
        let taking = Taking { from, cancel: &self.options.cancel };
        let (manifest, taken) = layout::take_blocks(&blocks, artifact, &oci, &taking, observer).map_err(|error| match error {
            BuildError::Interrupted => BuildError::Cancelled,
            error => error,
        })?;
        observer.event(BuildEvent::Output { line: "an image of Formation: its files are the base, not how it runs" });
        let cached = self.adopt(text, &manifest)?;
        taken.keep();
        self.kernel = manifest.kernel;
        if let Some(layer) = self.chain.last() {
            write_json(alias, &OciAlias { layer: layer.key, defaults: Defaults::default(), kernel: self.kernel.clone() })?;
        }
        artifact.layers.iter().chain([&artifact.config]).for_each(|blob| oci.remove(&blob.digest));
        Ok(cached)
    }

    /// Lets the sandbox unpack the files of a layer, for programs to see.
    pub(super) fn plant(&mut self, workspace: &Path, diff: &Diff, spool: &Spool) -> Result<(), BuildError> {
        if workspace.join(TREE).exists() {
            return Ok(());
        }
        self.sandbox.create_dir(&workspace.join(TREE))?;
        let script = "exec tar --extract --xattrs --xattrs-include='*' --numeric-owner --same-permissions --directory=tree --file=-";
        let job = Job { directory: workspace, script, args: &args::<&str>([]), env: &[], input: Input::Pipe };
        self.sandbox.write(job, &self.options.cancel, |stream| tarball::write(diff, spool, stream))
    }

    /// Publishes a layer that is in the file system of `disk`, which goes on to the next one.
    pub(super) fn publish(&mut self, workspace: &Path, disk: &Ext4, layer: Layer, diff: &Diff, spool: &Spool) -> Result<(), BuildError> {
        // Everything else in the workspace but the tree is done with.
        let next = self.layers.workspace()?;
        let moved = next.join("disk");
        fs::rename(disk.path(), &moved).during("move", &moved)?;
        self.disk = Some(Ext4::open(moved));
        self.workspace = None;
        fs::remove_dir_all(spool.directory()).during("remove", spool.directory())?;
        self.remove_scaffold(workspace)?;
        self.layers.publish(workspace, &layer, diff, &self.sandbox)?;
        self.workspace = Some(next);
        self.chain.push(layer);
        Ok(())
    }
}
