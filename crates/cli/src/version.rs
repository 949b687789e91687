//! Versions: the one of CRIU that commands, options and images are those of, and our own.

/// CRIU's version. Clients read the first line of `--version` (`Version: 4.2`), compare it, and choose options by it.
pub const CRIU: &str = "4.2";

/// Ours.
pub const OURS: &str = env!("CARGO_PKG_VERSION");

/// Stands where CRIU has the name of its commit, so that clients that print it show who is at work.
pub fn git_id() -> String {
    format!("dormouse-{OURS}")
}

/// What `--version` prints.
pub fn text() -> String {
    format!("Version: {CRIU}\nGitID: {}\n", git_id())
}

#[cfg(test)]
mod tests {
    #[test]
    fn first_line_is_what_clients_parse() {
        assert_eq!(super::text().lines().next(), Some("Version: 4.2"));
    }
}
