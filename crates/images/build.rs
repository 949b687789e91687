//! Compiles the schema in proto/ to Rust types and to a descriptor set, without protoc or any C code.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    let dir = Path::new("proto");
    let mut files: Vec<PathBuf> = fs::read_dir(dir)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    files.retain(|f| f.extension().is_some_and(|e| e == "proto"));
    files.sort();
    println!("cargo::rerun-if-changed=proto");

    let mut compiler = protox::Compiler::new([dir])?;
    compiler.include_imports(true).include_source_info(true).open_files(&files)?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // Encoded by protox itself: only there the display hints, which are extensions, are kept.
    fs::write(out.join("schema.bin"), compiler.encode_file_descriptor_set())?;
    let set = compiler.file_descriptor_set();
    debug_assert!(set.encoded_len() > 0);
    prost_build::Config::new().enable_type_names().compile_fds(set)?;
    Ok(())
}
