//! The file system as the SSD tier sees it: a few positioned calls behind two traits, so that tests can inject faults.
//!
//! Many transfers at once go through a [`Queue`], by the engine that was chosen when the store was opened.

use super::queue::{Queue, Threads};
use super::uring::Rings;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;
use rustix::fs::{FallocateFlags, Mode, OFlags};
use std::io;
use std::path::{Path, PathBuf};

/// Opens and removes files.
pub trait Io: Send + Sync + std::fmt::Debug {
    /// Opens a file.
    ///
    /// # Errors
    /// Whatever the file system says.
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn IoFile>>;

    /// Removes a file.
    ///
    /// # Errors
    /// Whatever the file system says.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Gives a file another's name, whose place it takes, durably; both are in one directory.
    ///
    /// # Errors
    /// Whatever the file system says.
    fn replace(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// What it reads and writes with, and why not with something faster.
    fn engine(&self) -> (&'static str, Option<String>) {
        ("pread", None)
    }
}

/// What a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// To be read.
    Read,
    /// To be read and written.
    Write,
    /// The same, and made if it is not there.
    Create,
}

/// One open file. Offsets, lengths and addresses of reads and writes are multiples of 4 KiB.
#[expect(clippy::len_without_is_empty, reason = "an empty file is of no interest")]
pub trait IoFile: Send + Sync + std::fmt::Debug {
    /// Reads at an offset; fewer bytes than asked means the file ends there.
    ///
    /// # Errors
    /// Whatever the file system says.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes all parts, one after the other.
    ///
    /// # Errors
    /// Whatever the file system says; a part may have been written.
    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()>;

    /// Reserves disk blocks for a range, extending the file.
    ///
    /// # Errors
    /// Whatever the file system says, `ENOSPC` among it.
    fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()>;

    /// Gives the disk blocks of a range back.
    ///
    /// # Errors
    /// Whatever the file system says.
    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()>;

    /// Waits until what was written is durable.
    ///
    /// # Errors
    /// Whatever the file system says.
    fn sync(&self) -> io::Result<()>;

    /// Length of the file.
    ///
    /// # Errors
    /// Whatever the file system says.
    fn len(&self) -> io::Result<u64>;

    /// Bytes that the file system has allocated to it.
    ///
    /// # Errors
    /// Whatever the file system says.
    fn allocated(&self) -> io::Result<u64>;

    /// Whether reads and writes go past the page cache.
    fn direct(&self) -> bool;

    /// A queue for many transfers at once; `None`: they are done one by one, by the calls above.
    fn queue(&self) -> Option<Box<dyn Queue + '_>> {
        None
    }
}

/// What reads and writes many places of a file at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Engine {
    /// io_uring where the kernel allows it, else threads.
    #[default]
    Auto,
    /// io_uring, or an error.
    IoUring,
    /// Threads that call `pread` and `pwritev`.
    Pread,
}

impl Engine {
    /// By its name: `auto`, `io_uring` or `pread`.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "io_uring" => Ok(Self::IoUring),
            "pread" => Ok(Self::Pread),
            _ => {
                let message = format!("ssd.engine is {name:?}, expected one of auto, io_uring, pread");
                Err(Error::new(ErrorKind::Config, message))
            }
        }
    }
}

/// The real file system, with `O_DIRECT` where it is to be had.
#[derive(Debug)]
pub struct FileIo {
    transfers: Transfers,
    /// Why it is not io_uring that was asked for first.
    refused: Option<String>,
}

#[derive(Debug, Clone)]
enum Transfers {
    Rings(Arc<Rings>),
    Threads(Arc<Threads>),
}

impl Default for FileIo {
    fn default() -> Self {
        Self { transfers: Transfers::Threads(Arc::default()), refused: None }
    }
}

impl FileIo {
    /// With an engine.
    ///
    /// # Errors
    /// The kernel refuses io_uring, and nothing else was asked for.
    pub fn new(engine: Engine) -> Result<Self> {
        let rings = match engine {
            Engine::Pread => return Ok(Self::default()),
            Engine::Auto | Engine::IoUring => Rings::new(),
        };
        match (rings, engine) {
            (Ok(rings), _) => Ok(Self { transfers: Transfers::Rings(Arc::new(rings)), refused: None }),
            (Err(e), Engine::IoUring) => {
                let message = "io_uring is refused here; set ssd.engine to auto or pread, or allow it in the container";
                Err(Error::io(message, e))
            }
            (Err(e), _) => Ok(Self { refused: Some(e.to_string()), ..Self::default() }),
        }
    }
}

impl Io for FileIo {
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn IoFile>> {
        let flags = OFlags::CLOEXEC
            | match access {
                Access::Read => OFlags::RDONLY,
                Access::Write => OFlags::RDWR,
                Access::Create => OFlags::RDWR | OFlags::CREATE,
            };
        let mode = Mode::RUSR | Mode::WUSR;
        let open = |flags| rustix::fs::open(path, flags, mode);
        // tmpfs and some overlays refuse O_DIRECT with EINVAL.
        let (fd, direct) = match open(flags | OFlags::DIRECT) {
            Ok(fd) => (fd, true),
            Err(rustix::io::Errno::INVAL) => (open(flags)?, false),
            Err(e) => return Err(e.into()),
        };
        let handle = Handle { fd, direct };
        Ok(Box::new(File { handle: Arc::new(handle), transfers: self.transfers.clone() }))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn replace(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)?;
        to.parent().map_or(Ok(()), |directory| std::fs::File::open(directory)?.sync_all())
    }

    fn engine(&self) -> (&'static str, Option<String>) {
        let name = match self.transfers {
            Transfers::Rings(_) => "io_uring",
            Transfers::Threads(_) => "pread",
        };
        (name, self.refused.clone())
    }
}

#[derive(Debug)]
struct File {
    handle: Arc<Handle>,
    transfers: Transfers,
}

/// An open file.
#[derive(Debug)]
pub(super) struct Handle {
    fd: std::os::fd::OwnedFd,
    direct: bool,
}

impl std::os::fd::AsRawFd for Handle {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}

impl IoFile for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.handle.read_at(buffer, offset)
    }

    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        self.handle.write_at(parts, offset)
    }

    fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(&self.handle.fd, FallocateFlags::empty(), offset, bytes)?)
    }

    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.handle.fd, flags, offset, bytes)?)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.handle.fd)?)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(rustix::fs::fstat(&self.handle.fd)?.st_size as u64)
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(rustix::fs::fstat(&self.handle.fd)?.st_blocks as u64 * 512)
    }

    fn direct(&self) -> bool {
        self.handle.direct
    }

    fn queue(&self) -> Option<Box<dyn Queue + '_>> {
        match &self.transfers {
            Transfers::Rings(rings) => Some(Box::new(rings.queue(&self.handle)?)),
            Transfers::Threads(threads) => Some(Box::new(threads.queue(self.handle.clone())?)),
        }
    }
}

impl Handle {
    pub(super) fn is_direct(&self) -> bool {
        self.direct
    }

    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match rustix::io::pread(&self.fd, &mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                // A direct read that ends at an odd length has met the end of the file.
                Ok(n) if self.direct && n % 512 != 0 => {
                    done += n;
                    break;
                }
                Ok(n) => done += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(done)
    }

    pub(super) fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        let mut slices: Vec<_> = parts.iter().map(|p| io::IoSlice::new(p)).collect();
        let mut rest = slices.as_mut_slice();
        let mut offset = offset;
        io::IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            // The kernel takes at most IOV_MAX (1,024) parts a call.
            let batch = rest.len().min(1024);
            match rustix::io::pwritev(&self.fd, &rest[..batch], offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    offset += n as u64;
                    io::IoSlice::advance_slices(&mut rest, n);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

/// Whether somebody has the lock on a directory, as far as the system tells. It is not taken for that: whoever opens the
/// directory at that instant would be refused.
pub(super) fn is_locked(directory: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let Ok(file) = std::fs::metadata(directory.join("lock")) else { return false };
    let (major, minor) = (rustix::fs::major(file.dev()), rustix::fs::minor(file.dev()));
    let name = format!("{major:02x}:{minor:02x}:{}", file.ino());
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    locks.lines().any(|line| line.contains("FLOCK") && line.split_whitespace().any(|word| word == name))
}

/// The exclusive lock on a store directory, held while it lives.
#[derive(Debug)]
pub(crate) struct DirectoryLock {
    fd: std::os::fd::OwnedFd,
}

impl DirectoryLock {
    /// Takes the lock, or says `WouldBlock` when another process has it.
    pub(crate) fn take(directory: &Path) -> io::Result<Self> {
        let path: PathBuf = directory.join("lock");
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?;
        rustix::fs::flock(&fd, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { fd })
    }

    /// Gives the lock free, also where a forked process inherited the descriptor.
    pub(crate) fn release(self) {
        // It cannot fail on a descriptor that holds a lock; if it did, closing it frees the lock.
        let _ = rustix::fs::flock(&self.fd, rustix::fs::FlockOperation::Unlock);
    }
}
