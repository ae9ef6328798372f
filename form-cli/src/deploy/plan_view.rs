//! A plan as people read it.

use form_api::deploy::{Plan, PlanAction, PlannedVm};

use crate::ui::{Paint, Terminal, printable};

pub fn text(plan: &Plan, terminal: &Terminal) -> String {
    plan.vms.iter().map(|vm| one(vm, terminal)).collect()
}

fn one(vm: &PlannedVm, terminal: &Terminal) -> String {
    let (mark, verb, paint) = match vm.action {
        PlanAction::Create => ("+", "create", Paint::Green),
        PlanAction::Update => ("~", "update", Paint::Yellow),
        PlanAction::Unchanged => return format!("= {}: unchanged\n", vm.name),
    };
    let restarts = if vm.restarts { " (restarts)" } else { "" };
    let mut text = format!("{} {verb} {}{restarts}\n", terminal.paint_data(paint, mark), vm.name);
    let indent = vm.changes.iter().map(|change| change.field.len()).max().unwrap_or(0);
    for change in &vm.changes {
        let words = match (&change.from, &change.to) {
            (None, None) => "changed".to_owned(),
            (None, Some(to)) => to.clone(),
            (Some(from), Some(to)) => format!("{from} -> {to}"),
            (Some(from), None) => format!("{from} -> nothing"),
        };
        text.push_str(&format!("    {:indent$}  {}\n", printable(&change.field), printable(&words)));
    }
    for loss in &vm.loses {
        text.push_str(&format!("    {} {}\n", terminal.paint_data(Paint::Red, "lost:"), printable(loss)));
    }
    text
}

#[cfg(test)]
mod tests {
    use form_api::deploy::FieldChange;

    use super::*;
    use crate::ui::Wishes;

    #[test]
    fn what_happens_and_what_is_lost() {
        let change = |field: &str, from: Option<&str>, to: Option<&str>| FieldChange {
            field: field.to_owned(),
            from: from.map(str::to_owned),
            to: to.map(str::to_owned),
        };
        let vm = |action, changes, loses: &[&str]| PlannedVm {
            name: "web".parse().unwrap(),
            action,
            changes,
            restarts: action == PlanAction::Update,
            loses: loses.iter().map(ToString::to_string).collect(),
        };
        let plan = Plan {
            vms: vec![
                vm(
                    PlanAction::Update,
                    vec![change("memory", Some("512 MiB"), Some("1 GiB")), change("cmd", Some("[]"), None)],
                    &["all of it"],
                ),
                vm(PlanAction::Unchanged, vec![], &[]),
            ],
        };
        let expected =
            "~ update web (restarts)\n    memory  512 MiB -> 1 GiB\n    cmd     [] -> nothing\n    lost: all of it\n= web: unchanged\n";
        assert_eq!(text(&plan, &Terminal::new(Wishes::default())), expected);
    }
}
