//! infect
