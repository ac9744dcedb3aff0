//! The repository format is what its prose says: a reader in another language, written from `docs/repository-format.md`
//! alone, restores a backup and its WAL, encrypted and not.

use std::process::Command;

use crate::common::compare;
use crate::common::ledger::{self, Ledger};
use crate::common::pgrecall::{Environment, Pgrecall, Store, secret_file};
use crate::common::postgres::{Cluster, run};
use crate::common::{NEWEST, places, wait};

#[test]
fn a_stranger_restores_the_same_bytes_by_the_prose() {
    for encrypted in [false, true] {
        let primary = ledger::keep_wal(Cluster::builder(NEWEST)).start();
        let spaces = primary.scratch().join("space");
        std::fs::create_dir(&spaces).unwrap();
        primary.query(&format!("CREATE TABLESPACE space LOCATION '{}'", spaces.display()));
        primary.query("CREATE TABLE moved TABLESPACE space AS SELECT n, md5(n::text) FROM generate_series(1, 5000) n");
        primary.pgbench(&["-i", "-s", "5", "-q"]);
        let mut ledger = Ledger::start(&primary, 2);
        ledger.wait_for(20);

        let repository = primary.scratch().join("repository");
        std::fs::create_dir(&repository).unwrap();
        let key = primary.scratch().join("master.key");
        secret_file(&key, &"0123456789abcdef".repeat(4));
        let mut environment = Environment::new("shop", Store::Directory(repository.clone())).cluster(&primary);
        if encrypted {
            environment = environment.encrypted(&key);
        }
        let mut host = Pgrecall::new(&[environment]);
        host.start(&[&primary]);
        host.wait_for_backup("shop");
        ledger.wait_for(50);
        ledger.stop();
        let end = primary.flush_lsn();
        wait::until("everything to be stored", 30, || {
            primary.query("SELECT count(*) FROM pg_stat_replication WHERE flush_lsn >= pg_current_wal_flush_lsn()")
                != "0"
        });
        host.stop();

        let target = primary.scratch().join("restored");
        let mut command = Command::new(places::cache().join("bin/reader-python"));
        command.arg(places::source().join("tests/reader/restore.py")).arg(repository.join("shop")).arg(&target);
        command.arg("--tablespaces").arg(primary.scratch().join("spaces"));
        if encrypted {
            command.arg("--master-key").arg(&key);
        }
        println!("{}", run(&mut command));
        let mut restored = Cluster::adopt(NEWEST, &target);
        restored.start();
        restored.wait_writable();
        ledger.check(&restored, &ledger.expected_at(&primary, end));
        compare::assert_same(&compare::fingerprint(&primary), &compare::fingerprint(&restored));
        compare::check_sound(&mut restored);
    }
}
