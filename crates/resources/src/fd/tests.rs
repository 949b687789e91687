//! A process with known descriptors gives the expected records, and kinds do not claim each other's.

