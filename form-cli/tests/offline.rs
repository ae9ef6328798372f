//! What the commands that need no host print, byte by byte, and how they end.

#[path = "support/registry.rs"]
mod registry;
mod support;

use std::{
    io::{Read, Write},
    process::Stdio,
    time::{Duration, Instant},
};

use registry::Registry;
use snapbox::{assert_data_eq, str};
use support::{Place, Ran, ran};

const GOOD: &str = "NAME web\nMEM 1G\nENTRYPOINT [\"/app\"]\nEXPOSE 8080:80\n";

fn error(ran: &Ran) -> serde_json::Value {
    let body: serde_json::Value = serde_json::from_str(ran.err.lines().last().unwrap()).unwrap();
    body["error"].clone()
}

#[test]
fn a_formfile_that_is_fine() {
    let place = Place::new();
    place.write("Formfile", GOOD);
    let run = place.run(&["check"]);
    assert_eq!((run.code, run.err.as_str()), (0, ""));
    assert_data_eq!(
        run.out,
        str![[r#"
Formfile: web is fine

"#]]
    );
    assert_eq!(place.run(&["check", "-q"]).out, "");
    assert_eq!(place.run(&["check", "-o", "name", "."]).out, "web\n");
    let json: serde_json::Value = serde_json::from_str(&place.run(&["check", "-o", "json"]).out).unwrap();
    assert_eq!((&json["name"], &json["resources"]["memory_mib"]), (&"web".into(), &1024.into()));
    assert!(place.run(&["check", "-o", "yaml"]).out.starts_with("name: web\n"));
}

#[test]
fn several_faults_at_once() {
    let place = Place::new();
    place.write("Formfile", "NAME web\nMEM 1\nVCPU 500\nname x\n");
    let run = place.run(&["check"]);
    assert_eq!((run.code, run.out.as_str()), (1, ""));
    assert_data_eq!(
        run.err,
        str![[r#"
error[out-of-range]: [..]
 --> Formfile:2:5
...
error[out-of-range]: [..]
 --> Formfile:3:6
...
error[unknown-keyword]: [..]
 --> Formfile:4:1
...
error: Formfile has 3 errors

"#]]
    );
    let json = place.run(&["check", "-o", "json"]);
    assert_eq!(json.code, 1);
    let faults: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(faults["diagnostics"].as_array().unwrap().len(), 3);
}

#[test]
fn standard_input_is_a_file_too() {
    let place = Place::new();
    let mut child = place.command(&["fmt", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"NAME   web\nCORES 2\n").unwrap();
    let run = ran(child.wait_with_output().unwrap());
    assert_eq!((run.code, run.out.as_str(), run.err.as_str()), (0, "NAME web\nVCPU 2\n", ""));
}

#[test]
fn formatting_rewrites_once() {
    let place = Place::new();
    place.write("Formfile", "NAME   web\n\n\n\nCORES 2\n");
    let check = place.run(&["fmt", "--check"]);
    assert_eq!((check.code, check.out.as_str()), (1, "Formfile\n"));
    assert_eq!(place.run(&["fmt"]).out, "Formfile\n");
    assert_eq!(place.read("Formfile"), "NAME web\n\nVCPU 2\n");
    let again = place.run(&["fmt"]);
    assert_eq!((again.code, again.out.as_str(), place.run(&["fmt", "--check"]).code), (0, "", 0));
}

#[test]
fn init_with_flags_alone() {
    let place = Place::new();
    let args = [
        "init",
        "site",
        "--name",
        "web",
        "--install",
        "nginx",
        "--mem",
        "1G",
        "--expose",
        "8080:80",
        "--entrypoint",
        "nginx -g \"daemon off;\"",
    ];
    let run = place.run(&args);
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(run.out, "site/Formfile: written\n");
    assert_data_eq!(
        place.read("site/Formfile"),
        str![[r#"
NAME web
FROM debian:12

VCPU 1
MEM 1G
DISK 5G

INSTALL nginx

ENTRYPOINT nginx -g "daemon off;"
EXPOSE 8080:80

"#]]
    );
    assert_eq!(place.run(&["check", "site"]).code, 0);
    let again = place.run(&args);
    assert_eq!(again.code, 5);
    assert_data_eq!(
        again.err,
        str![[r#"
error: site/Formfile is there already
hint: `--force` replaces it

"#]]
    );
    assert_eq!(place.run(&["init", "other", "--vcpu", "500"]).code, 1);
    assert!(!place.path("other/Formfile").exists());
}

#[test]
fn nobody_to_ask() {
    let place = Place::new();
    let run = place.run(&["init"]);
    assert_eq!(run.code, 2);
    assert!(run.err.contains("-y") && run.err.contains("FORM_YES"), "{run:?}");
    assert_eq!(place.command(&["init"]).env("FORM_YES", "true").output().unwrap().status.code(), Some(0));
    place.run(&["key", "new"]);
    let run = place.run(&["key", "new", "--force"]);
    assert_eq!(run.code, 2);
    assert!(run.err.contains("`-y`") && run.err.contains("FORM_YES=true"), "{run:?}");
    assert_eq!(place.run(&["key", "new", "--force", "-y"]).code, 0);
}

#[test]
fn what_is_missing_is_named() {
    let place = Place::new();
    let run = place.run(&["check"]);
    assert_eq!(run.code, 3);
    assert_data_eq!(
        run.err,
        str![[r#"
error: cannot read Formfile: No such file or directory (os error 2)
hint: `form init` writes a Formfile

"#]]
    );
    let run = place.run(&["key", "show", "-o", "json"]);
    assert_eq!((run.code, run.out.as_str()), (3, ""));
    let error = error(&run);
    assert_eq!(error["code"], "not-found");
    assert_eq!(error.as_object().unwrap().keys().collect::<Vec<_>>(), ["code", "hint", "message", "operation", "retryable"]);
    let run = place.run(&["ps", "--host", "unix:/nowhere/agent.sock"]);
    assert_eq!(run.code, 7);
    assert_data_eq!(
        run.err,
        str![[r#"
error: /nowhere/agent.sock is unreachable: no agent runs there
hint: start it with `systemctl start form-agent`, or look why it stopped with `journalctl -u form-agent`

"#]]
    );
    assert_eq!(place.run(&["ps", "--host", "elsewhere"]).code, 3);
    assert_eq!(place.run(&["ps", "--context", "none"]).code, 3);
    assert_eq!(place.run(&["context", "use", "none"]).code, 3);
    assert_eq!(place.run(&["host", "add", "10.0.0.1", "--token", "nonsense"]).code, 2);
}

#[test]
fn wrong_words_are_usage() {
    let place = Place::new();
    for args in [
        &["nonsense"][..],
        &["vm"],
        &["vm", "show"],
        &["vm", "show", "Web"],
        &["wait", "web"],
        &["ps", "--timeout", "soon"],
        &["ps", "-o", "xml"],
    ] {
        let run = place.run(args);
        assert_eq!(run.code, 2, "{args:?} {run:?}");
        assert_eq!(run.out, "", "{args:?}");
    }
}

#[test]
fn contexts_are_listed_chosen_and_shown() {
    let place = Place::new();
    let key = place.run(&["key", "new", "-o", "name"]).out;
    std::fs::create_dir_all(place.path("home/.config/form")).unwrap();
    let yaml = format!(
        "current: home\ncontexts:\n- name: home\n  hosts:\n  - name: den\n    address: 10.0.0.1\n    public_key: {}\n- name: box\n  kind: sandbox\n  sandbox: /tmp/box\n",
        key.trim()
    );
    place.write("home/.config/form/config.yaml", &yaml);
    assert_data_eq!(
        place.run(&["context", "ls"]).out,
        str![[r#"
NAME  CURRENT  KIND     HOSTS
home  *        cluster  den
box            sandbox

"#]]
    );
    assert_data_eq!(
        place.run_narrow(20, &["context", "ls"]).out,
        str![[r#"
home
  current  *
  kind     cluster
  hosts    den
box
  kind     sandbox

"#]]
    );
    assert_eq!(place.run(&["context", "ls", "-o", "name"]).out, "home\nbox\n");
    assert_eq!(place.run(&["context", "ls", "--no-header"]).out.lines().count(), 2);
    assert_eq!(place.run(&["context", "use", "box"]).code, 0);
    assert!(place.run(&["context", "show"]).out.contains("sandbox"));
    assert_eq!(place.run(&["ps"]).code, 7);
    assert_eq!(place.run(&["host", "rm", "den"]).code, 2);
    assert_eq!(place.run(&["host", "rm", "den", "-y"]).out, "den: forgotten\n");
    assert_eq!(place.run(&["host", "rm", "den", "-y"]).code, 3);
}

#[test]
fn images_built_here_are_listed_shown_verified_and_removed() {
    let place = Place::new();
    place.write("Formfile", "NAME app\nFROM scratch\nCOPY file /file\nWORKDIR /\nENTRYPOINT [\"/file\"]\n");
    place.write("file", &"x".repeat(100_000));
    assert_eq!(place.run(&["image", "ls", "--local", "-o", "json"]).out.trim(), "[]");
    for verb in [vec!["show", "--local"], vec!["verify", "--local"], vec!["rm", "--local"]] {
        let run = place.run(&[vec!["image"], verb, vec!["app"]].concat());
        assert_eq!((run.code, run.out.as_str()), (3, ""), "nobody is asked about what is not there: {}", run.err);
        assert_data_eq!(
            run.err,
            str![[r#"
error: no image `app` was built on this machine
hint: `form image ls --local` lists them

"#]]
        );
    }
    let built = place.run(&["build"]);
    assert_eq!(built.code, 0, "{}", built.err);
    assert_data_eq!(
        built.err,
        str![[r#"
[1/2] FROM scratch
  [..] changed[..]
[2/2] COPY file /file
  [..] changed[..]

"#]]
    );
    assert!(built.out.starts_with("app:1  "), "{}", built.out);
    assert_data_eq!(
        place.run(&["build"]).err,
        str![[r#"
[1/2] FROM scratch: cached
[2/2] COPY file /file: cached

"#]]
    );
    let shown = place.run(&["image", "show", "--local", "app"]).out;
    assert!(shown.contains("image    app:1\n") && shown.contains("  COPY file /file ("), "{shown}");
    let json: serde_json::Value = serde_json::from_str(&place.run(&["image", "show", "--local", "app:1", "-o", "json"]).out).unwrap();
    assert_eq!((&json["version"], json["layers"].as_array().map(Vec::len)), (&1.into(), Some(2)));
    assert!(place.run(&["image", "verify", "--local", "app"]).out.contains("blocks are as they should be"));

    // A block that is not what its name says.
    let mut blocks: Vec<_> = files_below(&place.path("home/.cache/form/blocks"));
    blocks.sort();
    std::fs::write(&blocks[0], "damaged").unwrap();
    let bad = place.run(&["image", "verify", "--local", "app"]);
    assert_eq!(bad.code, 1);
    assert!(bad.err.contains("1 block of ") && bad.err.contains("form build --no-cache"), "{}", bad.err);
    assert_eq!(place.run(&["image", "rm", "--local", "app"]).code, 2, "off a terminal nobody can be asked");
    let removed = place.run(&["image", "rm", "--local", "app", "-y"]);
    assert_eq!((removed.code, removed.out.as_str()), (0, "app: removed\n"), "{}", removed.err);
    assert_eq!(place.run(&["image", "show", "--local", "app"]).code, 3);
}

/// Every file below a directory.
fn files_below(directory: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

#[test]
fn a_reader_who_has_seen_enough_ends_it_quietly() {
    let place = Place::new();
    place.write("Formfile", GOOD);
    let mut child = place.command(&["check", "-o", "json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let run = ran(child.wait_with_output().unwrap());
    assert_eq!((run.code, run.err.as_str()), (0, ""));
}

#[test]
fn a_token_may_begin_as_a_flag_does() {
    let place = Place::new();
    let run = place.run(&["host", "add", "127.0.0.1:1", "--token", "-KVzohHG.8da0"]);
    assert!(run.code == 2 && run.err.contains("that is no token"), "{run:?}");
}

#[test]
fn forty_columns_are_enough() {
    let place = Place::new();
    place.run(&["key", "new"]);
    for args in [&["key", "show"][..], &["version"], &["context", "ls"]] {
        for line in place.run_narrow(40, args).out.lines() {
            // A key cannot be broken without being useless.
            assert!(line.chars().count() <= 40 || line.contains("ed25519:") || line.contains('/'), "{args:?}: {line}");
        }
    }
}

#[test]
fn no_colours_off_a_terminal() {
    let place = Place::new();
    place.write("Formfile", "NAME web\nMEM 1\n");
    for args in [&["check"][..], &["ps", "--host", "unix:/nowhere"]] {
        let run = place.run(args);
        assert!(!run.out.contains('\u{1b}') && !run.err.contains('\u{1b}'), "{run:?}");
    }
}

#[test]
fn deploy_refuses_what_it_cannot_do_before_it_builds() {
    let place = Place::new();
    place.write("Formfile", "NAME web\nFROM scratch\nREPLICAS 2\nENTRYPOINT /app\n");
    let run = place.run(&["deploy", "-y", "--host", "unix:/nowhere/agent.sock", "-o", "json"]);
    assert_eq!(run.code, 1, "{run:?}");
    assert_eq!(error(&run)["code"], "unsupported");
}

#[test]
fn deploy_and_plan_speak_of_the_formfile_before_they_look_for_a_host() {
    let place = Place::new();
    for verb in ["deploy", "plan"] {
        let run = place.run(&[verb, "-y", "--context", "none"]);
        assert!(run.code == 3 && run.err.contains("cannot read Formfile"), "{run:?}");
    }
}

#[test]
fn completion_scripts_ask_the_program() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish"] {
        let run = place.run(&["completion", shell]);
        assert!(run.code == 0 && run.out.contains("COMPLETE"), "{shell}");
    }
    let output = place
        .command(&["--", "form", "context", ""])
        .env("COMPLETE", "bash")
        .env("_CLAP_COMPLETE_INDEX", "2")
        .env("_CLAP_IFS", "\n")
        .output()
        .unwrap();
    let run = ran(output);
    assert!(run.out.lines().any(|line| line == "use"), "{run:?}");
}

#[test]
fn a_key_gets_a_passphrase_and_loses_it() {
    let place = Place::new();
    let with = |variables: &[(&str, &str)], args: &[&str]| {
        let mut command = place.command(args);
        for (variable, value) in variables {
            command.env(variable, value);
        }
        ran(command.output().unwrap())
    };
    let key = place.run(&["key", "new", "-o", "name"]).out;
    let secret = place.read("home/.config/form/identity");
    // Nobody can be asked: the flag and the variable are named.
    let run = place.run(&["key", "passphrase"]);
    assert!(run.code == 2 && run.err.contains("--new-passphrase-file") && run.err.contains("FORM_NEW_PASSPHRASE"), "{run:?}");
    assert_eq!(place.run(&["key", "passphrase", "--remove"]).code, 5);
    let run = with(&[("FORM_NEW_PASSPHRASE", "one")], &["key", "passphrase"]);
    assert_eq!((run.code, place.run(&["key", "show", "-o", "name"]).out), (0, key.clone()));
    let shown: serde_json::Value = serde_json::from_str(&place.run(&["key", "show", "-o", "json"]).out).unwrap();
    assert_eq!(shown["has_passphrase"], true);
    let file = place.path("home/.config/form/identity");
    assert_eq!(std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&file).unwrap()) & 0o777, 0o600);
    for entry in std::fs::read_dir(place.path("home/.config/form")).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        assert!(!text.contains(secret.trim()), "the key is on the disk in the clear");
    }

    // A wrong one, none, and one for everybody's eyes.
    let run = with(&[("FORM_PASSPHRASE", "two"), ("FORM_NEW_PASSPHRASE", "x")], &["key", "passphrase"]);
    assert!(run.code == 4 && run.err.contains("passphrase is wrong"), "{run:?}");
    let run = with(&[("FORM_NEW_PASSPHRASE", "x")], &["key", "passphrase"]);
    assert!(run.code == 2 && run.err.contains("--passphrase-file") && run.err.contains("FORM_PASSPHRASE"), "{run:?}");
    place.write("passphrase", "one\n");
    let args = ["key", "passphrase", "--remove", "--passphrase-file", "passphrase"];
    assert_eq!(place.run(&args).code, 4, "others may read it");
    std::fs::set_permissions(place.path("passphrase"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    assert_eq!(with(&[("FORM_PASSPHRASE", "one"), ("FORM_NEW_PASSPHRASE", "")], &["key", "passphrase"]).code, 2, "an empty one is none");

    // Torn: nothing is guessed, nothing is replaced.
    let sealed = place.read("home/.config/form/identity");
    place.write("home/.config/form/identity", &sealed[..sealed.len() / 2]);
    let run = place.run(&["key", "show"]);
    assert!(run.code == 1 && run.err.contains("holds no key") && run.err.contains("restore it"), "{run:?}");
    place.write("home/.config/form/identity", &sealed);

    assert_eq!(place.run(&args).code, 0);
    assert_eq!(place.read("home/.config/form/identity"), secret);
    let run = with(&[("FORM_PASSPHRASE", "three")], &["key", "new", "--force", "-y", "--passphrase", "-o", "json"]);
    assert!(run.code == 0 && run.out.contains("\"has_passphrase\": true"), "{run:?}");
    assert_eq!(place.run(&["key", "new", "--force", "-y", "--passphrase"]).code, 2);
}

#[test]
fn a_passphrase_is_asked_for_at_a_terminal() {
    let place = Place::new();
    place.run(&["key", "new"]);
    let form = env!("CARGO_BIN_EXE_form");
    // script(1) gives the program a terminal of its own.
    let mut child = std::process::Command::new("script")
        .args(["-qec", &format!("tty >{}; exec {form} key passphrase", place.path("tty").display()), "/dev/null"])
        .env("HOME", place.path("home"))
        .env_remove("XDG_CONFIG_HOME")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut keys, mut screen, mut said) = (child.stdin.take().unwrap(), child.stdout.take().unwrap(), String::new());
    for question in ["New passphrase for your key", "The same again"] {
        while !said.contains(question) {
            let mut bytes = [0; 256];
            let count = screen.read(&mut bytes).unwrap();
            assert!(count > 0, "it does not ask: {said}");
            said.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
        // It asks, then has the terminal show nothing more and forget what was typed until then.
        let begun = Instant::now();
        let shows = || {
            let stty = std::process::Command::new("stty").args(["-a", "-F", place.read("tty").trim()]).output().unwrap();
            assert!(stty.status.success() && begun.elapsed() < Duration::from_secs(60), "{said}");
            !String::from_utf8_lossy(&stty.stdout).contains(" -echo ")
        };
        while shows() {
            std::thread::sleep(Duration::from_millis(20));
        }
        keys.write_all(b"secret\r").unwrap();
    }
    screen.read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success() && !said.contains("secret"), "{said}");
    let with = |passphrase: &str| place.command(&["key", "passphrase", "--remove"]).env("FORM_PASSPHRASE", passphrase).status().unwrap();
    assert_eq!(with("other").code(), Some(4));
    assert_eq!(with("secret").code(), Some(0));
}

#[test]
fn an_image_is_pulled_and_runs_as_it_says() {
    let place = Place::new();
    let registry = Registry::start(&serde_json::json!({"Env": ["A=1"], "Cmd": ["/hello", "world"], "ExposedPorts": {"80/tcp": {}}}));
    let reference = format!("{}/tools/hello:1", registry.address);
    let run = place.run(&["image", "pull", &reference]);
    assert!(run.code == 0 && run.out.starts_with("hello:1  "), "{run:?}");
    assert!(run.err.contains("layer 1 of 1: 2 KiB") && run.err.contains("listens on 80/tcp"), "{}", run.err);
    assert_eq!(registry.asked().iter().filter(|line| line.contains("/blobs/")).count(), 2);
    let listed = place.run(&["image", "show", "hello", "--local", "-o", "json"]).out;
    assert!(listed.contains(&format!("FROM {reference}")), "{listed}");

    // Again: one question, and the same image. Under another name, and a default registry for a name without one.
    let again: serde_json::Value = serde_json::from_str(&place.run(&["image", "pull", &reference, "-o", "json"]).out).unwrap();
    assert_eq!((&again["unchanged"], &again["version"]), (&true.into(), &1.into()));
    assert_eq!(registry.asked(), ["HEAD /v2/tools/hello/manifests/1"]);
    std::fs::create_dir_all(place.path("home/.config/form")).unwrap();
    place.write("home/.config/form/config.yaml", &format!("registries: {{default: '{}/tools'}}\n", registry.address));
    let run = place.run(&["image", "pull", "hello:1", "--name", "other", "-o", "name"]);
    assert_eq!((run.code, run.out.as_str()), (0, "other:1\n"), "{}", run.err);
    place.write("Formfile", "NAME app\nFROM hello:1\nCMD [\"/own\"]\n");
    let run = place.run(&["build", "-o", "name"]);
    assert_eq!((run.code, run.out.as_str()), (0, "app:1\n"), "{}", run.err);
    assert!(place.read("Formfile.lock").contains("\"base\": \"sha256:"));
}

#[test]
fn a_disk_is_known_by_its_content_and_refused_with_the_reason() {
    let place = Place::new();
    let mut table = vec![0; 4096];
    table[510..512].copy_from_slice(&[0x55, 0xaa]);
    for name in ["cloud.tar", "My Disk.img"] {
        std::fs::write(place.path(name), &table).unwrap();
    }
    std::fs::write(place.path("torn.raw"), b"QFI\xfb").unwrap();
    let refused = |words: &[&str], code: i32, message: &str, hint: &str| {
        let run = place.run(&[&["image", "import"], words, &["-o", "json"]].concat());
        let error = error(&run);
        let says = |key: &str, text: &str| error[key].as_str().unwrap_or_default().contains(text);
        assert!(run.code == code && says("message", message) && says("hint", hint), "{run:?}");
    };
    refused(&["cloud.tar"], 1, "no image can be made of cloud.tar: it has no partition table", "");
    refused(&["My Disk.img"], 2, "`My Disk` cannot be the image's name", "form image import My Disk.img NAME");
    refused(&["My Disk.img", "disk"], 1, "it has no partition table", "");
    refused(&["torn.raw"], 1, "the qcow2 image torn.raw cannot be read", "qemu-img convert");
    assert_eq!(place.run(&["image", "ls", "--local", "-q"]).out, "");
}

#[test]
fn an_image_goes_by_a_file_to_another_machine() {
    let (here, there) = (Place::new(), Place::new());
    here.write("Formfile", "NAME web\nFROM scratch\nCOPY Formfile /etc/Formfile\nCMD [\"/web\"]\n");
    assert_eq!(here.run(&["build", "-q"]).code, 0);
    let run = here.run(&["image", "export", "web", "web.tar", "-o", "json"]);
    let exported: serde_json::Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!((&exported["name"], &exported["version"], &exported["path"]), (&"web".into(), &1.into(), &"web.tar".into()));
    assert!(run.err.contains("writing web to web.tar"), "{}", run.err);
    let file = here.path("web.tar").to_str().unwrap().to_owned();
    let run = there.run(&["image", "import", &file, "-o", "json"]);
    let imported: serde_json::Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!((&imported["digest"], &imported["unchanged"]), (&exported["digest"], &false.into()), "{run:?}");
    let short = &exported["digest"].as_str().unwrap()[..12];
    let again = there.run(&["image", "import", &file]);
    assert!(again.out.starts_with(&format!("web:1 is unchanged  {short}  ")), "{again:?}");
    assert_eq!(there.run(&["image", "import", &file, "shop", "-q"]).out, "shop:1\n");
    assert_eq!(there.run(&["image", "ls", "--local", "-q"]).out, "shop:1\nweb:1\n");
    let directory = there.run(&["image", "export", "shop", "layout/"]);
    assert!(directory.code == 0 && directory.out.starts_with("shop:1  ") && directory.out.ends_with(" in layout/\n"), "{directory:?}");
    assert!(there.read("layout/oci-layout").contains("1.0.0"));

    let taken = here.run(&["image", "export", "web", "web.tar", "-o", "json"]);
    assert_eq!((taken.code, error(&taken)["message"].as_str()), (5, Some("web.tar is there already")));
    let missing = here.run(&["image", "export", "web:2", "other.tar", "-o", "json"]);
    assert!(missing.code == 3 && error(&missing)["hint"].as_str().unwrap().contains("--from-host"), "{missing:?}");
    assert_eq!(here.run(&["image", "import", "none.tar"]).code, 3);
    for nothing in ["Formfile", "home"] {
        let refused = here.run(&["image", "import", nothing, "-o", "json"]);
        let error = error(&refused);
        assert!(refused.code == 1 && error["message"].as_str().unwrap().contains("OCI image layout"), "{refused:?}");
        assert!(error["hint"].as_str().unwrap().contains("nothing of it was kept"), "{refused:?}");
    }
    assert_eq!(here.run(&["image", "import", "web.tar", "No_Name"]).code, 2);

    // To a registry that is not there.
    let away = here.run(&["image", "push", "web", "127.0.0.1:1/web:1", "-o", "json"]);
    assert!(away.code == 7 && error(&away)["message"].as_str().unwrap().contains("127.0.0.1:1 does not answer"), "{away:?}");
    assert_eq!(here.run(&["image", "push", "web", "web:1"]).code, 1);
    let pinned = format!("127.0.0.1:1/web@sha256:{}", "0".repeat(64));
    assert_eq!(here.run(&["image", "push", "web", &pinned]).code, 2);
    assert_eq!(here.run(&["image", "push", "nope", "127.0.0.1:1/web:1"]).code, 3);
}

#[test]
fn what_cannot_be_pulled_says_why_and_what_to_do() {
    let place = Place::new();
    let registry = Registry::start(&serde_json::Value::Null);
    let failed = |args: &[&str]| {
        let run = place.run(&[&["image", "pull", "-o", "json"], args].concat());
        let error = error(&run);
        (run.code, error["message"].as_str().unwrap().to_owned(), error["hint"].as_str().unwrap_or_default().to_owned())
    };
    let (code, message, hint) = failed(&["nginx:1.25"]);
    assert_eq!((code, message.as_str()), (1, "`FROM nginx:1.25`: `nginx:1.25` names no registry"));
    assert!(hint.contains("`default` below `registries`"), "{hint}");
    let (code, message, _) = failed(&[&format!("{}/tools/hello:2", registry.address)]);
    assert_eq!(code, 3, "{message}");
    assert!(message.contains("has no tools/hello/manifests/2"), "{message}");
    // A port that nothing listens on.
    let (code, message, hint) = failed(&["127.0.0.1:1/tools/hello:1"]);
    assert_eq!(code, 7, "{message}");
    assert!(message.contains("127.0.0.1:1 does not answer") && hint.contains("--locked"), "{message} {hint}");
    let run = place.run(&["image", "pull", &format!("{}/tools/my_hello", registry.address)]);
    assert_eq!(run.code, 2, "{}", run.err);
}
