//! Pools that are made and removed: whose a directory is, what is taken for a pool, and what is never taken for one.

#[allow(dead_code)]
mod fixture;

use std::{
    fs,
    path::{Path, PathBuf},
};

use fixture::Mount;
use form_store::{MARKER, PoolSettings, Store, StoreError, local_pool};
use form_types::{HostId, Name, SecretKey, VolumeFormat, VolumeId};

const DATA: VolumeId = VolumeId::from_bytes([7; 16]);
const MIB: u64 = 1 << 20;

fn host(seed: u8) -> HostId {
    HostId::of(&SecretKey::from_bytes([seed; 32]).public())
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

struct Place {
    root: tempfile::TempDir,
    store: Option<Store>,
}

impl Place {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let store = Some(Store::open(&root.path().join("store")).unwrap());
        Self { root, store }
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    fn reopen(&mut self) {
        self.store = None;
        self.store = Some(Store::open(&self.root.path().join("store")).unwrap());
    }

    fn directory(&self, name: &str) -> PathBuf {
        let directory = self.root.path().join(name);
        fs::create_dir_all(&directory).unwrap();
        directory
    }

    fn make(&self, pool: &str, path: &Path) -> Result<(), StoreError> {
        self.store().create_pool(&name(pool), path, &host(1), &[self.root.path().join("own")], PoolSettings::default()).map(drop)
    }
}

#[test]
fn a_pool_that_was_made_is_there_after_a_restart_with_what_was_set() {
    let mut place = Place::new();
    let fast = place.directory("fast");
    place.make("fast", &fast).unwrap();
    place.store().pool(&name("fast")).unwrap().create(&DATA, VolumeFormat::Raw, 16 * MIB).unwrap();
    let settings =
        PoolSettings { reserve_bytes: 5 * MIB, limit_bytes: Some(7 * MIB), labels: [("tier".to_owned(), "one".to_owned())].into() };
    place.store().set_pool(&name("fast"), settings.clone()).unwrap();
    place.store().set_pool(&local_pool(), settings.clone()).unwrap();
    place.reopen();
    let pool = place.store().pool(&name("fast")).unwrap();
    assert_eq!((pool.settings(), pool.was_made(), pool.volumes().unwrap()), (settings.clone(), true, vec![DATA]));
    assert_eq!(place.store().pool(&local_pool()).unwrap().settings(), settings);

    // What is in use, or was not made, stays.
    assert!(matches!(place.store().remove_pool(&name("fast")), Err(StoreError::PoolInUse { .. })));
    pool.remove(pool.hold(&DATA).unwrap()).unwrap();
    let making = pool.enter().unwrap();
    assert!(matches!(place.store().remove_pool(&name("fast")), Err(StoreError::PoolInUse { .. })));
    drop(making);
    assert!(matches!(place.store().remove_pool(&local_pool()), Err(StoreError::PoolFixed(_))));
    place.store().remove_pool(&name("fast")).unwrap();
    assert!(matches!(pool.enter(), Err(StoreError::NoPool(_))), "nobody makes anything in it any more");
    assert_eq!(fs::read_dir(&fast).unwrap().count(), 0, "the directory stays, with nothing in it");
    place.reopen();
    assert!(matches!(place.store().pool(&name("fast")), Err(StoreError::NoPool(_))));
    place.make("fast", &fast).unwrap();
}

#[test]
fn what_is_no_place_for_a_pool_is_refused_with_the_reason() {
    let place = Place::new();
    let (fast, file) = (place.directory("fast"), place.root.path().join("file"));
    fs::write(&file, "").unwrap();
    place.directory("own/deep");
    place.make("fast", &fast).unwrap();
    std::os::unix::fs::symlink(&fast, place.root.path().join("link")).unwrap();
    fs::create_dir(fast.join("inner")).unwrap();
    for (path, reason) in [
        ("relative".into(), "absolute"),
        (place.root.path().join("nowhere"), "no such directory"),
        (file, "no directory"),
        (fast.join("inner"), "pool/fast"),
        (place.root.path().join("link"), "pool/fast"),
        (place.root.path().to_owned(), "pool/fast"),
        (place.directory("own/deep"), "own"),
        (place.directory("store/volumes/x"), "pool/local"),
        (place.directory("store/vms"), "store"),
    ] {
        let error = place.make("other", &path).unwrap_err();
        assert!(matches!(error, StoreError::PoolPlace { .. }) && error.to_string().contains(reason), "{path:?}: {error}");
        assert!(!path.join(MARKER).exists() || path.ends_with("link"), "{path:?}");
    }
    assert!(matches!(place.make("fast", &place.directory("free")), Err(StoreError::PoolExists { .. })));
    // Another agent has it.
    let error = place.store().create_pool(&name("taken"), &place.directory("free"), &host(2), &[], PoolSettings::default()).map(drop);
    error.unwrap();
    let other = Place::new();
    let error = other.make("mine", &place.directory("free")).unwrap_err();
    assert!(matches!(&error, StoreError::PoolTaken { host: owner, .. } if *owner == host(2)), "{error}");
    // Nothing can be written there.
    let full = Mount::tmpfs(1 << 20);
    fs::write(full.path().join("filler"), vec![1; 2 << 20]).unwrap_err();
    let error = place.make("full", full.path()).unwrap_err();
    assert!(!full.path().join(MARKER).exists(), "{error}");
}

#[test]
fn nothing_is_made_in_the_directory_below_a_pool_that_is_not_mounted() {
    let mut place = Place::new();
    let (fast, aside) = (place.directory("fast"), place.root.path().join("aside"));
    place.make("fast", &fast).unwrap();
    let pool = place.store().pool(&name("fast")).unwrap();
    pool.create(&DATA, VolumeFormat::Raw, 16 * MIB).unwrap();
    fs::rename(&fast, &aside).unwrap();
    let other = VolumeId::from_bytes([8; 16]);
    for empty in [false, true] {
        if empty {
            fs::create_dir(&fast).unwrap();
        }
        let away = |error: &StoreError| assert!(matches!(error, StoreError::PoolAway { .. }), "{error}");
        away(&pool.space().unwrap_err());
        away(&pool.volumes().unwrap_err());
        away(&pool.create(&other, VolumeFormat::Raw, 16 * MIB).unwrap_err());
        away(&pool.ensure(&DATA, VolumeFormat::Raw, 16 * MIB).unwrap_err());
        away(&pool.open_volume(&DATA, false).unwrap_err());
        away(&pool.hold(&DATA).unwrap_err());
        away(&pool.can_hold(VolumeFormat::Raw, 16 * MIB).unwrap_err());
    }
    drop(pool);
    place.reopen();
    assert_eq!(fs::read_dir(&fast).unwrap().count(), 0);
    fs::remove_dir(&fast).unwrap();
    fs::rename(&aside, &fast).unwrap();
    assert_eq!(place.store().pool(&name("fast")).unwrap().volumes().unwrap(), [DATA]);

    // The directory of another pool in its place is not taken for it.
    let marker = fs::read_to_string(fast.join(MARKER)).unwrap();
    fs::write(fast.join(MARKER), marker.replace("fast", "slow")).unwrap();
    let error = place.store().pool(&name("fast")).unwrap().space().unwrap_err().to_string();
    assert!(error.contains("pool/slow"), "{error}");
    fs::write(fast.join(MARKER), "nonsense").unwrap();
    place.store().pool(&name("fast")).unwrap().space().unwrap_err();
}
