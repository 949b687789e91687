//! x
pub fn tests() -> Vec<crate::report::Test> {
    vec![]
}
