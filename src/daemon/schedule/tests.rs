//! The timetable against a world with two clocks, a store, failures, pauses and restarts, in any order.

use proptest::prelude::*;

use super::*;

const TICK: u64 = 300;
const DAY: u64 = 86_400;
const HOUR: u64 = 3_600;

#[derive(Debug, Clone)]
enum Event {
    /// Time passes while everything works.
    Passes { seconds: u64 },
    /// Every backup fails meanwhile.
    Fails { seconds: u64 },
    /// The clock is set.
    Jumps { seconds: i64 },
    /// Nobody runs.
    Off { seconds: u64 },
    /// Somebody asks for a backup.
    Asked,
}

struct World {
    schedule: Schedule,
    timetable: Timetable,
    /// True seconds since the beginning, and what the wall clock adds to them.
    steady: u64,
    ahead: i64,
    /// End of the newest stored backup by the wall clock, and in true seconds.
    newest: Option<(DateTime<Utc>, u64)>,
    fails: bool,
    running_until: Option<u64>,
    /// True seconds of each backup that began, with whether it ended well.
    begun: Vec<(u64, bool)>,
    takes: u64,
}

impl World {
    fn new(text: &str, zone: Tz, takes: u64) -> World {
        let schedule = Schedule::new("shop", Cron::parse(text).expect("a schedule"), zone, Duration::from_secs(HOUR));
        let mut world = World {
            timetable: Timetable::new(schedule.clone()),
            schedule,
            steady: 0,
            ahead: 0,
            newest: None,
            fails: false,
            running_until: None,
            begun: Vec::new(),
            takes,
        };
        world.start();
        world
    }

    fn now(&self) -> Now {
        at(self.steady, self.ahead)
    }

    /// As the daemon does when it begins: asks the store; without a backup one is wanted.
    fn start(&mut self) {
        let now = self.now();
        self.timetable = Timetable::new(self.schedule.clone());
        self.timetable.learn(self.newest.map(|(end, _)| end), now);
        if self.newest.is_none() {
            self.timetable.demand(now);
        }
        self.running_until = None;
    }

    fn tick(&mut self) {
        self.steady += TICK;
        let now = self.now();
        if self.running_until.is_some_and(|until| until <= self.steady) {
            self.running_until = None;
            if self.fails {
                self.timetable.failed(now);
            } else {
                self.timetable.succeeded(now);
                self.newest = Some((now.wall, self.steady));
                self.begun.last_mut().expect("one began").1 = true;
            }
        }
        if self.timetable.is_due(now) {
            assert!(self.running_until.is_none(), "two at once");
            self.begin();
        }
    }

    fn begin(&mut self) {
        self.timetable.began();
        self.running_until = Some(self.steady + self.takes);
        self.begun.push((self.steady, false));
    }

    fn pass(&mut self, seconds: u64) {
        let until = self.steady + seconds;
        while self.steady < until {
            self.tick();
        }
    }

    fn happen(&mut self, event: &Event) {
        match event {
            Event::Passes { seconds } => self.pass(*seconds),
            Event::Fails { seconds } => {
                self.fails = true;
                self.pass(*seconds);
                self.fails = false;
            }
            Event::Jumps { seconds } => self.ahead += seconds,
            Event::Off { seconds } => {
                self.steady += seconds;
                self.start();
            }
            Event::Asked if self.running_until.is_none() => self.begin(),
            Event::Asked => {}
        }
    }

    fn well_since(&self, steady: u64) -> usize {
        self.begun.iter().filter(|(began, well)| *well && *began >= steady).count()
    }
}

fn at(steady: u64, ahead: i64) -> Now {
    let begin: DateTime<Utc> = "2026-03-20T12:00:00Z".parse().expect("RFC 3339");
    let wall = begin + TimeDelta::seconds(steady as i64 + ahead);
    Now { wall, steady: Duration::from_secs(steady) }
}

fn events() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0..3 * DAY).prop_map(|seconds| Event::Passes { seconds }),
        2 => (0..2 * DAY).prop_map(|seconds| Event::Fails { seconds }),
        2 => (-40 * DAY as i64..40 * DAY as i64).prop_map(|seconds| Event::Jumps { seconds }),
        2 => (0..10 * DAY).prop_map(|seconds| Event::Off { seconds }),
        1 => Just(Event::Asked),
    ]
}

proptest! {
    /// Whatever happened before: once everything works, the newest backup is never older than a day and what one takes, and no
    /// more are taken than are due.
    #[test]
    fn after_anything_a_calm_week_has_its_backups(
        history in proptest::collection::vec(events(), 0..12),
        zone in prop_oneof![Just(Tz::UTC), Just(Tz::Europe__Berlin), Just(Tz::America__Sao_Paulo)],
        takes in 1..3 * HOUR,
    ) {
        let mut world = World::new("30 2 * * *", zone, takes);
        for event in &history {
            world.happen(event);
        }
        // A pause after failures, one backup, and an hour that a zone may skip.
        world.pass(DAY + 2 * HOUR + 2 * takes);
        let begin = world.steady;
        for day in 1..=7u64 {
            world.pass(DAY);
            let (_, newest) = world.newest.expect("a backup");
            prop_assert!(world.steady - newest <= DAY + HOUR + takes + 2 * TICK, "day {day}: {history:?}");
            prop_assert!(world.timetable.overdue(world.now()).is_none());
        }
        let taken = world.well_since(begin);
        prop_assert!((6..=8).contains(&taken), "{taken} in a week after {history:?}");
    }

    /// Without jumps, failures and requests each due time has one backup, and what was missed is caught up by one.
    #[test]
    fn every_due_time_has_one_backup(off in proptest::collection::vec((DAY..4 * DAY, 0..3 * DAY), 1..6)) {
        let mut world = World::new("0 */6 * * *", Tz::UTC, 600);
        world.pass(DAY);
        for (on, off) in off {
            let (before, wall) = (world.begun.len(), world.now().wall);
            world.pass(on);
            let mut due = 0;
            let mut last = wall;
            while let Some(next) = world.schedule.next_after(last).filter(|next| *next <= world.now().wall) {
                (due, last) = (due + 1, next);
            }
            let begun = world.begun.len() - before;
            // What was missed before comes on top, as one.
            prop_assert!((due..=due + 1).contains(&begun), "{begun} begun, {due} due");
            world.happen(&Event::Off { seconds: off });
        }
    }
}

#[test]
fn a_failing_backup_is_tried_again_and_becomes_an_alarm() {
    let mut world = World::new("0 1 * * *", Tz::UTC, TICK);
    world.pass(HOUR);
    assert_eq!(world.well_since(0), 1);
    world.happen(&Event::Fails { seconds: 2 * DAY });
    let tried = world.begun.len();
    assert!((40..=110).contains(&tried), "tried {tried} times in two days");
    assert!(world.timetable.overdue(world.now()).is_some());
    world.pass(HOUR);
    assert!(world.timetable.overdue(world.now()).is_none());
    assert_eq!(world.well_since(0), 2);
}

#[test]
fn a_clock_that_was_a_year_ahead_for_a_while_costs_no_more_than_one_backup() {
    let mut world = World::new("0 1 * * *", Tz::UTC, TICK);
    world.pass(3 * DAY);
    world.happen(&Event::Jumps { seconds: 365 * DAY as i64 });
    world.pass(HOUR);
    world.happen(&Event::Jumps { seconds: -365 * DAY as i64 });
    let before = world.begun.len();
    // The daemon starts anew and finds a backup of the next year.
    world.happen(&Event::Off { seconds: 60 });
    world.pass(3 * DAY);
    assert_eq!(world.begun.len() - before, 3);
}

#[test]
fn environments_begin_at_different_times_that_stay_the_same() {
    let cron = || Cron::parse("0 1 * * *").expect("a schedule");
    let now = at(0, 0).wall;
    let due = |name: &str| {
        let schedule = Schedule::new(name, cron(), Tz::UTC, Duration::from_secs(HOUR));
        schedule.next_after(now).expect("due")
    };
    let times: std::collections::BTreeSet<_> = (0..200).map(|n| due(&format!("shop-{n}"))).collect();
    assert!(times.len() > 180, "{} different times", times.len());
    let (first, last) = (times.first().expect("one"), times.last().expect("one"));
    assert!((*last - *first).num_minutes() < 60 && (*last - *first).num_minutes() > 50);
    assert_eq!(due("shop-1"), due("shop-1"));
    let exact = Schedule::new("shop-1", cron(), Tz::UTC, Duration::ZERO);
    assert_eq!(exact.next_after(now).expect("due").to_rfc3339(), "2026-03-21T01:00:00+00:00");
}
