//! Overload: when the host runs short of something, new clients are turned away before those that are in suffer.
//!
//! `sensors` reads what the host says, `level` makes a share of it, and here each new connection draws a lot. Who is turned away costs
//! as little as can be: as long as no route is exempt, it is told before its request is parsed, and when nobody gets in, before TLS.

mod early;
mod level;
mod sensors;

pub(super) use early::turn_away;
pub(super) use level::{Level, Readings, Signal};
pub(super) use sensors::Sense;

use std::{
    convert::Infallible,
    fmt,
    sync::{
        Arc, Mutex as Lock, PoisonError,
        atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio::{
    sync::{Mutex, watch},
    task::spawn_blocking,
    time::{Instant, sleep_until},
};

use super::{
    Shared,
    retry::{Retry, Wait},
};
use crate::config;
use sensors::Host;

/// How often it is looked. The tests have less time.
const TICK: Duration = Duration::from_millis(if cfg!(test) { 10 } else { 500 });

/// How many timers in a row must be late before it is called a lag: one is late when the host had a hiccup.
const LATE_IN_A_ROW: usize = 2;

/// How many clients may be told at a time that they are turned away. Each takes a descriptor meanwhile; past these, they are only
/// disconnected.
const MOST_TOLD: usize = 512;

/// How overloaded this process is. There is one of it, whatever number of gateways: they share the host.
pub struct Overload {
    /// In tenths.
    level: AtomicU8,
    because: Lock<Option<Signal>>,
    turned_away: AtomicU64,
    /// Clients that are being told.
    told: AtomicUsize,
    /// Who was told when to come back; all the later, the more of this there is.
    retry: Retry,
    sensors: Arc<Mutex<Box<dyn Sense>>>,
    level_gauge: Gauge,
    ratios: Family<SignalLabel, Gauge<f64, AtomicU64>>,
}

impl fmt::Debug for Overload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Overload").field("level", &self.level).finish_non_exhaustive()
    }
}

/// What a health check is told.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Strain {
    /// The share of new clients that is turned away, from 0 to 1.
    pub refused_share: f64,
    /// The key of `[gateway.overload]` that it is because of; `None`: nobody is turned away, or not for long.
    pub because: Option<&'static str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SignalLabel {
    signal: &'static str,
}

impl Default for Overload {
    fn default() -> Self {
        Self {
            level: AtomicU8::default(),
            because: Lock::default(),
            turned_away: AtomicU64::default(),
            told: AtomicUsize::default(),
            retry: Retry::default(),
            sensors: Arc::new(Mutex::new(Box::<Host>::default())),
            level_gauge: Gauge::default(),
            ratios: Family::default(),
        }
    }
}

impl Overload {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "overload_level",
            "How many of ten new clients are turned away because the host is overloaded",
            self.level_gauge.clone(),
        );
        registry.register(
            "overload_ratio",
            "What is measured of the host's load, as a part of the threshold from which on new clients are turned away",
            self.ratios.clone(),
        );
    }

    /// The share of new clients that is turned away.
    pub(super) fn level(&self) -> Level {
        Level::of_tenths(self.level.load(Ordering::Relaxed))
    }

    /// What a health check is told.
    pub fn strain(&self) -> Strain {
        let because = *self.because.lock().unwrap_or_else(PoisonError::into_inner);
        Strain { refused_share: self.level().share(), because: because.map(Signal::name) }
    }

    /// Seconds after which somebody who is refused may come back.
    pub(super) fn retry_after(&self, wait: Wait) -> u16 {
        self.retry.after(wait, self.level().share())
    }

    /// Seconds after which somebody whose session is closed may come back.
    pub(super) fn reconnect_after(&self) -> u16 {
        self.retry.reconnect(self.level().share())
    }

    /// Draws a new client's lot: whether it is turned away.
    pub(super) fn draw(&self) -> bool {
        let level = self.level();
        level != Level::NONE && level.takes(fastrand::u8(0..10))
    }

    /// Somebody is turned away.
    pub(super) fn count(&self) {
        self.turned_away.fetch_add(1, Ordering::Relaxed);
    }

    /// A place among those that are told why; `None`: there are too many.
    fn telling(&self) -> Option<Telling<'_>> {
        let taken =
            self.told.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |told| (told < MOST_TOLD).then_some(told + 1));
        taken.is_ok().then_some(Telling(self))
    }

    /// Takes what was measured for true.
    fn note(&self, readings: &Readings, config: &config::Overload, episode: &mut Option<Episode>) {
        for signal in Signal::ALL {
            if let (Some(reading), Some(threshold)) = (readings.of(signal), signal.threshold(config)) {
                self.ratios.get_or_create(&SignalLabel { signal: signal.name() }).set(reading / threshold);
            } else {
                self.ratios.remove(&SignalLabel { signal: signal.name() });
            }
        }
        let before = self.level();
        let (level, because) = level::next(before, readings, config);
        self.level.store(level.tenths(), Ordering::Relaxed);
        self.level_gauge.set(level.tenths().into());
        *self.because.lock().unwrap_or_else(PoisonError::into_inner) = because;
        if level == before {
            return;
        }
        let tenths = level.tenths();
        match (episode.as_ref(), level) {
            (Some(begun), Level::NONE) => {
                let turned_away = self.turned_away.load(Ordering::Relaxed) - begun.turned_away;
                let lasted = begun.at.elapsed();
                tracing::info!(?lasted, turned_away, "not overloaded any longer: new clients get in");
                *episode = None;
            }
            (None, Level::NONE) => {}
            (None, _) => {
                let turned_away = self.turned_away.load(Ordering::Relaxed);
                *episode = Some(Episode { at: Instant::now(), turned_away });
                let signal = because.map(Signal::name);
                let reading = because.and_then(|signal| readings.of(signal));
                tracing::warn!(
                    signal,
                    reading,
                    tenths,
                    "overloaded: of ten new clients so many are turned away (503); those that are in stay in"
                );
            }
            (Some(_), _) => tracing::debug!(signal = because.map(Signal::name), tenths, "overloaded"),
        }
    }

    /// Has it measured by something else than the host.
    #[cfg(test)]
    pub(super) fn measured_by(sensors: impl Sense + 'static) -> Self {
        Self { sensors: Arc::new(Mutex::new(Box::new(sensors))), ..Self::default() }
    }
}

/// From the first client that may be turned away to the last.
struct Episode {
    at: Instant,
    /// How many had been before.
    turned_away: u64,
}

/// A place among those that are told.
struct Telling<'a>(&'a Overload);

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        self.0.told.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Measures for ever. Of several gateways one does it at a time, and the next goes on when that ends.
pub(super) async fn watch(current: watch::Receiver<Arc<Shared>>) -> Infallible {
    let overload = Arc::clone(&current.borrow().metrics.overload);
    let mut sensors = Arc::clone(&overload.sensors).lock_owned().await;
    let mut lags = [Duration::ZERO; LATE_IN_A_ROW];
    let mut episode = None;
    loop {
        let due = Instant::now() + TICK;
        sleep_until(due).await;
        lags.rotate_left(1);
        lags[LATE_IN_A_ROW - 1] = due.elapsed();
        let config = current.borrow().config.overload;
        let read = spawn_blocking(move || {
            let readings = sensors.read(&config);
            (sensors, readings)
        });
        // It does not panic; if it did, the level would stay as it is.
        let Ok((back, mut readings)) = read.await else { return std::future::pending().await };
        sensors = back;
        if let Some(late) = lags.iter().min() {
            readings.set(Signal::Lag, Some(late.as_secs_f64()));
        }
        overload.note(&readings, &config, &mut episode);
    }
}
