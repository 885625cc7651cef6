//! What the log asks of a disk: six calls, so that a test can pull its plug. Segments are known by their numbers.

use std::fs::{File, OpenOptions};
use std::io::{Result, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A folder of segments. What is created or removed is only there, or gone, after a power cut once the folder is synced.
pub trait Disk: Send + Sync {
    /// The segments that are there, in order.
    fn list(&self) -> Result<Vec<u64>>;

    fn read(&self, number: u64) -> Result<Vec<u8>>;

    /// Makes a new segment and claims `bytes` for it, so that what was promised room has it.
    fn create(&self, number: u64, bytes: u64) -> Result<Arc<dyn Segment>>;

    fn unlink(&self, number: u64) -> Result<()>;

    /// Keeps a segment as evidence, under a name that no start reads again.
    fn set_aside(&self, number: u64) -> Result<()>;

    /// Makes what was created, removed and renamed survive a power cut.
    fn sync_folder(&self) -> Result<()>;
}

/// A segment that is written to.
pub trait Segment: Send + Sync {
    /// Whole or an error: then nobody knows how much of it.
    fn append(&self, bytes: &[u8]) -> Result<()>;

    /// Makes what was appended survive a power cut. An error is said once: what it was about may be lost though a second
    /// call succeeds, so there must be no second call.
    fn sync(&self) -> Result<()>;
}

/// A folder of the machine's.
#[derive(Clone, Debug)]
pub struct RealDisk {
    folder: PathBuf,
}

impl RealDisk {
    pub fn new(folder: PathBuf) -> RealDisk {
        RealDisk { folder }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn path(&self, number: u64) -> PathBuf {
        self.folder.join(format!("{number:012}.wal"))
    }
}

impl Disk for RealDisk {
    fn list(&self) -> Result<Vec<u64>> {
        let mut numbers = Vec::new();
        for entry in std::fs::read_dir(&self.folder)? {
            let name = entry?.file_name();
            let number = name.to_str().and_then(|name| name.strip_suffix(".wal"));
            numbers.extend(number.and_then(|number| number.parse::<u64>().ok()));
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    fn read(&self, number: u64) -> Result<Vec<u8>> {
        std::fs::read(self.path(number))
    }

    fn create(&self, number: u64, bytes: u64) -> Result<Arc<dyn Segment>> {
        let path = self.path(number);
        let file = OpenOptions::new().create_new(true).append(true).open(&path)?;
        // KEEP_SIZE: the file's length stays what was written, so that recovery never sees a tail of zeros.
        match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::KEEP_SIZE, 0, bytes) {
            // Not every file system can claim space ahead; there the bound in bytes is all we have.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Ok(Arc::new(file)),
            Err(error) => {
                // An empty segment is no harm, if even this fails.
                let _ = std::fs::remove_file(&path);
                Err(error.into())
            }
        }
    }

    fn unlink(&self, number: u64) -> Result<()> {
        std::fs::remove_file(self.path(number))
    }

    fn set_aside(&self, number: u64) -> Result<()> {
        let path = self.path(number);
        std::fs::rename(&path, path.with_extension("damaged"))
    }

    fn sync_folder(&self) -> Result<()> {
        File::open(&self.folder)?.sync_all()
    }
}

impl Segment for File {
    fn append(&self, bytes: &[u8]) -> Result<()> {
        let mut file = self;
        file.write_all(bytes)
    }

    fn sync(&self) -> Result<()> {
        self.sync_data()
    }
}
