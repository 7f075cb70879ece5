//! `/proc/self/mountinfo` (`proc_pid_mountinfo(5)`).

/// One mounted filesystem.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) point: String,
    pub(super) filesystem: String,
}

/// The mounts, in the order of the file. A line of another shape is passed over.
pub(super) fn parse(mountinfo: &str) -> Vec<Mount> {
    mountinfo.lines().filter_map(mount).collect()
}

fn mount(line: &str) -> Option<Mount> {
    // Optional fields, ended by a dash of their own, stand between the mount point and the filesystem.
    let (before, after) = line.split_once(" - ")?;
    let point = before.split(' ').nth(4)?;
    Some(Mount { point: unescape(point), filesystem: after.split(' ').next()?.to_owned() })
}

/// Space, tab, newline and backslash are written as three octal digits.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(text.to_owned(), |text, (code, character)| text.replace(code, character))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_whatever_optional_fields_they_have() {
        let text = "36 35 98:0 / /mnt\\040one rw,noatime master:1 shared:2 - ext3 /dev/root rw\n\
                    37 35 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                    nonsense\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0], Mount { point: "/mnt one".into(), filesystem: "ext3".into() });
        assert_eq!(mounts[1], Mount { point: "/sys/fs/cgroup/unified".into(), filesystem: "cgroup2".into() });
    }
}
