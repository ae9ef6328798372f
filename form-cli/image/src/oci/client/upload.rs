//! The writing half of the distribution specification: "Pushing a blob monolithically" and "Pushing manifests".

use ureq::{
    Body,
    http::{self, HeaderMap, Method, Response, Uri},
};

use super::{super::OciDigest, Client, OciError, Request};

/// Something that is sent.
struct Sending<'a> {
    method: Method,
    url: &'a str,
    content_type: Option<&'a str>,
    body: &'a [u8],
    /// What it is, for messages.
    what: &'a str,
}

impl Client<'_> {
    /// Asks for logins that may write, too.
    pub fn for_writing(mut self) -> Self {
        self.writes = true;
        self
    }

    /// # Errors
    /// When the registry cannot be asked.
    pub fn has_blob(&mut self, digest: &OciDigest) -> Result<bool, OciError> {
        match self.call(&Request { head: true, path: &format!("blobs/{digest}"), accept: "*/*", from: 0 }) {
            Ok(_) => Ok(true),
            Err(OciError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Sends a blob in one piece. What breaks off is begun anew.
    ///
    /// # Errors
    /// When the registry does not take it.
    pub fn put_blob(&mut self, digest: &OciDigest, bytes: &[u8]) -> Result<(), OciError> {
        self.tried(|client| {
            let begin = format!("{}/blobs/uploads/", client.base);
            let begun =
                client.write(&Sending { method: Method::POST, url: &begin, content_type: None, body: &[], what: "blobs/uploads/" })?;
            let location = client.location(begun.headers())?;
            let joint = if location.contains('?') { '&' } else { '?' };
            let url = format!("{location}{joint}digest={digest}");
            let what = format!("blobs/{digest}");
            let content_type = Some("application/octet-stream");
            client.write(&Sending { method: Method::PUT, url: &url, content_type, body: bytes, what: &what }).map(drop)
        })
    }

    /// Sends a manifest, whose blobs are there, under a tag.
    ///
    /// # Errors
    /// When the registry does not take it, or keeps another one.
    pub fn put_manifest(&mut self, tag: &str, media_type: &str, bytes: &[u8]) -> Result<(), OciError> {
        let answer = self.tried(|client| {
            let (url, what) = (format!("{}/manifests/{tag}", client.base), format!("manifests/{tag}"));
            client.write(&Sending { method: Method::PUT, url: &url, content_type: Some(media_type), body: bytes, what: &what })
        })?;
        let expected = OciDigest::of(bytes);
        match super::digest_header(answer.headers())? {
            Some(found) if found != expected => {
                Err(OciError::Digest { what: "the manifest, as the registry has it,".to_owned(), expected, found })
            }
            _ => Ok(()),
        }
    }

    /// Where an upload goes on: on the same host, or on another that is spoken to as safely.
    fn location(&self, headers: &HeaderMap) -> Result<String, OciError> {
        let refuse = |reason: &str| OciError::Unsupported { what: format!("a registry whose place for uploads {reason}") };
        let location = headers.get("location").and_then(|value| value.to_str().ok()).ok_or_else(|| refuse("is missing"))?;
        let base: Uri = self.base.parse().map_err(|_| refuse("cannot be told"))?;
        let (scheme, authority) = (base.scheme_str().unwrap_or("https"), base.authority().map(|one| one.as_str()).unwrap_or_default());
        if location.starts_with('/') && !location.starts_with("//") {
            return Ok(format!("{scheme}://{authority}{location}"));
        }
        let uri: Uri = location.parse().map_err(|_| refuse("is no URL"))?;
        let host = uri.authority().map(|one| one.as_str()).unwrap_or_default();
        let fits = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => self.plain && (host == authority || self.registries.is_plain(host)),
            _ => false,
        };
        if !fits || host.is_empty() || host.contains('@') {
            return Err(refuse("has no TLS"));
        }
        Ok(location.to_owned())
    }

    /// One request, with the login that the registry asks for.
    fn write(&mut self, sending: &Sending<'_>) -> Result<Response<Body>, OciError> {
        let answer = self.send_body(sending)?;
        if answer.status() != 401 {
            return self.judge_write(answer, sending);
        }
        let had = self.authorization.take();
        self.log_in(answer.headers())?;
        let answer = if had == self.authorization { answer } else { self.send_body(sending)? };
        self.judge_write(answer, sending)
    }

    fn send_body(&self, sending: &Sending<'_>) -> Result<Response<Body>, OciError> {
        let mut request = http::Request::builder().method(&sending.method).uri(sending.url);
        if let Some(content_type) = sending.content_type {
            request = request.header("content-type", content_type);
        }
        // The login is the registry's; a place of somebody else's for its blobs has a permission in its URL.
        if let Some(authorization) = self.authorization.as_ref().filter(|_| self.is_of_registry(sending.url)) {
            request = request.header("authorization", authorization);
        }
        let unsendable = |error: &dyn std::fmt::Display| OciError::Unsupported { what: format!("a request that cannot be sent: {error}") };
        let request = request.body(sending.body).map_err(|error| unsendable(&error))?;
        let agent = if self.plain && sending.url.starts_with("https:") { &super::agent(false, false)? } else { &self.agent };
        agent.run(request).map_err(|error| OciError::Unreachable { registry: self.registry.clone(), source: Box::new(error) })
    }

    fn is_of_registry(&self, url: &str) -> bool {
        let authority =
            |text: &str| text.parse::<Uri>().ok().and_then(|uri| Some((uri.scheme_str()?.to_owned(), uri.authority()?.to_string())));
        authority(url).is_some_and(|found| Some(found) == authority(&self.base))
    }

    fn judge_write(&self, answer: Response<Body>, sending: &Sending<'_>) -> Result<Response<Body>, OciError> {
        let registry = self.registry.clone();
        let what = format!("{}/{}", self.repository, sending.what);
        match answer.status().as_u16() {
            200..=299 => Ok(answer),
            401 | 403 => Err(OciError::Denied { registry, known: self.login.is_some() }),
            404 => Err(OciError::NotFound { registry, what }),
            status => Err(OciError::Status { registry, request: what, status }),
        }
    }
}
