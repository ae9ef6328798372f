//! Instructions that the language has and this version cannot carry out: refused with a clear word, never ignored.

use form_api::ErrorCode;
use form_types::Spec;

use crate::failure::Failure;

/// # Errors
/// When the Formfile asks for something that is not there yet.
pub fn refuse(spec: &Spec) -> Result<(), Failure> {
    let mut reasons = Vec::new();
    if spec.replicas > 1 {
        reasons.push(format!("REPLICAS {}: only one instance can run", spec.replicas));
    }
    for network in spec.networks.iter().filter(|network| network.as_str() != "default") {
        reasons.push(format!("NETWORK {network}: there is only the network `default`"));
    }
    for gpu in &spec.resources.gpus {
        reasons.push(format!("GPU {}: no device can be passed to a VM yet", gpu.model));
    }
    if let Some(model) = spec.model.as_ref().filter(|model| model.required) {
        reasons.push(format!("MODEL required:{}: models are not provided yet", model.id));
    }
    if reasons.is_empty() {
        return Ok(());
    }
    let text = reasons.join("; ");
    Err(Failure::new(ErrorCode::Unsupported, format!("this version cannot do what the Formfile asks for: {text}"))
        .hint("leave those instructions out; `form check` and `form build` take them already"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn spec(lines: &str) -> Spec {
        let options = formfile::LowerOptions { build_args: BTreeMap::new() };
        formfile::check("Formfile", &format!("NAME web\nENTRYPOINT /app\n{lines}"), &options).spec.unwrap()
    }

    #[test]
    fn every_reason_is_named() {
        assert!(refuse(&spec("NETWORK default\nENV --scope=service:web A=1\nMODEL preferred:llama3:8b\nVOLUME data:/data\n")).is_ok());
        let failure = refuse(&spec("REPLICAS 3\nNETWORK back\nGPU a100\nMODEL required:m\n")).unwrap_err();
        assert_eq!((failure.error.code, failure.exit_code()), (ErrorCode::Unsupported, 1));
        for word in ["REPLICAS 3", "NETWORK back", "GPU a100", "MODEL required:m"] {
            assert!(failure.error.message.contains(word), "{}", failure.error.message);
        }
    }
}
