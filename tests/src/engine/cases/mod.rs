//! What is to hold for the containers of any engine, one function a case.

pub mod build;
pub mod exec;
pub mod files;
pub mod life;
pub mod limits;
pub mod network;
pub mod page;
pub mod pods;
pub mod process;
pub mod security;
pub mod watch;
pub mod work;
