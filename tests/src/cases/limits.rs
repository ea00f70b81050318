//! What a file system must hold at its edges: sparse files, long names, large directories and attributes, and a
//! device without room.

use std::time::Duration;

use super::{Case, CaseContext};
use crate::{artifacts::MOUNT_POINT, daemon::Daemon, qemu::Echo, uml::UmlGuest};

pub(super) const LIMITS: Case = Case {
    name: "limits",
    about: "sparse 16 TiB, names of 255 bytes, 30,000 entries in a directory, attributes of 64 KiB",
    run: |context| run(context, "1G", EDGES),
};

pub(super) const FULL: Case = Case {
    name: "full",
    about: "64 MiB filled by data and by small files: ENOSPC, df, overwriting, deleting, three rounds",
    run: |context| run(context, "64M", FILL),
};

/// Each line fails the script by itself (`set -e`).
const EDGES: &str = r#"
echo sparse files
truncate -s 16T sparse
echo -n end | dd of=sparse bs=1 seek=$((16 * 1024 ** 4 - 3)) conv=notrunc status=none
echo -n middle | dd of=sparse bs=1 seek=$((8 * 1024 ** 4 + 7)) conv=notrunc status=none
sync sparse; echo 3 >/proc/sys/vm/drop_caches
test $(stat -c %s sparse) = $((16 * 1024 ** 4)); test $(stat -c %b sparse) -lt 100
test "$(tail -c 3 sparse)" = end
test "$(dd if=sparse bs=1 skip=$((8 * 1024 ** 4 + 7)) count=6 status=none)" = middle
truncate -s 10T sparse; test "$(dd if=sparse bs=1 skip=$((8 * 1024 ** 4 + 7)) count=6 status=none)" = middle
fallocate --punch-hole --offset 0 --length 9T sparse; test $(stat -c %b sparse) = 0; rm sparse
fallocate --length 64M ahead; test $(stat -c %b ahead) -ge 131072; cmp -n $((64 << 20)) ahead /dev/zero; rm ahead

echo names
long=$(printf 'n%.0s' {1..255}); echo long >$long; mkdir d; ln $long d/$long; test "$(cat d/$long)" = long
if echo longer >${long}n; then exit 1; fi 2>/dev/null
deep=.; for i in {1..60}; do deep=$deep/directory$i; done; mkdir -p $deep; echo deep >$deep/file
mv directory1 moved; test "$(cat moved/${deep#./directory1/}/file)" = deep; rm -r moved

echo a directory of 30,000 entries
mkdir many; (cd many; seq -f 'entry with number %.0f' 30000 | xargs -d '\n' touch)
echo 3 >/proc/sys/vm/drop_caches
test $(ls -U many | sort -u | wc -l) = 30000; test $(ls -U many | wc -l) = 30000
(cd many; seq -f 'entry with number %.0f' 1 2 30000 | xargs -d '\n' rm); test $(ls -U many | wc -l) = 15000
rm -r many; test ! -e many

echo attributes
touch attributes
head -c 49000 /dev/urandom | base64 -w 0 | head -c 65000 >large.value
setfattr -n user.large -v "$(cat large.value)" attributes
for i in {1..100}; do setfattr -n user.small$i -v "value $i" attributes; done
echo 3 >/proc/sys/vm/drop_caches
getfattr --only-values -n user.large attributes | cmp - large.value
test $(getfattr attributes | grep -c '^user.small') = 100
test "$(getfattr --only-values -n user.small77 attributes)" = 'value 77'
setfattr -x user.large attributes; if getfattr -n user.large attributes; then exit 1; fi 2>/dev/null
for i in {1..100}; do setfattr -x user.small$i attributes; done; test -z "$(getfattr attributes)"

echo deleted but open
exec 8<>unlinked; echo kept >&8; rm unlinked; sync; echo 3 >/proc/sys/vm/drop_caches
test "$(cat /proc/self/fd/8)" = kept; exec 8>&-
"#;

/// Three rounds, since what a full device gives back late shows only when it is filled again.
///
/// A guest that writes back late hears of a full device at its next sync only. So the large file is written directly,
/// and one more goes through the guest's cache to see that error. Space is near what it was when fewer than three more
/// of the chunks of 1 MiB that metadata takes are kept for what comes next. The others come back by a checkpoint, which
/// deletions start and nobody waits for.
const FILL: &str = r#"
no_space() {
    if "$@" 2>/mnt/tmp/error; then echo "there was room for: $*"; return 1; fi
    grep -q 'No space left' /mnt/tmp/error || { cat /mnt/tmp/error; return 1; }
}
free_bytes() { echo $(($(stat -f -c '%f * %S' .))); }
free_is_near() {
    for try in {1..100}; do
        free=$(free_bytes)
        test $((free - $1)) -lt $((3 << 20)) -a $(($1 - free)) -lt $((3 << 20)) && return
        sleep 0.1
    done
    echo "$free bytes are free, not nearly $1"; return 1
}
split_into() { yes "$1" | split -a 4 -b $2 - small/; }

echo kept >kept; sync
free_at_first=$(free_bytes)
for size in 60000 20000 6000; do
    echo one large file
    no_space dd if=/dev/urandom of=large bs=1M count=96 oflag=direct status=none
    no_space dd if=/dev/urandom of=cached bs=1M count=32 conv=fsync status=none
    rm cached; sync
    written=$(stat -c %s large); test $written -gt $((40 << 20))
    free_is_near $((free_at_first - written))
    echo overwriting it
    dd if=/dev/urandom of=large bs=1M count=8 seek=3 conv=notrunc oflag=direct status=none
    dd if=/dev/urandom of=large bs=1M count=8 seek=20 conv=notrunc,fsync status=none
    test $(stat -c %s large) = $written
    sum=$(sha256sum <large); echo 3 >/proc/sys/vm/drop_caches; test "$(sha256sum <large)" = "$sum"
    rm large; sync
    free_is_near $free_at_first

    echo files of $size bytes
    mkdir small; text="content of a file of $size bytes"
    # Closing a file writes it back, so that split hears of the error.
    no_space split_into "$text" $size
    count=$(ls -U small | wc -l); echo $count files; test $count -gt $((30 * 1024 * 1024 / (size + 4096)))
    echo 3 >/proc/sys/vm/drop_caches; rm small/$(ls small | tail -n 1) # the one that found no room
    sum=$( (set +o pipefail; yes "$text" | head -c $(((count - 1) * size)) | sha256sum) )
    test "$(ls small | (cd small; xargs cat) | sha256sum)" = "$sum"
    rm -r small; sync
done
test "$(cat kept)" = kept
free_is_near $free_at_first
"#;

/// Seconds on an idle machine, minutes on one with eight times as much to do as CPUs.
const LIMIT: Duration = Duration::from_secs(900);

fn run(context: &CaseContext<'_>, size: &str, script: &str) -> anyhow::Result<()> {
    let daemon = Daemon::start(&context.artifacts.server, context.scratch, "fs", size, &[])?;
    let guest = UmlGuest::new(daemon.socket());
    let script = format!("set -e -o pipefail; cd {MOUNT_POINT}\n{script}");
    guest.run(context.scratch, "uml", &script, Echo::Quiet, LIMIT)?;
    daemon.stop_and_check()
}
