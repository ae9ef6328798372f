//! Where an image that is sent on comes from: this machine, or the host.

use form_api::{client::Client, image::ReadBlocksRequest};
use form_bundle::manifest::MAX_MANIFEST_BYTES;
use form_image::{BuildError, BuildObserver, Builder, Cancel, HostImage, Original, StoreError};
use form_types::ImageReference;
use tokio::runtime::Handle;

use super::{failure, store};
use crate::{failure::Failure, session::Session};

pub enum Origin {
    Here(ImageReference),
    Host { image: HostImage, client: Client, runtime: Handle },
}

impl Origin {
    /// Looks whether there is such an image, before anything is done for it.
    pub async fn find(image: &ImageReference, from_host: bool, session: &Session) -> Result<Self, Failure> {
        if !from_host {
            return match store()?.get(image) {
                Ok(_) => Ok(Self::Here(image.clone())),
                Err(error @ StoreError::NotFound(_)) => {
                    Err(failure(&error).hint("`form image ls --local` lists them; with --from-host it is an image of the host"))
                }
                Err(error) => Err(failure(&error)),
            };
        }
        let client = session.client()?;
        let found = client.image(image).await?;
        // A newer one may come meanwhile.
        let exact = ImageReference { name: found.name.clone(), version: Some(found.version) };
        let text = client.image_manifest(&exact, MAX_MANIFEST_BYTES).await?;
        let image = HostImage { name: found.name, version: found.version, digest: found.digest, text };
        Ok(Self::Host { image, client, runtime: Handle::current() })
    }

    /// Has everything of it on this machine. Blocks: not for a thread that other tasks wait for.
    pub fn open(self, builder: &Builder, cancel: &Cancel, observer: &mut dyn BuildObserver) -> Result<Original, BuildError> {
        let (image, client, runtime) = match self {
            Self::Here(image) => return builder.original(&image),
            Self::Host { image, client, runtime } => (image, client, runtime),
        };
        let exact = ImageReference { name: image.name.clone(), version: Some(image.version) };
        let mut fetch = |blocks: &[u64]| {
            let request = ReadBlocksRequest { blocks: blocks.to_vec() };
            runtime.block_on(client.read_blocks(&exact, &request)).map_err(|error| BuildError::Host(Box::new(error)))
        };
        builder.fetched(image, ReadBlocksRequest::MAX, &mut fetch, cancel, observer)
    }
}
