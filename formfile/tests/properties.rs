//! What holds for every text: no panic, a bounded cost, formatting that changes nothing twice and never the meaning.

use std::{collections::BTreeMap, time::Duration};

use formfile::{LowerOptions, Renderer, Style};
use proptest::prelude::*;

const SEED: &str = include_str!("seed.Formfile");

/// Does everything that can be done with a text.
fn exercise(source: &str) {
    let options = LowerOptions { build_args: BTreeMap::from([("VERSION".to_owned(), "$7 \"x".to_owned())]) };
    let checked = formfile::check("Formfile", source, &options);
    assert_eq!(checked.spec.is_none(), checked.diagnostics.iter().any(|diagnostic| diagnostic.is_error()));
    let renderer = Renderer::new("Formfile", source, Style::Plain);
    for diagnostic in &checked.diagnostics {
        assert!((diagnostic.line, diagnostic.column) <= (diagnostic.end_line, diagnostic.end_column), "{diagnostic:?}");
        assert!(diagnostic.line >= 1 && diagnostic.column >= 1, "{diagnostic:?}");
        let text = renderer.render(diagnostic);
        assert!(!text.chars().any(|character| character.is_control() && character != '\n'), "{text:?}");
    }
    let Ok(formatted) = formfile::format(source) else { return };
    assert_eq!(formfile::format(&formatted).as_deref(), Ok(formatted.as_str()), "not idempotent: {source:?}");
    let again = formfile::check("Formfile", &formatted, &options);
    match (&checked.spec, &again.spec) {
        (Some(before), Some(after)) => {
            assert_eq!(before.digest().ok(), after.digest().ok(), "{source:?}\n{before:?}\n{after:?}");
            let json = before.to_json().unwrap_or_default();
            assert!(serde_json::from_str::<form_types::Spec>(&json).is_ok(), "{json}");
        }
        (None, None) => {}
        _ => panic!("{source:?}\n{:?}\n{formatted:?}\n{:?}", checked.diagnostics, again.diagnostics),
    }
}

/// Pieces that matter to the reader, to meet in odd orders.
fn piece() -> impl Strategy<Value = String> {
    let fixed = prop::sample::select(vec![
        "NAME",
        "RUN",
        "INSTALL",
        "COPY",
        "ENV",
        "ENTRYPOINT",
        "CMD",
        "HEALTHCHECK",
        "DESCRIPTION",
        "USER",
        "LABEL",
        "ARG",
        "FROM",
        "\n",
        "\n",
        "\n",
        " ",
        " ",
        "\t",
        "\\",
        "\\\n",
        " \\\n",
        "\\ ",
        "#",
        " # c",
        "\"",
        "'",
        "\\\"",
        "\r\n",
        "\r",
        "<<EOF",
        "<<-'A'",
        "EOF",
        "\nEOF\n",
        "\nA\n",
        "[\"a\", \"b\"]",
        "[",
        "]",
        "$VERSION",
        "${A:-b}",
        "${",
        "}",
        "--chown=a:b",
        "--interval=1s",
        "http 80 /x",
        "tcp 1",
        "NONE",
        "web",
        "a b",
        "/x",
        "KEY=v",
        "username:a",
        "passwd:b",
        "8080:80",
        "é",
        "\u{feff}",
        "\0",
        ":",
        "=",
        ",",
        "./",
    ]);
    prop_oneof![8 => fixed.prop_map(str::to_owned), 1 => any::<char>().prop_map(String::from), 1 => "[a-z0-9]{1,4}"]
}

/// A real file with some lines or characters changed.
fn mutated() -> impl Strategy<Value = String> {
    prop::collection::vec((any::<prop::sample::Index>(), 0..4_usize, piece()), 1..6).prop_map(|changes| {
        let mut text = SEED.to_owned();
        for (index, kind, piece) in changes {
            let places: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
            if places.is_empty() {
                break;
            }
            let at = places[index.index(places.len())];
            let after = text[at..].chars().next().map_or(at, |character| at + character.len_utf8());
            let line = text[at..].find('\n').map_or(text.len(), |length| at + length + 1);
            match kind {
                0 => text.insert_str(at, &piece),
                1 => text.replace_range(at..after, &piece),
                2 => text.replace_range(at..line, ""),
                _ => text.replace_range(at..line, &piece),
            }
        }
        text
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.max(1500), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pieces(pieces in prop::collection::vec(piece(), 0..40)) {
        exercise(&format!("NAME web\n{}", pieces.concat()));
        exercise(&pieces.concat());
    }

    #[test]
    fn mutations(source in mutated()) {
        exercise(&source);
    }

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        exercise(&String::from_utf8_lossy(&bytes));
    }
}

#[test]
fn the_seed_is_valid() {
    let checked = formfile::check("Formfile", SEED, &LowerOptions::default());
    assert_eq!(checked.diagnostics, []);
    exercise(SEED);
}

/// The CPU time that this thread has used: unlike wall time, other programs do not make it longer.
fn cpu_time() -> Duration {
    let statistics = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux says what a thread has used");
    let nanoseconds = statistics.split(' ').next().and_then(|text| text.parse().ok());
    Duration::from_nanos(nanoseconds.expect("the first number is the time on a CPU"))
}

/// Each is 128 KiB of one thing; anything quadratic would take much longer.
#[test]
fn long_inputs_stay_quick() {
    let size = 1 << 17;
    let fill = |head: &str, unit: &str| format!("NAME web\n{head}{}", unit.repeat((size - head.len() - 16) / unit.len()));
    for source in [
        fill("", "\n"),
        fill("", "x\n"),
        fill("", "RUN a\n"),
        fill("", "RUN <<E\n"),
        fill("", "VCPU 1\n"),
        fill("RUN ", "\\\n"),
        fill("RUN ", "a \\\n# c\n"),
        fill("INSTALL ", "a \\\n# c\n"),
        fill("INSTALL ", "! "),
        fill("INSTALL ", "\\"),
        fill("USER ", "passwd:x "),
        fill("USER ", "x \\\n"),
        fill("USER ", "sudo:x"),
        fill("", "USER username:a sudo:x\n"),
        fill("EXPOSE ", "80:1 "),
        fill("EXPOSE ", "99:1 98:1 "),
        fill("ENV A=", "$A"),
        fill("ENV A=", "${A:-"),
        fill("LABEL ", "a=$B "),
        fill("LABEL a=", "${B:-$C}"),
        fill("", "ENV A=$A$A\n"),
        fill("ENV A=x\n", "ENV A=$A$A$A$A$A$A$A$A\n"),
        fill("ENV A=xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\nRUN a\n", "RUN b\n"),
        fill("ENTRYPOINT ", "["),
        fill("ENTRYPOINT ", "[\"a\","),
        fill("ENTRYPOINT ", "\"a\" "),
        fill("COPY ", "<<A "),
        fill("COPY ", "a "),
        fill("NETWORK ", "a "),
        fill("DESCRIPTION \"", "a"),
        fill("HEALTHCHECK ", "--interval=1s "),
        fill("", "\\\n"),
        fill("", "#\n"),
        fill("", "é"),
    ] {
        let start = cpu_time();
        exercise(&source);
        let elapsed = cpu_time() - start;
        assert!(elapsed < Duration::from_secs(5), "{elapsed:?}: {}", &source[..60]);
    }
    assert!(formfile::check("Formfile", &"#\n".repeat(1 << 20), &LowerOptions::default()).spec.is_none());
}
