//! Display hints of fields: read once from the schema, where they are options of the fields.

use std::collections::HashMap;
use std::sync::LazyLock;

use prost_reflect::{DynamicMessage, ExtensionDescriptor, FieldDescriptor, Value};

use super::names::{self, Dict, Flags};
use crate::schema;

/// How a field is printed where it differs from its type's way.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Hints {
    /// In base 16, and so is every number below.
    pub hex: bool,
    /// A list of words is an address.
    pub address: bool,
    /// A device number.
    pub device: Option<Device>,
    /// Names of bits; an empty table means base 16.
    pub flags: Option<Flags>,
    /// Names of values.
    pub dict: Option<Dict>,
    /// Bytes are quoted-printable.
    pub quoted: bool,
}

/// How major and minor are packed into a device number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    /// As within the kernel: 20 bits of minor.
    Kernel,
    /// As in stat(2).
    Stat,
}

/// By full name of the field.
static HINTS: LazyLock<HashMap<String, Hints>> = LazyLock::new(|| {
    let pool = schema::pool();
    let Some(extension) = pool.get_extension_by_name("dormouse.criu.crit") else { return HashMap::new() };
    let fields = pool.all_messages().flat_map(|m| m.fields().collect::<Vec<_>>());
    fields.filter_map(|f| Some((f.full_name().to_owned(), read(&f, &extension)?))).collect()
});

/// The hints of a field.
pub(crate) fn of(field: &FieldDescriptor) -> Hints {
    HINTS.get(field.full_name()).copied().unwrap_or_default()
}

fn read(field: &FieldDescriptor, extension: &ExtensionDescriptor) -> Option<Hints> {
    let options = field.options();
    if !options.has_extension(extension) {
        return None;
    }
    let value = options.get_extension(extension);
    let hint: &DynamicMessage = value.as_message()?;
    let set = |name: &str| hint.get_field_by_name(name).and_then(|v| v.as_bool()).unwrap_or(false);
    let word = |name: &str| match hint.get_field_by_name(name).as_deref() {
        Some(Value::String(s)) if !s.is_empty() => Some(s.clone()),
        _ => None,
    };
    Some(Hints {
        hex: set("hex"),
        address: set("ipadd"),
        device: if set("odev") { Some(Device::Stat) } else { set("dev").then_some(Device::Kernel) },
        flags: word("flags").map(|w| names::flags(&w).unwrap_or(&[])),
        dict: word("dict").and_then(|w| names::dict(&w, field.name())),
        quoted: word("conv").is_some(),
    })
}

impl Device {
    /// `major:minor`.
    pub fn print(self, dev: u64) -> String {
        let (major, minor) = match self {
            Self::Kernel => (dev >> 20, dev & 0xf_ffff),
            Self::Stat => (dev >> 8 & 0xfff | dev >> 32 & !0xfff, dev & 0xff | dev >> 12 & !0xff),
        };
        format!("{major}:{minor}")
    }

    /// The number of such a text.
    pub fn parse(self, text: &str) -> Option<u64> {
        let (major, minor) = text.split_once(':')?;
        let (major, minor): (u64, u64) = (major.trim().parse().ok()?, minor.trim().parse().ok()?);
        if major > u64::from(u32::MAX) || minor > u64::from(u32::MAX) {
            return None;
        }
        match self {
            Self::Kernel => (minor < 1 << 20).then_some(major << 20 | minor),
            Self::Stat => Some((major & 0xfff) << 8 | (major & !0xfff) << 32 | minor & 0xff | (minor & !0xff) << 12),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hints(message: &str, field: &str) -> Hints {
        let message = schema::message(message).expect("it is in the schema");
        of(&message.get_field_by_name(field).expect("it is in the message"))
    }

    #[test]
    fn hints_survive_the_build() {
        assert!(hints("vma_entry", "start").hex);
        assert!(!hints("vma_entry", "pgoff").hex);
        assert_eq!(hints("vma_entry", "prot").flags.map(<[_]>::len), Some(3));
        assert_eq!(hints("fh_entry", "bytes").device, None);
        assert_eq!(hints("ghost_file_entry", "rdev").device, Some(Device::Stat));
        assert_eq!(hints("ghost_file_entry", "dev").device, Some(Device::Kernel));
        assert!(hints("inet_sk_entry", "src_addr").address);
        assert!(hints("inet_sk_entry", "family").dict.is_some());
        assert!(hints("unix_sk_entry", "name").quoted);
        assert_eq!(HINTS.len(), 104);
        // No flags of the schema lack a table, no dict does.
        assert!(HINTS.values().all(|h| h.flags != Some(&[])));
    }

    proptest::proptest! {
        #[test]
        fn device_numbers_come_back(dev: u32) {
            for device in [Device::Kernel, Device::Stat] {
                proptest::prop_assert_eq!(device.parse(&device.print(dev.into())), Some(dev.into()));
            }
        }
    }
}
