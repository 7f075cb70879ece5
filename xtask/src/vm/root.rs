//! The root file system of the virtual machine: an initramfs, in the cpio format that kernels unpack. It needs no driver, no disk
//! and no server, and is gone with the machine.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    os::unix::fs::PermissionsExt as _,
    path::{Component, Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::process::output_of;

/// What lies at a path.
#[derive(Debug)]
enum Entry {
    Folder,
    Link(PathBuf),
    /// Copied when it is written.
    File {
        from: PathBuf,
        mode: u32,
    },
    Text(String),
    /// A character device.
    Device {
        major: u32,
        minor: u32,
    },
}

/// Folders of which a system is made, and those that are names of others where /usr has everything.
const FOLDERS: [&str; 12] =
    ["dev", "etc", "proc", "root", "run", "sys", "tmp", "usr/bin", "usr/lib", "usr/lib64", "usr/sbin", "var"];
const MERGED: [&str; 4] = ["bin", "lib", "lib64", "sbin"];

/// A root file system that is being put together.
#[derive(Debug)]
pub struct Root {
    entries: BTreeMap<PathBuf, Entry>,
}

impl Root {
    /// One with nothing in it but what every process expects.
    pub fn new() -> Self {
        let mut root = Self { entries: BTreeMap::new() };
        for folder in FOLDERS {
            root.add(Path::new(folder), Entry::Folder);
        }
        for name in MERGED {
            root.add(Path::new(name), Entry::Link(Path::new("usr").join(name)));
        }
        root.add(Path::new("dev/console"), Entry::Device { major: 5, minor: 1 });
        root.text("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n");
        root.text("etc/group", "root:x:0:\nnogroup:x:65534:\n");
        root.text("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n");
        root
    }

    /// A file with that content.
    pub fn text(&mut self, path: &str, content: impl Into<String>) {
        self.add(Path::new(path), Entry::Text(content.into()));
    }

    /// Another name for a file.
    pub fn link(&mut self, path: &str, to: impl Into<PathBuf>) {
        self.add(Path::new(path), Entry::Link(to.into()));
    }

    /// A file of this machine, there as it is here.
    pub fn file(&mut self, path: &Path) -> Result<()> {
        self.file_from(path, path)
    }

    /// A file of this machine, there at that path.
    pub fn file_from(&mut self, path: &Path, from: &Path) -> Result<()> {
        let metadata = fs::metadata(from).with_context(|| format!("can't read {}", from.display()))?;
        ensure!(metadata.is_file(), "{} is no file", from.display());
        self.add(path, Entry::File { from: from.to_owned(), mode: metadata.permissions().mode() & 0o7777 });
        Ok(())
    }

    /// A program of this machine, with the libraries that it loads.
    pub fn program(&mut self, path: &Path) -> Result<()> {
        self.file(path)?;
        self.libraries_of(path)
    }

    /// The libraries that a program of this machine loads.
    pub fn libraries_of(&mut self, program: &Path) -> Result<()> {
        let listed = output_of(Command::new("ldd").arg(program))?;
        for library in listed.lines().filter_map(library) {
            self.file(library)?;
        }
        Ok(())
    }

    /// What is below a folder of this machine and is wanted, there below `path`.
    pub fn folder(&mut self, path: &Path, from: &Path, wanted: &impl Fn(&Path) -> bool) -> Result<()> {
        for entry in fs::read_dir(from).with_context(|| format!("can't read {}", from.display()))? {
            let entry = entry?;
            let (path, from) = (path.join(entry.file_name()), entry.path());
            if entry.file_type()?.is_dir() {
                self.folder(&path, &from, wanted)?;
            } else if entry.file_type()?.is_file() && wanted(&from) {
                self.file_from(&path, &from)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, path: &Path, entry: Entry) {
        let path = merged(path);
        for folder in path.ancestors().skip(1).filter(|folder| !folder.as_os_str().is_empty()) {
            self.entries.entry(folder.to_owned()).or_insert(Entry::Folder);
        }
        self.entries.insert(path, entry);
    }

    /// Writes it as an archive in the format `newc`. A folder comes before what is in it.
    pub fn write(&self, to: &mut impl Write) -> Result<()> {
        let mut archive = Archive { to, number: 0 };
        for (path, entry) in &self.entries {
            match entry {
                Entry::Folder => archive.entry(path, 0o040_755, (0, 0), &[])?,
                Entry::Link(target) => archive.entry(path, 0o120_777, (0, 0), target.as_os_str().as_encoded_bytes())?,
                Entry::Text(text) => archive.entry(path, 0o100_644, (0, 0), text.as_bytes())?,
                Entry::Device { major, minor } => archive.entry(path, 0o020_600, (*major, *minor), &[])?,
                Entry::File { from, mode } => {
                    let content = fs::read(from).with_context(|| format!("can't read {}", from.display()))?;
                    archive.entry(path, 0o100_000 | mode, (0, 0), &content)?;
                }
            }
        }
        archive.entry(Path::new("TRAILER!!!"), 0, (0, 0), &[])?;
        Ok(())
    }
}

/// Where a path of this machine is there: below no link, and relative.
fn merged(path: &Path) -> PathBuf {
    let path: PathBuf = path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
    match path.components().next() {
        Some(Component::Normal(first)) if path.components().count() > 1 && MERGED.iter().any(|name| first == *name) => {
            Path::new("usr").join(path)
        }
        _ => path,
    }
}

/// The file of a line of ldd's: `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`, or `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn library(line: &str) -> Option<&Path> {
    let path = line.split_once("=>").map_or(line, |(_, path)| path).split('(').next()?.trim();
    path.starts_with('/').then_some(Path::new(path))
}

struct Archive<'a, W> {
    to: &'a mut W,
    number: u32,
}

impl<W: Write> Archive<'_, W> {
    fn entry(&mut self, path: &Path, mode: u32, device: (u32, u32), content: &[u8]) -> Result<()> {
        let path = path.as_os_str().as_encoded_bytes();
        let (length, name_length) = (u32::try_from(content.len())?, u32::try_from(path.len() + 1)?);
        self.number += 1;
        // inode, mode, owner, group, links, time, length, device of the file's own (twice), of what it stands for, of its name
        let fields = [self.number, mode, 0, 0, 1, 0, length, 0, 0, device.0, device.1, name_length, 0];
        let mut head = b"070701".to_vec();
        for field in fields {
            write!(head, "{field:08x}")?;
        }
        head.extend_from_slice(path);
        head.push(0);
        self.padded(&head)?;
        self.padded(content)?;
        Ok(())
    }

    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)?;
        self.to.write_all(&[0; 3][..bytes.len().next_multiple_of(4) - bytes.len()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_in_what_ldd_says() {
        assert_eq!(library("\tlinux-vdso.so.1 (0x00007ffd)"), None);
        assert_eq!(library("\tlibc.so.6 => /lib/libc.so.6 (0x00007f)"), Some(Path::new("/lib/libc.so.6")));
        assert_eq!(library("\t/lib64/ld-linux-x86-64.so.2 (0x00007f)"), Some(Path::new("/lib64/ld-linux-x86-64.so.2")));
        assert_eq!(library("\tlibnone.so => not found"), None);
    }

    #[test]
    fn a_file_lies_below_no_link_and_its_folders_come_first() {
        let mut root = Root { entries: BTreeMap::new() };
        root.text("/lib/x/name", "12345");
        let paths: Vec<_> = root.entries.keys().map(|path| path.display().to_string()).collect();
        assert_eq!(paths, ["usr", "usr/lib", "usr/lib/x", "usr/lib/x/name"]);
    }

    #[test]
    fn an_archive_is_what_kernels_unpack() {
        let mut root = Root { entries: BTreeMap::new() };
        root.text("name", "12345");
        let mut bytes = Vec::new();
        root.write(&mut bytes).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let head = "070701000000010000\
            81a400000000000000000000000100000000000000050000000000000000000000000000000000000005\
            00000000name\0";
        let (first, rest) = text.split_at(head.len());
        assert_eq!(first, head);
        // The head and the name take 115 bytes, and end at a multiple of 4.
        assert!(rest.starts_with("\x0012345\x00\x00\x00070701"), "{rest:?}");
        assert!(rest.ends_with("TRAILER!!!\0\0\0\0"), "{rest:?}");
    }
}
