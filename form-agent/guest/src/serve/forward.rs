//! A TCP connection to a port of the guest, carried over the channel.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use form_guest::protocol::{ErrorKind, Reply};

use super::Channel;

const CONNECT_LIMIT: Duration = Duration::from_secs(5);

pub fn forward(channel: &Channel, port: u16) -> io::Result<()> {
    if channel.is_port() {
        return channel
            .refuse(ErrorKind::Unsupported, "a virtio-serial port carries no forwarded connection: use the network of this machine");
    }
    let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    let stream =
        TcpStream::connect_timeout(&v4, CONNECT_LIMIT).or_else(|error| TcpStream::connect_timeout(&v6, CONNECT_LIMIT).map_err(|_| error));
    let stream = match stream {
        Ok(stream) => stream,
        Err(error) => return channel.refuse(ErrorKind::NotFound, format_args!("nothing listens on port {port} of the guest: {error}")),
    };
    channel.reply(&Reply::Connected)?;
    thread::scope(|scope| {
        scope.spawn(|| {
            // Whatever ends it, the other side is told by the end of the stream.
            let _ = io::copy(&mut &*channel, &mut &stream);
            let _ = stream.shutdown(Shutdown::Write);
        });
        let _ = io::copy(&mut &stream, &mut &*channel);
        channel.shutdown(rustix::net::Shutdown::Write);
    });
    Ok(())
}
