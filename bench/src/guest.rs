//! What a real guest does on the mount. Runs inside it, by this same program: the guest's root is the host's tree.
//!
//! Each row prints a line when its preparations are done and one when its operations are; the host, which reads them,
//! takes the server's CPU time at both. See [`Mark`].

use std::{
    env,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use rustix::fs::{major, minor};

use crate::{
    client::fuse::O_DIRECT,
    machine::median,
    material::{CLONE_SOURCE, SQL, SQL_TRANSACTIONS, TREE_ARCHIVE},
};

/// Bytes of the file for direct I/O, and of the one for buffered I/O.
const DIRECT_FILE_LEN: u64 = 64 << 20;
const BUFFERED_FILE_LEN: u64 = 128 << 20;

/// Name of the file for buffered I/O.
const BUFFERED_FILE: &str = "buffered";

/// Lengths of requests.
const SMALL: usize = 4 << 10;
const LARGE: usize = 1 << 20;

/// Threads of the rows with eight jobs.
const JOBS: u64 = 8;

/// Files that exist before the rows that only look at them or change them.
const STANDING_FILES: u64 = 100;

/// Start of the lines that tell the host what happens.
const MARK: &str = "@@row ";

/// A line for the host.
#[derive(Debug, Clone, PartialEq)]
pub enum Mark {
    /// The operations of a row begin.
    Begin(String),
    /// They have ended.
    End {
        /// The row.
        row: String,
        /// What they came to.
        done: Done,
    },
    /// They could not be done.
    Failed {
        /// The row.
        row: String,
        /// One line.
        why: String,
    },
}

/// The operations of a row, all together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Done {
    /// How many there were: requests, files, or bytes.
    pub amount: f64,
    /// How long they took.
    pub elapsed: Duration,
    /// Median of their latencies, where they were taken.
    pub median: Option<Duration>,
}

impl Mark {
    /// The mark of a line, if it is one.
    pub fn parse(line: &str) -> Option<Self> {
        let line = line.strip_prefix(MARK)?;
        if let Some((row, why)) = line.split_once(" failed ") {
            return Some(Self::Failed { row: row.into(), why: why.into() });
        }
        let words: Vec<&str> = line.split(' ').collect();
        match *words.as_slice() {
            [row, "begin"] => Some(Self::Begin(row.into())),
            [row, "end", amount, elapsed, median] => Some(Self::End {
                row: row.into(),
                done: Done {
                    amount: amount.parse().ok()?,
                    elapsed: Duration::from_nanos(elapsed.parse().ok()?),
                    median: median.parse().ok().map(Duration::from_nanos),
                },
            }),
            _ => None,
        }
    }

    fn print(&self) {
        match self {
            Self::Begin(row) => println!("{MARK}{row} begin"),
            Self::End { row, done: Done { amount, elapsed, median } } => {
                let median = median.map_or("-".into(), |median| median.as_nanos().to_string());
                println!("{MARK}{row} end {amount} {} {median}", elapsed.as_nanos());
            }
            Self::Failed { row, why } => println!("{MARK}{row} failed {}", why.replace('\n', " ")),
        }
    }
}

/// What a row does, by the name of the row.
pub type Work = fn(&Stage) -> anyhow::Result<()>;

/// Where and how much.
#[derive(Debug, Clone)]
pub struct Stage {
    /// A folder of its own on the mount.
    pub folder: PathBuf,
    /// Archive, repository and script, made by the host.
    pub material: PathBuf,
    /// Time for a row that can end at any time.
    pub round: Duration,
    /// Operations of a row that works on so many names.
    pub names: u64,
    row: &'static str,
}

impl Stage {
    /// A stage without a row.
    pub fn new(folder: PathBuf, material: PathBuf, round: Duration, names: u64) -> Self {
        Self { folder, material, round, names, row: "" }
    }

    /// Does one row's work, or tells the host why not.
    pub fn perform(&self, row: &'static str, work: Work) {
        if let Err(error) = self.prepare().and_then(|()| work(&Self { row, ..self.clone() })) {
            Mark::Failed { row: row.into(), why: format!("{error:#}") }.print();
        }
    }

    /// The folder, and a file opened in it: a guest learns by its first OPEN whether the server wants any, and only
    /// then stops sending what belongs to them.
    fn prepare(&self) -> anyhow::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let path = self.folder.join("opened");
        fs::write(&path, "")?;
        Ok(File::open(path).map(drop)?)
    }

    /// Operations until the round is over, each of `amount`.
    fn timed(&self, amount: f64, mut operation: impl FnMut(u64) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let mut latencies = Vec::new();
        self.begin();
        let (begin, mut before, mut now) = (Instant::now(), Instant::now(), Instant::now());
        for number in 0.. {
            operation(number)?;
            now = Instant::now();
            latencies.push((now - before).as_nanos() as f64);
            before = now;
            if now - begin >= self.round {
                break;
            }
        }
        let amount = amount * latencies.len() as f64;
        let median = Some(Duration::from_nanos(median(&mut latencies) as u64));
        self.end(Done { amount, elapsed: now - begin, median });
        Ok(())
    }

    /// Work that has its own end, of `amount` in all.
    fn whole(&self, amount: f64, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
        self.counted(|| work().map(|()| amount))
    }

    /// Work that has its own end, and tells what it amounted to.
    fn counted(&self, work: impl FnOnce() -> anyhow::Result<f64>) -> anyhow::Result<()> {
        self.begin();
        let begin = Instant::now();
        let amount = work()?;
        self.end(Done { amount, elapsed: begin.elapsed(), median: None });
        Ok(())
    }

    fn begin(&self) {
        Mark::Begin(self.row.into()).print();
    }

    fn end(&self, done: Done) {
        Mark::End { row: self.row.into(), done }.print();
    }

    /// So many operations on names.
    fn each_name(&self, mut operation: impl FnMut(u64) -> anyhow::Result<()>) -> anyhow::Result<()> {
        self.whole(self.names as f64, || (0..self.names).try_for_each(&mut operation))
    }

    /// A new folder for the row.
    fn folder_of_row(&self) -> anyhow::Result<PathBuf> {
        let folder = self.folder.join(self.row);
        fs::create_dir(&folder)?;
        Ok(folder)
    }

    /// A folder with empty files, numbered from 0.
    fn files(&self, count: u64) -> anyhow::Result<PathBuf> {
        let folder = self.folder_of_row()?;
        for number in 0..count {
            File::create(folder.join(number.to_string()))?;
        }
        Ok(folder)
    }

    /// A file full of data, opened with `flags`; made by the first row that needs it.
    fn data_file(&self, flags: u32) -> anyhow::Result<File> {
        let path = self.folder.join("data");
        if !path.exists() {
            fill(&path, DIRECT_FILE_LEN)?;
        }
        let flags = i32::try_from(flags)?;
        Ok(OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?)
    }
}

fn fill(path: &Path, len: u64) -> anyhow::Result<()> {
    let mut file = File::create(path)?;
    let mut block = vec![0; LARGE];
    SmallRng::seed_from_u64(len).fill(&mut block[..]);
    for _ in 0..len / LARGE as u64 {
        file.write_all(&block)?;
    }
    Ok(file.sync_all()?)
}

/// A buffer whose start is a multiple of a page, as direct I/O needs.
struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    fn new(len: usize) -> Self {
        let bytes = vec![0x5a; len + SMALL];
        let start = bytes.as_ptr().align_offset(SMALL);
        Self { bytes, start, len }
    }

    fn get(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// A random offset of a small request.
fn small_offset(random: &mut SmallRng) -> u64 {
    random.random_range(0..DIRECT_FILE_LEN / SMALL as u64) * SMALL as u64
}

/// The offset of a large request, by its number: in order, and from the start again at the end of the file.
fn large_offset(number: u64) -> u64 {
    number * LARGE as u64 % DIRECT_FILE_LEN
}

/// 4 KiB direct reads.
pub fn direct_read(stage: &Stage) -> anyhow::Result<()> {
    let file = stage.data_file(O_DIRECT)?;
    let (mut buffer, mut random) = (AlignedBuffer::new(SMALL), SmallRng::seed_from_u64(1));
    stage.timed(1.0, |_| Ok(file.read_exact_at(buffer.get(), small_offset(&mut random))?))
}

/// 4 KiB direct writes.
pub fn direct_write(stage: &Stage) -> anyhow::Result<()> {
    let file = stage.data_file(O_DIRECT)?;
    let (mut buffer, mut random) = (AlignedBuffer::new(SMALL), SmallRng::seed_from_u64(2));
    stage.timed(1.0, |_| Ok(file.write_all_at(buffer.get(), small_offset(&mut random))?))
}

/// 4 KiB direct reads by eight threads.
pub fn direct_read_jobs(stage: &Stage) -> anyhow::Result<()> {
    jobs(stage, |file, buffer, offset| file.read_exact_at(buffer, offset))
}

/// 4 KiB direct writes by eight threads.
pub fn direct_write_jobs(stage: &Stage) -> anyhow::Result<()> {
    jobs(stage, |file, buffer, offset| file.write_all_at(buffer, offset))
}

fn jobs(
    stage: &Stage,
    operation: impl Fn(&File, &mut [u8], u64) -> io::Result<()> + Sync,
) -> anyhow::Result<()> {
    let file = stage.data_file(O_DIRECT)?;
    let until_end = |seed: u64, begin: Instant| -> anyhow::Result<u64> {
        let (mut buffer, mut random) = (AlignedBuffer::new(SMALL), SmallRng::seed_from_u64(seed));
        let mut count = 0;
        while begin.elapsed() < stage.round {
            operation(&file, buffer.get(), small_offset(&mut random))?;
            count += 1;
        }
        Ok(count)
    };
    stage.counted(|| {
        let begin = Instant::now();
        let total = thread::scope(|scope| -> anyhow::Result<u64> {
            let threads: Vec<_> = (0..JOBS).map(|seed| scope.spawn(move || until_end(seed, begin))).collect();
            let counts = threads.into_iter().map(|thread| {
                thread.join().map_err(|_| anyhow::anyhow!("a job panicked")).and_then(|count| count)
            });
            counts.sum()
        })?;
        Ok(total as f64)
    })
}

/// 1 MiB direct reads in order.
pub fn sequential_read(stage: &Stage) -> anyhow::Result<()> {
    let file = stage.data_file(O_DIRECT)?;
    let mut buffer = AlignedBuffer::new(LARGE);
    stage.timed(LARGE as f64, |number| Ok(file.read_exact_at(buffer.get(), large_offset(number))?))
}

/// 1 MiB direct writes in order.
pub fn sequential_write(stage: &Stage) -> anyhow::Result<()> {
    let file = stage.data_file(O_DIRECT)?;
    let mut buffer = AlignedBuffer::new(LARGE);
    stage.timed(LARGE as f64, |number| Ok(file.write_all_at(buffer.get(), large_offset(number))?))
}

/// A new file by 1 MiB buffered writes, with an fsync at the end.
pub fn buffered_write(stage: &Stage) -> anyhow::Result<()> {
    write_buffered_file(stage, &stage.folder.join(BUFFERED_FILE))
}

/// The same, while Linux lets the mount have all of the dirty memory that a guest may have.
pub fn buffered_write_unthrottled(stage: &Stage) -> anyhow::Result<()> {
    let path = stage.folder_of_row()?.join(BUFFERED_FILE);
    with_dirty_share(&stage.folder, 100, || write_buffered_file(stage, &path))?;
    // The server's memory is left to the file that the next row reads.
    Ok(fs::remove_file(path)?)
}

fn write_buffered_file(stage: &Stage, path: &Path) -> anyhow::Result<()> {
    stage.whole(BUFFERED_FILE_LEN as f64, || fill(path, BUFFERED_FILE_LEN))
}

/// Does `work` while the mount of `folder` may have `percent` of the guest's dirty memory.
///
/// Linux gives a FUSE mount 1 % (`max_ratio` of its backing device), and with a write-back cache lets a writer sleep
/// that wants more, however fast the server is.
fn with_dirty_share(
    folder: &Path,
    percent: u32,
    work: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let device = fs::metadata(folder)?.dev();
    let share = format!("/sys/class/bdi/{}:{}/max_ratio", major(device), minor(device));
    let before = fs::read_to_string(&share).with_context(|| share.clone())?;
    fs::write(&share, percent.to_string())?;
    let outcome = work();
    fs::write(&share, before)?;
    outcome
}

/// The file again, which the guest has dropped from its memory. It has read it once before, so that a server that
/// keeps what is read has it.
pub fn buffered_read(stage: &Stage) -> anyhow::Result<()> {
    let path = stage.folder.join(BUFFERED_FILE);
    if !path.exists() {
        fill(&path, BUFFERED_FILE_LEN)?;
    }
    drop_caches()?;
    read_buffered_file(&path)?;
    drop_caches()?;
    stage.whole(BUFFERED_FILE_LEN as f64, || read_buffered_file(&path))
}

fn read_buffered_file(path: &Path) -> anyhow::Result<()> {
    let mut block = vec![0; LARGE];
    let mut file = File::open(path)?;
    (0..BUFFERED_FILE_LEN / LARGE as u64).try_for_each(|_| Ok(file.read_exact(&mut block)?))
}

fn drop_caches() -> anyhow::Result<()> {
    Ok(fs::write("/proc/sys/vm/drop_caches", "3")?)
}

/// 4 KiB random writes with an fsync each.
pub fn write_fsync(stage: &Stage) -> anyhow::Result<()> {
    let file = stage.data_file(0)?;
    let (block, mut random) = (vec![0x5a; SMALL], SmallRng::seed_from_u64(3));
    stage.timed(1.0, |_| {
        file.write_all_at(&block, small_offset(&mut random))?;
        Ok(file.sync_all()?)
    })
}

/// New empty files.
pub fn create(stage: &Stage) -> anyhow::Result<()> {
    let folder = stage.folder_of_row()?;
    stage.each_name(|number| Ok(File::create(folder.join(number.to_string())).map(drop)?))
}

/// Files removed.
pub fn unlink(stage: &Stage) -> anyhow::Result<()> {
    let folder = stage.files(stage.names)?;
    stage.each_name(|number| Ok(fs::remove_file(folder.join(number.to_string()))?))
}

/// Existing files opened and closed.
pub fn open_close(stage: &Stage) -> anyhow::Result<()> {
    let folder = stage.files(STANDING_FILES)?;
    stage.each_name(|number| Ok(File::open(folder.join((number % STANDING_FILES).to_string())).map(drop)?))
}

/// New files with a byte in each.
pub fn write_new(stage: &Stage) -> anyhow::Result<()> {
    let folder = stage.folder_of_row()?;
    stage.each_name(|number| Ok(fs::write(folder.join(number.to_string()), "x")?))
}

/// Modes changed.
pub fn chmod(stage: &Stage) -> anyhow::Result<()> {
    let folder = stage.files(STANDING_FILES)?;
    stage.each_name(|number| {
        let mode = if (number / STANDING_FILES).is_multiple_of(2) { 0o600 } else { 0o644 };
        let path = folder.join((number % STANDING_FILES).to_string());
        Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
    })
}

/// Files renamed in their folder.
pub fn rename(stage: &Stage) -> anyhow::Result<()> {
    let folder = stage.files(stage.names)?;
    stage.each_name(|number| {
        Ok(fs::rename(folder.join(number.to_string()), folder.join(format!("new-{number}")))?)
    })
}

/// New folders.
pub fn mkdir(stage: &Stage) -> anyhow::Result<()> {
    let folder = stage.folder_of_row()?;
    stage.each_name(|number| Ok(fs::create_dir(folder.join(number.to_string()))?))
}

/// Empty folders removed.
pub fn rmdir(stage: &Stage) -> anyhow::Result<()> {
    let folder = stage.folder_of_row()?;
    for number in 0..stage.names {
        fs::create_dir(folder.join(number.to_string()))?;
    }
    stage.each_name(|number| Ok(fs::remove_dir(folder.join(number.to_string()))?))
}

/// A source tree unpacked.
pub fn untar(stage: &Stage) -> anyhow::Result<()> {
    let folder = stage.folder_of_row()?;
    let mut tar = Command::new("tar");
    tar.arg("xf").arg(stage.material.join(TREE_ARCHIVE)).arg("-C").arg(folder);
    stage.whole(1.0, || succeed(&mut tar))
}

/// A repository cloned.
pub fn git_clone(stage: &Stage) -> anyhow::Result<()> {
    let folder = stage.folder_of_row()?;
    let mut clone = clone_command(stage, &folder);
    stage.whole(1.0, || succeed(&mut clone))
}

/// The state of a clone, after the guest has forgotten it.
pub fn git_status(stage: &Stage) -> anyhow::Result<()> {
    let folder = stage.folder_of_row()?;
    succeed(&mut clone_command(stage, &folder))?;
    drop_caches()?;
    let mut status = git();
    status.arg("-C").arg(folder.join("clone")).args(["status", "--short"]);
    stage.whole(1.0, || succeed(&mut status))
}

fn git() -> Command {
    let mut git = Command::new("git");
    git.env("HOME", env::temp_dir()).env("GIT_CONFIG_NOSYSTEM", "1").args(["-c", "safe.directory=*"]);
    git
}

fn clone_command(stage: &Stage, folder: &Path) -> Command {
    let mut clone = git();
    clone.args(["clone", "--quiet"]);
    clone.arg(format!("file://{}", stage.material.join(CLONE_SOURCE).display()));
    clone.arg(folder.join("clone"));
    clone
}

/// Rows inserted into a database, each in a transaction of its own.
pub fn sqlite(stage: &Stage) -> anyhow::Result<()> {
    let script = File::open(stage.material.join(SQL))?;
    let mut sqlite = Command::new("sqlite3");
    sqlite.arg(stage.folder_of_row()?.join("database")).stdin(script).stdout(Stdio::null());
    stage.whole(SQL_TRANSACTIONS as f64, || {
        let status = sqlite.status()?;
        ensure!(status.success(), "sqlite3: {status}");
        Ok(())
    })
}

fn succeed(command: &mut Command) -> anyhow::Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {text}", output.status);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_read_as_they_are_printed() {
        assert_eq!(Mark::parse("@@row a begin"), Some(Mark::Begin("a".into())));
        let end = Mark::End {
            row: "a".into(),
            done: Done {
                amount: 2.0,
                elapsed: Duration::from_nanos(30),
                median: Some(Duration::from_nanos(4)),
            },
        };
        assert_eq!(Mark::parse("@@row a end 2 30 4"), Some(end));
        assert_eq!(Mark::parse("@@row a end 2 30"), None);
        let failed = Mark::Failed { row: "a".into(), why: "no room".into() };
        assert_eq!(Mark::parse("@@row a failed no room"), Some(failed));
        assert_eq!(Mark::parse("something else"), None);
    }
}
