//! Inodes against the names that lead to them.

use hashbrown::HashMap;

use super::finding::{Finding, Findings};
use super::items::{InodeState, Presence};
use super::remedy::{Change, InodeEdit, NameRule, Remedy};
use crate::fs::libc_mode::S_IFDIR;
use crate::ondisk::{InodeItem, Key};
use crate::units::InodeId;

const ROOT: u64 = InodeId::ROOT.0;

/// Checks link counts, parents, orphans, and that everything hangs on the root. All items must be known.
pub(super) fn check(inodes: &HashMap<u64, InodeState>, findings: &mut Findings) {
    // A new file system has no inodes; its first mount makes the root.
    if inodes.is_empty() {
        return;
    }
    if inodes.get(&ROOT).is_none_or(|root| root.item == Presence::Missing) {
        findings.push(Finding::NoRoot, made_root());
    }
    let mut numbers: Vec<u64> = inodes.keys().copied().collect();
    numbers.sort_unstable();
    let subdirectories = count_subdirectories(inodes);
    for number in &numbers {
        let subdirectories = subdirectories.get(number).copied().unwrap_or(0);
        check_inode(*number, &inodes[number], subdirectories, findings);
    }
    find_circles(&numbers, inodes, findings);
}

/// By directory, the number of directories that its entries name.
fn count_subdirectories(inodes: &HashMap<u64, InodeState>) -> HashMap<u64, u64> {
    let mut counts = HashMap::new();
    for state in inodes.values().filter(|state| state.is_directory() && state.names > 0) {
        *counts.entry(state.named_in).or_default() += 1;
    }
    counts
}

fn check_inode(number: u64, state: &InodeState, subdirectories: u64, findings: &mut Findings) {
    match state.item {
        Presence::Readable => {}
        Presence::Unreadable => return,
        Presence::Missing => return check_missing(number, state, findings),
    }
    if state.names > 0 && (state.named_type != state.file_type || state.types_differ) {
        check_type(number, state, findings);
    }
    if number == ROOT {
        check_root(state, findings);
    } else if state.orphan {
        let mut found = |problem| {
            let remedy = Remedy::safe("no orphan any more").and_delete(Key::orphan(InodeId(number)));
            findings.push(Finding::Orphan { inode: number, problem }, remedy);
        };
        if state.nlink != 0 {
            found("has links");
        }
        if state.names != 0 {
            found("has a name");
        }
        return;
    } else if state.names == 0 {
        return findings.push(Finding::Unreachable { inode: number }, attached(number, state));
    } else if state.is_directory() {
        check_place(number, state, findings);
    }
    let expected = if state.is_directory() { 2 + subdirectories } else { state.names };
    if u64::from(state.nlink) != expected {
        let nlink = u32::try_from(expected).unwrap_or(u32::MAX);
        let edit = InodeEdit { nlink: Some(nlink), ..InodeEdit::default() };
        let finding = Finding::LinkCount { inode: number, nlink: state.nlink, expected };
        findings.push(finding, Remedy::inode(number, "set", edit));
    }
}

/// What has no name and no links was to be deleted; anything else gets a name again.
fn attached(inode: u64, state: &InodeState) -> Remedy {
    match state.nlink {
        0 => Remedy::lossy("made an orphan: the next mount deletes it")
            .put(Key::orphan(InodeId(inode)), Vec::new()),
        _ => Remedy::lossy("named in lost+found").with(Change::Attach { inode, file_type: state.file_type }),
    }
}

fn made_root() -> Remedy {
    let root =
        InodeItem { nlink: 2, parent: InodeId::ROOT, ..InodeItem::empty(InodeId::ROOT, S_IFDIR | 0o755) };
    Remedy::lossy("made").put(Key::inode(InodeId::ROOT), root.encode().to_vec())
}

fn check_type(inode: u64, state: &InodeState, findings: &mut Findings) {
    let rule = NameRule { file_type: Some(state.file_type), ..NameRule::default() };
    let change = Change::Names(inode, rule);
    if state.named_type == state.file_type {
        // The name with the wrong type was reported when it was seen.
        return findings.also(change);
    }
    let finding = Finding::EntryType {
        directory: state.named_in,
        offset: state.named_at,
        inode,
        file_type: state.named_type,
        expected: state.file_type,
    };
    findings.push(finding, Remedy::safe("set to the type of the inode").with(change));
}

fn no_names(text: &'static str, inode: u64) -> Remedy {
    let rule = NameRule { drop: true, ..NameRule::default() };
    Remedy::lossy(text).with(Change::Names(inode, rule))
}

fn check_missing(number: u64, state: &InodeState, findings: &mut Findings) {
    let inode = InodeId(number);
    let problem = "does not exist";
    if state.intent {
        let remedy = Remedy::safe("removed").and_delete(Key::intent(inode));
        findings.push(Finding::Intent { inode: number, problem }, remedy);
    }
    if state.orphan {
        let remedy = Remedy::safe("removed").and_delete(Key::orphan(inode));
        findings.push(Finding::Orphan { inode: number, problem }, remedy);
    }
    if state.names > 0 {
        let (directory, offset) = (state.named_in, state.named_at);
        let remedy = match state.made_anew {
            true => Remedy::lossy("the inode was made anew"),
            false => no_names("removed", number),
        };
        findings.push(Finding::EntryDangling { directory, offset, inode: number }, remedy);
    }
}

fn check_root(state: &InodeState, findings: &mut Findings) {
    if !state.is_directory() {
        let finding = Finding::Inode { inode: ROOT, problem: "the root is no directory" };
        findings.push(finding, made_root());
    }
    if state.orphan {
        let remedy = Remedy::safe("no orphan any more").and_delete(Key::orphan(InodeId::ROOT));
        findings.push(Finding::Orphan { inode: ROOT, problem: "is the root" }, remedy);
    }
    if state.names > 0 {
        let finding = Finding::DirectoryNames { inode: ROOT, names: state.names };
        findings.push(finding, no_names("names removed", ROOT));
    }
    if state.parent != ROOT {
        let edit = InodeEdit { parent: Some(ROOT), ..InodeEdit::default() };
        let finding = Finding::Parent { inode: ROOT, parent: state.parent, expected: ROOT };
        findings.push(finding, Remedy::inode(ROOT, "set", edit));
    }
}

fn check_place(number: u64, state: &InodeState, findings: &mut Findings) {
    if state.names > 1 {
        let finding = Finding::DirectoryNames { inode: number, names: state.names };
        findings.push(finding, one_name(number, state));
    }
    if state.parent != state.named_in {
        let (parent, expected) = (state.parent, state.named_in);
        // Of several names the directory itself may say which one is right.
        let remedy = match state.names {
            1 => {
                let edit = InodeEdit { parent: Some(expected), ..InodeEdit::default() };
                Remedy::inode(number, "set", edit)
            }
            _ => Remedy::lossy("decided by the name that stays"),
        };
        findings.push(Finding::Parent { inode: number, parent, expected }, remedy);
    }
}

/// Which name a directory keeps: the one in the directory that it calls its parent, if that can be told.
fn one_name(inode: u64, state: &InodeState) -> Remedy {
    let first = (state.named_in, state.named_at);
    if state.names == 2 && state.parent != state.named_in {
        let key = Key::dirent(InodeId(first.0), first.1);
        return Remedy::delete(key, "one name removed");
    }
    let rule = NameRule { only: Some(first), ..NameRule::default() };
    Remedy::lossy("all names but one removed").with(Change::Names(inode, rule))
}

/// Finds directories that are below themselves. What hangs on an inode that is missing or has no name is
/// reported there.
fn find_circles(numbers: &[u64], inodes: &HashMap<u64, InodeState>, findings: &mut Findings) {
    // By directory, the walk that came by.
    let mut walks: HashMap<u64, u64> = HashMap::new();
    for start in numbers {
        let mut at = *start;
        loop {
            let known = inodes.get(&at).filter(|state| state.is_directory() && state.names > 0);
            let Some(state) = known.filter(|_| at != ROOT) else { break };
            if let Some(walk) = walks.get(&at) {
                if walk == start {
                    report_circle(at, inodes, findings);
                }
                break;
            }
            walks.insert(at, *start);
            at = state.named_in;
        }
    }
}

/// Reports each directory of a circle. Opened at one of them, all of it can be named again.
fn report_circle(first: u64, inodes: &HashMap<u64, InodeState>, findings: &mut Findings) {
    let mut at = first;
    loop {
        let state = &inodes[&at];
        let remedy = Remedy::lossy("freed from the circle");
        let remedy = match at == first {
            true => remedy.and_delete(Key::dirent(InodeId(state.named_in), state.named_at)),
            false => remedy,
        };
        findings.push(Finding::Disconnected { inode: at }, remedy);
        at = state.named_in;
        if at == first {
            return;
        }
    }
}
