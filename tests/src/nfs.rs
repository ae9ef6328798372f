//! An NFS server: the kernel's, in a network of its own, whose cable can be pulled.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

/// Where it is, as the host sees it.
pub const SERVER: &str = "10.99.99.2";
/// The host's own address towards it; nobody serves there.
pub const HOST: &str = "10.99.99.1";
/// Not like a name of the agent's own.
const CABLE: &str = "nfs-test";

/// Becomes the process that answers the kernel's questions about exports, in the end. What it mounts nobody else sees. Leases, and the grace for
/// clients of an earlier server, are as short as they can be: without a daemon that knows of those, it cannot be ended sooner.
const SERVE: &str = r#"
mount --make-rprivate /
mount -t tmpfs none /var/lib/nfs && mkdir -p /var/lib/nfs/v4recovery
mkdir -p "$1" && mount -o loop "$2" "$1"
mkdir -p "$1/volumes"
ip link set lo up
mount -t nfsd none /proc/fs/nfsd
: >/var/lib/nfs/etab
exportfs -o rw,no_root_squash,no_subtree_check,fsid=0 "*:$1"
echo 10 >/proc/fs/nfsd/nfsv4leasetime
echo 10 >/proc/fs/nfsd/nfsv4gracetime
rpc.nfsd --no-udp -N 3 -V 4.2 2
echo up
exec rpc.mountd -F --no-udp -N 2 -N 3
"#;

/// Serves `/volumes`, of an XFS, as long as this lives.
pub struct NfsServer {
    process: Child,
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

impl NfsServer {
    /// One whose files are below `directory`.
    ///
    /// # Panics
    /// Without root, or on a kernel without an NFS server.
    pub fn start(directory: &Path) -> Self {
        fs::create_dir_all(directory).unwrap();
        let (image, root) = (directory.join("nfs.img"), directory.join("root"));
        fs::File::create(&image).unwrap().set_len(400 << 20).unwrap();
        run("mkfs.xfs", &["-q", "-m", "reflink=1", image.to_str().unwrap()]);
        // On a host with all its modules; the emulated one has them loaded.
        let _ = Command::new("modprobe").args(["-a", "nfsd", "nfsv4"]).stderr(Stdio::null()).status();
        let mut server = Command::new("unshare");
        server.args(["--net", "--mount", "bash", "-ec", SERVE, "nfs-server", root.to_str().unwrap(), image.to_str().unwrap()]);
        let mut process = server.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut said).unwrap();
        let server = Self { process };
        assert_eq!(said, "up\n", "the NFS server does not start");
        let pid = server.process.id().to_string();
        run("ip", &["link", "add", CABLE, "type", "veth", "peer", "name", "nfs", "netns", &pid]);
        run("ip", &["addr", "add", &format!("{HOST}/24"), "dev", CABLE]);
        server.within(&["ip", "addr", "add", &format!("{SERVER}/24"), "dev", "nfs"]);
        server.within(&["ip", "link", "set", "nfs", "up"]);
        server.plug();
        server
    }

    fn within(&self, command: &[&str]) {
        let pid = self.process.id().to_string();
        run("nsenter", &[&["-t", &pid, "--net", "--mount"], command].concat());
    }

    /// Nothing that is asked reaches it any more, and nothing comes back: no refusal either.
    ///
    /// # Panics
    /// Without `ip`.
    pub fn unplug(&self) {
        run("ip", &["link", "set", CABLE, "down"]);
    }

    /// # Panics
    /// Without `ip`.
    pub fn plug(&self) {
        run("ip", &["link", "set", CABLE, "up"]);
    }
}

impl Drop for NfsServer {
    fn drop(&mut self) {
        let pid = self.process.id().to_string();
        // Its threads are the kernel's, and would keep the network.
        let _ = Command::new("nsenter").args(["-t", &pid, "--net", "--mount", "rpc.nfsd", "0"]).status();
        let _ = Command::new("ip").args(["link", "del", CABLE]).status();
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
