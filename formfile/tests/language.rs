//! The language as its users meet it: whole files, what they mean, and what is said about their faults.

use std::collections::BTreeMap;

use form_types::{
    Spec,
    spec::{Command, CopySource, StepAction},
};
use formfile::{Checked, Code, Diagnostic, LowerOptions, Renderer, Severity, Style};

fn check(source: &str) -> Checked {
    formfile::check("Formfile", source, &LowerOptions::default())
}

/// What a file means that is expected to be without errors.
fn spec(source: &str) -> Spec {
    let checked = check(source);
    match checked.spec {
        Some(spec) => spec,
        None => panic!("{source}\n{}", render(source, &checked.diagnostics)),
    }
}

/// Code and line of each fault.
fn faults(source: &str) -> Vec<(Code, u32)> {
    check(source).diagnostics.iter().map(|diagnostic| (diagnostic.code, diagnostic.line)).collect()
}

fn render(source: &str, diagnostics: &[Diagnostic]) -> String {
    let renderer = Renderer::new("Formfile", source, Style::Plain);
    diagnostics.iter().map(|diagnostic| renderer.render(diagnostic)).collect()
}

const FULL: &str = r#"# Everything at once.
NAME shop   # the name
DESCRIPTION It's the shop: "best" # in town
FROM debian:12
ARG VERSION=1.2
ARG TOKEN
VCPU 2
MEM 2G
DISK 20
GPU a100:2
GPU 01:00.0
MODEL preferred:llama3:8b
INSTALL python3 \
    # the database
    postgresql \
    nginx=1.22.1-9
ENV KEY=value GREETING="hello world" REF=v$VERSION
ENV --scope=user:web SECRET=x
WORKDIR /srv/app/
COPY --chown=web:web --chmod=0644 ./app.py conf/*.toml ./
COPY <<one.txt <<'two.txt' /etc/texts/
version $VERSION
one.txt
literally $VERSION
two.txt
RUN echo "$KEY" && \
    # between
    touch /x # not a comment of ours
RUN ["touch", "/y"] 
RUN <<EOF
set -e
echo $HOME
EOF
USER username:web passwd:"s3cret word" sudo:yes groups:docker,adm ssh_authorized_keys:"ssh-ed25519 AAAA a@b,ssh-rsa BBBB"
USER web
ENTRYPOINT nginx -g "daemon off;" 
CMD ["--flag"] # defaults
EXPOSE 80 8443:443 53/udp
VOLUME data:/var/lib/data:20G
REPLICAS 2
RESTART on-failure:5
HEALTHCHECK --interval=10s --retries=5 http 80 /health # every ten seconds
LABEL region=eu role="front end"
NETWORK default backend
"#;

#[test]
fn everything_at_once() {
    let spec = spec(FULL);
    assert_eq!(spec.name.as_str(), "shop");
    assert_eq!(spec.description.as_deref(), Some("It's the shop: \"best\""));
    assert_eq!(spec.args, BTreeMap::from([("VERSION".to_owned(), Some("1.2".to_owned())), ("TOKEN".to_owned(), None)]));
    assert_eq!((spec.resources.vcpus, spec.resources.memory_mib, spec.resources.disk_gib), (2, 2048, 20));
    assert_eq!(spec.resources.gpus[1].model, "0000:01:00.0");
    assert_eq!(spec.workdir.as_deref(), Some("/srv/app"));
    assert_eq!(spec.entrypoint, ["nginx", "-g", "daemon off;"]);
    assert_eq!(spec.cmd, ["--flag"]);
    assert_eq!(spec.run_as.as_deref(), Some("web"));
    assert_eq!(spec.users[0].groups, ["adm", "docker"]);
    assert_eq!(spec.users[0].ssh_authorized_keys.len(), 2);
    assert_eq!(spec.users[0].passwd.as_ref().map(|passwd| passwd.expose()), Some("s3cret word"));
    let kinds: Vec<u32> = spec.steps.iter().map(|step| step.line).collect();
    assert_eq!(kinds, [13, 20, 21, 26, 29, 30]);
    assert_eq!(
        spec.steps[0].action,
        StepAction::Install { packages: vec!["python3".to_owned(), "postgresql".to_owned(), "nginx=1.22.1-9".to_owned()] }
    );
    let StepAction::Copy(copy) = &spec.steps[1].action else { panic!("{:?}", spec.steps[1]) };
    assert_eq!(copy.to, "/srv/app/");
    assert_eq!(copy.sources, [CopySource::Path("app.py".to_owned()), CopySource::Path("conf/*.toml".to_owned())]);
    let StepAction::Copy(copy) = &spec.steps[2].action else { panic!("{:?}", spec.steps[2]) };
    let inline = |name: &str, text: &str| CopySource::Inline { name: name.to_owned(), text: text.to_owned() };
    assert_eq!(copy.sources, [inline("one.txt", "version 1.2\n"), inline("two.txt", "literally $VERSION\n")]);
    let StepAction::Run { command, env, workdir } = &spec.steps[3].action else { panic!("{:?}", spec.steps[3]) };
    assert_eq!(*command, Command::Shell("echo \"$KEY\" &&     touch /x # not a comment of ours".to_owned()));
    assert_eq!(workdir.as_deref(), Some("/srv/app"));
    let env: Vec<String> = env.iter().map(|(key, value)| format!("{key}={value}")).collect();
    assert_eq!(env, ["GREETING=hello world", "KEY=value", "REF=v1.2", "VERSION=1.2"]);
    let StepAction::Run { command, .. } = &spec.steps[5].action else { panic!("{:?}", spec.steps[5]) };
    assert_eq!(*command, Command::Shell("set -e\necho $HOME\n".to_owned()));
    assert_eq!(faults(FULL), []);
}

#[test]
fn json_has_every_key_and_no_password() {
    let json = spec(FULL).to_json().unwrap_or_default();
    assert!(!json.contains("s3cret"), "{json}");
    let value: serde_json::Value = serde_json::from_str(&json).unwrap_or_default();
    let keys = |value: &serde_json::Value| value.as_object().map(|object| object.keys().cloned().collect::<Vec<_>>()).unwrap_or_default();
    let mut expected = vec![
        "name",
        "description",
        "from",
        "args",
        "steps",
        "resources",
        "users",
        "run_as",
        "env",
        "workdir",
        "entrypoint",
        "cmd",
        "ports",
        "volumes",
        "networks",
        "replicas",
        "restart",
        "healthcheck",
        "labels",
        "model",
    ];
    expected.sort_unstable();
    assert_eq!(keys(&value), expected);
    assert_eq!(keys(&value["steps"][0]), ["args", "kind", "line"]);
    assert_eq!(value["steps"][0]["kind"], "install");
    assert_eq!(
        keys(&value["users"][0]),
        [
            "chpasswd_expire",
            "disable_root",
            "groups",
            "has_passwd",
            "lock_passwd",
            "name",
            "shell",
            "ssh_authorized_keys",
            "ssh_pwauth",
            "sudo"
        ]
    );
    assert_eq!(value["healthcheck"]["interval_ms"], 10_000);
    assert_eq!(value["healthcheck"]["start_period_ms"], 0);
    assert_eq!(value["ports"][2], serde_json::json!({"port": 443, "protocol": "tcp", "host_port": 8443}));
    assert_eq!(value["env"][3], serde_json::json!({"scope": "user:web", "key": "SECRET", "value": "x"}));
    assert_eq!(value["volumes"][0]["size_bytes"], 20_u64 << 30);
    let mut again: Spec = serde_json::from_str(&json).unwrap_or_else(|error| panic!("{error}"));
    again.users[0].passwd = spec(FULL).users[0].passwd.clone();
    assert_eq!(again, spec(FULL));
}

#[test]
fn defaults() {
    let json = spec("NAME web").to_json().unwrap_or_default();
    assert_eq!(
        json,
        concat!(
            r#"{"name":"web","description":null,"from":"debian:12","args":{},"steps":[],"resources":{"vcpus":1,"memory_mib":512,"#,
            r#""disk_gib":5,"gpus":[]},"users":[],"run_as":null,"env":[],"workdir":null,"entrypoint":[],"cmd":[],"ports":[],"#,
            r#""volumes":[],"networks":["default"],"replicas":1,"restart":{"policy":"always","max_retries":null},"#,
            r#""healthcheck":null,"labels":{},"model":null}"#
        )
    );
}

#[test]
fn the_same_meaning_has_the_same_digest() {
    let digest = |source: &str| spec(source).digest().map(|digest| digest.to_string()).unwrap_or_default();
    let plain = digest("NAME web\nVCPU 2\nMEM 2048\nENV A=1 B=2\nEXPOSE 80 443\nUSER username:a passwd:x groups:b,c\n");
    let other = "\u{feff}# a comment\r\nNAME \"web\"\r\n\r\nCORES 2 # two\r\nMBS 2G\r\nENV B=2 A=0\r\nENV A='1'\r\nEXPOSE 443/tcp \\\r\n  80\r\nUSER passwd=x groups=c,b username=a";
    assert_eq!(plain, digest(other));
    assert_ne!(plain, digest("NAME web\nVCPU 2\nMEM 2048\nENV A=1 B=2\nEXPOSE 80 443\nUSER username:a passwd:y groups:b,c\n"));
}

#[test]
fn several_faults_at_once() {
    let source = "NAME My_App\nVCPU 200\nINSTAL nginx\nMEM 99999999999999999999999\nEXPOSE 0 70000 x\nRUN\nUSER username:a\n";
    let codes = [
        (Code::InvalidName, 1),
        (Code::OutOfRange, 2),
        (Code::UnknownKeyword, 3),
        (Code::OutOfRange, 4),
        (Code::OutOfRange, 5),
        (Code::OutOfRange, 5),
        (Code::InvalidNumber, 5),
        (Code::MissingArgument, 6),
        (Code::MissingArgument, 7),
    ];
    assert_eq!(faults(source), codes);
    assert!(check(source).spec.is_none());
    let diagnostics = check(source).diagnostics;
    assert_eq!(diagnostics[0].hint.as_deref(), Some("write `my-app`"));
    assert_eq!(diagnostics[1].message, "`VCPU` is from 1 to 128, not `200`");
    assert_eq!(diagnostics[2].hint.as_deref(), Some("did you mean `INSTALL`?"));
    assert_eq!(diagnostics[3].message, "`MEM` is from 128 MiB to 256 GiB, not `99999999999999999999999`");
    assert_eq!((diagnostics[5].column, diagnostics[5].end_line, diagnostics[5].end_column), (10, 5, 15));
}

#[test]
fn diagnostics_have_exactly_their_keys() {
    let diagnostics = check("NAME web\nVCPU 2\nCORES 3\nname x\n").diagnostics;
    let value = serde_json::to_value(&diagnostics[0]).unwrap_or_default();
    assert_eq!(
        value,
        serde_json::json!({"code": "repeated", "severity": "error", "line": 3, "column": 1, "end_line": 3, "end_column": 8,
            "message": "`CORES` may be given once, and line 2 already gives it as `VCPU`", "hint": "remove one of the two lines"})
    );
    assert_eq!(diagnostics[0].related[0].line, 2);
    assert_eq!(diagnostics[1].hint.as_deref(), Some("keywords are upper case: write `NAME`"));
    let value = serde_json::to_value(&check("RUN true").diagnostics[0]).unwrap_or_default();
    assert_eq!(value["code"], "missing-name");
}

#[test]
fn rendering() {
    let source = "NAME web\nVCPU 2\nVCPU\t200 # é\n";
    let text = render(source, &check(source).diagnostics);
    assert_eq!(
        text,
        "error[repeated]: `VCPU` may be given once, and line 2 already gives it\n --> Formfile:3:1\n  |\n3 | VCPU 200 # é\n  | ^^^^^^^^\n --> Formfile:2:1\n  |\n2 | VCPU 2\n  | ^^^^^^ first given here\n  = hint: remove one of the two lines\nerror[out-of-range]: `VCPU` is from 1 to 128, not `200`\n --> Formfile:3:6\n  |\n3 | VCPU 200 # é\n  |      ^^^\n"
    );
    let renderer = Renderer::new("Formfile", source, Style::Ansi);
    assert!(renderer.render(&check(source).diagnostics[0]).contains("\u{1b}[1;31merror[repeated]\u{1b}[0m"));
}

#[test]
fn passwords_are_never_shown() {
    for source in [
        "NAME web\nUSER username:web passwd:hunter2 sudo:maybe\n",
        "NAME web\nUSER username:web passwd:\"hunter2 sudo:maybe\n",
        "NAME web\nUSER username:web passwd:my hunter2\n",
        "NAME web\nUSER username:web pasword:hunter2\n",
        "NAME web\nUSER username:web hunter2:x\n",
        "NAME web\nUSER username:web passwd:hun\\\nter2 sudo:maybe \\\n  passwd:hunter2\n",
        "NAME web\nUSER username:\"web passwd:hunter2\"\n",
        "NAME web\nUSER username:web sudo:\"1 passwd:hunter2\"\n",
        "NAME web\nuser username:web passwd:hunter2\n",
        "NAME web\nUSR username:web passwd:hunter2\n",
        "NAME web\nUSER username:Web \"passwd:hunter2\"\n",
        "NAME web\nUSER username:web passwd:hunter2\nUSER username:web passwd:hunter2\n",
    ] {
        let checked = check(source);
        assert!(checked.spec.is_none(), "{source}");
        let shown = render(source, &checked.diagnostics);
        let json = serde_json::to_string(&checked.diagnostics).unwrap_or_default();
        for text in [&shown, &json, &format!("{:?}", formfile::parse(source))] {
            assert!(!text.contains("hunter2") && !text.contains("ter2"), "{source}\n{text}");
        }
    }
    let spec = spec("NAME web\nUSER username:web passwd:hunter2\n");
    assert!(!format!("{spec:?}{}", spec.to_json().unwrap_or_default()).contains("hunter2"));
}

#[test]
fn stacks_are_refused_clearly() {
    for (name, source) in [("stack.yaml", "NAME web"), ("x.YML", ""), ("Formfile", "# x\n\ninstances:\n  web: { from: debian:12 }\n")] {
        let checked = formfile::check(name, source, &LowerOptions::default());
        assert_eq!(checked.diagnostics.len(), 1, "{name}");
        assert_eq!(checked.diagnostics[0].code, Code::StackUnsupported);
        assert!(checked.diagnostics[0].message.contains("not supported yet"));
    }
}

#[test]
fn continuations() {
    assert_eq!(faults("NAME web\nINSTALL a0 \\\n\n  b0\n"), [(Code::EmptyContinuation, 3)]);
    assert_eq!(faults("NAME web\nINSTALL a0 \\\n# x\n\n"), [(Code::DanglingContinuation, 2)]);
    assert_eq!(faults("NAME web\nINSTALL a0 # see \\\nRUN true"), []);
    assert_eq!(faults("NAME web\nCMD [\"a\"] # x \\\n b\n"), [(Code::DanglingContinuation, 2)]);
    assert_eq!(faults("NAME web\nHEALTHCHECK tcp 80 # x \\\n b\n"), [(Code::DanglingContinuation, 2)]);
    assert_eq!(faults("NAME web\nCMD [\"a\", \\\n  \"b\"] # x\n"), []);
    assert_eq!(faults("\\\nNAME web"), [(Code::UnknownKeyword, 1)]);
    let StepAction::Run { command, .. } = &spec("NAME web\nRUN printf 'a\\\\'\nENV A=1").steps[0].action else { panic!() };
    assert_eq!(*command, Command::Shell("printf 'a\\\\'".to_owned()));
    let StepAction::Install { packages } = &spec("NAME web\nINSTALL python3-\\\nminimal \\  \n\tcurl").steps[0].action else { panic!() };
    assert_eq!(packages, &["python3-minimal", "curl"]);
}

#[test]
fn labels_have_a_number_and_a_length() {
    let labels = |count: usize| (0..count).map(|number| format!("LABEL tier-{number}=a\n")).collect::<String>();
    let file = |labels: &str| format!("NAME web\n{labels}");
    assert_eq!(spec(&file(&labels(64))).labels.len(), 64);
    // Said once, where the first too many is; one that is given again is none more.
    assert_eq!(faults(&file(&labels(67))), [(Code::InvalidValue, 66)]);
    assert_eq!(faults(&file(&format!("{}LABEL tier-1=b\n", labels(64)))), []);
    assert_eq!(faults(&file(&format!("LABEL a={}\n", "v".repeat(1024)))), []);
    assert_eq!(faults(&file(&format!("LABEL a={}\n", "v".repeat(1025)))), [(Code::InvalidValue, 2)]);
    assert_eq!(faults(&file(&format!("LABEL {}=v\n", "a".repeat(129)))), [(Code::InvalidName, 2)]);
}

#[test]
fn last_one_wins_with_a_warning() {
    let source = "NAME web\nENTRYPOINT a\nENTRYPOINT [\"b\"]\nHEALTHCHECK tcp 80\nHEALTHCHECK NONE\n";
    let checked = check(source);
    assert_eq!(faults(source), [(Code::Overridden, 3), (Code::Overridden, 5)]);
    assert!(checked.diagnostics.iter().all(|diagnostic| diagnostic.severity == Severity::Warning));
    let spec = spec(source);
    assert_eq!((spec.entrypoint, spec.healthcheck), (vec!["b".to_owned()], None));
}

#[test]
fn variables_follow_a_dockerfile() {
    let source = "NAME web\nARG TAG=12\nARG WHO=me\nFROM debian:$TAG\nARG WHO\nENV A=1\nENV A=2 B=$A C='$A' D=\\$A\nCOPY $WHO /x/${TAG:-none}\nLABEL who=$WHO\nRUN echo $A\n";
    let read = spec(source);
    assert_eq!(read.from, "debian:12");
    let env: Vec<String> = read.env.iter().map(|env| format!("{}={}", env.key, env.value)).collect();
    assert_eq!(env, ["A=2", "B=1", "C=$A", "D=$A"]);
    let StepAction::Copy(copy) = &read.steps[0].action else { panic!() };
    assert_eq!((copy.to.as_str(), &copy.sources[0]), ("/x/none", &CopySource::Path("me".to_owned())));
    assert_eq!(read.labels["who"], "me");
    let options = LowerOptions { build_args: BTreeMap::from([("TAG".to_owned(), "11".to_owned()), ("NOPE".to_owned(), "1".to_owned())]) };
    let checked = formfile::check("Formfile", source, &options);
    assert_eq!(checked.spec.map(|spec| spec.from), Some("debian:11".to_owned()));
    assert_eq!(checked.diagnostics.iter().map(|diagnostic| diagnostic.code).collect::<Vec<_>>(), [Code::UnusedBuildArg]);
    assert_eq!(faults("NAME web\nARG TAG=1\nFROM debian:12\nLABEL a=$TAG\n"), [(Code::Variable, 4)]);
    let passwd = spec("NAME web\nARG A=1\nUSER username:a passwd:x$A\n").users.remove(0).passwd;
    assert_eq!(passwd.as_ref().map(|passwd| passwd.expose()), Some("x$A"));
}

#[test]
fn commands_with_an_array_a_shell_or_words() {
    assert_eq!(spec("NAME web\nENTRYPOINT exec app | tee /log\n").entrypoint, ["/bin/sh", "-c", "exec app | tee /log"]);
    assert_eq!(faults("NAME web\nENTRYPOINT ['a']\n"), [(Code::InvalidJson, 2)]);
    assert_eq!(faults("NAME web\nRUN ['a']\n"), [(Code::InvalidJson, 2)]);
    assert_eq!(faults("NAME web\nRUN [ -f /x ] || true\n"), []);
    assert_eq!(faults("NAME web\nENTRYPOINT a && b\nCMD c\n"), [(Code::Ineffective, 3)]);
    assert_eq!(faults("NAME web\nENTRYPOINT []\n"), [(Code::Ineffective, 2)]);
    let command = |source: &str| spec(source).healthcheck.and_then(|check| check.command);
    assert_eq!(
        command("NAME w\nHEALTHCHECK --timeout=3s CMD curl -f http://localhost/ || exit 1\n"),
        Some(Command::Shell("curl -f http://localhost/ || exit 1".to_owned()))
    );
    assert_eq!(command("NAME w\nHEALTHCHECK CMD [\"true\"] # x\n"), Some(Command::Exec(vec!["true".to_owned()])));
}

#[test]
fn what_lies_outside_the_context_is_refused() {
    for source in [
        "COPY /etc/passwd /x",
        "COPY ../x /x",
        "COPY a/../../x /x",
        "COPY a b /x",
        "COPY a",
        "COPY --from=b a /x",
        "COPY \"\" /x",
        "COPY a <<EOF\nx\nEOF",
    ] {
        let checked = check(&format!("NAME web\n{source}\n"));
        assert!(checked.spec.is_none(), "{source}");
        assert!(checked.diagnostics.iter().all(|diagnostic| diagnostic.line == 2), "{source}");
    }
}

#[test]
fn conflicts() {
    assert_eq!(faults("NAME w\nEXPOSE 80:80 80:81\n"), [(Code::Conflict, 2)]);
    assert_eq!(faults("NAME w\nEXPOSE 80:80 80:80/udp 80 80\n"), []);
    assert_eq!(spec("NAME w\nEXPOSE 80 8080:80 80\n").ports.len(), 1);
    assert_eq!(faults("NAME w\nVOLUME a:/x a:/y b:/x\n"), [(Code::Conflict, 2), (Code::Conflict, 2)]);
    assert_eq!(faults("NAME w\nGPU 01:00.0\nGPU 0000:01:00.0\n"), [(Code::Conflict, 3)]);
    assert_eq!(faults("NAME w\nUSER username:a passwd:x\nUSER username:a passwd:y\n"), [(Code::Repeated, 3)]);
    assert_eq!(faults("NAME w\nRUN true\nFROM debian:12\n"), [(Code::Order, 3)]);
}

#[test]
fn formatting() {
    let source = "\u{feff}\r\n\r\n  #  kept  \r\nNAME   web#1\r\n\r\n\r\n\r\nCORES\t2   #two\r\nINSTALL \\\r\n a0   b0 \\\r\n   # why\r\n\tc0 # end\r\nENTRYPOINT [ \"a\",\"b c\" ]  # run\r\nRUN   echo a  && \\\r\n      echo b   \r\nRUN <<EOF\r\n  x\r\n\r\nEOF\r\n\r\n";
    let expected = "#  kept\nNAME web#1\n\nVCPU 2 #two\nINSTALL \\\n    a0 b0 \\\n    # why\n    c0 # end\nENTRYPOINT [\"a\", \"b c\"] # run\nRUN echo a  && \\\n      echo b\nRUN <<EOF\n  x\n\nEOF\n";
    assert_eq!(formfile::format(source).as_deref(), Ok(expected));
    assert_eq!(formfile::format(expected).as_deref(), Ok(expected));
    assert_eq!(formfile::format("NAME web\nINSTALL a \\\n").map_err(|faults| faults[0].code), Err(Code::DanglingContinuation));
    let formatted = formfile::format(FULL).unwrap_or_default();
    assert_eq!(spec(&formatted).digest().ok(), spec(FULL).digest().ok());
}
