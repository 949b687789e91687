//! Payloads as the field `extra` of an entry, and back.

use std::io::BufRead;

use prost::Message;
use prost_reflect::DynamicMessage;
use serde_json::{Value, json};

use super::base64;
use super::record::{At, from_json, to_json};
use crate::kind::{Body, ImageKind};
use crate::reader::{Pending, Records, pending};
use crate::{ImageError, schema, wire};

/// The payload of the last record of an image, as JSON; `None` for images whose records have none.
pub(crate) fn to_extra<R: BufRead>(records: &mut Records<R>, record: &[u8]) -> Result<Option<Value>, ImageError> {
    let split = match records.kind().body() {
        Body::Plain | Body::Pagemap | Body::Raw => return Ok(None),
        Body::Ghost if records.awaits_nothing() => return Ok(None),
        Body::Ghost | Body::PipeData | Body::SkPacket | Body::BpfMap | Body::IpcShm => {
            return Ok(Some(Value::String(base64::encode(&records.payload()?))));
        }
        Body::TcpStream => wire::number(record, 1) as u32 as usize,
        Body::IpcSem => {
            let values = records.payload()?;
            return Ok(Some(values.chunks_exact(2).map(|v| u16::from_le_bytes([v[0], v[1]])).collect()));
        }
        Body::IpcMsg => {
            let desc = message_descriptor()?;
            let mut list = Vec::new();
            for (message, text) in records.raw_messages()? {
                let message = decode(&desc, &message, records)?;
                list.push(Value::Object(to_json(&message, false, false)));
                list.push(Value::String(base64::encode(&text)));
            }
            return Ok(Some(Value::Array(list)));
        }
    };
    let queues = records.payload()?;
    let (inq, outq) = queues.split_at(split.min(queues.len()));
    Ok(Some(json!({ "inq": base64::encode(inq), "outq": base64::encode(outq) })))
}

/// In place of a payload that is not shown: `... <12B>`.
pub(crate) fn to_summary<R: BufRead>(records: &mut Records<R>, record: &[u8]) -> Result<Option<Value>, ImageError> {
    let len = match records.kind().body() {
        Body::Plain | Body::Pagemap | Body::Raw | Body::Ghost => {
            records.skip_payload()?;
            return Ok(None);
        }
        Body::IpcMsg => records.raw_messages()?.iter().map(|(m, text)| (m.len() + text.len()) as u64).sum(),
        // The size of the segment, wherever its content is.
        Body::IpcShm => {
            records.skip_payload()?;
            wire::number(record, 2)
        }
        Body::PipeData | Body::SkPacket | Body::TcpStream | Body::BpfMap | Body::IpcSem => {
            let len = records.payload_len().unwrap_or(0);
            records.skip_payload()?;
            len
        }
    };
    Ok(Some(Value::String(format!("... <{}>", size_text(len)))))
}

/// `12B`, `1.5KB`.
fn size_text(bytes: u64) -> String {
    let mut size = bytes as f64;
    for unit in ["", "K", "M", "G", "T", "P"] {
        if size < 1024.0 {
            let digits = usize::from(size.fract() != 0.0);
            return format!("{size:.digits$}{unit}B");
        }
        size /= 1024.0;
    }
    format!("{size:.1}EB")
}

/// The payload for a record: checked against the lengths in the record, and padded.
pub(crate) fn from_extra(
    kind: ImageKind,
    number: u64,
    record: &[u8],
    extra: Option<&Value>,
    at: At<'_>,
) -> Result<Vec<u8>, ImageError> {
    let at = At::Name(&at, "extra");
    let bytes = match (kind.body(), extra) {
        (Body::Plain | Body::Pagemap | Body::Raw, None) => return Ok(Vec::new()),
        (Body::Plain | Body::Pagemap | Body::Raw, Some(_)) => {
            return Err(at.fail(format!("records of {} have no payload", kind.name())));
        }
        (Body::IpcMsg, extra) => return messages(wire::number(record, 3) as u32, extra, at),
        (_, None) => Vec::new(),
        (Body::Ghost | Body::PipeData | Body::SkPacket | Body::BpfMap | Body::IpcShm, Some(text)) => {
            base64_of(text, at)?
        }
        (Body::TcpStream, Some(queues)) => {
            let queue = |name: &str, len: u64| {
                let at = At::Name(&at, name);
                let text = queues.get(name).ok_or_else(|| at.fail("this queue is missing"))?;
                let queue = base64_of(text, at)?;
                expect_len(queue.len() as u64, len, at)?;
                Ok(queue)
            };
            let len = |field| u64::from(wire::number(record, field) as u32);
            [queue("inq", len(1))?, queue("outq", len(3))?].concat()
        }
        (Body::IpcSem, Some(values)) => {
            let values = values.as_array().ok_or_else(|| at.fail("a list of numbers is expected here"))?;
            let value = |(i, v): (usize, &Value)| {
                let n = v.as_u64().and_then(|v| u16::try_from(v).ok());
                n.map(u16::to_le_bytes).ok_or_else(|| At::Index(&at, i).fail("a number below 65536 is expected here"))
            };
            values.iter().enumerate().map(value).collect::<Result<Vec<_>, _>>()?.concat()
        }
    };
    match pending(kind, number, record) {
        Pending::Nothing => expect_len(bytes.len() as u64, 0, at)?,
        Pending::Bytes(len) => expect_len(bytes.len() as u64, len, at)?,
        Pending::Messages(_) | Pending::Rest => {}
    }
    Ok(padded(bytes, kind))
}

/// The messages of a queue: by turns a record and its text.
fn messages(count: u32, extra: Option<&Value>, at: At<'_>) -> Result<Vec<u8>, ImageError> {
    let none = Vec::new();
    let items = match extra {
        Some(list) => list.as_array().ok_or_else(|| at.fail("a list is expected here"))?,
        None => &none,
    };
    if items.len() as u64 != 2 * u64::from(count) {
        return Err(at.fail(format!(
            "qnum is {count}, so {} items are expected here, by turns a message and its text",
            2 * u64::from(count)
        )));
    }
    let desc = message_descriptor()?;
    let mut out = Vec::new();
    for (i, pair) in items.chunks_exact(2).enumerate() {
        let here = At::Index(&at, 2 * i);
        let object = pair[0].as_object().ok_or_else(|| here.fail("an object is expected here"))?;
        let record = super::complete(&from_json(&desc, object, here)?, here)?;
        let there = At::Index(&at, 2 * i + 1);
        let text = base64_of(&pair[1], there)?;
        expect_len(text.len() as u64, u64::from(wire::number(&record, 2) as u32), there)?;
        out.extend((record.len() as u32).to_le_bytes());
        out.extend(record);
        out.extend(padded(text, ImageKind::IpcnsMsg));
    }
    Ok(out)
}

fn message_descriptor() -> Result<prost_reflect::MessageDescriptor, ImageError> {
    let missing = ImageError::WrongMessage { kind: ImageKind::IpcnsMsg, message: "ipc_msg" };
    schema::message("ipc_msg").ok_or(missing)
}

/// A record that has been checked, with its unknown fields.
pub(crate) fn decode<R: BufRead>(
    desc: &prost_reflect::MessageDescriptor,
    bytes: &[u8],
    records: &Records<R>,
) -> Result<DynamicMessage, ImageError> {
    let mut message = DynamicMessage::new(desc.clone());
    message.merge(bytes).map_err(|e| ImageError::Decode {
        path: records.path().to_owned(),
        record: records.count().saturating_sub(1),
        message: desc.name().to_owned(),
        reason: e.to_string(),
    })?;
    Ok(message)
}

fn base64_of(json: &Value, at: At<'_>) -> Result<Vec<u8>, ImageError> {
    json.as_str().and_then(base64::decode).ok_or_else(|| at.fail("a text in base64 is expected here"))
}

fn expect_len(len: u64, expected: u64, at: At<'_>) -> Result<(), ImageError> {
    if len == expected {
        return Ok(());
    }
    Err(at.fail(format!("this is {len} bytes, but its record says {expected}; change one of them")))
}

fn padded(mut bytes: Vec<u8>, kind: ImageKind) -> Vec<u8> {
    let padding = (bytes.len() as u64).wrapping_neg() % kind.padding();
    bytes.resize(bytes.len() + padding as usize, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        assert_eq!(size_text(0), "0B");
        assert_eq!(size_text(1024), "1KB");
        assert_eq!(size_text(1536), "1.5KB");
        assert_eq!(size_text(1023), "1023B");
        assert_eq!(size_text(u64::MAX), "16.0EB");
    }
}
