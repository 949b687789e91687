//! A directory of one unit test, removed with it.

use std::path::{Path, PathBuf};

/// See the module.
pub struct TestDir(PathBuf);

impl TestDir {
    /// Makes it.
    pub fn new(name: &str) -> TestDir {
        let session = dormouse_kernel::Session::new().expect("randomness");
        let path = std::env::temp_dir().join(session.temp_dir_name(name));
        std::fs::create_dir(&path).expect("make a directory");
        TestDir(path)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}
