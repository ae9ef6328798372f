//! What a builder hands to a host: image manifests, kernel bundles, block maps, compressed blocks, module dependencies.

#![no_main]

use arbitrary::Arbitrary;
use form_bundle::{
    BlockMap, KernelManifest, Manifest, ModuleSet,
    blocks::{BLOCK_SIZE, compress, decompress, open},
    kernel::{self, Dependencies},
    manifest, travel,
};
use form_fuzz::format::{
    Alteration, Edit, Samples, alter,
    samples::{DIGEST, blocks, spec},
};
use form_types::Digest;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    Manifest(Vec<Alteration<'a>>),
    Kernel(Vec<Alteration<'a>>),
    Map(Vec<Alteration<'a>>),
    /// Runs of blocks: first block and count.
    Runs {
        size: u64,
        runs: Vec<(u64, u8)>,
    },
    Block {
        plain: Vec<(u8, u16)>,
        edits: Vec<Edit<'a>>,
    },
    /// A manifest on its way, in pieces of this length.
    Stream {
        text: &'a [u8],
        repeat: u8,
        edits: Vec<Edit<'a>>,
        piece: u8,
    },
    /// What each module needs, by number.
    Modules {
        needs: Vec<Vec<u8>>,
        builtin: Vec<u8>,
    },
    ModuleFiles {
        dependencies: &'a str,
        builtin: &'a str,
    },
}

fn manifest() -> Value {
    json!({
        "media_type": manifest::MEDIA_TYPE, "name": "web", "spec_digest": DIGEST, "config": spec(),
        "rootfs": {"media_type": manifest::ROOTFS_MEDIA_TYPE, "blocks": {"size": 262_144, "runs": blocks()["runs"]}},
        "packages": {"nginx": "1.22"}, "history": [{"text": "FROM debian:12", "layer": DIGEST, "changed_blocks": 3}],
        "kernel": {"release": "6.1.0-31-cloud-amd64", "bundle": DIGEST},
    })
}

fn kernel() -> Value {
    json!({
        "media_type": kernel::MEDIA_TYPE, "release": "6.1.0-31-cloud-amd64", "package_version": "6.1.1-1", "vmlinux": blocks(),
        "modules": {"virtio": {"file": blocks(), "needs": []}, "virtio_blk": {"file": blocks(), "needs": ["virtio"]}},
        "sets": {"guest": ["virtio", "virtio_blk"], "host": ["virtio"]},
    })
}

/// Whatever a map says, looking at it is bounded and stays inside it.
fn walk(map: &BlockMap) {
    let mut stored = 0;
    for (index, digest) in map.iter() {
        assert_eq!(map.get(index), Some(digest));
        let length = map.block_len(index);
        assert!(length > 0 && length <= BLOCK_SIZE, "block {index} has {length} bytes");
        stored += length as u64;
    }
    assert_eq!(map.stored_bytes(), stored);
    assert!(stored <= map.size());
    assert_eq!(map.get(u64::MAX), None);
    let again: BlockMap = serde_json::from_value(serde_json::to_value(map).expect("a map has a JSON form")).expect("it can be read");
    assert_eq!(again, *map);
}

fn read_manifest(bytes: &[u8]) {
    let Ok(manifest) = Manifest::decode(bytes) else { return };
    walk(&manifest.rootfs.blocks);
    let encoded = manifest.encode().expect("a manifest has a JSON form");
    let again = Manifest::decode_verified(&encoded, &Digest::of(&encoded)).expect("what was written can be read");
    assert_eq!(manifest, again);
}

fn read_kernel(bytes: &[u8]) {
    let Ok(kernel) = KernelManifest::decode(bytes) else { return };
    kernel.files().for_each(|(path, map)| {
        assert!(!path.contains("..") && !path.starts_with('/'), "{path} leads out");
        walk(map);
    });
    for set in ModuleSet::ALL {
        let order = kernel.load_order(set);
        for (at, name) in order.iter().enumerate() {
            assert!(kernel.modules[name].needs.iter().all(|needed| order[..at].contains(needed)), "{name} comes too early");
        }
    }
    let encoded = kernel.encode().expect("a manifest has a JSON form");
    assert_eq!(KernelManifest::decode(&encoded).ok(), Some(kernel));
}

fn read_block(plain: &[(u8, u16)], edits: &[Edit]) {
    let mut sound: Vec<u8> = plain.iter().take(64).flat_map(|(byte, count)| std::iter::repeat_n(*byte, usize::from(*count))).collect();
    sound.truncate(BLOCK_SIZE);
    let mut frame = compress(&sound).expect("a block can be compressed");
    alter(&mut frame, edits);
    let opened = decompress(&frame);
    if edits.is_empty() {
        assert_eq!(opened.as_ref().ok(), Some(&sound));
    }
    if let Ok(plain) = opened {
        assert!(plain.len() <= BLOCK_SIZE, "a block of {} bytes", plain.len());
        assert!(open(&Digest::of(&plain), &frame).is_ok());
        assert!(plain == sound || open(&Digest::of(&sound), &frame).is_err(), "an altered block has the name of the sound one");
    }
}

fn read_stream(text: &[u8], edits: &[Edit], piece: u8) {
    let mut packed = travel::pack(text).expect("a text can be compressed");
    alter(&mut packed, edits);
    let unpack = || {
        let mut unpacker = travel::Unpacker::new(Vec::new())?;
        packed.chunks(usize::from(piece).max(1)).try_for_each(|piece| unpacker.write(piece))?;
        unpacker.finish()
    };
    let unpacked = unpack();
    if edits.is_empty() {
        assert_eq!(unpacked.ok().as_deref(), Some(text));
    }
}

/// Names of which some are those that a guest cannot do without.
fn module(number: u8) -> String {
    let known = [
        "virtio",
        "virtio_ring",
        "virtio_pci",
        "virtio_blk",
        "virtio_net",
        "vmw_vsock_virtio_transport",
        "virtio_balloon",
        "virtio_rng",
        "virtio_console",
        "ext4",
    ];
    known.get(usize::from(number)).map_or_else(|| format!("m{}", number % 64), ToString::to_string)
}

fn resolve(dependencies: &Dependencies) {
    for set in ModuleSet::ALL {
        let Ok(order) = dependencies.resolve(set) else { continue };
        for (at, name) in order.iter().enumerate() {
            assert!(dependencies.path(name).is_some());
            assert!(dependencies.needs(name).iter().all(|needed| order[..at].contains(needed)), "{name} comes too early");
        }
    }
}

fuzz_target!(|input: Input| match input {
    Input::Manifest(alterations) => {
        static SAMPLES: Samples = Samples::new(|| vec![manifest()]);
        read_manifest(&SAMPLES.altered::<Manifest>(0, &alterations));
    }
    Input::Kernel(alterations) => {
        static SAMPLES: Samples = Samples::new(|| vec![kernel()]);
        read_kernel(&SAMPLES.altered::<KernelManifest>(0, &alterations));
    }
    Input::Map(alterations) => {
        static SAMPLES: Samples = Samples::new(|| vec![blocks()]);
        if let Ok(map) = serde_json::from_slice::<BlockMap>(&SAMPLES.altered::<BlockMap>(0, &alterations)) {
            walk(&map);
        }
    }
    Input::Runs { size, runs } => {
        let runs: Vec<Value> =
            runs.iter().take(64).map(|(start, count)| json!({"start": start, "digests": vec![DIGEST; usize::from(*count)]})).collect();
        if let Ok(map) = serde_json::from_value::<BlockMap>(json!({"size": size, "runs": runs})) {
            walk(&map);
        }
    }
    Input::Block { plain, edits } => read_block(&plain, &edits),
    Input::Stream { text, repeat, edits, piece } => read_stream(&text.repeat(repeat.into()), &edits, piece),
    Input::Modules { needs, builtin } => {
        let line = |(number, needs): (u8, &Vec<u8>)| {
            let needs: Vec<String> = needs.iter().map(|number| format!("kernel/{}.ko", module(*number))).collect();
            format!("kernel/{}.ko.xz: {}\n", module(number), needs.join(" "))
        };
        let dependencies: String = (0..).zip(&needs).map(line).collect();
        let builtin: String = builtin.iter().map(|number| format!("kernel/{}.ko\n", module(*number))).collect();
        resolve(&Dependencies::parse(&dependencies, &builtin));
    }
    Input::ModuleFiles { dependencies, builtin } => resolve(&Dependencies::parse(dependencies, builtin)),
});
