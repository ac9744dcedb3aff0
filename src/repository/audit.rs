//! Acts of people on record, in chains that show when one was changed, exchanged or left out.
//!
//! Each life of a daemon opens a chain of its own, `audit/<generation>/<n>` with n from 1 on; the generation is one more than that
//! of the newest chain. An act carries the digest of the act before it, the first one that of the newest act of an earlier
//! chain. The digest is the SHA-256 of the content, the JSON. What a chain cannot show by itself is that its last acts were
//! removed: the chain after it shows that.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};

use super::codec::Kind;
use super::format::{Repository, RepositoryError, parse_json, to_json};
use super::layout::{self, Generation, Key, prefix};
use crate::pg::Timestamp;
use crate::util::digest::{Digest, hex};

/// An act is a request, which has at most 64 KiB, with little around it.
const ACT_BYTES_MAX: u64 = 256 << 10;
/// Acts that are read at the same time.
const READS_MAX: usize = 16;

/// What became of what was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It was begun.
    Allowed,
    /// The one who asked may not.
    Refused,
    /// It was allowed, and could not be done; `why` says it.
    Failed,
    /// No act: what comes before it was stored late, because the store did not answer.
    Late,
}

/// What somebody did or tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Act {
    pub at: Timestamp,
    /// As the kernel said.
    pub uid: Option<u32>,
    pub user: String,
    pub role: Option<String>,
    /// The name of the request, such as `restore`.
    pub request: String,
    pub job: Option<String>,
    pub ticket: Option<String>,
    /// The request's own words.
    #[serde(default)]
    pub detail: serde_json::Value,
    pub outcome: Outcome,
    pub why: Option<String>,
    /// So many more of the kind were refused shortly before, and are not listed.
    #[serde(default)]
    pub unlisted: u64,
}

/// An act in its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Link {
    number: u32,
    /// Digest of the act before it in hex; of the first, of the act that `follows` names.
    previous: Option<String>,
    #[serde(default)]
    follows: Option<Place>,
    act: Act,
}

/// Where an act stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub generation: String,
    pub number: u32,
}

/// The end of a chain that is being written; only one writer has it.
#[derive(Debug, Clone)]
pub struct Chain {
    generation: Generation,
    number: u32,
    previous: Option<String>,
    follows: Option<Place>,
}

/// An act as it was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    pub generation: String,
    pub number: u32,
    #[serde(flatten)]
    pub act: Act,
}

/// What the record says, and what is wrong with it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// How many acts there are in all.
    pub count: u64,
    /// The newest of them, oldest first.
    pub acts: Vec<Recorded>,
    /// Empty when every chain holds.
    pub problems: Vec<String>,
}

impl Chain {
    /// Opens the next chain. Nothing is stored before its first act.
    pub async fn open(repository: &Repository) -> Result<Chain, RepositoryError> {
        let newest = list(repository).await?.into_keys().next_back();
        let ordinal = newest.map_or(1, |(generation, _)| generation.ordinal.saturating_add(1));
        let mut chain = Chain {
            generation: Generation { ordinal, random: rand::random() },
            number: 1,
            previous: None,
            follows: None,
        };
        if let Some((generation, number)) = newest {
            let content = read(repository, generation, number).await?;
            chain.previous = Some(digest(&content));
            chain.follows = Some(Place { generation: generation.to_string(), number });
        }
        Ok(chain)
    }

    /// Stores the next act. After an error the same act must come again: perhaps it was stored.
    pub async fn append(&mut self, repository: &Repository, act: &Act) -> Result<(), RepositoryError> {
        let follows = self.follows.clone().filter(|_| self.number == 1);
        let link = Link { number: self.number, previous: self.previous.clone(), follows, act: act.clone() };
        let content = to_json(&link);
        let previous = digest(&content);
        repository.write(&Key::audit(self.generation, self.number), Kind::Act, content.into()).await?;
        self.previous = Some(previous);
        self.number = self.number.saturating_add(1);
        Ok(())
    }
}

/// Reads every act, checks every chain, and returns the newest `shown` acts.
pub async fn check(repository: &Repository, shown: usize) -> Result<Record, RepositoryError> {
    let listed = list(repository).await?;
    let mut record = Record { count: listed.len() as u64, ..Record::default() };
    let reads = futures::stream::iter(listed.keys().copied()).map(|(generation, number)| async move {
        match read(repository, generation, number).await {
            Ok(content) => Ok((generation, number, Some(content))),
            Err(error) if error.is_corrupt() || error.is_not_found() => Ok((generation, number, None)),
            Err(error) => Err(error),
        }
    });
    let mut reads = std::pin::pin!(reads.buffered(READS_MAX));
    let mut reader = Reader { digests: BTreeMap::new(), listed: &listed };
    while let Some((generation, number, content)) = reads.try_next().await? {
        let link = content.and_then(|content| {
            let key = Key::audit(generation, number);
            parse_json::<Link>(&key, &content).ok().map(|link| (link, digest(&content)))
        });
        record.problems.extend(reader.problem(generation, number, link.as_ref()));
        if let Some((link, digest)) = link {
            reader.digests.insert((generation, number), digest);
            record.acts.push(Recorded { generation: generation.to_string(), number, act: link.act });
            if record.acts.len() >= shown.saturating_mul(2).max(2) {
                record.acts.drain(..record.acts.len().saturating_sub(shown));
            }
        }
    }
    record.acts.drain(..record.acts.len().saturating_sub(shown));
    Ok(record)
}

type Listed = BTreeMap<(Generation, u32), ()>;

async fn list(repository: &Repository) -> Result<Listed, RepositoryError> {
    let objects = repository.store().list(prefix::AUDIT).await?;
    Ok(objects.iter().filter_map(|object| layout::parse_audit(&object.key)).map(|place| (place, ())).collect())
}

async fn read(repository: &Repository, generation: Generation, number: u32) -> Result<Bytes, RepositoryError> {
    repository.read(&Key::audit(generation, number), Kind::Act, ACT_BYTES_MAX).await
}

fn digest(content: &[u8]) -> String {
    hex(&Digest::sha256(content).0)
}

/// What was seen of the chains so far.
struct Reader<'a> {
    digests: BTreeMap<(Generation, u32), String>,
    listed: &'a Listed,
}

impl Reader<'_> {
    /// What is wrong with an act in its place.
    fn problem(&self, generation: Generation, number: u32, link: Option<&(Link, String)>) -> Option<String> {
        let name = Key::audit(generation, number);
        let name = name.as_str();
        let Some((link, _)) = link else { return Some(format!("{name} cannot be read")) };
        if link.number != number {
            return Some(format!("{name} was written as number {}", link.number));
        }
        let before = match (number, &link.follows) {
            (1, None) => return link.previous.as_ref().map(|_| format!("{name} does not say what it follows")),
            (1, Some(place)) => place.generation.parse().ok().map(|generation| (generation, place.number)),
            (number, _) => number.checked_sub(1).map(|before| (generation, before)),
        };
        let Some(before) = before else { return Some(format!("{name} follows what has no name")) };
        let before_name = Key::audit(before.0, before.1);
        let before_name = before_name.as_str();
        if !self.listed.contains_key(&before) {
            return Some(format!("{before_name} is gone: {name} comes after it"));
        }
        match (self.digests.get(&before), &link.previous) {
            (Some(found), Some(written)) if found == written => None,
            // It was named already.
            (None, _) => None,
            _ => Some(format!("{before_name} is not what it was when {name} was written")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::testing::World;

    fn act(request: &str) -> Act {
        Act {
            at: Timestamp::from_unix_seconds(1_795_000_000),
            uid: Some(1000),
            user: "ada".into(),
            role: Some("operator".into()),
            request: request.into(),
            job: None,
            ticket: Some("T-1".into()),
            detail: serde_json::json!({ "to": "latest" }),
            outcome: Outcome::Allowed,
            why: None,
            unlisted: 0,
        }
    }

    /// Two chains, of three acts and of two.
    async fn world() -> (World, [Generation; 2]) {
        let world = World::new(None).await;
        let mut generations = Vec::new();
        for count in [3, 2] {
            let mut chain = Chain::open(&world.repository).await.expect("open");
            for n in 0..count {
                chain.append(&world.repository, &act(&format!("act-{n}"))).await.expect("append");
            }
            generations.push(chain.generation);
        }
        let generations = [generations[0], generations[1]];
        assert!(generations[0] < generations[1]);
        (world, generations)
    }

    async fn problems(world: &World) -> Vec<String> {
        check(&world.repository, 100).await.expect("check").problems
    }

    #[tokio::test]
    async fn chains_hold_and_the_newest_acts_are_shown() {
        let (world, generations) = world().await;
        let record = check(&world.repository, 4).await.expect("check");
        assert_eq!((record.count, record.problems.as_slice()), (5, [].as_slice()));
        let shown: Vec<_> =
            record.acts.iter().map(|r| (r.generation.clone(), r.number, r.act.request.as_str())).collect();
        let [first, second] = generations.map(|generation| generation.to_string());
        let expected = [(&first, 2, "act-1"), (&first, 3, "act-2"), (&second, 1, "act-0"), (&second, 2, "act-1")]
            .map(|(g, n, r)| (g.clone(), n, r));
        assert_eq!(shown, expected);
    }

    #[tokio::test]
    async fn an_act_that_is_gone_changed_or_exchanged_is_named() {
        let (world, [first, second]) = world().await;
        let store = world.repository.store();
        let check = |found: Vec<String>, expected: &[String]| assert_eq!(found, expected);
        let name = |generation, number| Key::audit(generation, number).as_str().to_owned();
        let kept = store.get(&Key::audit(first, 2), 1 << 20).await.expect("read");

        store.delete(&Key::audit(first, 2)).await.expect("delete");
        check(problems(&world).await, &[format!("{} is gone: {} comes after it", name(first, 2), name(first, 3))]);
        // Somebody who can write objects puts another act into the place.
        let forged = Link { number: 2, previous: None, follows: None, act: act("nothing") };
        world.repository.write_fact(&Key::audit(first, 2), Kind::Act, &forged).await.expect("write");
        let changed = |a: String, b: String| format!("{a} is not what it was when {b} was written");
        let expected = [changed(name(first, 1), name(first, 2)), changed(name(first, 2), name(first, 3))];
        check(problems(&world).await, &expected);
        store.put(&Key::audit(first, 2), kept).await.expect("put back");
        check(problems(&world).await, &[]);

        // The end of a chain is held by the next one.
        store.delete(&Key::audit(first, 3)).await.expect("delete");
        check(problems(&world).await, &[format!("{} is gone: {} comes after it", name(first, 3), name(second, 1))]);
        store.put(&Key::audit(second, 2), vec![1, 2, 3]).await.expect("damage");
        assert_eq!(problems(&world).await.last(), Some(&format!("{} cannot be read", name(second, 2))));
    }
}
