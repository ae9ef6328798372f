//! What the machine's own apt is configured to use. No mirror is written in our code: a base comes from where the machine's packages come from.

use std::{fs, path::Path, process::Command};

use crate::{BuildError, error::IoContext, tools::search_path};

/// One `deb` line (sources.list(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    pub uri: String,
    pub suite: String,
    pub components: Vec<String>,
    /// Path of the keyring, where the machine names one.
    pub signed_by: Option<String>,
}

impl Source {
    /// The one-line form for the image.
    pub fn line(&self) -> String {
        let options = self.signed_by.as_ref().map_or_else(String::new, |keyring| format!("[signed-by={keyring}] "));
        format!("deb {options}{} {} {}", self.uri, self.suite, self.components.join(" "))
    }
}

/// Every enabled binary source of the machine.
///
/// # Errors
/// When apt's directory cannot be read.
pub(crate) fn machine_sources(etc_apt: &Path) -> Result<Vec<Source>, BuildError> {
    let mut files = vec![etc_apt.join("sources.list")];
    let parts = etc_apt.join("sources.list.d");
    if parts.is_dir() {
        let mut found: Vec<_> = fs::read_dir(&parts).during("list", &parts)?.flatten().map(|entry| entry.path()).collect();
        found.sort();
        files.extend(found);
    }
    let mut sources = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => sources.extend(text.lines().filter_map(parse_line)),
            Some("sources") => sources.extend(text.split("\n\n").flat_map(parse_stanza)),
            _ => {}
        }
    }
    Ok(sources)
}

/// The sources of a release's own archive: the suite itself and its updates, signed by the distribution's own keyring where one is named.
/// Third parties use the same code names.
pub(crate) fn for_release(sources: &[Source], codename: &str) -> Vec<Source> {
    let wanted = [codename.to_owned(), format!("{codename}-updates"), format!("{codename}-security")];
    let official = |source: &&Source| {
        source.signed_by.as_deref().is_none_or(|keyring| keyring.contains("-archive-keyring"))
            && source.components.iter().any(|component| component == "main")
    };
    let mut found: Vec<Source> = sources.iter().filter(|source| wanted.contains(&source.suite)).filter(official).cloned().collect();
    found.dedup();
    if found.iter().any(|source| source.suite == codename) { found } else { Vec::new() }
}

/// Settings of the machine that a fetch inside needs too: proxies, time-outs, checks of dates. `KEY` and value.
///
/// # Errors
/// When `apt-config` cannot be started.
pub(crate) fn fetch_options() -> Result<Vec<(String, String)>, BuildError> {
    let output = Command::new("apt-config").arg("dump").env("PATH", search_path()).output().during("start", "apt-config")?;
    Ok(parse_options(&String::from_utf8_lossy(&output.stdout)))
}

fn parse_options(dump: &str) -> Vec<(String, String)> {
    const WANTED: &[&str] =
        &["Acquire::http", "Acquire::https", "Acquire::ftp", "Acquire::Retries", "Acquire::Check-", "Acquire::ForceIPv"];
    dump.lines()
        .filter_map(|line| {
            let (key, value) = line.strip_suffix("\";")?.split_once(" \"")?;
            // Lists end in `::`, and what names a program of the machine does not exist inside.
            let fits = WANTED.iter().any(|prefix| key.starts_with(prefix))
                && !value.is_empty()
                && !key.ends_with("::")
                && !key.contains("Auto-Detect");
            fits.then(|| (key.to_owned(), value.to_owned()))
        })
        .collect()
}

fn parse_line(line: &str) -> Option<Source> {
    let line = line.split('#').next()?.trim();
    let mut rest = line.strip_prefix("deb")?.trim_start();
    if !line.starts_with("deb ") && !line.starts_with("deb\t") && !line.starts_with("deb[") {
        return None;
    }
    let mut signed_by = None;
    if let Some(options) = rest.strip_prefix('[') {
        let (options, after) = options.split_once(']')?;
        signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by=")).map(str::to_owned);
        rest = after;
    }
    let mut words = rest.split_whitespace().map(str::to_owned);
    Some(Source { uri: words.next()?, suite: words.next()?, components: words.collect(), signed_by })
}

/// A deb822 stanza; one source for each pair of URI and suite.
fn parse_stanza(stanza: &str) -> Vec<Source> {
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in stanza.lines().filter(|line| !line.starts_with('#')) {
        if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line.trim());
            }
        } else if let Some((key, value)) = line.split_once(':') {
            fields.push((key.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    let field = |name: &str| fields.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value.as_str());
    if field("enabled").eq_ignore_ascii_case("no") || !field("types").split_whitespace().any(|kind| kind == "deb") {
        return Vec::new();
    }
    let components: Vec<String> = field("components").split_whitespace().map(str::to_owned).collect();
    // A key in the stanza itself has no path; such sources are third parties'.
    let signed_by =
        Some(field("signed-by")).filter(|keyring| !keyring.is_empty()).map(|keyring| keyring.lines().next().unwrap_or_default().to_owned());
    let mut sources = Vec::new();
    for uri in field("uris").split_whitespace() {
        for suite in field("suites").split_whitespace() {
            sources.push(Source {
                uri: uri.to_owned(),
                suite: suite.to_owned(),
                components: components.clone(),
                signed_by: signed_by.clone(),
            });
        }
    }
    sources
}

#[cfg(test)]
mod tests {
    use super::*;

    const STANZAS: &str = "Types: deb\n# a comment\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates bookworm-backports\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\nTypes: deb\nURIs: https://third.example\nSuites: bookworm\nComponents: stable\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n xyz\n\nEnabled: no\nTypes: deb\nURIs: http://off.example\nSuites: bookworm\nComponents: main\n";

    #[test]
    fn both_forms_are_read_and_third_parties_left_out() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("sources.list.d")).unwrap();
        fs::write(directory.path().join("sources.list"), "# none\ndeb [arch=amd64] http://old.example/debian bookworm-security main contrib # x\ndeb-src http://old.example/debian bookworm main\n").unwrap();
        fs::write(directory.path().join("sources.list.d/debian.sources"), STANZAS).unwrap();
        fs::write(directory.path().join("sources.list.d/off.list.disabled"), "deb http://no.example x main\n").unwrap();
        let sources = machine_sources(directory.path()).unwrap();
        assert_eq!(sources.len(), 5);
        let lines: Vec<String> = for_release(&sources, "bookworm").iter().map(Source::line).collect();
        assert_eq!(
            lines,
            [
                "deb http://old.example/debian bookworm-security main contrib",
                "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.example/debian bookworm main",
                "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.example/debian bookworm-updates main",
            ]
        );
        assert!(for_release(&sources, "trixie").is_empty());
    }

    #[test]
    fn proxies_are_kept() {
        let dump = "APT \"\";\nAcquire::http::Proxy \"http://proxy:3128\";\nAcquire::Retries \"3\";\nAcquire::http::Proxy-Auto-Detect \"/usr/bin/x\";\nAcquire::Check-Date \"false\";\nAcquire::https::Proxy \"\";\n";
        let options = parse_options(dump);
        assert_eq!(
            options.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(),
            ["Acquire::http::Proxy", "Acquire::Retries", "Acquire::Check-Date"]
        );
    }
}
