//! Bad weather between pgrecall and what it talks to.
//!
//! [`s3::S3Proxy`] stands before the object store and does what stores do on bad days, by rules; [`tcp::TcpProxy`] stands
//! before PostgreSQL and cuts, holds and limits connections. Both listen on a loopback port.

pub mod s3;
pub mod tcp;

use std::sync::OnceLock;

use tokio::runtime::Runtime;

/// The runtime of the proxies; apart from the tests' own, so that a blocking test does not starve it.
fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let builder = &mut tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(2).thread_name("proxy").enable_all().build().expect("start the proxies' runtime")
    })
}
