//! Inodes against the names that lead to them.

use hashbrown::HashMap;

use super::finding::{Finding, Findings};
use super::items::{InodeState, Presence};
use crate::units::InodeId;

const ROOT: u64 = InodeId::ROOT.0;

/// Checks link counts, parents, orphans, and that everything hangs on the root. All items must be known.
pub(super) fn check(inodes: &HashMap<u64, InodeState>, findings: &mut Findings) {
    // A new file system has no inodes; its first mount makes the root.
    if inodes.is_empty() {
        return;
    }
    if inodes.get(&ROOT).is_none_or(|root| root.item == Presence::Missing) {
        findings.push(Finding::NoRoot);
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
    if state.names > 0 && state.named_type != state.file_type {
        findings.push(Finding::EntryType {
            directory: state.named_in,
            offset: state.named_at,
            inode: number,
            file_type: state.named_type,
            expected: state.file_type,
        });
    }
    if number == ROOT {
        check_root(state, findings);
    } else if state.orphan {
        let mut found = |problem| findings.push(Finding::Orphan { inode: number, problem });
        if state.nlink != 0 {
            found("has links");
        }
        if state.names != 0 {
            found("has a name");
        }
        return;
    } else if state.names == 0 {
        return findings.push(Finding::Unreachable { inode: number });
    } else if state.is_directory() {
        check_place(number, state, findings);
    }
    let expected = if state.is_directory() { 2 + subdirectories } else { state.names };
    if u64::from(state.nlink) != expected {
        findings.push(Finding::LinkCount { inode: number, nlink: state.nlink, expected });
    }
}

fn check_missing(number: u64, state: &InodeState, findings: &mut Findings) {
    if state.intent {
        findings.push(Finding::Intent { inode: number, problem: "does not exist" });
    }
    if state.orphan {
        findings.push(Finding::Orphan { inode: number, problem: "does not exist" });
    }
    if state.names > 0 {
        let (directory, offset) = (state.named_in, state.named_at);
        findings.push(Finding::EntryDangling { directory, offset, inode: number });
    }
}

fn check_root(state: &InodeState, findings: &mut Findings) {
    if !state.is_directory() {
        findings.push(Finding::Inode { inode: ROOT, problem: "the root is no directory" });
    }
    if state.orphan {
        findings.push(Finding::Orphan { inode: ROOT, problem: "is the root" });
    }
    if state.names > 0 {
        findings.push(Finding::DirectoryNames { inode: ROOT, names: state.names });
    }
    if state.parent != ROOT {
        findings.push(Finding::Parent { inode: ROOT, parent: state.parent, expected: ROOT });
    }
}

fn check_place(number: u64, state: &InodeState, findings: &mut Findings) {
    if state.names > 1 {
        findings.push(Finding::DirectoryNames { inode: number, names: state.names });
    }
    if state.parent != state.named_in {
        let (parent, expected) = (state.parent, state.named_in);
        findings.push(Finding::Parent { inode: number, parent, expected });
    }
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

fn report_circle(first: u64, inodes: &HashMap<u64, InodeState>, findings: &mut Findings) {
    let mut at = first;
    loop {
        findings.push(Finding::Disconnected { inode: at });
        at = inodes[&at].named_in;
        if at == first {
            return;
        }
    }
}
