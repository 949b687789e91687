//! Compiles the schema in proto/ without protoc or any C code: to Rust types, to a descriptor set for JSON, and to flat
//! tables for checking records, which cost nothing at run time.

use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, FileDescriptorSet};

/// The package of every message.
const PACKAGE: &str = "dormouse.criu";

fn main() -> Result<(), Box<dyn Error>> {
    let dir = Path::new("proto");
    let mut files: Vec<PathBuf> = fs::read_dir(dir)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    files.retain(|f| f.extension().is_some_and(|e| e == "proto"));
    files.sort();
    println!("cargo::rerun-if-changed=proto");

    let mut compiler = protox::Compiler::new([dir])?;
    compiler.include_imports(true).open_files(&files)?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // Encoded by protox itself: only there the display hints, which are extensions, are kept. Without comments, since
    // it is decoded at run time.
    fs::write(out.join("schema.bin"), compiler.include_source_info(false).encode_file_descriptor_set())?;
    let types = compiler.include_source_info(true).file_descriptor_set();
    fs::write(out.join("shapes.rs"), shapes(&types)?)?;
    prost_build::Config::new().enable_type_names().compile_fds(types)?;
    Ok(())
}

/// The table `SHAPES`, sorted by name.
fn shapes(set: &FileDescriptorSet) -> Result<String, Box<dyn Error>> {
    let files = set.file.iter().filter(|f| f.package() == PACKAGE);
    let mut messages: Vec<&DescriptorProto> = files.flat_map(|f| &f.message_type).collect();
    messages.sort_by_key(|m| m.name());
    let names: Vec<String> = messages.iter().map(|m| format!(".{PACKAGE}.{}", m.name())).collect();
    let mut text = String::from("static SHAPES: &[Shape] = &[\n");
    for message in &messages {
        let (mut required, mut fields) = (0u128, Vec::new());
        for field in &message.field {
            let wire = match field.r#type() {
                Type::Int32
                | Type::Int64
                | Type::Uint32
                | Type::Uint64
                | Type::Sint32
                | Type::Sint64
                | Type::Bool
                | Type::Enum => "Varint".to_owned(),
                Type::Fixed64 | Type::Sfixed64 | Type::Double => "Fixed64".to_owned(),
                Type::Fixed32 | Type::Sfixed32 | Type::Float => "Fixed32".to_owned(),
                Type::Bytes => "Bytes".to_owned(),
                Type::String => "Text".to_owned(),
                Type::Message => {
                    let index = names.binary_search_by_key(&field.type_name(), String::as_str);
                    format!("Message({})", index.map_err(|_| format!("{} is nested or foreign", field.type_name()))?)
                }
                Type::Group => return Err("groups are not supported".into()),
            };
            let number = usize::try_from(field.number())?;
            if number >= 128 {
                return Err(format!("{}.{}: field numbers end at 127", message.name(), field.name()).into());
            }
            if field.label() == Label::Required {
                required |= 1 << number;
            }
            if fields.len() <= number {
                fields.resize(number + 1, "None".to_owned());
            }
            let list = field.label() == Label::Repeated;
            fields[number] =
                format!("Some(FieldShape {{ name: {:?}, wire: Wire::{wire}, list: {list} }})", field.name());
        }
        let fields = fields.join(", ");
        writeln!(text, "Shape {{ name: {:?}, required: {required:#x}, fields: &[{fields}] }},", message.name())?;
    }
    text.push_str("];\n");
    Ok(text)
}
