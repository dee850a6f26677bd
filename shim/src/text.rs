//! Text for messages. Text of guests and images is made safe for a terminal and a log.

pub(crate) use isopod_protocol::text::seconds;
use isopod_vmm::text::is_showable;

/// Makes text from the guest safe to show: one line, no control or format characters, bounded.
pub(crate) fn printable(text: &str) -> String {
    const MAX_CHARS: usize = 1024;
    let mut shown: String =
        text.chars().take(MAX_CHARS).map(|c| if is_showable(c) { c } else { ' ' }).collect();
    if text.chars().nth(MAX_CHARS).is_some() {
        shown.push_str("...");
    }
    shown
}

/// Quotes the text of an image for a message: on one line, whatever it holds.
pub(crate) fn quoted(bytes: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(bytes))
}
