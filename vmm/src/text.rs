//! Text of the guest for people.

/// Returns true if a terminal may get this character of a guest's.
///
/// Control characters are refused, because they move the cursor and worse. Format characters are
/// refused, because they change how other characters look. Those for right-to-left text make a line
/// read differently.
pub fn is_showable(c: char) -> bool {
    !c.is_control() && !is_format(c)
}

/// The general categories Cf, Zl and Zp (Unicode 16).
fn is_format(c: char) -> bool {
    matches!(c,
        '\u{ad}'
        | '\u{600}'..='\u{605}'
        | '\u{61c}'
        | '\u{6dd}'
        | '\u{70f}'
        | '\u{890}'..='\u{891}'
        | '\u{8e2}'
        | '\u{180e}'
        | '\u{200b}'..='\u{200f}'
        | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}'
        | '\u{feff}'
        | '\u{fff9}'..='\u{fffb}'
        | '\u{110bd}'
        | '\u{110cd}'
        | '\u{13430}'..='\u{1343f}'
        | '\u{1bca0}'..='\u{1bca3}'
        | '\u{1d173}'..='\u{1d17a}'
        | '\u{e0001}'
        | '\u{e0020}'..='\u{e007f}'
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_how_text_is_shown_is_not() {
        for c in ['\x1b', '\n', '\u{7f}', '\u{9b}', '\u{202e}', '\u{2066}', '\u{200f}', '\u{e0041}']
        {
            assert!(!is_showable(c), "{c:?}");
        }
        for c in ['a', ' ', '~', 'ä', '\u{a0}', 'ش', '好', '🙂'] {
            assert!(is_showable(c), "{c:?}");
        }
    }
}
