//! How a manifest travels: as one zstd stream. It names every block of a file system, so it grows with the data (one MiB for each
//! GiB) and is no body of a request that somebody holds in memory.

use std::io::{self, Write};

use zstd::stream::write::Decoder;

use crate::manifest::MAX_MANIFEST_BYTES;

/// The largest window of a stream, as its logarithm: 8 MiB. A larger one would make the receiver hold as much.
const MAX_WINDOW: u32 = 23;

/// The text as one zstd stream.
///
/// # Errors
/// When the library cannot allocate.
pub fn pack(text: &[u8]) -> io::Result<Vec<u8>> {
    zstd::bulk::compress(text, 3)
}

/// Takes a stream in pieces and writes the text that is in it, at most [`MAX_MANIFEST_BYTES`].
pub struct Unpacker<W: Write + 'static> {
    decoder: Decoder<'static, Bounded<W>>,
}

impl<W: Write> Unpacker<W> {
    /// # Errors
    /// When the library cannot allocate.
    pub fn new(sink: W) -> io::Result<Self> {
        let mut decoder = Decoder::new(Bounded { sink, left: MAX_MANIFEST_BYTES })?;
        decoder.window_log_max(MAX_WINDOW)?;
        Ok(Self { decoder })
    }

    /// Takes the next piece.
    ///
    /// # Errors
    /// When it is no zstd stream, the text grows too long, or the sink fails.
    pub fn write(&mut self, piece: &[u8]) -> io::Result<()> {
        self.decoder.write_all(piece)
    }

    /// The sink, with everything in it that came so far. Whether that is the whole text its digest says.
    ///
    /// # Errors
    /// Those of the sink.
    pub fn finish(mut self) -> io::Result<W> {
        self.decoder.flush()?;
        Ok(self.decoder.into_inner().sink)
    }
}

struct Bounded<W> {
    sink: W,
    left: usize,
}

impl<W: Write> Write for Bounded<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.left {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a manifest of more than {} MiB", MAX_MANIFEST_BYTES >> 20)));
        }
        let written = self.sink.write(bytes)?;
        self.left -= written;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpack(packed: &[u8], piece: usize) -> io::Result<Vec<u8>> {
        let mut unpacker = Unpacker::new(Vec::new())?;
        packed.chunks(piece).try_for_each(|piece| unpacker.write(piece))?;
        unpacker.finish()
    }

    #[test]
    fn a_text_survives_in_pieces_of_any_size() {
        let text: Vec<u8> = (0..200_000u32).flat_map(|number| format!("{:08x}", number.wrapping_mul(2_654_435_761)).into_bytes()).collect();
        let packed = pack(&text).unwrap();
        assert!(packed.len() < text.len());
        for piece in [1000, 65_536, packed.len()] {
            assert!(unpack(&packed, piece).unwrap() == text, "{piece}");
        }
        assert_ne!(unpack(&packed[..packed.len() / 2], 1000).unwrap(), text, "half a stream is not the text");
    }

    #[test]
    fn a_small_stream_that_unfolds_to_much_is_refused() {
        let bomb = pack(&vec![b' '; MAX_MANIFEST_BYTES + 1]).unwrap();
        assert!(bomb.len() < 1 << 20);
        assert!(unpack(&bomb, 4096).unwrap_err().to_string().contains("320 MiB"));
        assert!(unpack(b"no stream at all", 4096).is_err());
    }
}
