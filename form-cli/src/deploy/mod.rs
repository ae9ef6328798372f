//! From a Formfile to a running VM: what `plan` and `deploy` share.

pub mod build;
pub mod own_kernel;
mod passwords;
pub mod plan_view;
mod refuse;
mod upload;

use form_api::{
    ErrorCode,
    client::{Client, ClientError},
    deploy::{Boot, DeployRequest},
    vm::VmDetail,
};
use form_image::{BuiltImage, KernelBundle};
use form_types::Spec;

use self::refuse::refuse;
pub use self::upload::{upload, upload_image, upload_kernel};
use crate::{failure::Failure, session::Session};

/// Everything that a deploy needs, made and not yet sent.
pub struct Prepared {
    pub image: BuiltImage,
    pub kernel: KernelBundle,
    pub request: DeployRequest,
}

/// Builds what is needed and asks the host for what runs there now; gives the way to that host too.
///
/// # Errors
/// When the Formfile has faults or asks for what this version cannot do, the host does not answer, or the build fails.
pub async fn prepare(session: &Session, args: &build::BuildArgs) -> Result<(Client, Prepared), Failure> {
    // A fault of the file is the user's next step whether or not there is a host.
    let (source, spec) = args.load(session)?;
    refuse(&spec)?;
    let client = session.client()?;
    // A host that is away, or not ours, is better known before a long build than after it.
    let before = existing(&client, &spec).await?;
    let image = build::image(session, args, &source, &spec).await?;
    let kernel = build::kernel_of(session, &image.manifest).await?;
    let old = before.map(|detail| detail.desired.passwd_hashes).unwrap_or_default();
    let passwd_hashes = passwords::hashes(&spec, &old)?;
    // On a base from a registry a Formfile means what that leaves open too.
    let request = DeployRequest { spec: image.spec.clone(), passwd_hashes, boot: Boot::Image(image.digest), kernel: kernel.digest };
    Ok((client, Prepared { image, kernel, request }))
}

async fn existing(client: &Client, spec: &Spec) -> Result<Option<VmDetail>, Failure> {
    match client.vm(&spec.name).await {
        Ok(detail) => Ok(Some(detail)),
        Err(ClientError::Api(error)) if error.code == ErrorCode::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}
