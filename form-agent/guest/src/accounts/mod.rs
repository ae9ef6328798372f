//! User accounts: the files of passwd(5), shadow(5), group(5) and gshadow(5), and what belongs to an account besides.

mod access;
mod apply;
mod database;
mod table;

pub use access::key_lines;
pub use apply::apply;
pub use database::password_usable;
pub use table::{Row, Table};

#[cfg(test)]
pub mod tests {
    pub use super::database::tests::user;
}
