//! Every text: no panic, and what formatting promises.

#![no_main]

use std::collections::BTreeMap;

use formfile::{LowerOptions, Renderer, Style};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let source = String::from_utf8_lossy(bytes);
    let source = source.as_ref();
    let options = LowerOptions { build_args: BTreeMap::from([("VERSION".to_owned(), "$7 \"x".to_owned())]) };
    let checked = formfile::check("Formfile", source, &options);
    assert_eq!(checked.spec.is_none(), checked.diagnostics.iter().any(|diagnostic| diagnostic.is_error()));
    let renderer = Renderer::new("Formfile", source, Style::Plain);
    for diagnostic in &checked.diagnostics {
        assert!((diagnostic.line, diagnostic.column) <= (diagnostic.end_line, diagnostic.end_column), "{diagnostic:?}");
        let text = renderer.render(diagnostic);
        assert!(!text.chars().any(|character| character.is_control() && character != '\n'), "{text:?}");
    }
    let Ok(formatted) = formfile::format(source) else { return };
    assert_eq!(formfile::format(&formatted).as_deref(), Ok(formatted.as_str()), "formatting again changes it");
    let again = formfile::check("Formfile", &formatted, &options);
    match (&checked.spec, &again.spec) {
        (Some(before), Some(after)) => {
            assert_eq!(before.digest().ok(), after.digest().ok(), "formatting changed the meaning");
            let json = before.to_json().unwrap_or_default();
            assert!(serde_json::from_str::<form_types::Spec>(&json).is_ok(), "{json}");
        }
        (None, None) => {}
        _ => panic!("formatting changed whether it is valid: {:?}, then {:?}", checked.diagnostics, again.diagnostics),
    }
});
