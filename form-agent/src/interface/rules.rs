//! How a signed request changes the interfaces of a VM. Pure, like all rules of the state.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use form_api::{ApiError, ErrorCode};
use form_net::Ipv4Range;
use form_state::{Refusal, Table, View, Write};
use form_types::{ClusterId, VmId, settings::INTERFACES_MAX};

use super::{NUMBERS, field, id_of, number_of, taken};
use crate::desired::DesiredVm;

/// The number that the next interface of a VM gets: the lowest that is free.
///
/// # Errors
/// A conflict when it has as many as it can have.
pub fn next_number(vm: &DesiredVm) -> Result<u8, ApiError> {
    NUMBERS.into_iter().find(|number| !vm.interfaces.contains_key(number)).ok_or_else(|| {
        let text = format!("vm/{} has {INTERFACES_MAX} network interfaces, and cannot have more", vm.name());
        ApiError::new(ErrorCode::Conflict, text).hint(format!("detach one: `form net ls {}`", vm.name()))
    })
}

/// The number of an interface that can be detached.
///
/// # Errors
/// Not found; a conflict for the first one.
pub fn detachable(vm: &DesiredVm, name: &str) -> Result<u8, ApiError> {
    match number_of(name) {
        Some(0) => Err(ApiError::new(ErrorCode::Conflict, format!("{name} is the first interface of vm/{}, which it keeps", vm.name()))
            .hint(format!("see the others with `form net ls {}`", vm.name()))),
        Some(number) if vm.interfaces.contains_key(&number) => Ok(number),
        _ => {
            let name: String = name.chars().take(40).collect();
            Err(ApiError::new(ErrorCode::NotFound, format!("vm/{} has no network interface `{name}`", vm.name()))
                .hint(format!("list them with `form net ls {}`", vm.name())))
        }
    }
}

fn put(vm: VmId, number: u8, address: Option<Ipv4Addr>) -> Write {
    Write::put(Table::Vms, vm, field(number), address.map(|address| address.to_string()).unwrap_or_default())
}

fn address(id: &VmId, number: u8, cluster: &ClusterId, taken: &BTreeSet<Ipv4Addr>) -> Result<Ipv4Addr, Refusal> {
    Ipv4Range::for_cluster(cluster).assign(&id_of(id, number), taken).map_err(|error| Refusal::new(error.to_string()))
}

/// One more interface.
///
/// # Errors
/// As [`next_number`]; when every address is taken.
pub fn attach(vm: &DesiredVm, cluster: &ClusterId, view: &View) -> Result<Vec<Write>, Refusal> {
    let number = next_number(vm).map_err(|error| Refusal::new(error.message))?;
    Ok(vec![put(vm.id, number, Some(address(&vm.id, number, cluster, &taken(view))?))])
}

/// One less.
///
/// # Errors
/// As [`detachable`].
pub fn detach(vm: &DesiredVm, name: &str) -> Result<Vec<Write>, Refusal> {
    let number = detachable(vm, name).map_err(|error| Refusal::new(error.message))?;
    Ok(vec![put(vm.id, number, None)])
}

/// As many for the new VM `id` as the one has that it is a copy of, with the same numbers and addresses of their own.
///
/// # Errors
/// When every address is taken.
pub fn copy(of: &BTreeMap<u8, Ipv4Addr>, id: &VmId, cluster: &ClusterId, view: &View) -> Result<Vec<Write>, Refusal> {
    let mut taken = taken(view);
    // What the VM itself gets with the same change.
    let own = Ipv4Range::for_cluster(cluster).assign(id, &taken).map_err(|error| Refusal::new(error.to_string()))?;
    taken.insert(own);
    let mut writes = Vec::new();
    for number in of.keys() {
        let address = address(id, *number, cluster, &taken)?;
        taken.insert(address);
        writes.push(put(*id, *number, Some(address)));
    }
    Ok(writes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::vm;

    #[test]
    fn interfaces_have_the_lowest_free_number_up_to_the_most() {
        let mut web = vm("web");
        for number in NUMBERS {
            assert_eq!(next_number(&web).unwrap(), number);
            web.interfaces.insert(number, [10, 77, 1, number].into());
        }
        let error = next_number(&web).unwrap_err();
        assert_eq!((error.code, error.message.as_str()), (ErrorCode::Conflict, "vm/web has 8 network interfaces, and cannot have more"));
        web.interfaces.remove(&3);
        assert_eq!(next_number(&web).unwrap(), 3);
        assert_eq!(detachable(&web, "eth4").unwrap(), 4);
        for (name, code) in
            [("eth0", ErrorCode::Conflict), ("eth3", ErrorCode::NotFound), ("eth9", ErrorCode::NotFound), ("x", ErrorCode::NotFound)]
        {
            assert_eq!(detachable(&web, name).unwrap_err().code, code, "{name}");
        }
    }
}
