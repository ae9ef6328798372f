//! Times as people say them.

use std::time::Duration;

use jiff::Timestamp;

/// How long ago: `5s`, `3m`, `2h`, `9d`.
pub fn age(since: Timestamp, now: Timestamp) -> String {
    let seconds = now.as_second().saturating_sub(since.as_second()).max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// How long it took: `0.3 s`, `12 s`, `3 min 5 s`.
pub fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..10 => format!("{:.1} s", duration.as_secs_f64()),
        10..120 => format!("{seconds} s"),
        _ => format!("{} min {} s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_and_spans() {
        let at = |second| Timestamp::from_second(second).unwrap();
        assert_eq!([age(at(0), at(5)), age(at(0), at(7199)), age(at(0), at(200_000)), age(at(9), at(1))], ["5s", "119m", "2d", "0s"]);
        assert_eq!([span(Duration::from_millis(320)), span(Duration::from_secs(185))], ["0.3 s", "3 min 5 s"]);
    }
}
