//! Appends whose place the server chooses.

use super::super::load::LOAD_PAGES;
use super::*;

const CLIENTS: u8 = 8;
const APPENDS: u8 = 6;

/// Clients append at the same time to a file whose last page is not cached, so that the first ones have to
/// wait for it together. Every append has bytes of its own.
fn append_together(
    seed: u64,
    len_at_first: usize,
    mut len: impl FnMut(&mut StdRng) -> usize,
    flags: IoFlags,
) {
    let mount = Mount::new(4096, true);
    let inode = mount.create("log");
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    let first = vec![255; len_at_first];
    mount.reactor.block_on(async move { write(&fs, ctx, inode, 0, &first, BUFFERED).await });
    let mount = mount.remount();
    let mut rng = StdRng::seed_from_u64(seed);
    let lens: Vec<usize> = (0..CLIENTS * APPENDS).map(|_| len(&mut rng)).collect();
    let clients = lens.chunks(APPENDS.into()).enumerate().map(|(client, lens)| {
        let (fs, ctx, lens) = (mount.fs.clone(), mount.ctx, lens.to_vec());
        async move {
            for (number, len) in lens.into_iter().enumerate() {
                let byte = client as u8 * APPENDS + number as u8;
                write(&fs, ctx, inode, 0, &vec![byte; len], IoFlags { append: true, ..flags }).await;
            }
        }
    });
    mount.reactor.block_on(join_all(clients.collect::<Vec<_>>()));
    let (fs, ctx, total) = (mount.fs.clone(), mount.ctx, len_at_first + lens.iter().sum::<usize>());
    let content = mount.reactor.block_on(async move {
        let size = fs.run(|fs| fs.get_attr(&ctx, inode)).await.unwrap().size;
        assert_eq!(size, total as u64, "seed {seed}");
        read(&fs, ctx, inode, 0, total, BUFFERED).await
    });
    let mut found: Vec<(u8, usize)> =
        content.chunk_by(|a, b| a == b).map(|run| (run[0], run.len())).collect();
    assert_eq!(found.remove(0), (255, len_at_first));
    found.sort_unstable();
    let wanted: Vec<(u8, usize)> = (0..).zip(lens).collect();
    assert_eq!(found, wanted, "seed {seed}");
}

#[test]
fn appends_that_wait_at_the_same_time_do_not_take_the_same_place() {
    for seed in 0..4 {
        append_together(seed, 10_001, |rng| rng.random_range(1..9000), BUFFERED);
        append_together(seed, 10_001, |rng| rng.random_range(1..9000), IoFlags { sync: true, ..BUFFERED });
    }
}

#[test]
fn direct_appends_do_not_take_the_same_place() {
    for seed in 0..4 {
        append_together(seed, 8192, |rng| 4096 * rng.random_range(1..4), DIRECT);
        // Whole blocks and others, at places that are none.
        append_together(seed, 8192, |rng| [512, 4096, 5000][rng.random_range(0..3)], DIRECT);
    }
}

#[test]
fn the_largest_requests_are_appended_in_one_piece() {
    for flags in [BUFFERED, DIRECT] {
        append_together(9, 4096, |rng| 4096 * [1, 2, LOAD_PAGES as usize][rng.random_range(0..3)], flags);
    }
}
