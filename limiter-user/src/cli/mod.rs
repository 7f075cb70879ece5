//! The command line: what was typed becomes what is meant, one file per verb.

mod attach;
mod completions;
mod config;
mod connections;
mod control;
mod detach;
mod doctor;
mod events;
mod exit;
mod explain;
mod key;
mod kick;
mod limit;
mod logging;
mod man;
mod output;
mod publish;
mod rules;
mod run;
mod settings;
mod sources;
mod status;
mod top;

#[cfg(test)]
pub(crate) use run::raise_open_files;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

use crate::config::{Config, ConfigError};

/// What is wrong with what was typed, where clap can't know it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

#[derive(Debug, Parser)]
#[command(
    name = "limiter",
    version,
    about = "Keeps a WebSocket service alive: limits connections in the kernel, and messages in a gateway",
    after_help = "Exit status: 0 done; 1 failed; 2 bad usage or configuration; 3 nothing is attached or running; \
                  4 no privilege.",
    disable_help_subcommand = true
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What goes with every command.
#[derive(Clone, Debug, Default, clap::Args)]
struct Global {
    /// The configuration file
    #[arg(long, global = true, value_name = "FILE", env = "LIMITER_CONFIG")]
    config: Option<PathBuf>,
    /// Where programs, links and maps are pinned [default: /sys/fs/bpf/limiter]
    #[arg(long, global = true, value_name = "PATH", env = "LIMITER_PIN_PATH")]
    pin_path: Option<PathBuf>,
}

impl Global {
    /// Where the state is pinned: the flag or the environment, else the file, else the default.
    fn pin_path(&self) -> Result<PathBuf, ConfigError> {
        Config::pin_path(self.config.as_deref(), self.pin_path.as_deref())
    }

    /// The file to write into, where that is asked for.
    fn file_to_save(&self, save: bool) -> Result<Option<&Path>, Usage> {
        match (save, self.config.as_deref()) {
            (true, None) => Err(Usage("--save needs --config: the file to write into".into())),
            (true, file) => Ok(file),
            (false, _) => Ok(None),
        }
    }

    fn config(&self) -> Option<&Path> {
        self.config.as_deref()
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the gateway and the kernel's limits in the foreground
    #[command(after_help = run::SIGNALS)]
    Run(run::Args),
    /// Load and pin the kernel's limits, and exit
    Attach(attach::Args),
    /// Remove every trace from the kernel
    Detach(detach::Args),
    /// Show what is in force
    Status(status::Args),
    /// Show the sources that hold connections, those with most first
    Sources(sources::Args),
    /// Show the connections in the ledger, oldest first
    Connections(connections::Args),
    /// Show what applies to an address, and what its next SYN gets and why
    Explain(explain::Args),
    /// Show refusals: those that are remembered, and with --follow those that come
    Events(events::Args),
    /// Show the rules: what holds for some addresses, whatever the limits are
    Rules(rules::RulesArgs),
    /// Let an address or a prefix past all limits
    Allow(rules::AllowArgs),
    /// Keep an address or a prefix out; connections that are open stay open without --cut
    Deny(rules::DenyArgs),
    /// Take the rule of an address or a prefix away
    Forget(rules::ForgetArgs),
    /// Close the connections of a client, or of a prefix of clients, now
    Kick(kick::Args),
    /// Send a message to clients of the gateway that runs
    Publish(publish::Args),
    /// Make API keys for clients of the gateway
    #[command(subcommand)]
    Key(key::Command),
    /// Show or change the limits in force
    #[command(subcommand)]
    Limit(limit::Command),
    /// Check a configuration file, or print an example
    #[command(subcommand)]
    Config(config::Command),
    /// Say what this host supports, and what to do about what it doesn't
    Doctor(doctor::Args),
    /// Show services and sources again and again
    Top(top::Args),
    /// Print the completions for a shell
    Completions(completions::Args),
    /// Print the manual page of limiter or of one of its commands
    Man(man::Args),
}

/// The binary's `main`: parses, does what was asked, and says with which status to exit.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return exit::usage(&error),
    };
    exit::report(dispatch(cli))
}

fn dispatch(Cli { global, command }: Cli) -> anyhow::Result<()> {
    match command {
        Command::Run(args) => run::run(&global, args),
        Command::Attach(args) => attach::run(&global, args),
        Command::Detach(args) => detach::run(&global, &args),
        Command::Status(args) => status::run(&global, &args),
        Command::Sources(args) => sources::run(&global, &args),
        Command::Connections(args) => connections::run(&global, &args),
        Command::Explain(args) => explain::run(&global, &args),
        Command::Events(args) => events::run(&global, &args),
        Command::Rules(args) => rules::rules(&global, &args),
        Command::Allow(args) => rules::allow(&global, &args),
        Command::Deny(args) => rules::deny(&global, &args),
        Command::Forget(args) => rules::forget(&global, &args),
        Command::Kick(args) => kick::run(&global, &args),
        Command::Publish(args) => publish::run(&global, &args),
        Command::Key(command) => key::run(&command),
        Command::Limit(command) => limit::run(&global, command),
        Command::Config(command) => config::run(&command),
        Command::Doctor(args) => doctor::run(&global, &args),
        Command::Top(args) => top::run(&global, &args),
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => man::run(&args),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_well_formed() {
        super::Cli::command().debug_assert();
    }
}
