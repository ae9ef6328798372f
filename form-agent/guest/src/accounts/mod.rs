//! User accounts: the files of passwd(5), shadow(5), group(5) and gshadow(5), and what belongs to an account besides.

mod access;
mod apply;
mod database;
mod table;

pub use apply::apply;
pub use table::{Row, Table};
