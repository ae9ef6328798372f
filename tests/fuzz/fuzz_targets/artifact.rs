//! Images that came as OCI image layouts: whole and as they say they are, or nothing of them stays.

#![no_main]

use std::path::{Path, PathBuf};

use arbitrary::Arbitrary;
use form_bundle::{
    Manifest,
    blocks::{BLOCK_SIZE, compress},
    manifest,
};
use form_fuzz::format::{Alteration, Edit, alter, alter_json, samples::spec};
use form_image::{Builder, CachePaths, Cancel, fuzzing::oci_digest};
use form_types::Digest;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    /// What fills each block; none is a hole.
    blocks: Vec<Option<u8>>,
    manifest: Vec<Alteration<'a>>,
    /// In which of two packs each block is, and what became of the first.
    packs: Vec<u8>,
    pack: Vec<Edit<'a>>,
    artifact: Vec<Alteration<'a>>,
    index: Vec<Alteration<'a>>,
    /// The digests of what was altered are those of what it was.
    stale: u8,
    renamed: bool,
    tar: Vec<Edit<'a>>,
}

/// The files of a layout.
struct Layout {
    files: Vec<(String, Vec<u8>)>,
}

impl Layout {
    /// A blob, and how others name it: by what it was before, when `stale`.
    fn blob(&mut self, media_type: &str, sound: &[u8], bytes: Vec<u8>, stale: bool) -> Value {
        let named = if stale { sound } else { &bytes };
        let (digest, size) = (oci_digest(named), named.len());
        self.files.push((format!("blobs/sha256/{}", digest.trim_start_matches("sha256:")), bytes));
        json!({"mediaType": media_type, "digest": digest, "size": size})
    }

    fn tar(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (name, content) in &self.files {
            let mut header = [0; 512];
            let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
            put(0, name);
            put(100, "0000644");
            put(124, &format!("{:011o}", content.len()));
            put(148, "        ");
            put(156, "0");
            put(257, "ustar\x0000");
            let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            bytes.extend(header);
            bytes.extend(content);
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    }
}

fn block(fill: u8) -> Vec<u8> {
    let mut block = vec![fill; BLOCK_SIZE];
    block[0] = !fill;
    block
}

/// The layout, and our own manifest in it.
fn layout(input: &Input) -> (Layout, Vec<u8>) {
    let mut layout = Layout { files: vec![("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec())] };
    let blocks = &input.blocks[..input.blocks.len().min(8)];
    let runs: Vec<Value> = (0..)
        .zip(blocks)
        .filter_map(|(at, fill)| Some((at, block((*fill)?))))
        .map(|(at, block): (u64, _)| json!({"start": at, "digests": [Digest::of(&block).to_string()]}))
        .collect();
    let sound = json!({
        "media_type": manifest::MEDIA_TYPE, "name": "web", "spec_digest": Digest::of(b"spec").to_string(), "config": spec(),
        "rootfs": {"media_type": manifest::ROOTFS_MEDIA_TYPE, "blocks": {"size": 8 * BLOCK_SIZE, "runs": runs}},
        "packages": {}, "history": [],
    });
    let text = alter_json(sound.clone(), &input.manifest);
    let stale = |bit: u8| input.stale >> bit & 1 == 1;
    let config = layout.blob(manifest::MEDIA_TYPE, sound.to_string().as_bytes(), text.clone(), stale(0));
    // Blocks lie in one of two packs, or in both.
    let mut packs = [Vec::new(), Vec::new()];
    for (at, fill) in blocks.iter().enumerate().filter_map(|(at, fill)| Some((at, (*fill)?))) {
        let (plain, which) = (block(fill), input.packs.get(at).copied().unwrap_or(0));
        let frame = compress(&plain).expect("a block can be compressed");
        let framed = [Digest::of(&plain).as_bytes(), &(frame.len() as u32).to_le_bytes()[..], &frame].concat();
        packs
            .iter_mut()
            .enumerate()
            .filter(|(pack, _)| which % 4 >= 2 || usize::from(which % 4) == *pack)
            .for_each(|(_, pack)| pack.extend(&framed));
    }
    let mut layers = Vec::new();
    for (number, sound) in packs.into_iter().enumerate() {
        let mut bytes = sound.clone();
        alter(&mut bytes, if number == 0 { &input.pack } else { &[] });
        layers.push(layout.blob("application/vnd.formation.image.blocks.v1", &sound, bytes, stale(1)));
    }
    let oci = "application/vnd.oci.image.manifest.v1+json";
    let sound = json!({"schemaVersion": 2, "mediaType": oci, "config": config, "layers": layers});
    let descriptor = layout.blob(oci, sound.to_string().as_bytes(), alter_json(sound.clone(), &input.artifact), stale(2));
    let index = alter_json(json!({"schemaVersion": 2, "manifests": [descriptor]}), &input.index);
    layout.files.push(("index.json".to_owned(), index));
    (layout, text)
}

fn files(directory: &Path) -> usize {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| if entry.path().is_dir() { files(&entry.path()) } else { 1 }).sum()
}

fuzz_target!(|input: Input| {
    let root = PathBuf::from(format!("/dev/shm/form-fuzz-artifact-{}", std::process::id()));
    std::fs::create_dir_all(&root).expect("a directory");
    let (layout, text) = layout(&input);
    let mut tar = layout.tar();
    alter(&mut tar, &input.tar);
    std::fs::write(root.join("tar"), &tar).expect("it can be written");
    let builder = Builder::new(CachePaths::new(root.join("cache")));
    let name = "shop".parse().ok().filter(|_| input.renamed);
    let untouched = [&input.manifest, &input.artifact, &input.index].iter().all(|alterations| alterations.is_empty())
        && input.pack.is_empty()
        && input.tar.is_empty();
    match builder.import(&root.join("tar"), name.as_ref(), &Cancel::new(), &mut |_: form_image::BuildEvent| {}) {
        Err(error) => {
            assert!(!untouched, "it is sound: {error}");
            assert_eq!(files(&root.join("cache/blocks")), 0, "blocks of an image that was refused stay");
            assert!(builder.store().list().is_ok_and(|images| images.is_empty()), "an image that was refused stays");
        }
        Ok(image) => {
            let reference = image.name.as_str().parse().expect("an image's name");
            let verified = builder.store().verify(&reference).expect("it is there");
            assert!(verified.bad.is_empty(), "an image that was taken is not whole");
            let (_, kept) = builder.store().get(&reference).expect("it is there");
            let told = Manifest::decode(&text).expect("a manifest that was taken");
            assert!(name.is_some() || told == kept, "another image was taken");
            assert!(told.rootfs == kept.rootfs);
        }
    }
    let _ = std::fs::remove_dir_all(root);
});
