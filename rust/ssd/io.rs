//! The file system as the SSD tier sees it: a few positioned calls behind two traits, so that tests can inject faults.

use rustix::fs::{FallocateFlags, Mode, OFlags};
use std::io;
use std::path::{Path, PathBuf};

/// Opens and removes files.
pub trait Io: Send + Sync + std::fmt::Debug {
    /// Opens a file for reading and writing, creating it if asked.
    ///
    /// # Errors
    /// Whatever the file system says.
    fn open(&self, path: &Path, create: bool) -> io::Result<Box<dyn IoFile>>;

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
}

/// The real file system, by `pread` and `pwritev`, with `O_DIRECT` where it is to be had.
#[derive(Debug, Default)]
pub struct FileIo;

impl Io for FileIo {
    fn open(&self, path: &Path, create: bool) -> io::Result<Box<dyn IoFile>> {
        let mut flags = OFlags::RDWR | OFlags::CLOEXEC;
        if create {
            flags |= OFlags::CREATE;
        }
        let mode = Mode::RUSR | Mode::WUSR;
        let open = |flags| rustix::fs::open(path, flags, mode);
        // tmpfs and some overlays refuse O_DIRECT with EINVAL.
        let (fd, direct) = match open(flags | OFlags::DIRECT) {
            Ok(fd) => (fd, true),
            Err(rustix::io::Errno::INVAL) => (open(flags)?, false),
            Err(e) => return Err(e.into()),
        };
        Ok(Box::new(File { fd, direct }))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn replace(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)?;
        to.parent().map_or(Ok(()), |directory| std::fs::File::open(directory)?.sync_all())
    }
}

#[derive(Debug)]
struct File {
    fd: std::os::fd::OwnedFd,
    direct: bool,
}

impl IoFile for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
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

    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
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

    fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), offset, bytes)?)
    }

    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.fd, flags, offset, bytes)?)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.fd)?)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(rustix::fs::fstat(&self.fd)?.st_size as u64)
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(rustix::fs::fstat(&self.fd)?.st_blocks as u64 * 512)
    }

    fn direct(&self) -> bool {
        self.direct
    }
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
