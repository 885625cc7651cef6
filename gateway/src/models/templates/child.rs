//! The child's side: one template, and talks until nobody asks any more.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use glassgate_runtime::{Message, Template, TemplateSource};
use rustix::process::Resource;

use super::{MEMORY_BYTES, READY, frames};
use crate::models::limits;

/// Renders talks from the socket that is this process's standard input, until its other end is closed.
///
/// # Errors
/// When there is no such socket, or this process cannot be limited.
pub fn serve() -> Result<(), String> {
    let stream = io::stdin().as_fd().try_clone_to_owned().map_err(|error| error.to_string())?;
    let mut stream = UnixStream::from(stream);
    // Who is in the midst of a long talk would not see that the other end is gone.
    #[cfg(target_os = "linux")]
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(|error| format!("cannot tie this process to its parent: {error}"))?;
    limits::set(&[(Resource::As, limits::mapped_bytes() + MEMORY_BYTES), (Resource::Nofile, 0)])?;
    let source = frames::read(&mut stream, usize::MAX).map_err(|error| error.to_string())?;
    let source: TemplateSource = serde_json::from_slice(&source).map_err(|error| error.to_string())?;
    let template = Template::new(&source);
    frames::write(&mut stream, READY).map_err(|error| error.to_string())?;
    while let Ok(talk) = frames::read(&mut stream, usize::MAX) {
        let messages: Vec<Message> = serde_json::from_slice(&talk).map_err(|error| error.to_string())?;
        let template = template.as_ref().map_err(ToString::to_string);
        let said = template.and_then(|template| template.render(&messages).map_err(|error| error.to_string()));
        let said = serde_json::to_vec(&said).map_err(|error| error.to_string())?;
        let bytes_max = frames::said_bytes_max(talk.len());
        let said = if said.len() <= bytes_max { said } else { too_long(bytes_max)? };
        frames::write(&mut stream, &said).map_err(|error| error.to_string())?;
    }
    Ok(())
}

fn too_long(bytes_max: usize) -> Result<Vec<u8>, String> {
    let why = format!("it makes more than {} KiB of these messages", bytes_max >> 10);
    serde_json::to_vec(&Err::<String, _>(why)).map_err(|error| error.to_string())
}
