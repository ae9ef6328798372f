//! Questions. Off a terminal nothing is asked: the command fails and names what answers the question instead.

use dialoguer::{Confirm, Input, Password, Select, theme::ColorfulTheme};
use form_api::ErrorCode;
use zeroize::Zeroizing;

use super::Terminal;
use crate::failure::Failure;

impl Terminal {
    /// Asks whether to go on; `-y` (`FORM_YES`) answers yes.
    ///
    /// # Errors
    /// When nobody can be asked, or the answer is no.
    pub fn confirm(&self, question: &str) -> Result<(), Failure> {
        if self.wishes.yes {
            return Ok(());
        }
        if !self.can_ask() {
            return Err(Failure::usage(format!("this wants an answer, and nobody can be asked here: {question}"))
                .hint("answer with the flag `-y`, or set FORM_YES=true in the environment"));
        }
        let answer =
            self.progress.suspend(|| Confirm::with_theme(theme(self).as_ref()).with_prompt(question).default(false).interact_opt());
        match answer {
            Ok(Some(true)) => Ok(()),
            Ok(_) => Err(Failure::new(ErrorCode::Failed, "stopped: nothing was changed")),
            Err(error) => Err(unanswered(&error)),
        }
    }

    /// Asks for a text that `check` takes.
    ///
    /// # Errors
    /// When the terminal goes away.
    pub fn input(&self, question: &str, default: &str, check: impl Fn(&str) -> Result<(), String>) -> Result<String, Failure> {
        let theme = theme(self);
        let mut input = Input::<String>::with_theme(theme.as_ref()).with_prompt(question).allow_empty(true);
        if !default.is_empty() {
            input = input.default(default.to_owned());
        }
        input.validate_with(|text: &String| check(text)).interact_text().map_err(|error| unanswered(&error))
    }

    /// Asks for one of several.
    ///
    /// # Errors
    /// When the terminal goes away.
    pub fn select(&self, question: &str, choices: &[&str]) -> Result<usize, Failure> {
        Select::with_theme(theme(self).as_ref())
            .with_prompt(question)
            .items(choices)
            .default(0)
            .interact()
            .map_err(|error| unanswered(&error))
    }

    /// Asks for what is not shown; with `twice`, until it was written the same way twice.
    ///
    /// # Errors
    /// When the terminal goes away.
    pub fn password(&self, question: &str, twice: bool) -> Result<Zeroizing<String>, Failure> {
        let theme = theme(self);
        let mut password = Password::with_theme(theme.as_ref()).with_prompt(question).allow_empty_password(true);
        if twice {
            password = password.with_confirmation("The same again", "That was another one");
        }
        self.progress.suspend(|| password.interact()).map(Zeroizing::new).map_err(|error| unanswered(&error))
    }

    pub const fn says_yes(&self) -> bool {
        self.wishes.yes
    }
}

fn theme(terminal: &Terminal) -> Box<dyn dialoguer::theme::Theme> {
    if terminal.colours_errors() { Box::new(ColorfulTheme::default()) } else { Box::new(dialoguer::theme::SimpleTheme) }
}

fn unanswered(error: &dialoguer::Error) -> Failure {
    Failure::failed(format!("the question was not answered: {error}"))
}
