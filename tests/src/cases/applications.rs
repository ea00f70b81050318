//! Applications: a C project is extracted, built and tested on the mount; git; sqlite.

use std::time::Duration;

use super::{Case, CaseContext};
use crate::{artifacts::MOUNT_POINT, daemon::Daemon, qemu::Echo, uml::UmlGuest};

pub(super) const C_PROJECT: Case = Case {
    name: "c-project",
    about: "a real C project is extracted, configured, built and passes its own tests on the mount",
    run: |context| {
        let archive = context.artifacts.c_project.display();
        run(
            context,
            &format!(
                "cd {MOUNT_POINT}; mkdir zlib; tar -xf {archive} -C zlib --strip-components=1; cd zlib\n\
                 ./configure; make -j2; make test | tee test.out\n\
                 grep -q 'zlib test OK' test.out; grep -q 'zlib shared test OK' test.out\n\
                 make install DESTDIR={MOUNT_POINT}/installed\n\
                 test -e {MOUNT_POINT}/installed/usr/local/lib/libz.so\n"
            ),
        )
    },
};

pub(super) const GIT: Case = Case {
    name: "git",
    about: "git init, commit, clone, branch, gc and fsck of a source tree on the mount",
    run: |context| {
        let archive = context.artifacts.c_project.display();
        run(
            context,
            &format!(
                "export GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t@t GIT_COMMITTER_NAME=t GIT_COMMITTER_EMAIL=t@t\n\
                 cd {MOUNT_POINT}; mkdir origin; tar -xf {archive} -C origin --strip-components=1; cd origin\n\
                 git init -q -b main; git add -A -f; git commit -qm first\n\
                 git clone -q --no-hardlinks . ../clone; git clone -q . ../linked; cd ../clone\n\
                 git checkout -q -b work; echo change >>README; git rm -q -r doc; git commit -qam second\n\
                 git checkout -q main; git merge -q work; git push -q origin work\n\
                 git gc -q; git fsck --strict; cd ../origin; git fsck --strict; git checkout -q work\n\
                 test -z \"$(git status --porcelain)\"; test \"$(tail -1 README)\" = change; test ! -e doc\n\
                 diff -r --exclude=.git . ../clone\n"
            ),
        )
    },
};

pub(super) const SQLITE: Case = Case {
    name: "sqlite",
    about: "sqlite transactions with a rollback journal and with a write-ahead log, and its integrity check",
    run: |context| {
        run(
            context,
            &format!(
                "cd {MOUNT_POINT}\n\
                 for mode in delete wal; do\n\
                     {{ echo \"PRAGMA journal_mode=$mode; PRAGMA synchronous=FULL; CREATE TABLE t(a INTEGER PRIMARY KEY, b TEXT);\"\n\
                     for i in $(seq 300); do echo \"INSERT INTO t(b) VALUES(hex(randomblob(200)));\"; done\n\
                     echo 'BEGIN; INSERT INTO t(b) SELECT b FROM t; INSERT INTO t(b) SELECT b FROM t; INSERT INTO t(b) SELECT b FROM t; COMMIT;'\n\
                     echo 'CREATE INDEX i ON t(b); DELETE FROM t WHERE a%3=0; VACUUM;'; }} | sqlite3 -bail $mode.db\n\
                     test \"$(sqlite3 $mode.db 'PRAGMA integrity_check; SELECT count(*) FROM t;')\" = $'ok\\n1600'\n\
                 done\n"
            ),
        )
    },
};

/// Runs a script in a User-Mode Linux guest and checks the image it left.
fn run(context: &CaseContext<'_>, script: &str) -> anyhow::Result<()> {
    let daemon = Daemon::start(&context.artifacts.server, context.scratch, "fs", "2G", &[])?;
    let mut guest = UmlGuest::new(daemon.socket());
    guest.memory_mib = 1024;
    let limit = Duration::from_secs(600);
    guest.run(context.scratch, "uml", &format!("set -e -o pipefail\n{script}"), Echo::Quiet, limit)?;
    daemon.stop_and_check()
}
