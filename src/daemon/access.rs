//! Who somebody is and what they may do, by the configuration and the kernel's word.
//!
//! The daemon's own user and root may do everything. Everybody else needs a role: [`Role::Viewer`] < [`Role::Operator`] <
//! [`Role::Admin`], in one environment or, by the table `[access]`, in all of them and over the daemon itself. Names become
//! numbers when somebody asks, so a user who was added to a group needs no reload. A name that cannot be looked up grants nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::{Gid, Group, Uid, User};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::warn;

use crate::config::{Access, Config, Principal};

/// Looking up names may mean asking a server; who waits longer than this is nobody.
const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(5);

/// What somebody may do; more includes less.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// See states, backups, plans, jobs.
    Viewer,
    /// Take backups, restore into sandboxes.
    Operator,
    /// Everything: restore anywhere, pins, pruning, the daemon itself.
    Admin,
}

/// The other side of a connection, as the kernel knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub uid: u32,
    pub pid: Option<i32>,
    /// The primary and all others.
    pub groups: Vec<u32>,
}

/// Somebody, with what they may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    pub uid: u32,
    pub user: String,
    /// Over the daemon, and in every environment.
    pub everywhere: Option<Role>,
    /// In each environment where they have a role.
    environments: BTreeMap<String, Role>,
}

/// The rules; a cheap copy of the way to them.
#[derive(Clone)]
pub struct AccessRules(Arc<Inner>);

struct Inner {
    owner_uid: u32,
    rules: watch::Sender<Rules>,
    replaced: watch::Sender<u64>,
}

#[derive(Default)]
struct Rules {
    everywhere: Access,
    environments: BTreeMap<String, Access>,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Viewer => "viewer",
            Role::Operator => "operator",
            Role::Admin => "admin",
        }
    }
}

impl Caller {
    /// For tests and for acts of the daemon's own: roles as given.
    pub fn new(uid: u32, user: &str, everywhere: Option<Role>, environments: BTreeMap<String, Role>) -> Caller {
        Caller { uid, user: user.to_owned(), everywhere, environments }
    }

    /// The role in an environment; `None` where they may not even see it.
    pub fn role_in(&self, environment: &str) -> Option<Role> {
        self.environments.get(environment).copied()
    }

    /// The environments that they may see.
    pub fn visible(&self) -> impl Iterator<Item = &str> {
        self.environments.keys().map(String::as_str)
    }

    /// Their highest role anywhere.
    pub fn highest(&self) -> Option<Role> {
        self.environments.values().copied().chain(self.everywhere).max()
    }
}

impl AccessRules {
    /// `owner_uid` is the daemon's own user.
    pub fn new(config: &Config, owner_uid: u32) -> AccessRules {
        let rules = AccessRules(Arc::new(Inner {
            owner_uid,
            rules: watch::Sender::default(),
            replaced: watch::Sender::default(),
        }));
        rules.replace(config);
        rules
    }

    /// Takes over another configuration.
    pub fn replace(&self, config: &Config) {
        let of = |environment: &crate::config::Environment| (environment.name.to_string(), environment.access.clone());
        let rules =
            Rules { everywhere: config.access.clone(), environments: config.environments.values().map(of).collect() };
        self.0.rules.send_replace(rules);
        self.0.replaced.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Whether anybody but the daemon's user and root is named anywhere.
    pub fn is_shared(&self) -> bool {
        let rules = self.0.rules.borrow();
        !rules.everywhere.is_empty() || rules.environments.values().any(|access| !access.is_empty())
    }

    /// Changes whenever the rules are replaced.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.replaced.subscribe()
    }

    pub fn is_owner(&self, uid: u32) -> bool {
        uid == self.0.owner_uid || uid == 0
    }

    /// Who a peer is and what they may do.
    pub async fn caller(&self, peer: Peer) -> Caller {
        let rules = self.clone();
        let uid = peer.uid;
        let looked_up = tokio::task::spawn_blocking(move || rules.look_up(&peer));
        match tokio::time::timeout(LOOK_UP_TIMEOUT, looked_up).await {
            Ok(Ok(caller)) => caller,
            _ => {
                warn!(
                    uid,
                    "names of users and groups cannot be looked up in time: only the daemon's user and root may"
                );
                self.caller_by(uid, format!("uid {uid}"), &|_| false)
            }
        }
    }

    fn look_up(&self, peer: &Peer) -> Caller {
        let user = User::from_uid(Uid::from_raw(peer.uid)).ok().flatten();
        let name = user.map_or_else(|| format!("uid {}", peer.uid), |user| user.name);
        self.caller_by(peer.uid, name, &|principal| match principal {
            Principal::User(name) => {
                User::from_name(name).ok().flatten().is_some_and(|user| user.uid == Uid::from_raw(peer.uid))
            }
            Principal::Group(name) => Group::from_name(name)
                .ok()
                .flatten()
                .is_some_and(|group| peer.groups.iter().any(|gid| group.gid == Gid::from_raw(*gid))),
        })
    }

    fn caller_by(&self, uid: u32, user: String, is_named: &dyn Fn(&Principal) -> bool) -> Caller {
        let rules = self.0.rules.borrow();
        let owner = self.is_owner(uid).then_some(Role::Admin);
        let everywhere = owner.or_else(|| role_by(&rules.everywhere, is_named));
        let role_in = |access: &Access| everywhere.max(owner.or_else(|| role_by(access, is_named)));
        let environments = rules.environments.iter();
        let environments = environments.filter_map(|(name, access)| Some((name.clone(), role_in(access)?))).collect();
        Caller { uid, user, everywhere, environments }
    }
}

fn role_by(access: &Access, is_named: &dyn Fn(&Principal) -> bool) -> Option<Role> {
    let roles = [(Role::Admin, &access.admin), (Role::Operator, &access.operator), (Role::Viewer, &access.viewer)];
    roles.into_iter().find(|(_, named)| named.iter().any(is_named)).map(|(role, _)| role)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_come_by_user_and_group_everywhere_and_in_one_environment() {
        let text = "[access]\nviewer = [\"group:staff\"]\nadmin = [\"user:dba\"]\n\
                    [environment.shop]\nrepository = \"file:///a\"\naccess.operator = [\"group:support\"]\n\
                    [environment.billing]\nrepository = \"file:///b\"\n";
        let config = Config::parse(text, std::path::Path::new("c")).expect("a configuration");
        let rules = AccessRules::new(&config, 70);
        let check = |uid: u32, named: &[&str], shop, billing, everywhere| {
            let caller = rules.caller_by(uid, String::new(), &|principal| {
                let (Principal::User(name) | Principal::Group(name)) = principal;
                named.contains(&name.as_str())
            });
            let found = (caller.role_in("shop"), caller.role_in("billing"), caller.everywhere);
            assert_eq!(found, (shop, billing, everywhere), "{uid} {named:?}");
            assert_eq!(caller.visible().count(), [shop, billing].iter().flatten().count());
        };
        let (viewer, operator, admin) = (Some(Role::Viewer), Some(Role::Operator), Some(Role::Admin));
        check(1000, &[], None, None, None);
        check(1000, &["support"], operator, None, None);
        check(1000, &["staff"], viewer, viewer, viewer);
        check(1000, &["staff", "support"], operator, viewer, viewer);
        check(1000, &["dba", "staff"], admin, admin, admin);
        check(70, &[], admin, admin, admin);
        check(0, &[], admin, admin, admin);
        assert!(rules.is_shared());
    }

    #[tokio::test]
    async fn a_peer_is_looked_up_by_the_numbers_that_the_kernel_gave() {
        let own = Uid::current().as_raw();
        let name = User::from_uid(Uid::current()).expect("looked up").expect("known").name;
        let group = Group::from_gid(Gid::current()).expect("looked up").expect("known").name;
        let text = format!(
            "[environment.shop]\nrepository = \"file:///a\"\naccess.viewer = [\"user:{name}\", \"group:no-such-group\"]\n\
             access.operator = [\"group:{group}\"]\n"
        );
        let rules = AccessRules::new(&Config::parse(&text, std::path::Path::new("c")).expect("valid"), u32::MAX - 1);
        if own == 0 {
            return;
        }
        let peer = Peer { uid: own, pid: None, groups: vec![] };
        let caller = rules.caller(peer.clone()).await;
        assert_eq!((caller.user.as_str(), caller.role_in("shop")), (name.as_str(), Some(Role::Viewer)));
        let caller = rules.caller(Peer { groups: vec![Gid::current().as_raw()], ..peer.clone() }).await;
        assert_eq!(caller.role_in("shop"), Some(Role::Operator));
        assert_eq!(rules.caller(Peer { uid: own + 7, ..peer }).await.highest(), None);
    }
}
