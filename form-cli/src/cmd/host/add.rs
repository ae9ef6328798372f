use clap_complete::engine::ArgValueCompleter;
use form_api::{
    client::{Client, Timeouts},
    host::ClaimRequest,
};
use form_types::{Name, PublicKey};

use crate::{
    complete,
    context::{ConfigFile, KnownHost, load_or_create_identity},
    failure::{Failure, Outcome},
    session::Session,
};

/// Make a host yours with the token that `form-agent init` printed there
#[derive(Debug, clap::Args)]
pub struct Args {
    /// HOST or HOST:PORT
    address: String,
    /// The token; it holds the host's key, so nobody can pretend to be the host
    #[arg(long, env = "FORM_TOKEN", hide_env_values = true, allow_hyphen_values = true)]
    token: String,
    /// The context to add it to, made when there is none
    #[arg(long = "to", value_name = "CONTEXT", add = ArgValueCompleter::new(complete::contexts))]
    to: Option<Name>,
}

/// The host's public key and the secret of a token.
fn split(token: &str) -> Result<(PublicKey, String), Failure> {
    let wrong = || Failure::usage("that is no token").hint("run `form-agent init` on the host and copy the whole line that it prints");
    let (key, secret) = token.trim().split_once('.').ok_or_else(wrong)?;
    let key = format!("ed25519:{key}").parse().map_err(|_| wrong())?;
    if secret.is_empty() { Err(wrong()) } else { Ok((key, secret.to_owned())) }
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let (public_key, secret) = split(&args.token)?;
    let mut file = ConfigFile::load()?;
    load_or_create_identity()?;
    let timeouts = Timeouts { deadline: session.deadline(), ..Timeouts::default() };
    let client = Client::quic(&args.address, public_key, &session.identity()?, timeouts);
    session.keep(&client);
    let host = client.claim(&ClaimRequest { secret }).await?;

    let fallback = || file.config.current.clone().map_or_else(|| "default".parse().map_err(|_| Failure::usage("no name")), Ok);
    let name: Name = match args.to.or_else(|| session.global.context.clone()) {
        Some(name) => name,
        None => fallback()?,
    };
    let context = file.config.context_or_new(&name);
    // The same host under a new address, or another host at the old one: what is true now replaces what was.
    context.hosts.retain(|known| known.public_key != public_key && known.address != args.address);
    context.hosts.push(KnownHost { name: host.name.clone(), address: args.address.clone(), public_key });
    file.save()?;
    session.terminal.done(&host, &host.name, &format!("{} at {} is yours, in the context {name}", host.name, args.address))?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use form_types::SecretKey;

    use super::*;

    #[test]
    fn a_token_is_key_and_secret() {
        let key = SecretKey::from_bytes([1; 32]).public();
        let text = key.to_string().replace("ed25519:", "");
        assert_eq!(split(&format!(" {text}.abc\n")).unwrap(), (key, "abc".to_owned()));
        for bad in ["", "abc", ".abc", &format!("{text}."), &format!("{key}.abc")] {
            assert_eq!(split(bad).unwrap_err().exit_code(), 2, "{bad}");
        }
    }
}
