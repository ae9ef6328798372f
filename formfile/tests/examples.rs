//! Every Formfile in `examples/` is without faults and in the canonical layout.

use std::{fs, path::Path};

use formfile::{LowerOptions, Renderer, Style};

#[test]
fn examples_are_valid_and_formatted() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let mut host_ports = Vec::new();
    let mut seen = 0;
    for entry in fs::read_dir(folder).expect("the examples can be listed") {
        let path = entry.expect("an example can be listed").path().join("Formfile");
        let Ok(source) = fs::read_to_string(&path) else { continue };
        seen += 1;
        let name = path.display().to_string();
        let checked = formfile::check(&name, &source, &LowerOptions::default());
        let renderer = Renderer::new(&name, &source, Style::Plain);
        let faults: String = checked.diagnostics.iter().map(|diagnostic| renderer.render(diagnostic)).collect();
        assert_eq!(faults, "");
        assert_eq!(formfile::format(&source).as_deref(), Ok(source.as_str()), "{name} is not formatted");
        let spec = checked.spec.expect("without faults there is a spec");
        host_ports.extend(spec.ports.iter().filter_map(|port| port.host_port));
    }
    assert!(seen >= 5, "only {seen} examples were found");
    let published = host_ports.len();
    host_ports.sort_unstable();
    host_ports.dedup();
    assert_eq!(host_ports.len(), published, "two examples publish one port");
}
