//! The modes that a client wishes for its terminal (RFC 4254, section 8).

use std::io;

use russh::Pty;
use rustix::{
    fd::AsFd,
    termios::{ControlModes, InputModes, LocalModes, OptionalActions, OutputModes, SpecialCodeIndex, Termios, tcgetattr, tcsetattr},
};

/// Sets what the terminal understands; the rest is for other systems.
///
/// # Errors
/// When it is no terminal.
pub fn set(terminal: impl AsFd, wishes: &[(Pty, u32)]) -> io::Result<()> {
    let mut termios = tcgetattr(&terminal)?;
    for (mode, value) in wishes {
        apply(&mut termios, *mode, *value);
    }
    Ok(tcsetattr(&terminal, OptionalActions::Now, &termios)?)
}

fn apply(termios: &mut Termios, mode: Pty, value: u32) {
    let on = value != 0;
    if let Some(index) = character(mode) {
        // 255 says that the character is not used.
        termios.special_codes[index] = u8::try_from(value).ok().filter(|byte| *byte != 255).unwrap_or(0);
    } else if let Some(flag) = input(mode) {
        termios.input_modes.set(flag, on);
    } else if let Some(flag) = local(mode) {
        termios.local_modes.set(flag, on);
    } else if let Some(flag) = output(mode) {
        termios.output_modes.set(flag, on);
    } else {
        match mode {
            Pty::CS7 if on => set_size(termios, ControlModes::CS7),
            Pty::CS8 if on => set_size(termios, ControlModes::CS8),
            Pty::PARENB => termios.control_modes.set(ControlModes::PARENB, on),
            Pty::PARODD => termios.control_modes.set(ControlModes::PARODD, on),
            _ => {}
        }
    }
}

fn set_size(termios: &mut Termios, size: ControlModes) {
    termios.control_modes.remove(ControlModes::CSIZE);
    termios.control_modes.insert(size);
}

const fn character(mode: Pty) -> Option<SpecialCodeIndex> {
    Some(match mode {
        Pty::VINTR => SpecialCodeIndex::VINTR,
        Pty::VQUIT => SpecialCodeIndex::VQUIT,
        Pty::VERASE => SpecialCodeIndex::VERASE,
        Pty::VKILL => SpecialCodeIndex::VKILL,
        Pty::VEOF => SpecialCodeIndex::VEOF,
        Pty::VEOL => SpecialCodeIndex::VEOL,
        Pty::VEOL2 => SpecialCodeIndex::VEOL2,
        Pty::VSTART => SpecialCodeIndex::VSTART,
        Pty::VSTOP => SpecialCodeIndex::VSTOP,
        Pty::VSUSP => SpecialCodeIndex::VSUSP,
        Pty::VREPRINT => SpecialCodeIndex::VREPRINT,
        Pty::VWERASE => SpecialCodeIndex::VWERASE,
        Pty::VLNEXT => SpecialCodeIndex::VLNEXT,
        Pty::VDISCARD => SpecialCodeIndex::VDISCARD,
        _ => return None,
    })
}

const fn input(mode: Pty) -> Option<InputModes> {
    Some(match mode {
        Pty::IGNPAR => InputModes::IGNPAR,
        Pty::PARMRK => InputModes::PARMRK,
        Pty::INPCK => InputModes::INPCK,
        Pty::ISTRIP => InputModes::ISTRIP,
        Pty::INLCR => InputModes::INLCR,
        Pty::IGNCR => InputModes::IGNCR,
        Pty::ICRNL => InputModes::ICRNL,
        Pty::IUCLC => InputModes::IUCLC,
        Pty::IXON => InputModes::IXON,
        Pty::IXANY => InputModes::IXANY,
        Pty::IXOFF => InputModes::IXOFF,
        Pty::IMAXBEL => InputModes::IMAXBEL,
        Pty::IUTF8 => InputModes::IUTF8,
        _ => return None,
    })
}

const fn local(mode: Pty) -> Option<LocalModes> {
    Some(match mode {
        Pty::ISIG => LocalModes::ISIG,
        Pty::ICANON => LocalModes::ICANON,
        Pty::ECHO => LocalModes::ECHO,
        Pty::ECHOE => LocalModes::ECHOE,
        Pty::ECHOK => LocalModes::ECHOK,
        Pty::ECHONL => LocalModes::ECHONL,
        Pty::NOFLSH => LocalModes::NOFLSH,
        Pty::TOSTOP => LocalModes::TOSTOP,
        Pty::IEXTEN => LocalModes::IEXTEN,
        Pty::ECHOCTL => LocalModes::ECHOCTL,
        Pty::ECHOKE => LocalModes::ECHOKE,
        _ => return None,
    })
}

const fn output(mode: Pty) -> Option<OutputModes> {
    Some(match mode {
        Pty::OPOST => OutputModes::OPOST,
        Pty::ONLCR => OutputModes::ONLCR,
        Pty::OCRNL => OutputModes::OCRNL,
        Pty::ONOCR => OutputModes::ONOCR,
        Pty::ONLRET => OutputModes::ONLRET,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use rustix::termios::Winsize;

    use super::*;

    #[test]
    fn a_terminal_is_as_the_client_wishes() {
        let size = Winsize { ws_row: 1, ws_col: 1, ws_xpixel: 0, ws_ypixel: 0 };
        let terminal = crate::terminal::open(rustix::process::geteuid().as_raw(), size).unwrap();
        let before = tcgetattr(&terminal.ours).unwrap();
        assert!(before.local_modes.contains(LocalModes::ECHO) && !before.input_modes.contains(InputModes::IUTF8));
        let wishes = [(Pty::ECHO, 0), (Pty::IUTF8, 1), (Pty::VERASE, 8), (Pty::VEOL2, 255), (Pty::VSTATUS, 7), (Pty::TTY_OP_ISPEED, 9600)];
        set(&terminal.ours, &wishes).unwrap();
        let after = tcgetattr(&terminal.ours).unwrap();
        assert!(!after.local_modes.contains(LocalModes::ECHO) && after.input_modes.contains(InputModes::IUTF8));
        assert_eq!((after.special_codes[SpecialCodeIndex::VERASE], after.special_codes[SpecialCodeIndex::VEOL2]), (8, 0));
        assert_eq!(after.output_modes, before.output_modes);
    }
}
