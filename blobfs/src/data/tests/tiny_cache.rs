//! Writes of more pages than the cache has room for.

use super::*;

/// A mount whose cache has `pages` pages, with a file of `len` bytes that is not cached.
fn mount_with(pages: usize, len: usize) -> (Mount, InodeId) {
    let mount = Mount::new(512, true);
    let inode = mount.create("file");
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        write(&fs, ctx, inode, 0, &vec![1; len], BUFFERED).await;
        fs.unmount().await.unwrap();
    });
    let options = MountOptions { cache_size: 0, cache_pages_min: pages, ..MountOptions::default() };
    let device = mount.disk.clone();
    (Mount::on(mount.reactor, mount.disk, device, options), inode)
}

#[test]
fn appends_and_overwrites_of_more_pages_than_there_are_end() {
    const LEN: usize = 160 << 10;
    for pages in [8, 24, 32] {
        let (mount, inode) = mount_with(pages, LEN);
        let (fs, ctx) = (mount.fs.clone(), mount.ctx);
        let content = mount.reactor.block_on(async move {
            write(&fs, ctx, inode, 0, &vec![2; LEN], IoFlags { append: true, ..BUFFERED }).await;
            write(&fs, ctx, inode, 100, &vec![3; LEN], BUFFERED).await;
            read(&fs, ctx, inode, 0, 2 * LEN, BUFFERED).await
        });
        let expected = [vec![1; 100], vec![3; LEN], vec![2; LEN - 100]].concat();
        assert!(content == expected, "{pages} pages");
    }
}

#[test]
fn writers_that_want_the_same_few_pages_all_end() {
    const LEN: usize = 40_000;
    for pages in [8, 24] {
        let (mount, inode) = mount_with(pages, 8 * LEN);
        let clients = (0..8).map(|client: usize| {
            let (fs, ctx) = (mount.fs.clone(), mount.ctx);
            async move {
                // Most pages are there, the first and the last are written in part.
                for round in 0..4 {
                    let bytes = vec![(10 + 4 * client + round) as u8; LEN];
                    write(&fs, ctx, inode, (client * LEN) as u64, &bytes, BUFFERED).await;
                    read(&fs, ctx, inode, (client * LEN) as u64, LEN / 2, BUFFERED).await;
                }
            }
        });
        mount.reactor.block_on(join_all(clients.collect::<Vec<_>>()));
        let (fs, ctx) = (mount.fs.clone(), mount.ctx);
        let content =
            mount.reactor.block_on(async move { read(&fs, ctx, inode, 0, 8 * LEN, BUFFERED).await });
        let expected: Vec<u8> = (0..8).flat_map(|client| vec![13 + 4 * client; LEN]).collect();
        assert!(content == expected, "{pages} pages");
    }
}

/// Nothing is dirty and no timer runs: whoever finds every page taken is woken by the loads of the others alone.
#[test]
fn readers_that_want_the_same_few_pages_all_end() {
    const PAGES: usize = 8;
    const PIECE: usize = 3 * 4096;
    for seed in 0..40 {
        let (mount, inode) = mount_with(PAGES, 64 * PIECE);
        let (fs, ctx, reactor) = (mount.fs.clone(), mount.ctx, mount.reactor.clone());
        mount.reactor.block_on(async move {
            // The access time is newer than all else now, and durable.
            reactor.sleep(Duration::from_secs(1)).await;
            read(&fs, ctx, inode, 0, 1, BUFFERED).await;
            fs.sync_all().await.unwrap();
            reactor.sleep(Duration::from_secs(20)).await;
        });
        let begin = mount.reactor.clock().monotonic();
        let clients = (0..6).map(|client| {
            let (fs, ctx) = (mount.fs.clone(), mount.ctx);
            let mut rng = StdRng::seed_from_u64(100 * seed + client);
            async move {
                for _ in 0..60 {
                    let offset = rng.random_range(0..60 * PIECE as u64);
                    let got = read(&fs, ctx, inode, offset, PIECE, BUFFERED).await;
                    assert!(got == vec![1; PIECE]);
                }
            }
        });
        mount.reactor.block_on(join_all(clients.collect::<Vec<_>>()));
        // A timer of seconds would have been another way out.
        let took = mount.reactor.clock().monotonic() - begin;
        assert!(took < Duration::from_secs(2), "seed {seed}: {took:?}");
    }
}

#[test]
fn a_load_that_ends_between_the_look_for_room_and_the_wait_is_not_missed() {
    let (mount, inode) = mount_with(8, 4096);
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        let relieved = fs.cache.relieved.notified();
        read(&fs, ctx, inode, 0, 4096, BUFFERED).await;
        fs.relief(relieved).await;
    });
}

/// A power cut shows an append of several rounds up to the end of one of them.
#[test]
fn rounds_of_an_append_end_with_pages() {
    let (mount, inode) = mount_with(8, 1000);
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    let done = Rc::new(std::cell::Cell::new(false));
    let (end, file) = (done.clone(), fs.clone());
    let append = mount.reactor.spawn(async move {
        write(&file, ctx, inode, 0, &vec![2; 100_000], IoFlags { append: true, ..BUFFERED }).await;
        end.set(true);
    });
    let reactor = mount.reactor.clone();
    let sizes = mount.reactor.block_on(async move {
        let mut sizes = Vec::new();
        while !done.get() {
            sizes.push(fs.run(|fs| fs.get_attr(&ctx, inode)).await.unwrap().size);
            reactor.sleep(Duration::from_micros(5)).await;
        }
        sizes.dedup();
        sizes
    });
    mount.reactor.block_on(append);
    let between: Vec<u64> = sizes.into_iter().filter(|size| ![1000, 101_000].contains(size)).collect();
    assert!(!between.is_empty() && between.iter().all(|size| size.is_multiple_of(4096)), "{between:?}");
}
