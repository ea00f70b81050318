//! Times of a file while something that takes a while is done to it. Whatever the tree has of them then, a power cut
//! may show.

use std::cell::Cell;

use super::*;

/// Times that a file shows during `operation`, from before it to its end.
fn times_during<F: Future<Output = ()> + 'static>(
    mount: &Mount,
    inode: InodeId,
    operation: impl FnOnce(Rc<Fs>, Context) -> F,
) -> Vec<crate::ondisk::Timestamp> {
    let (fs, ctx, reactor) = (mount.fs.clone(), mount.ctx, mount.reactor.clone());
    let done = Rc::new(Cell::new(false));
    let (work, end, clock) = (operation(fs.clone(), ctx), done.clone(), reactor.clone());
    let work = async move {
        // Behind the first look, and at another time than what was done before.
        clock.sleep(Duration::from_millis(1)).await;
        work.await;
        end.set(true);
    };
    let watch = async move {
        let mut times = Vec::new();
        loop {
            let is_last = done.get();
            times.push(fs.run(|fs| fs.get_attr(&ctx, inode)).await.unwrap().mtime);
            if is_last {
                times.dedup();
                return times;
            }
            reactor.sleep(Duration::from_micros(5)).await;
        }
    };
    let work = mount.reactor.spawn(work);
    let times = mount.reactor.block_on(watch);
    mount.reactor.block_on(work);
    times
}

#[test]
fn an_operation_gives_a_file_one_time() {
    let zero = FallocateMode::Zero { keep_size: false };
    let allocate = FallocateMode::Allocate { keep_size: false };
    let cases = [
        // Inside of blocks, over data and the end; over parts of pages only; over holes.
        (zero, 5000, 60_000),
        (zero, 40_960, 2560),
        (FallocateMode::PunchHole, 1000, 12_000),
        (FallocateMode::PunchHole, 4100, 30),
        (allocate, 3000, 90_000),
    ];
    for (mode, offset, len) in cases {
        let mount = Mount::new(512, true);
        let inode = mount.create("file");
        let (fs, ctx) = (mount.fs.clone(), mount.ctx);
        mount.reactor.block_on(async move { write(&fs, ctx, inode, 0, &[1; 30_001], BUFFERED).await });
        let mount = mount.remount();
        let times = times_during(&mount, inode, |fs, ctx| async move {
            fs.fallocate(ctx, inode, mode, offset, len).await.unwrap();
        });
        assert_eq!(times.len(), 2, "{mode:?} of {len} bytes at {offset}: {times:?}");
    }
}

#[test]
fn a_write_of_many_rounds_gives_a_file_one_time() {
    for flags in [BUFFERED, DIRECT, IoFlags { append: true, ..BUFFERED }] {
        let mount = Mount::new(4096, true);
        let inode = mount.create("file");
        let times = times_during(&mount, inode, |fs, ctx| async move {
            write(&fs, ctx, inode, 0, &vec![1; 5 << 20], flags).await;
        });
        assert_eq!(times.len(), 2, "{flags:?}: {times:?}");
    }
}
