//! What a registry asks for before it answers: `WWW-Authenticate` (RFC 9110, section 11.6.1).

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    Basic,
    Bearer,
    Other,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Challenge {
    pub scheme: Scheme,
    /// Keys in lower case.
    parameters: Vec<(String, String)>,
}

impl Challenge {
    /// Every challenge of a header's value. What cannot be understood is left out.
    pub fn parse(value: &str) -> Vec<Self> {
        let mut found: Vec<Self> = Vec::new();
        for part in split_outside_quotes(value) {
            let part = part.trim();
            // `Scheme key=value`, `Scheme`, or one more `key=value` of the scheme before.
            let (scheme, parameter) = match part.split_once(' ') {
                Some((scheme, rest)) if !scheme.contains('=') => (Some(scheme), Some(rest.trim())),
                _ if part.contains('=') => (None, Some(part)),
                _ => (Some(part), None),
            };
            if let Some(scheme) = scheme.filter(|scheme| !scheme.is_empty()) {
                let scheme = match scheme.to_ascii_lowercase().as_str() {
                    "basic" => Scheme::Basic,
                    "bearer" => Scheme::Bearer,
                    _ => Scheme::Other,
                };
                found.push(Self { scheme, parameters: Vec::new() });
            }
            if let (Some(challenge), Some((key, value))) = (found.last_mut(), parameter.and_then(|text| text.split_once('='))) {
                challenge.parameters.push((key.trim().to_ascii_lowercase(), unquote(value.trim())));
            }
        }
        found
    }

    pub fn get(&self, key: &str) -> Option<&str> {
        self.parameters.iter().find(|(found, _)| found == key).map(|(_, value)| value.as_str())
    }
}

fn split_outside_quotes(text: &str) -> Vec<&str> {
    let (mut parts, mut begin, mut quoted, mut escaped) = (Vec::new(), 0, false, false);
    for (at, char) in text.char_indices() {
        match char {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            ',' if !quoted => {
                parts.push(&text[begin..at]);
                begin = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[begin..]);
    parts
}

fn unquote(text: &str) -> String {
    let Some(inner) = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) else { return text.to_owned() };
    let mut value = String::new();
    let mut chars = inner.chars();
    while let Some(char) = chars.next() {
        value.extend(if char == '\\' { chars.next() } else { Some(char) });
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read() {
        let value = r#"Bearer realm="https://auth.example/token",service="a, \"b\"",scope="repository:a/b:pull,push", Basic realm=x"#;
        let found = Challenge::parse(value);
        assert_eq!(found.iter().map(|challenge| challenge.scheme).collect::<Vec<_>>(), [Scheme::Bearer, Scheme::Basic]);
        assert_eq!(found[0].get("realm"), Some("https://auth.example/token"));
        assert_eq!(found[0].get("service"), Some("a, \"b\""));
        assert_eq!(found[0].get("scope"), Some("repository:a/b:pull,push"));
        assert_eq!((found[1].get("realm"), found[1].get("scope")), (Some("x"), None));
    }

    #[test]
    fn odd_challenges_do_no_harm() {
        assert_eq!(Challenge::parse(""), []);
        assert_eq!(Challenge::parse("Negotiate")[0].scheme, Scheme::Other);
        assert_eq!(Challenge::parse("=,\",=\\")[..], []);
        assert_eq!(Challenge::parse("BASIC REALM=\"x\"")[0].get("realm"), Some("x"));
    }
}
