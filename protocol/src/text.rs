//! Words of messages that both sides write.

use std::time::Duration;

/// Whole seconds of a time limit, as in `1 second` and `30 seconds`.
#[must_use]
pub fn seconds(limit: Duration) -> String {
    match limit.as_secs() {
        1 => "1 second".to_owned(),
        seconds => format!("{seconds} seconds"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_second_is_singular() {
        let texts = [1, 30].map(|limit| seconds(Duration::from_secs(limit)));
        assert_eq!(texts, ["1 second", "30 seconds"]);
    }
}
