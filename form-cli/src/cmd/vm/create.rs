use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use clap_complete::engine::ArgValueCompleter;
use form_api::{
    ErrorCode,
    client::{Client, ClientError},
    deploy::{Boot, CreateVmRequest, DeployRequest, GivenVolume},
};
use form_bundle::Manifest;
use form_image::{ImageStore, KernelBundle, StoreError};
use form_types::{
    Digest, IdempotencyKey, ImageReference, Name, Spec,
    spec::{Env, EnvScope, Port, Restart},
};

use crate::{
    args::{gibibytes, label, mebibytes, new_label, published, restart_policy, vm_name, volume_name},
    cmd::{deploy, image},
    complete,
    deploy::{build, own_kernel::OwnKernel, plan_view, upload_image, upload_kernel},
    failure::{Failure, Outcome},
    operation::settle,
    session::Session,
};

/// Make a VM without a Formfile, from an image or from a kernel, and start it
///
/// Of an image it runs as the Formfile of the image says, but for what is given here. Ports of that Formfile are open to other VMs; on the
/// host only what --publish names is published. Passwords are no part of an image.
///
/// With --kernel the VM runs that kernel and nothing of Formation's: it has a serial console, a network interface whose address and MAC `form
/// vm show` says, entropy, and the volumes that --volume names. It is running when its process runs. What needs Formation's guest in it (exec,
/// cp, ssh, logs, port-forward) is refused.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "An image that the host does not have is taken from the build cache of this machine. A kernel is an uncompressed ELF \
    file with a PVH entry (CONFIG_PVH): Linux's scripts/extract-vmlinux takes it out of a bzImage."
)]
pub struct Args {
    /// The new VM
    #[arg(value_parser = vm_name)]
    name: Name,
    /// NAME or NAME:VERSION
    #[arg(long, required_unless_present = "kernel", add = ArgValueCompleter::new(complete::images))]
    image: Option<ImageReference>,
    #[command(flatten)]
    own: Own,
    #[command(flatten)]
    wishes: Wishes,
    /// An environment variable of every process in it
    #[arg(short, long = "env", value_name = "KEY=VALUE", value_parser = label)]
    env: Vec<(String, String)>,
    /// What to do when its service ends: always, never, on-failure or on-failure:TIMES
    #[arg(long, value_name = "POLICY", value_parser = restart_policy)]
    restart: Option<Restart>,
    /// Leave out the volumes of the image's Formfile
    #[arg(long)]
    no_volumes: bool,
}

/// A VM without an image.
#[derive(Debug, clap::Args)]
struct Own {
    /// In place of an image: an uncompressed ELF kernel with a PVH entry (vmlinux)
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath, conflicts_with_all = ["image", "env", "disk", "no_volumes"])]
    kernel: Option<PathBuf>,
    /// The initial RAM disk of that kernel, passed on as it is
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath, requires = "kernel", conflicts_with = "image")]
    initrd: Option<PathBuf>,
    /// The command line of that kernel [default: console=ttyS0 panic=-1 reboot=t]
    #[arg(long, value_name = "TEXT", requires = "kernel", conflicts_with = "image", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// A volume of the host that no VM has, as a disk, `:ro` if the VM cannot write to it; may be given several times
    #[arg(long = "volume", value_name = "NAME[:ro]", requires = "kernel", conflicts_with = "image", value_parser = given_volume, add = ArgValueCompleter::new(complete::volumes))]
    volumes: Vec<GivenVolume>,
}

/// The console is the serial port; a panic or a reboot ends the VM, so that the host sees it.
const CMDLINE: &str = "console=ttyS0 panic=-1 reboot=t";
/// As a Formfile that says nothing.
const VCPUS: u32 = 1;
const MEMORY_MIB: u64 = 512;

/// `data`, `data:ro`.
fn given_volume(text: &str) -> Result<GivenVolume, String> {
    let (name, read_only) = text.strip_suffix(":ro").map_or((text, false), |name| (name, true));
    Ok(GivenVolume { name: volume_name(name)?, read_only })
}

/// What a new VM may have that differs from what it is made of.
#[derive(Debug, clap::Args)]
pub struct Wishes {
    /// Virtual CPUs
    #[arg(long, value_name = "COUNT")]
    pub cpus: Option<u32>,
    /// Memory: 512M, 2G
    #[arg(long, value_name = "SIZE", value_parser = mebibytes)]
    pub memory: Option<u64>,
    /// Size of the root disk: 10G
    #[arg(long, value_name = "SIZE", value_parser = gibibytes)]
    pub disk: Option<u64>,
    /// Lead a port of the host to the VM; may be given several times
    #[arg(short, long = "publish", value_name = "HOSTPORT:PORT", value_parser = published)]
    pub publish: Vec<Port>,
    /// Set a label
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = new_label)]
    pub labels: Vec<(String, String)>,
    /// Only make it; `form vm start` starts it
    #[arg(long)]
    pub no_start: bool,
}

impl Wishes {
    /// `spec` as a VM called `name` that has what is wished for. No two VMs publish one port, so what `spec` publishes is left out.
    pub fn apply(&self, spec: Spec, name: &Name) -> Spec {
        let mut spec = spec.renamed(name);
        let resources = &mut spec.resources;
        resources.vcpus = self.cpus.unwrap_or(resources.vcpus);
        resources.memory_mib = self.memory.unwrap_or(resources.memory_mib);
        resources.disk_gib = self.disk.unwrap_or(resources.disk_gib);
        for port in &mut spec.ports {
            port.host_port = None;
        }
        spec.ports.retain(|port| self.publish.iter().all(|published| (published.port, published.protocol) != (port.port, port.protocol)));
        spec.ports.extend(self.publish.iter().cloned());
        spec.labels.extend(self.labels.iter().cloned());
        spec
    }
}

impl Args {
    fn own_request(&self, kernel: Digest) -> DeployRequest {
        let bare = Spec::of_own_kernel(self.name.clone(), VCPUS, MEMORY_MIB);
        let mut spec = self.wishes.apply(bare, &self.name);
        if let Some(restart) = &self.restart {
            spec.restart = restart.clone();
        }
        let cmdline = self.own.cmdline.clone().unwrap_or_else(|| CMDLINE.to_owned());
        DeployRequest { spec, passwd_hashes: [].into(), boot: Boot::Own { cmdline }, kernel }
    }

    fn spec(&self, of_image: Spec) -> Spec {
        let mut spec = self.wishes.apply(of_image, &self.name);
        for (key, value) in &self.env {
            spec.env.retain(|env| env.scope != EnvScope::System || env.key != *key);
            spec.env.push(Env { scope: EnvScope::System, key: key.clone(), value: value.clone() });
        }
        if let Some(restart) = &self.restart {
            spec.restart = restart.clone();
        }
        if self.no_volumes {
            spec.volumes.clear();
        }
        spec
    }
}

/// An image, where it is.
struct Found {
    digest: Digest,
    config: Spec,
    /// Not on the host.
    local: Option<(Manifest, ImageStore)>,
    /// Of the kernel that it brings along.
    kernel: Option<Digest>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    match (&args.image, &args.own.kernel) {
        (_, Some(kernel)) => of_kernel(&args, kernel, session).await,
        (Some(image), None) => of_image(&args, image, session).await,
        (None, None) => Err(Failure::usage("there is nothing to make a VM of").hint("give --image or --kernel")),
    }
}

async fn of_kernel(args: &Args, kernel: &Path, session: &Session) -> Outcome {
    let own = OwnKernel::read(kernel.to_owned(), args.own.initrd.clone())?;
    let client = session.client()?;
    is_free(&client, &args.name).await?;
    let vm = args.own_request(own.digest);
    let plan = client.plan(&vm).await?;
    session.terminal.note(plan_view::text(&plan, &session.terminal).trim_end());
    own.upload(session, &client).await?;
    let volumes = args.own.volumes.clone();
    make(session, &client, CreateVmRequest { vm, start: !args.wishes.no_start, disk_of: None, fork_of: None, volumes }).await
}

async fn of_image(args: &Args, image: &ImageReference, session: &Session) -> Outcome {
    let client = session.client()?;
    is_free(&client, &args.name).await?;
    let found = find(&client, image).await?;
    let spec = args.spec(found.config.clone());
    let unknown: Vec<&str> = spec.users.iter().filter(|user| user.has_passwd).map(|user| user.name.as_str()).collect();
    if !unknown.is_empty() {
        session.terminal.warn(format!("no password is set for {}: passwords are no part of an image", unknown.join(", ")));
    }
    let kernel = kernel(session, &client, &found).await?;
    let vm = DeployRequest { spec, passwd_hashes: [].into(), boot: Boot::Image(found.digest), kernel: kernel.digest() };
    let plan = client.plan(&vm).await?;
    session.terminal.note(plan_view::text(&plan, &session.terminal).trim_end());
    if let Kernel::Here(bundle) = &kernel {
        upload_kernel(session, &client, bundle).await?;
    }
    if let Some((manifest, store)) = found.local {
        upload_image(session, &client, &found.digest, &manifest, Arc::new(store)).await?;
    }
    let request = CreateVmRequest { vm, start: !args.wishes.no_start, disk_of: None, fork_of: None, volumes: Vec::new() };
    make(session, &client, request).await
}

/// What the VM is started with.
enum Kernel {
    /// Of this machine, sent when the host does not have it.
    Here(Box<KernelBundle>),
    /// The image's own, which came to the host with it.
    There(Digest),
}

impl Kernel {
    const fn digest(&self) -> Digest {
        match self {
            Self::Here(bundle) => bundle.digest,
            Self::There(digest) => *digest,
        }
    }
}

async fn kernel(session: &Session, client: &Client, found: &Found) -> Result<Kernel, Failure> {
    match (&found.local, found.kernel) {
        (Some((manifest, _)), _) => build::kernel_of(session, manifest).await.map(|bundle| Kernel::Here(Box::new(bundle))),
        (None, None) => build::kernel(session).await.map(|bundle| Kernel::Here(Box::new(bundle))),
        (None, Some(digest)) => match client.kernel(&digest).await {
            Ok(_) => Ok(Kernel::There(digest)),
            Err(ClientError::Api(error)) if error.code == ErrorCode::NotFound => {
                Err(Failure::not_found("the host has the image, and not the kernel that the image brings along")
                    .hint("remove the image there with `form image rm`, and create the VM from a machine that has it in its build cache"))
            }
            Err(error) => Err(error.into()),
        },
    }
}

/// Asks for a new VM and follows that to its end.
///
/// # Errors
/// When the host does not make it.
pub async fn make(session: &Session, client: &Client, request: CreateVmRequest) -> Outcome {
    let key = IdempotencyKey::random().map_err(|error| Failure::failed(format!("no randomness: {error}")))?;
    let operation = client.create_vm(&request, key).await?;
    let name = &request.vm.spec.name;
    if request.start {
        return deploy::carry_out(session, client, &request.vm, operation).await;
    }
    let operation = settle(session, client, operation).await?;
    if !operation.status.is_final() {
        session.terminal.done(&operation, name.as_str(), &format!("{name}: {}", operation.status.as_str()))?;
        return Ok(0);
    }
    deploy::show(session, &client.vm(name).await?.vm)
}

/// A name that is taken is said before anything is built or sent; the host looks once more.
///
/// # Errors
/// A conflict that says what to do.
pub async fn is_free(client: &Client, name: &Name) -> Result<(), Failure> {
    match client.vm(name).await {
        Ok(_) => Err(Failure::new(ErrorCode::Conflict, format!("there is a vm/{name} already")).hint(format!(
            "choose another name, change that one with `form vm set {name}` or `form deploy`, or remove it with `form vm rm {name}`"
        ))),
        Err(ClientError::Api(error)) if error.code == ErrorCode::NotFound => Ok(()),
        Err(error) => Err(error.into()),
    }
}

async fn find(client: &Client, reference: &ImageReference) -> Result<Found, Failure> {
    match client.image_config(reference).await {
        Ok(config) => Ok(Found { digest: config.image.digest, config: config.spec, local: None, kernel: config.kernel }),
        Err(ClientError::Api(error)) if error.code == ErrorCode::NotFound => {
            let store = image::store()?;
            match store.get(reference) {
                Ok((record, manifest)) => {
                    let kernel = manifest.kernel.as_ref().map(|kernel| kernel.bundle);
                    Ok(Found { digest: record.digest, config: manifest.config.clone(), local: Some((manifest, store)), kernel })
                }
                Err(StoreError::NotFound(_)) => {
                    Err(Failure::not_found(format!("there is no image {reference}, neither on the host nor on this machine"))
                        .hint("list them with `form image ls` and `form image ls --local`, or make one with `form build`"))
                }
                Err(error) => Err(image::failure(&error)),
            }
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use clap::Parser;
    use form_types::spec::Protocol;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn made(words: &[&str]) -> Spec {
        let text = "NAME web\nEXPOSE 8080:80\nEXPOSE 53/udp\nENTRYPOINT /app\nENV A=1\nENV --scope=service:web B=2\nVOLUME data:/data\n";
        let spec = formfile::check("Formfile", text, &formfile::LowerOptions { build_args: BTreeMap::new() }).spec.unwrap();
        Line::parse_from([&["create", "two", "--image", "web:3"], words].concat()).args.spec(spec)
    }

    fn own(words: &[&str]) -> Result<Args, clap::Error> {
        Line::try_parse_from([&["create", "two", "--kernel", "vmlinux"], words].concat()).map(|line| line.args)
    }

    #[test]
    fn a_kernel_of_its_own_comes_without_an_image() {
        let request = own(&[]).unwrap().own_request(Digest::of(b"kernel"));
        assert_eq!((request.cmdline(), request.spec.resources.vcpus, request.spec.resources.memory_mib), (Some(CMDLINE), 1, 512));
        assert_eq!(request.spec, Spec::of_own_kernel("two".parse().unwrap(), 1, 512));

        let words = ["--cmdline", "", "--memory", "16M", "--cpus", "2", "-p", "8080:80", "-l", "a=b", "--restart", "never"];
        let request = own(&words).unwrap().own_request(Digest::of(b"kernel"));
        assert_eq!((request.cmdline(), request.spec.resources.memory_mib, request.spec.ports.len()), (Some(""), 16, 1));
        assert_eq!((request.spec.labels["a"].as_str(), request.spec.restart.policy), ("b", form_types::spec::RestartPolicy::Never));

        let volumes = own(&["--volume", "data", "--volume", "volume/base:ro"]).unwrap().own.volumes;
        assert_eq!(volumes.iter().map(|one| (one.name.as_str(), one.read_only)).collect::<Vec<_>>(), [("data", false), ("base", true)]);
        for wrong in [["--image", "web"], ["--env", "A=1"], ["--disk", "5G"], ["--volume", "a:rw"]] {
            assert!(own(&wrong).is_err(), "{wrong:?}");
        }
        for wrong in [["--initrd", "x"], ["--cmdline", "x"], ["--volume", "x"]] {
            assert!(Line::try_parse_from([&["create", "two", "--image", "web"][..], &wrong].concat()).is_err(), "{wrong:?}");
        }
        assert!(Line::try_parse_from(["create", "two"]).is_err());
    }

    #[test]
    fn it_runs_as_its_image_says_but_for_what_is_asked() {
        let spec = made(&[]);
        assert_eq!(spec.name.as_str(), "two");
        assert!(spec.ports.iter().all(|port| port.host_port.is_none()) && spec.ports.len() == 2, "{:?}", spec.ports);
        assert!(spec.env.iter().any(|env| env.scope == EnvScope::Service("two".to_owned()) && env.key == "B"), "its service is its own");
        assert_eq!(spec.volumes.len(), 1);

        let words = ["-p", "9090:80", "-e", "A=3", "--env", "C=4", "--cpus", "2", "--memory", "1G", "--disk", "20G", "-l", "tier=front"];
        let spec = made(&[&words[..], &["--restart", "never", "--no-volumes"]].concat());
        let published: Vec<_> = spec.ports.iter().map(|port| (port.host_port, port.port, port.protocol)).collect();
        assert_eq!(published, [(None, 53, Protocol::Udp), (Some(9090), 80, Protocol::Tcp)]);
        let system: BTreeMap<&str, &str> =
            spec.env.iter().filter(|env| env.scope == EnvScope::System).map(|env| (env.key.as_str(), env.value.as_str())).collect();
        assert_eq!(system, [("A", "3"), ("C", "4")].into());
        assert_eq!((spec.resources.vcpus, spec.resources.memory_mib, spec.resources.disk_gib), (2, 1024, 20));
        assert_eq!((spec.labels["tier"].as_str(), spec.volumes.len()), ("front", 0));
    }
}
