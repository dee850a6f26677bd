//! Preparations for `execve`.

use std::ffi::{CString, NulError};

/// Marks every descriptor from 3 on close-on-exec. No descriptor of the guest may get into a
/// container.
pub(super) fn close_on_exec() {
    // SAFETY: the call only marks descriptors; it closes none that is in use.
    unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) };
}

/// Arguments or an environment as C strings.
pub(super) fn c_strings(texts: &[String]) -> Result<Vec<CString>, NulError> {
    texts.iter().map(|text| CString::new(text.as_bytes())).collect()
}

/// The null-terminated array of pointers that `execve` takes. The strings have to outlive it.
pub(super) fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect()
}
