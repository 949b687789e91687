//! The wire format of protobuf, as far as checking a record needs it: fields in the order they come, nothing copied.

/// A field as it comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Raw<'a> {
    Varint(u64),
    Fixed64,
    Fixed32,
    Bytes(&'a [u8]),
}

/// The fields of a message. Ends after the first error.
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub fn new(message: &'a [u8]) -> Self {
        Self { rest: message }
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8], &'static str> {
        let len = usize::try_from(len).ok().filter(|l| *l <= self.rest.len());
        let (head, rest) = self.rest.split_at(len.ok_or("a field is longer than the record")?);
        self.rest = rest;
        Ok(head)
    }

    fn varint(&mut self) -> Result<u64, &'static str> {
        let mut value = 0u64;
        for (i, byte) in self.rest.iter().enumerate().take(10) {
            if i == 9 && *byte > 1 {
                return Err("a number exceeds 64 bits");
            }
            value |= u64::from(byte & 0x7f) << (7 * i);
            if byte & 0x80 == 0 {
                self.rest = &self.rest[i + 1..];
                return Ok(value);
            }
        }
        Err("a number does not end")
    }

    fn field(&mut self) -> Result<(u32, Raw<'a>), &'static str> {
        let key = self.varint()?;
        let number = u32::try_from(key >> 3)
            .ok()
            .filter(|n| (1..1 << 29).contains(n))
            .ok_or("a field number is out of range")?;
        let raw = match key & 7 {
            0 => Raw::Varint(self.varint()?),
            1 => self.take(8).map(|_| Raw::Fixed64)?,
            2 => {
                let len = self.varint()?;
                Raw::Bytes(self.take(len)?)
            }
            5 => self.take(4).map(|_| Raw::Fixed32)?,
            3 | 4 => return Err("it holds a group, which no image does"),
            _ => return Err("a wire type is not known"),
        };
        Ok((number, raw))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u32, Raw<'a>), &'static str>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}

/// Counts the numbers of a packed list.
pub(crate) fn check_packed(bytes: &[u8]) -> Result<(), &'static str> {
    let mut fields = Fields::new(bytes);
    while !fields.rest.is_empty() {
        fields.varint()?;
    }
    Ok(())
}

/// The last value of a number field; 0 if it is absent or the message is broken.
pub(crate) fn number(message: &[u8], field: u32) -> u64 {
    let mut value = 0;
    for (n, raw) in Fields::new(message).map_while(Result::ok) {
        if let (true, Raw::Varint(v)) = (n == field, raw) {
            value = v;
        }
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_in_order() {
        let bytes = [0x08, 0x96, 0x01, 0x12, 0x02, b'h', b'i', 0x1d, 1, 2, 3, 4];
        let fields: Result<Vec<_>, _> = Fields::new(&bytes).collect();
        assert_eq!(fields, Ok(vec![(1, Raw::Varint(150)), (2, Raw::Bytes(b"hi")), (3, Raw::Fixed32)]));
        assert_eq!(number(&bytes, 1), 150);
        assert_eq!(number(&bytes, 9), 0);
    }

    #[test]
    fn broken_fields_end_the_walk() {
        let too_long = [0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
        for bytes in [&too_long[..], &[0x08], &[0x0b], &[0x00, 0x00], &[0xff; 12], &[0x0f]] {
            let fields: Vec<_> = Fields::new(bytes).collect();
            assert!(fields.len() == 1 && fields[0].is_err(), "{bytes:?}: {fields:?}");
        }
    }
}
