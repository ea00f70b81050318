//! Calls that overtake each other in one file.

use std::pin::Pin;

use super::*;
use crate::check::check;

type Call = Pin<Box<dyn Future<Output = ()>>>;

/// Lets calls begin in their order and run together on a slow device.
fn together(mount: &Mount, calls: Vec<Call>) {
    mount.disk.set_latency(&mount.reactor, Duration::from_micros(100)..Duration::from_micros(200));
    mount.reactor.block_on(join_all(calls));
}

fn call<F: Future<Output = ()> + 'static>(mount: &Mount, with: impl FnOnce(Rc<Fs>, Context) -> F) -> Call {
    Box::pin(with(mount.fs.clone(), mount.ctx))
}

/// What the device has of a file, and that nothing is wrong.
fn content(mount: Mount, inode: InodeId) -> Vec<u8> {
    let mount = mount.remount();
    let (fs, ctx, device): (_, _, Rc<dyn Bdev>) = (mount.fs.clone(), mount.ctx, mount.disk.clone());
    mount.reactor.block_on(async move {
        let content = read(&fs, ctx, inode, 0, 1 << 17, BUFFERED).await;
        fs.unmount().await.unwrap();
        let report = check(&device).await.unwrap();
        assert!(report.is_clean(), "{:?}", report.findings);
        content
    })
}

#[test]
fn a_small_file_is_synced_while_a_direct_write_makes_it_large() {
    for is_allocated in [false, true] {
        let mount = Mount::new(4096, false);
        let inode = mount.create("f");
        let (fs, ctx) = (mount.fs.clone(), mount.ctx);
        mount.reactor.block_on(async move { write(&fs, ctx, inode, 0, &[1; 100], BUFFERED).await });
        let grow = call(&mount, move |fs, ctx| async move {
            match is_allocated {
                true => {
                    let mode = FallocateMode::Allocate { keep_size: false };
                    fs.fallocate(ctx, inode, mode, 40_960, 4096).await.unwrap();
                }
                false => write(&fs, ctx, inode, 40_960, &[2; 4096], DIRECT).await,
            }
        });
        let sync = call(&mount, move |fs, _| async move { fs.sync_inode(inode, false).await.unwrap() });
        together(&mount, vec![grow, sync]);
        let content = content(mount, inode);
        assert_eq!(content.len(), 45_056);
        assert_eq!(content[..100], [1; 100]);
        assert_eq!(content[40_960..], [if is_allocated { 0 } else { 2 }; 4096]);
    }
}

#[test]
fn a_hole_up_to_the_end_spares_what_is_appended_meanwhile() {
    let mount = Mount::new(4096, false);
    let inode = mount.create("f");
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move { write(&fs, ctx, inode, 0, &[1; 5000], BUFFERED).await });
    let mount = mount.remount();
    // The first page is not in memory, the second one is.
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move { read(&fs, ctx, inode, 4096, 100, BUFFERED).await });
    let punch = call(&mount, move |fs, ctx| async move {
        fs.fallocate(ctx, inode, FallocateMode::PunchHole, 100, 4900).await.unwrap();
    });
    let append = call(&mount, move |fs, ctx| async move {
        write(&fs, ctx, inode, 5000, &[2; 1000], BUFFERED).await;
        fs.sync_inode(inode, false).await.unwrap();
    });
    together(&mount, vec![punch, append]);
    let content = content(mount, inode);
    assert!(content == [vec![1; 100], vec![0; 4900], vec![2; 1000]].concat());
}

#[test]
fn a_hole_is_there_in_a_file_that_moves_into_the_tree_meanwhile() {
    let mount = Mount::new(4096, false);
    let inode = mount.create("f");
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move { write(&fs, ctx, inode, 0, &[1; 2000], BUFFERED).await });
    let sync = call(&mount, move |fs, _| async move { fs.sync_inode(inode, false).await.unwrap() });
    let punch = call(&mount, move |fs, ctx| async move {
        fs.fallocate(ctx, inode, FallocateMode::PunchHole, 0, 4096).await.unwrap();
    });
    together(&mount, vec![sync, punch]);
    assert!(content(mount, inode) == vec![0; 2000]);
}

#[test]
fn a_rename_over_a_file_ends_while_an_empty_source_moves_to_blocks() {
    let mount = Mount::new(4096, false);
    let inode = mount.create("f");
    mount.create("old");
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        write(&fs, ctx, inode, 0, &[1; 100], BUFFERED).await;
        fs.sync_inode(inode, false).await.unwrap();
        resize(&fs, ctx, inode, 0).await;
    });
    let grow = call(&mount, move |fs, ctx| async move {
        let src = buffer(&[2; 8192]);
        fs.write(ctx, inode, 0, src, BUFFERED).await.unwrap();
    });
    let rename = call(&mount, move |fs, ctx| async move {
        let (from, to) = ((InodeId::ROOT, &b"f"[..]), (InodeId::ROOT, &b"old"[..]));
        fs.run(|fs| fs.rename(&ctx, from, to, RenameMode::Replace, false)).await.unwrap();
    });
    together(&mount, vec![grow, rename]);
    assert!(content(mount, inode) == vec![2; 8192]);
}

#[test]
fn a_write_into_a_small_file_ends_when_the_file_is_deleted_meanwhile() {
    let mount = Mount::new(4096, false);
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    let spec = CreateSpec { node: NewNode::File, mode: 0o644, umask: 0, security: &[] };
    let inode = mount.reactor.block_on(async move {
        let made = fs.run(|fs| fs.create_tmpfile(&ctx, InodeId::ROOT, &spec)).await.unwrap();
        write(&fs, ctx, made.attr.inode, 0, &[1; 100], BUFFERED).await;
        fs.sync_inode(made.attr.inode, false).await.unwrap();
        made.attr.inode
    });
    let forget = call(&mount, move |fs, ctx| async move { fs.forget(ctx.session, inode, 1) });
    let grow = |offset| {
        call(&mount, move |fs, ctx| async move {
            match fs.write(ctx, inode, offset, buffer(&[2; 8192]), BUFFERED).await {
                Ok(8192) | Err(FsError::Stale) => {}
                other => panic!("{other:?}"),
            }
        })
    };
    together(&mount, vec![grow(0), forget, grow(4096)]);
}
