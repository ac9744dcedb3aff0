//! Where archiving goes on after an interruption, with servers that are not what they were.

use pgrecall::archive::{Settings, State};

use crate::archive::{Running, keep, repository, stored, write};
use crate::common::NEWEST;
use crate::common::guard::Directory;
use crate::common::postgres::{Stop, copy};
use crate::replication::config;

/// The stored end is the border of two segments, and the server that was set back stands there again.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_set_back_that_stands_at_the_stored_border_again_is_a_conflict() {
    let (mut cluster, dir) = (keep(NEWEST), Directory::new("archive"));
    let repository = repository(dir.path()).await;
    let settings = || Settings { rpo: std::time::Duration::ZERO, ..Settings::default() };
    let running = Running::start_with(&repository, config(&cluster), settings()).await;
    let end = write(&cluster, 1_000);
    running.wait_stored(end).await;
    running.stop().await;
    cluster.stop(Stop::Fast);
    let snapshot = cluster.scratch().join("snapshot");
    copy(cluster.data(), &snapshot);
    cluster.start();
    let running = Running::start_with(&repository, config(&cluster), settings()).await;
    write(&cluster, 500);
    cluster.switch_wal();
    let border = cluster.flush_lsn();
    running.wait_stored(border).await;
    running.stop().await;
    cluster.kill9();
    std::fs::remove_dir_all(cluster.data()).unwrap();
    std::fs::rename(&snapshot, cluster.data()).unwrap();
    cluster.start();
    cluster.query("CREATE TABLE another_past AS SELECT i, repeat('y', 300) FROM generate_series(1, 400) i");
    cluster.switch_wal();
    assert!(cluster.flush_lsn() >= border, "it is where the archive ends");
    let before = stored(&repository, 1).await;
    let running = Running::start_with(&repository, config(&cluster), settings()).await;
    running.wait("conflict", |s| matches!(&s.state, State::Conflict(text) if text.contains("other content"))).await;
    running.stop().await;
    assert!(before == stored(&repository, 1).await, "the stored past is untouched");
}
