//! From what is measured to the share of new clients that is turned away.
//!
//! Each signal has a threshold, from which on some are turned away, and a point further on, from which on all are. The signal that is
//! worst decides. It goes up at once and comes down slowly: a step at a time, and each only when what is measured has fallen a tenth
//! below where that step began. So it does not go to and fro with a signal that does, nor with those that come back when it gives way.

use crate::config;

/// How many steps there are from none to all.
const STEPS: u8 = 10;

/// A step is left when what is measured, times this, would not reach it: a tenth below where it begins.
const SLACK: f64 = 1.0 / 0.9;

/// Where of the way from the threshold to 100 percent all are turned away: early enough that something is left for those that are in.
const ALL_AT: f64 = 0.75;

/// By how many times its threshold timers are late when all are turned away.
const LAG_OF_ALL: f64 = 4.0;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::gateway) enum Signal {
    Memory,
    MemoryPressure,
    CpuPressure,
    Descriptors,
    Lag,
}

impl Signal {
    pub(super) const ALL: [Self; 5] =
        [Self::Memory, Self::MemoryPressure, Self::CpuPressure, Self::Descriptors, Self::Lag];

    /// Its name in metrics and logs, which is that of its key.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::MemoryPressure => "memory_pressure",
            Self::CpuPressure => "cpu_pressure",
            Self::Descriptors => "descriptors",
            Self::Lag => "lag",
        }
    }

    /// From where on some are turned away, in percent, or seconds for the lag; `None`: it is not looked at.
    pub(super) fn threshold(self, config: &config::Overload) -> Option<f64> {
        let threshold = match self {
            Self::Memory => f64::from(config.memory),
            Self::MemoryPressure => f64::from(config.memory_pressure),
            Self::CpuPressure => f64::from(config.cpu_pressure),
            Self::Descriptors => f64::from(config.descriptors),
            Self::Lag => config.lag.as_secs_f64(),
        };
        (threshold > 0.0).then_some(threshold)
    }

    /// From where on all are.
    fn worst(self, threshold: f64) -> f64 {
        match self {
            Self::Lag => threshold * LAG_OF_ALL,
            _ => threshold + (100.0 - threshold) * ALL_AT,
        }
    }

    /// The step of what is measured.
    fn step(self, reading: f64, threshold: f64) -> Level {
        if reading < threshold || reading.is_nan() {
            return Level::NONE;
        }
        let way = (reading - threshold) / (self.worst(threshold) - threshold);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "the share of the way is not negative, and the cast ends at the greatest"
        )]
        let further = (way * f64::from(STEPS - 1)) as u8;
        Level(further.saturating_add(1).min(STEPS))
    }
}

/// What was measured, by [`Signal`]: percent, and seconds for the lag; `None`: not looked at, or not to be had.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(in crate::gateway) struct Readings([Option<f64>; Signal::ALL.len()]);

impl Readings {
    pub(in crate::gateway) fn of(self, signal: Signal) -> Option<f64> {
        self.0[signal as usize]
    }

    pub(in crate::gateway) fn set(&mut self, signal: Signal, reading: Option<f64>) {
        self.0[signal as usize] = reading;
    }
}

/// The share of new clients that is turned away, in tenths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::gateway) struct Level(u8);

impl Level {
    /// Nobody is turned away.
    pub(in crate::gateway) const NONE: Self = Self(0);
    /// Everybody is.
    pub(in crate::gateway) const ALL: Self = Self(STEPS);

    pub(super) const fn tenths(self) -> u8 {
        self.0
    }

    /// The share of that many tenths, which are ten at most.
    pub(super) fn of_tenths(tenths: u8) -> Self {
        Self(tenths.min(STEPS))
    }

    /// From 0 to 1.
    pub(in crate::gateway) fn share(self) -> f64 {
        f64::from(self.0) / f64::from(STEPS)
    }

    /// Whether who drew this lot, of 0 to 9, is turned away.
    pub(super) fn takes(self, lot: u8) -> bool {
        lot < self.0
    }
}

/// The level after `before`, and the signal that it is because of, unless nobody is turned away.
pub(super) fn next(before: Level, readings: &Readings, config: &config::Overload) -> (Level, Option<Signal>) {
    let (up, _) = worst(readings, config, 1.0);
    let (hold, because) = worst(readings, config, SLACK);
    let down = Level(before.0.saturating_sub(1));
    let level = before.min(hold).max(down).max(up);
    (level, because.filter(|_| level != Level::NONE))
}

/// The highest step of any signal, times `slack`, and that signal.
fn worst(readings: &Readings, config: &config::Overload, slack: f64) -> (Level, Option<Signal>) {
    let steps = Signal::ALL.into_iter().filter_map(|signal| {
        let step = signal.step(readings.of(signal)? * slack, signal.threshold(config)?);
        Some((step, signal))
    });
    match steps.max_by_key(|(step, _)| *step) {
        Some((step, signal)) if step != Level::NONE => (step, Some(signal)),
        _ => (Level::NONE, None),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const CONFIG: config::Overload = config::Overload {
        memory: 80,
        memory_pressure: 40,
        cpu_pressure: 60,
        descriptors: 90,
        lag: Duration::from_millis(100),
    };

    fn read(readings: &[(Signal, f64)]) -> Readings {
        let mut read = Readings::default();
        for (signal, value) in readings {
            read.set(*signal, Some(*value));
        }
        read
    }

    fn after(before: u8, readings: &[(Signal, f64)]) -> (u8, Option<Signal>) {
        let (level, because) = next(Level(before), &read(readings), &CONFIG);
        (level.0, because)
    }

    #[test]
    fn some_are_turned_away_at_the_threshold_and_all_before_the_end() {
        for (signal, threshold, worst) in [
            (Signal::Memory, 80.0, 95.0),
            (Signal::MemoryPressure, 40.0, 85.0),
            (Signal::CpuPressure, 60.0, 90.0),
            (Signal::Descriptors, 90.0, 97.5),
            (Signal::Lag, 0.1, 0.4),
        ] {
            assert_eq!(after(0, &[(signal, threshold - 0.001)]), (0, None), "{signal:?}");
            assert_eq!(after(0, &[(signal, threshold)]), (1, Some(signal)));
            assert_eq!(after(0, &[(signal, worst - 0.001)]), (9, Some(signal)));
            assert_eq!(after(0, &[(signal, worst + 0.001)]), (10, Some(signal)));
            assert_eq!(after(0, &[(signal, 1e9)]), (10, Some(signal)));
        }
    }

    #[test]
    fn the_worst_signal_decides_and_what_is_not_measured_does_not() {
        assert_eq!(after(0, &[(Signal::Memory, 81.0), (Signal::Lag, 0.31)]), (7, Some(Signal::Lag)));
        assert_eq!(after(0, &[]), (0, None));
        assert_eq!(after(0, &[(Signal::Memory, f64::NAN)]), (0, None));
        let (level, because) = next(Level::NONE, &read(&[(Signal::Memory, 100.0)]), &config::Overload::OFF);
        assert_eq!((level, because), (Level::NONE, None));
    }

    #[test]
    fn it_comes_down_a_step_at_a_time_and_only_well_below() {
        // Ten of ten was from 95 on; a tenth below that is 85.5.
        assert_eq!(after(10, &[(Signal::Memory, 86.0)]).0, 10);
        assert_eq!(after(10, &[(Signal::Memory, 85.0)]).0, 9);
        assert_eq!(after(10, &[(Signal::Memory, 0.0)]).0, 9);
        // The first step was from 80 on.
        assert_eq!(after(1, &[(Signal::Memory, 72.5)]).0, 1);
        assert_eq!(after(1, &[(Signal::Memory, 71.5)]), (0, None));
        // And up again at once.
        assert_eq!(after(1, &[(Signal::Memory, 95.0)]).0, 10);
    }

    fn readings() -> impl Strategy<Value = Readings> {
        let percent = || proptest::option::weighted(0.8, 0.0..100.0);
        (percent(), percent(), percent(), percent(), proptest::option::of(0.0..1.0))
            .prop_map(|(a, b, c, d, e)| Readings([a, b, c, d, e]))
    }

    fn thresholds() -> impl Strategy<Value = config::Overload> {
        let percent = || 0u8..100;
        (percent(), percent(), percent(), percent(), 0u64..500).prop_map(|(memory, pressure, cpu, descriptors, lag)| {
            config::Overload {
                memory,
                memory_pressure: pressure,
                cpu_pressure: cpu,
                descriptors,
                lag: Duration::from_millis(lag),
            }
        })
    }

    /// Higher in one signal, and in none lower.
    fn worse(readings: Readings, at: usize, by: f64) -> Readings {
        let mut worse = readings;
        worse.0[at] = worse.0[at].map(|reading| reading + by);
        worse
    }

    proptest! {
        #[test]
        fn the_worse_it_is_the_more_are_turned_away(
            config in thresholds(), now in readings(), before in 0..=STEPS, more in 0..=STEPS, at in 0..5usize, by in 0.0..50.0,
        ) {
            let (level, because) = next(Level(before), &now, &config);
            prop_assert!(level <= Level::ALL);
            prop_assert_eq!(because.is_some(), level != Level::NONE && worst(&now, &config, SLACK).0 != Level::NONE);
            prop_assert!(next(Level(before), &worse(now, at, by), &config).0 >= level);
            prop_assert!(next(Level(before.max(more)), &now, &config).0 >= level);
            prop_assert!(level.0 >= before.saturating_sub(1), "never more than a step down");
        }

        #[test]
        fn what_stays_as_it_is_comes_to_rest(config in thresholds(), now in readings(), before in 0..=STEPS) {
            let mut level = Level(before);
            for _ in 0..=STEPS {
                level = next(level, &now, &config).0;
            }
            prop_assert_eq!(next(level, &now, &config).0, level);
        }

        #[test]
        fn a_signal_that_goes_up_and_down_by_a_twentieth_does_not_move_it(
            config in thresholds(), now in readings(), ups in proptest::collection::vec(0.95..=1.0, 1..30),
        ) {
            let mut level = next(Level::NONE, &now, &config).0;
            let first = level;
            for up in ups {
                let shaky = Readings(now.0.map(|reading| reading.map(|reading| reading * up)));
                level = next(level, &shaky, &config).0;
                prop_assert_eq!(level, first);
            }
        }

        #[test]
        fn when_it_is_over_everybody_gets_in(config in thresholds(), now in readings()) {
            let mut level = next(Level::NONE, &now, &config).0;
            for _ in 0..STEPS {
                level = next(level, &Readings([Some(0.0); 5]), &config).0;
            }
            prop_assert_eq!(level, Level::NONE);
        }
    }
}
