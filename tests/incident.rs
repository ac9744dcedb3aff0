//! Incidents on real PostgreSQL: the restore point is there, stored, and can be restored to.

use async_trait::async_trait;
use pgrecall::config::Config;
use pgrecall::error::Failure;
use pgrecall::lineage::moment::Request;
use pgrecall::operations::incident::{By, Scene, Tail, What, open};
use pgrecall::operations::locate;
use pgrecall::pg::Lsn;
use pgrecall::repository::Ticket;

use crate::common::pgrecall::{Environment, Pgrecall, Store};
use crate::common::postgres::Cluster;
use crate::common::{MAJORS, guard::Directory, wait};

/// Waits for what the server was told.
struct Told<'a>(&'a Cluster);

#[async_trait]
impl Tail for Told<'_> {
    async fn stored(&self, lsn: Lsn) -> Result<(), Failure> {
        let told = "SELECT min(flush_lsn) FROM pg_stat_replication WHERE application_name LIKE 'pgrecall%'";
        wait::until("the WAL to be stored", 60, || self.0.query(told).parse::<Lsn>().is_ok_and(|told| told >= lsn));
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_restore_point_of_an_incident_is_stored_and_can_be_restored_to_on_every_major() {
    for major in MAJORS {
        let cluster = Cluster::start_new(major);
        cluster.query("CREATE ROLE archiver LOGIN REPLICATION IN ROLE pg_monitor");
        let dir = Directory::new("incident");
        let conninfo = cluster.conninfo().replace("user=postgres", "user=archiver");
        let shop = Environment::new("shop", Store::Directory(dir.join("store"))).postgres(&conninfo);
        let mut host = Pgrecall::new(&[shop]);
        host.start(&[&cluster]);
        host.wait_for_backup("shop");
        let config = Config::load(&host.config_file()).expect("valid");
        let environment = config.environment("shop").expect("there");
        let repository = environment.open_or_create_repository().await.expect("open");
        let connect = environment.connect().expect("a server");
        let tail = Told(&cluster);
        let scene = Scene { environment: "shop", repository: &repository, connect: Some(&connect), tail: &tail };
        let ticket = |text: &str| text.parse::<Ticket>().expect("a ticket");

        let refused = open(&scene, &ticket("OPS-1"), By("ann"), None).await.expect("opened all the same");
        let kinds = |log: &pgrecall::operations::incident::Log| log.entries.iter().map(|e| e.what).collect::<Vec<_>>();
        assert_eq!(kinds(&refused), [What::Opened, What::Pinned, What::Remark]);
        let grant = "GRANT EXECUTE ON FUNCTION pg_create_restore_point(text) TO \"archiver\"";
        assert!(refused.entries[2].text.contains(grant), "{major}: {:?}", refused.entries[2]);

        cluster.query(grant);
        cluster.query("CREATE TABLE before (n int)");
        let log = open(&scene, &ticket("OPS-2"), By("ann"), Some("a table is gone")).await.expect("opened");
        assert_eq!(kinds(&log), [What::Opened, What::Pinned, What::RestorePoint, What::Stored], "{major}: {log:?}");
        cluster.query("DROP TABLE before");
        let target = "name:incident-OPS-2".parse().expect("a target");
        let request = Request { target, exclusive: false, timeline: None };
        let (_, plan, _) = locate::plan_any(&repository, "shop", &request, None).await.expect("it is stored");
        let lsn: Lsn = log.entries[2].document["lsn"].as_str().and_then(|text| text.parse().ok()).expect("an LSN");
        assert!(plan.stop.lsn <= lsn && lsn <= plan.stop.end_lsn, "{major}: {lsn}, {:?}", plan.stop);
        host.stop();
    }
}
