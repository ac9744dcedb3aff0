//! `pgrecall restore ENV --to TARGET --into DIR`: a plan, executed, and a cluster that was looked at.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use clap::{Args, ValueEnum};
use hyper::Method;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::places::{PlacesArguments, absolute};
use super::progress::Progress;
use super::sandbox::{self, CreateArguments};
use super::target::TargetArguments;
use super::{Context, TicketArgument, interrupted, remote};
use crate::config::Environment;
use crate::control::client::Client;
use crate::daemon::jobs::restore::{CheckAsked, FinishAsked, RestoreAsked};
use crate::error::{Code, Failure};
use crate::operations::planned::Planned;
use crate::operations::restore::{self, Observer, RestoreReport, RestoreRequest, execute};
use crate::restore::recovery::Finish;
use crate::restore::{Plan, fetch, follow};

/// How often what is fetched is shown.
const LOOK_EVERY: std::time::Duration = std::time::Duration::from_millis(250);

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    target: TargetArguments,
    #[command(flatten)]
    places: PlacesArguments,
    /// Print the plan and do nothing
    #[arg(long)]
    dry_run: bool,
    /// What becomes of the server at the target: a primary of its own, a read-only server, or none
    #[arg(long, value_name = "HOW", value_enum, default_value_t = FinishArgument::Promote)]
    finish: FinishArgument,
    /// How much is looked at: quick asks for the reached position and a session in every database, full also reads every
    /// page and runs pg_amcheck
    #[arg(long, value_name = "HOW", value_enum, default_value_t = CheckArgument::Quick)]
    check: CheckArgument,
    /// Keep the source's configuration instead of a generated one under which the copy keeps to itself
    #[arg(long)]
    with_config: bool,
    /// Start nothing: leave a directory that recovers by itself, exactly so far, when somebody starts it
    #[arg(long)]
    no_start: bool,
    /// A superuser of the restored cluster, for the checks
    #[arg(long, value_name = "ROLE", default_value = "postgres")]
    user: String,
    #[command(flatten)]
    ticket: TicketArgument,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum FinishArgument {
    Promote,
    Pause,
    Shutdown,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CheckArgument {
    None,
    Quick,
    Full,
}

pub async fn run(context: &Context, arguments: Arguments) -> Result<(), Failure> {
    if !arguments.dry_run && !arguments.places.is_chosen() {
        return into_sandbox(context, arguments).await;
    }
    if let Some(client) = context.daemon_unless(|owner| is_own(owner, &arguments)) {
        return ask_daemon(context, &client, &arguments).await;
    }
    let config = context.load_config()?;
    let environment = arguments.target.environment.find(&config)?;
    if !arguments.dry_run {
        arguments.places.directory()?;
    }
    let cancel = CancellationToken::new();
    let work = async {
        let repository = environment.open_repository().await?.throttled(config.limits.restore_throttle());
        let mut planned = arguments.target.plan(environment, &repository).await?;
        if arguments.dry_run {
            arguments.places.measure(&mut planned.plan)?;
            context.output.result(&planned, Planned::show);
            return Ok(());
        }
        let request = request_of(context, environment, &arguments)?;
        if !context.output.is_json() {
            context.output.note(format_args!("target: {}", planned.target_shown));
        }
        let mut watcher = Watcher::new(Progress::new(context.output));
        let report = execute(&repository, planned.plan, &request, &mut watcher, cancel.clone()).await;
        watcher.stop_fetching();
        drop(watcher);
        let report = report?;
        context.output.result(&report, RestoreReport::show);
        Ok(())
    };
    let mut work = std::pin::pin!(work);
    tokio::select! {
        result = &mut work => return result,
        () = interrupted() => cancel.cancel(),
    }
    // What was started is stopped in order; a second signal does not wait for it.
    tokio::select! {
        result = &mut work => result,
        () = interrupted() => Err(Failure::new(Code::Cancelled, "finish: interrupted twice")),
    }
}

/// Who names no directory wants to look, and gets a copy that the daemon looks after and removes in time. This is never done
/// without a daemon: nobody would remove it.
async fn into_sandbox(context: &Context, arguments: Arguments) -> Result<(), Failure> {
    let plain = matches!(arguments.finish, FinishArgument::Promote) && !arguments.with_config && !arguments.no_start;
    if !plain {
        let failure = Failure::new(Code::Usage, "restore: --into names no directory");
        return Err(failure.hint("Without --into a sandbox is made, which is always promoted and isolated."));
    }
    let Arguments { target, ticket, .. } = arguments;
    sandbox::create(context, CreateArguments { target, ticket, writable: false, expires: None }).await
}

/// Whether this process restores by itself: as the daemon's user, and as root where nothing is started.
fn is_own(owner: u32, arguments: &Arguments) -> bool {
    let own = rustix::process::geteuid();
    owner == own.as_raw() || (own.is_root() && (arguments.no_start || arguments.dry_run))
}

/// The daemon restores, as its user.
async fn ask_daemon(context: &Context, client: &Client, arguments: &Arguments) -> Result<(), Failure> {
    let environment = &arguments.target.environment.name;
    let target = arguments.target.asked();
    if arguments.dry_run {
        let path = format!("/v1/environments/{environment}/plan");
        return remote::show(context, client, Method::POST, &path, Some(&remote::body(&target))).await;
    }
    let places = arguments.places.tablespaces();
    let asked = RestoreAsked {
        to: target.to,
        exclusive: target.exclusive,
        timeline: target.timeline,
        incarnation: target.incarnation,
        into: arguments.places.directory()?,
        finish: match arguments.finish {
            FinishArgument::Promote => FinishAsked::Promote,
            FinishArgument::Pause => FinishAsked::Pause,
            FinishArgument::Shutdown => FinishAsked::Shutdown,
        },
        check: match arguments.check {
            CheckArgument::None => CheckAsked::None,
            CheckArgument::Quick => CheckAsked::Quick,
            CheckArgument::Full => CheckAsked::Full,
        },
        with_config: arguments.with_config,
        no_start: arguments.no_start,
        tablespaces: places.moved,
        tablespaces_under: places.under,
        user: arguments.user.clone(),
    };
    let path = format!("/v1/environments/{environment}/restore");
    let body = arguments.ticket.with(remote::body(&asked));
    let report = remote::run_job(context, client, &path, &body).await?;
    remote::show_end(context, report)
}

fn request_of(context: &Context, environment: &Environment, arguments: &Arguments) -> Result<RestoreRequest, Failure> {
    Ok(RestoreRequest {
        into: arguments.places.directory()?,
        finish: match arguments.finish {
            FinishArgument::Promote => Finish::Promote,
            FinishArgument::Pause => Finish::Pause,
            FinishArgument::Shutdown => Finish::Shutdown,
        },
        check: match arguments.check {
            CheckArgument::None => restore::Check::None,
            CheckArgument::Quick => restore::Check::Quick,
            CheckArgument::Full => restore::Check::Full,
        },
        with_config: arguments.with_config,
        no_start: arguments.no_start,
        tablespaces: arguments.places.tablespaces(),
        wal_get: restore::wal_get_words(&absolute(&context.config_path)?)?,
        postgres_bin_dirs: environment.restore.postgres_bin_dirs.clone(),
        user: arguments.user.clone(),
        socket_directory: None,
    })
}

/// Shows how far a restore is.
struct Watcher {
    progress: Arc<std::sync::Mutex<Progress>>,
    fetching: Option<JoinHandle<()>>,
}

impl Watcher {
    fn new(progress: Progress) -> Self {
        Watcher { progress: Arc::new(std::sync::Mutex::new(progress)), fetching: None }
    }

    fn stop_fetching(&mut self) {
        if let Some(task) = self.fetching.take() {
            task.abort();
        }
    }

    fn with(&self, show: impl FnOnce(&mut Progress)) {
        if let Ok(mut progress) = self.progress.lock() {
            show(&mut progress);
        }
    }
}

impl Observer for Watcher {
    fn fetching(&mut self, plan: &Plan, counters: Arc<fetch::Progress>) {
        let (progress, total) = (Arc::clone(&self.progress), plan.backup.bytes);
        self.fetching = Some(tokio::spawn(async move {
            loop {
                let done = counters.bytes.load(Ordering::Relaxed);
                if let Ok(mut progress) = progress.lock() {
                    progress.show("restoring files", done, Some(total));
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }));
    }

    fn replaying(&mut self, plan: &Plan, seen: &follow::Progress) {
        self.stop_fetching();
        let (start, stop) = (plan.backup.start_lsn, plan.stop.end_lsn);
        let total = stop.saturating_since(start);
        let done = seen.replayed_lsn.map_or(0, |lsn| lsn.saturating_since(start)).min(total);
        self.with(|progress| progress.show("replaying WAL", done, Some(total)));
    }

    fn usable(&mut self, psql: &str) {
        self.stop_fetching();
        self.with(|progress| progress.note(&format!("usable: {psql}")));
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop_fetching();
    }
}
