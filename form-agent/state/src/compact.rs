//! A redb file keeps the room of what was replaced and removed. Between two runs of an agent is the moment to give it back.

use std::path::Path;

use redb::Database;

/// A file below this size is let be, in bytes.
const WORTH: u64 = 4 << 20;

/// Whether making a file of `size` bytes with `used` ones in it smaller is worth reading and writing it.
const fn pays(size: u64, used: u64) -> bool {
    size >= WORTH && used <= size / 2
}

/// Makes the file of a database smaller when at least half of it is room that nothing is in. Gives back the sizes before and after.
///
/// # Errors
/// What the database says; it is then as it was.
pub fn compact(database: &mut Database, path: &Path) -> Result<Option<(u64, u64)>, redb::Error> {
    let size = || std::fs::metadata(path).map(|metadata| metadata.len()).map_err(redb::Error::Io);
    let before = size()?;
    if before < WORTH {
        return Ok(None);
    }
    let transaction = database.begin_write()?;
    let stats = transaction.stats()?;
    transaction.abort()?;
    let used = stats.stored_bytes() + stats.metadata_bytes();
    if !pays(before, used) {
        return Ok(None);
    }
    // It stops where a page cannot be moved: again until nothing moves, but not for ever.
    for _ in 0..8 {
        if !database.compact()? {
            break;
        }
    }
    Ok(Some((before, size()?)))
}

#[cfg(test)]
mod tests {
    use redb::{ReadableDatabase, TableDefinition};

    use super::*;

    const TABLE: TableDefinition<u64, &[u8]> = TableDefinition::new("table");

    #[test]
    fn room_is_given_back_when_there_is_much_of_it() {
        assert!(pays(WORTH, WORTH / 2) && !pays(WORTH, WORTH / 2 + 1) && !pays(WORTH - 1, 0));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("test.redb");
        let mut database = Database::create(&path).unwrap();
        assert_eq!(compact(&mut database, &path).unwrap(), None, "a new file is small");
        let write = |keys: std::ops::Range<u64>, value: Option<&[u8]>| {
            let transaction = database.begin_write().unwrap();
            {
                let mut table = transaction.open_table(TABLE).unwrap();
                for key in keys {
                    match value {
                        Some(value) => drop(table.insert(key, value).unwrap()),
                        None => drop(table.remove(key).unwrap()),
                    }
                }
            }
            transaction.commit().unwrap();
        };
        write(0..1000, Some(&[7; 10_000]));
        write(1..1000, None);
        let (before, after) = compact(&mut database, &path).unwrap().unwrap();
        assert!(before > 8 << 20 && after < before / 2, "{before} {after}");
        let table = database.begin_read().unwrap().open_table(TABLE).unwrap();
        assert_eq!(table.get(0).unwrap().unwrap().value(), [7; 10_000]);
    }
}
