use std::{path::Path, sync::mpsc, thread};

use super::{mounting::find_mount, *};

fn export(source: &str, options: &str) -> Result<NfsExport, NfsError> {
    NfsExport::new(source, options)
}

#[test]
fn exports_are_servers_and_absolute_paths() {
    for (source, server, path) in [
        ("storage.example:/volumes", "storage.example", "/volumes"),
        ("192.0.2.1:/", "192.0.2.1", "/"),
        ("[fd00::1]:/a/b", "fd00::1", "/a/b"),
        ("nas_1:/a:b", "nas_1", "/a:b"),
    ] {
        let export = export(source, "").unwrap();
        assert_eq!((export.server(), export.path(), export.source().as_str()), (server, path, source));
    }
    assert_eq!(export("nas://a//b/", "").unwrap().source(), "nas:/a/b", "as the kernel writes it");
    let long = format!("nas:/{}", "a".repeat(2000));
    for source in
        ["", "nas", "nas:", "nas:volumes", ":/volumes", "fd00::1:/x", "[nas]:/x", "[fd00::1]/x", "nas:/a/../b", "nas:/a b", "a,b:/x", &long]
    {
        assert!(matches!(export(source, ""), Err(NfsError::Source(_))), "{source}");
    }
}

#[test]
fn options_are_those_with_which_no_server_holds_up_the_agent() {
    let plain = export("nas:/x", "").unwrap();
    assert_eq!((plain.kernel_options().as_str(), plain.options().as_str(), plain.versions().len()), ("timeo=50,retrans=1", "", 3));
    let set = export("nas:/x", "vers=4.1, timeo=100,retrans=2,port=12049,port=12050").unwrap();
    assert_eq!(set.kernel_options(), "timeo=100,retrans=2,port=12050");
    assert_eq!((set.options().as_str(), set.versions()), ("vers=4.1,timeo=100,retrans=2,port=12050", vec!["4.1"]));
    for option in
        ["hard", "soft", "timeo=9", "timeo=6000", "retrans=100", "vers=3", "addr=192.0.2.1", "port=0", "port=65536", "rsize=x", "nolock"]
    {
        assert_eq!(export("nas:/x", option), Err(NfsError::Option(option.to_owned())));
    }
    let json = serde_json::to_string(&set).unwrap();
    assert_eq!(serde_json::from_str::<NfsExport>(&json).unwrap(), set);
    assert!(serde_json::from_str::<NfsExport>(r#"{"source": "nas"}"#).is_err());
}

#[test]
fn one_export_is_in_another_by_its_parts() {
    let overlap = |one: &str, two: &str| export(one, "").unwrap().overlaps(&export(two, "").unwrap());
    assert!(overlap("nas:/a", "nas:/a/") && overlap("nas:/a/b", "nas:/a") && overlap("nas:/", "nas:/a"));
    assert!(!overlap("nas:/a", "nas:/ab") && !overlap("nas:/a", "other:/a"));
}

#[test]
fn the_topmost_mount_is_read_from_the_kernels_list() {
    let mounts = "22 1 0:21 / / rw - ext4 /dev/vda rw\n\
                  30 22 0:40 / /srv/a\\040b rw,nosuid shared:1 master:2 - nfs4 nas:/old rw\n\
                  31 30 0:41 / /srv/a\\040b rw - nfs4 nas:/with\\134slash rw,vers=4.2\n";
    let found = find_mount(mounts, Path::new("/srv/a b")).unwrap();
    assert_eq!((found.kind.as_str(), found.source.as_str()), ("nfs4", "nas:/with\\slash"));
    assert_eq!(find_mount(mounts, Path::new("/srv/a")), None);
    assert_eq!(find_mount("garbage\n - \n", Path::new("/")), None);
}

fn shared() -> Shared {
    Shared {
        pool: "shared".parse().unwrap(),
        export: export("192.0.2.1:/x", "").unwrap(),
        directory: "/nowhere".into(),
        state: Mutex::default(),
        changed: Condvar::new(),
    }
}

#[test]
fn nobody_waits_for_a_look_that_takes_too_long() {
    let shared = shared();
    let begun = Instant::now().checked_sub(Duration::from_secs(7)).unwrap();
    shared.lock().begun = Some(begun);
    let Err(Fault::Silent(reason)) = shared.check(PATIENCE) else { panic!("it does not answer") };
    let says = |seconds| reason == format!("the server of 192.0.2.1:/x has not answered for {seconds} s");
    assert!((7..=begun.elapsed().as_secs()).any(says), "{reason}");
    // What was found before does not count then.
    shared.lock().last = Some((Instant::now(), Ok(())));
    assert!(matches!(shared.check(PATIENCE), Err(Fault::Silent(_))));
    shared.lock().begun = None;
    assert_eq!(shared.check(PATIENCE), Ok(()));
    shared.lock().last = Some((Instant::now(), Err(Fault::Refused("no such export".to_owned()))));
    assert_eq!(shared.check(PATIENCE), Err(Fault::Refused("no such export".to_owned())));
    shared.stop();
    assert!(matches!(shared.check(PATIENCE), Err(Fault::Refused(reason)) if reason.contains("unmounted")));
}

#[test]
fn an_answer_counts_also_for_who_comes_late_to_see_it() {
    let shared = shared();
    let later = Instant::now() + Duration::from_secs(60);
    for found in [Ok(()), Err(Fault::Refused("no such export".to_owned()))] {
        shared.lock().last = Some((later, found.clone()));
        assert_eq!(shared.check(Duration::ZERO), found);
    }
}

#[test]
fn an_old_answer_is_asked_for_again() {
    let shared = Arc::new(shared());
    shared.lock().last = Some((Instant::now().checked_sub(Duration::from_secs(60)).unwrap(), Ok(())));
    let (done, outcome) = mpsc::channel();
    let asking = Arc::clone(&shared);
    thread::spawn(move || done.send(asking.check(FIRST)));
    let mut state = shared.lock();
    while !state.asked {
        state = shared.changed.wait(state).unwrap();
    }
    state.last = Some((Instant::now(), Err(Fault::Silent("gone".to_owned()))));
    shared.changed.notify_all();
    drop(state);
    assert_eq!(outcome.recv().unwrap(), Err(Fault::Silent("gone".to_owned())));
}
