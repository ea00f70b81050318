//! What guests unpack, clone and insert: made anew for each run from a seed, so that no network is needed and every
//! run has the same.

use std::{fs, io::Write as _, path::Path, process::Command};

use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use vhostfs_tests::process::output_of;

/// Archive of a tree.
pub const TREE_ARCHIVE: &str = "tree.tar";
/// Repository with the tree in one commit.
pub const CLONE_SOURCE: &str = "source.git";
/// Script for a database.
pub const SQL: &str = "insert.sql";
/// Inserts in it.
pub const SQL_TRANSACTIONS: u32 = 100;

/// Folders and files of the tree, in numbers like those of a medium source tree.
const FOLDERS: u32 = 80;
const FILES_PER_FOLDER: u32 = 19;

/// Words that lines are made of: text that compresses as sources do.
const WORDS: [&str; 8] = ["static", "int", "return", "buffer", "(offset", "= 0;", "struct", "->length"];

/// Makes everything in `folder`.
pub fn make(folder: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(folder)?;
    let tree = folder.join("tree");
    make_tree(&tree)?;
    output_of(
        Command::new("tar").arg("cf").arg(folder.join(TREE_ARCHIVE)).arg("-C").arg(folder).arg("tree"),
    )?;
    make_repository(&tree)?;
    let source = folder.join(CLONE_SOURCE);
    output_of(Command::new("git").args(["clone", "--quiet", "--bare"]).arg(&tree).arg(source))?;
    let mut script = String::from("CREATE TABLE t (id INTEGER PRIMARY KEY, text TEXT);\n");
    for number in 0..SQL_TRANSACTIONS {
        script.push_str(&format!("INSERT INTO t (text) VALUES ('row number {number} of the benchmark');\n"));
    }
    Ok(fs::write(folder.join(SQL), script)?)
}

fn make_tree(tree: &Path) -> anyhow::Result<()> {
    let mut random = SmallRng::seed_from_u64(1582);
    for number in 0..FOLDERS {
        let folder = tree.join(format!("part{}", number % 8)).join(format!("module{number}"));
        fs::create_dir_all(&folder)?;
        for file in 0..FILES_PER_FOLDER {
            // Most sources are small, a few are large: half below 4 KiB, one in sixteen above 32 KiB.
            let len = 1_usize << random.random_range(8..16);
            let mut text = Vec::with_capacity(len + 64);
            while text.len() < len {
                write!(text, "{} {} ", WORDS[random.random_range(0..WORDS.len())], random.random::<u16>())?;
                if random.random_range(0..6) == 0 {
                    text.push(b'\n');
                }
            }
            fs::write(folder.join(format!("file{file}.c")), text)?;
        }
    }
    Ok(())
}

fn make_repository(tree: &Path) -> anyhow::Result<()> {
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        command.arg("-C").arg(tree).args(["-c", "user.name=bench", "-c", "user.email=bench@localhost"]);
        output_of(command.args(arguments)).map(drop)
    };
    git(&["init", "--quiet"])?;
    git(&["add", "."])?;
    git(&["commit", "--quiet", "--message", "tree"])
}
