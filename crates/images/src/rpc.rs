//! Messages of the service protocol, which share schema and checks with the images.

use prost::{Message, Name};

use crate::required::{self, Fault};
use crate::schema;

/// Reads a message. As with images, a missing required field is an error, and an unknown one is passed over.
///
/// # Errors
/// What is wrong with the bytes, for people.
pub fn decode<M: Message + Name + Default>(bytes: &[u8]) -> Result<M, String> {
    let shape = schema::shape(M::NAME).ok_or_else(|| format!("{} is not in the schema", M::NAME))?;
    required::check(shape, bytes, false).map_err(|fault| match fault {
        Fault::Missing(mut path) => {
            path.reverse();
            format!("the message lacks the required field {}", path.join("."))
        }
        Fault::Malformed(reason) => format!("the message is no valid {}: {reason}", M::NAME),
        Fault::Unknown { message, tag } => format!("the message holds an unknown field {tag} of {message}"),
    })?;
    M::decode(bytes).map_err(|e| format!("the message is no valid {}: {e}", M::NAME))
}

/// The bytes of a message.
pub fn encode(message: &impl Message) -> Vec<u8> {
    message.encode_to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb;

    #[test]
    fn requests_come_back() {
        let opts = pb::CriuOpts { images_dir_fd: 7, log_level: Some(4), ..Default::default() };
        let request = pb::CriuReq { r#type: pb::CriuReqType::Dump.into(), opts: Some(opts), ..Default::default() };
        assert_eq!(decode::<pb::CriuReq>(&encode(&request)), Ok(request));
    }

    #[test]
    fn garbage_and_missing_fields_are_named() {
        let fault = decode::<pb::CriuReq>(b"").expect_err("no type");
        assert!(fault.contains("criu_req.type"), "{fault}");
        // type, and options without images_dir_fd.
        let fault = decode::<pb::CriuReq>(&[0x08, 1, 0x12, 0]).expect_err("no directory");
        assert!(fault.contains("criu_req.opts.images_dir_fd"), "{fault}");
        assert!(decode::<pb::CriuReq>(&[0xff; 64]).is_err());
        assert!(decode::<pb::CriuReq>(&vec![0x41; 1 << 20]).is_err());
    }
}
