//! Where the passphrase of the user's key comes from: a file, the environment, or the person at the terminal.

use std::{
    fs,
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use form_api::ErrorCode;
use zeroize::Zeroizing;

use crate::{failure::Failure, ui::Terminal};

pub type Passphrase = Zeroizing<String>;

/// The longest passphrase, in bytes.
const LONGEST: u64 = 4096;

/// Who can be asked for a passphrase, in this order.
pub struct Source<'a> {
    pub file: Option<PathBuf>,
    /// Names of the flag and the variable, for the error when nobody answers.
    pub flag: &'static str,
    pub variable: &'static str,
    /// `None` asks nobody.
    pub terminal: Option<&'a Terminal>,
}

impl<'a> Source<'a> {
    /// Of the passphrase that the key has.
    pub fn of_the_key(file: Option<&Path>, terminal: Option<&'a Terminal>) -> Self {
        Self { file: file.map(Path::to_owned), flag: "--passphrase-file", variable: "FORM_PASSPHRASE", terminal }
    }

    /// # Errors
    /// When there is none, or nobody can be asked.
    pub fn get(&self, question: &str) -> Result<Passphrase, Failure> {
        match self.given()? {
            Some(passphrase) => Ok(passphrase),
            None => self.person()?.password(question, false),
        }
    }

    /// A new passphrase, which a person has to write twice.
    ///
    /// # Errors
    /// As [`Source::get`], and when it is empty.
    pub fn get_new(&self, question: &str) -> Result<Passphrase, Failure> {
        let passphrase = match self.given()? {
            Some(passphrase) => passphrase,
            None => self.person()?.password(question, true)?,
        };
        if passphrase.is_empty() { Err(Failure::usage("a passphrase is not empty")) } else { Ok(passphrase) }
    }

    fn given(&self) -> Result<Option<Passphrase>, Failure> {
        if let Some(file) = &self.file {
            return read(file).map(Some);
        }
        Ok(std::env::var(self.variable).ok().map(Zeroizing::new))
    }

    fn person(&self) -> Result<&'a Terminal, Failure> {
        self.terminal.filter(|terminal| terminal.can_ask()).ok_or_else(|| {
            Failure::usage("a passphrase is needed, and nobody can be asked for it here")
                .hint(format!("name a file that holds it with `{} FILE`, or set {} in the environment", self.flag, self.variable))
        })
    }
}

/// The first line of a file. A file for everybody's eyes is refused; a pipe is fine.
fn read(path: &Path) -> Result<Passphrase, Failure> {
    let failed = |error: std::io::Error| Failure::io("read", path, &error);
    let file = fs::File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if metadata.is_file() && metadata.permissions().mode() & 0o077 != 0 {
        return Err(Failure::new(ErrorCode::NotAllowed, format!("others may read the passphrase in {}", path.display()))
            .hint(format!("`chmod 600 {}`", path.display())));
    }
    let mut text = Zeroizing::new(String::new());
    file.take(LONGEST).read_to_string(&mut text).map_err(failed)?;
    Ok(Zeroizing::new(text.lines().next().unwrap_or_default().to_owned()))
}
