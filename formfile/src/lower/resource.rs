//! `VCPU`, `MEM`, `DISK`, `GPU`, `MODEL`, `REPLICAS`.

use form_types::{
    size::{GIB, MIB},
    spec::{Gpu, Model},
};

use super::{
    Lowerer,
    value::{self, Sizes, Wrong, shown},
};
use crate::{
    ast::Instruction,
    diagnostic::{Code, Fault},
    word::unquote,
};

const MEMORY: Sizes = Sizes { what: "`MEM`", unit: MIB, unit_name: "MiB", least: 128, most: 256 << 10 };
const DISK: Sizes = Sizes { what: "`DISK`", unit: GIB, unit_name: "GiB", least: 5, most: 64 << 10 };
const MOST_REPLICAS: u32 = 1000;

impl Lowerer<'_, '_> {
    pub(super) fn vcpu(&mut self, instruction: &Instruction) {
        let Some(word) = self.only(instruction, "a number of virtual CPUs") else { return };
        let vcpus = self.take(value::number32("`VCPU`", &unquote(&word.raw), 1, 128), word.span);
        self.draft.vcpus = self.draft.vcpus.or(vcpus);
    }

    pub(super) fn mem(&mut self, instruction: &Instruction) {
        let Some(word) = self.only(instruction, "a size such as `512M`") else { return };
        let memory = self.take(MEMORY.read(&unquote(&word.raw)), word.span);
        self.draft.memory_mib = self.draft.memory_mib.or(memory);
    }

    pub(super) fn disk(&mut self, instruction: &Instruction) {
        let Some(word) = self.only(instruction, "a size such as `20G`") else { return };
        let disk = self.take(DISK.read(&unquote(&word.raw)), word.span);
        self.draft.disk_gib = self.draft.disk_gib.or(disk);
    }

    pub(super) fn replicas(&mut self, instruction: &Instruction) {
        let Some(word) = self.only(instruction, "a number of instances") else { return };
        let replicas = self.take(value::number32("`REPLICAS`", &unquote(&word.raw), 1, MOST_REPLICAS), word.span);
        self.draft.replicas = self.draft.replicas.or(replicas);
    }

    pub(super) fn gpu(&mut self, instruction: &Instruction) {
        let Some(word) = self.only(instruction, "a model such as `a100:2`, or a PCI address") else { return };
        let text = unquote(&word.raw);
        let Some(gpu) = self.take(gpu(&text), word.span) else { return };
        if pci_address(&gpu.model).is_some()
            && let Some(earlier) = self.spans.devices.insert(gpu.model.clone(), word.span)
        {
            let fault = Fault::error(Code::Conflict, word.span, format!("the device {} is asked for twice", gpu.model));
            self.faults.push(fault.related(earlier, "first asked for here"));
        }
        self.draft.gpus.push(gpu);
    }

    pub(super) fn model(&mut self, instruction: &Instruction) {
        let Some(word) = self.only(instruction, "`required:ID` or `preferred:ID`") else { return };
        let text = unquote(&word.raw);
        let model = match text.split_once(':') {
            Some(("required", id)) if !id.is_empty() => Ok(Model { id: id.to_owned(), required: true }),
            Some(("preferred", id)) if !id.is_empty() => Ok(Model { id: id.to_owned(), required: false }),
            _ => Err(Wrong::new(Code::InvalidValue, format!("`MODEL` is `required:ID` or `preferred:ID`, not {}", shown(&text)))
                .hint("for example `MODEL preferred:llama3:8b`")),
        };
        let model = self.take(model, word.span);
        self.draft.model = self.draft.model.take().or(model);
    }
}

fn gpu(text: &str) -> Result<Gpu, Wrong> {
    if let Some(address) = pci_address(text) {
        return Ok(Gpu { model: address, count: 1 });
    }
    let (model, count) = match text.split_once(':') {
        None => (text, 1),
        Some((model, count)) => (model, value::number32("a GPU count", count, 1, 8)?),
    };
    let fits = model.starts_with(|first: char| first.is_ascii_alphanumeric())
        && model.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'));
    if !fits {
        return Err(Wrong::new(Code::InvalidValue, format!("{} is no GPU model and no PCI address", shown(text)))
            .hint("write it like `a100`, `rtx-4090:2` or `0000:01:00.0`"));
    }
    Ok(Gpu { model: model.to_owned(), count })
}

/// `[DOMAIN:]BUS:DEVICE.FUNCTION` in hexadecimal, with its domain and in lower case.
fn pci_address(text: &str) -> Option<String> {
    let (rest, function) = text.split_once('.')?;
    let parts: Vec<&str> = rest.split(':').collect();
    let (domain, bus, device) = match parts.as_slice() {
        [bus, device] => ("0000", *bus, *device),
        [domain, bus, device] => (*domain, *bus, *device),
        _ => return None,
    };
    let hex = |part: &str, length: usize| part.len() == length && part.bytes().all(|byte| byte.is_ascii_hexdigit());
    let fits = hex(domain, 4) && hex(bus, 2) && hex(device, 2) && matches!(function.as_bytes(), [b'0'..=b'7']);
    fits.then(|| format!("{domain}:{bus}:{device}.{function}").to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus() {
        let read = |text| gpu(text).ok().map(|gpu| (gpu.model, gpu.count));
        assert_eq!(read("a100"), Some(("a100".to_owned(), 1)));
        assert_eq!(read("a100:8"), Some(("a100".to_owned(), 8)));
        assert_eq!(read("01:00.0"), Some(("0000:01:00.0".to_owned(), 1)));
        assert_eq!(read("0000:0A:1f.7"), Some(("0000:0a:1f.7".to_owned(), 1)));
        for bad in ["", "a100:0", "a100:9", "a100:", ":2", "a b", "01:00.9"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
