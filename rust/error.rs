//! One error type: a closed kind, a sentence, and the cause.
//!
//! A miss is never an error. An `Error` says that a request was malformed or that a store cannot be opened;
//! everything that goes wrong with a cached block while serving is a [`Miss`](crate::stats::Miss) instead.

use std::fmt;

/// What kind of thing went wrong; bindings map each kind to one exception type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// An argument does not make sense: tokens, tensors, sizes.
    Input,
    /// A setting does not make sense.
    Config,
    /// The directory cannot be read or written.
    Io,
    /// Another process holds the directory.
    Locked,
    /// The directory was written by another format version, or with another secret.
    Format,
    /// The model is already registered differently.
    ModelExists,
    /// No such model is registered.
    ModelNotFound,
    /// The store, or the lease, was closed before.
    Closed,
}

/// An error with its kind, its sentence and its cause.
#[derive(Debug, thiserror::Error)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    #[source]
    source: Option<std::io::Error>,
}

impl Error {
    /// An error of `kind` whose message names the value, what was expected and what to do.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// An I/O error together with what was being done.
    pub fn io(message: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self { kind: ErrorKind::Io, message: message.into(), source: Some(source.into()) }
    }

    /// The kind of this error.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The operating system's error number, if the cause has one.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.source.as_ref().and_then(std::io::Error::raw_os_error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Some(source) => write!(f, "{}: {source}", self.message),
            None => f.write_str(&self.message),
        }
    }
}

/// The result of everything that can fail in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Shorthand for an input error.
pub(crate) fn input(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Input, message)
}
