//! Images of every kind go to JSON and come back byte for byte.

mod common;

use std::path::Path;

use dormouse_images::{Body, ImageError, ImageKind, json};
use proptest::prelude::*;

fn there_and_back(kind: ImageKind, bytes: &[u8]) {
    for pretty in [false, true] {
        let text =
            json::decode_bytes(bytes, Path::new("test"), pretty).unwrap_or_else(|e| panic!("{}: {e}", kind.name()));
        assert!(text.is_ascii());
        let back = json::encode_json(&text).unwrap_or_else(|e| panic!("{}: {e}\n{text}", kind.name()));
        assert!(back == bytes, "{} differs\n{text}", kind.name());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_kind_comes_back_byte_for_byte(seed: u64) {
        for kind in common::kinds() {
            there_and_back(kind, &common::image(kind, seed));
        }
    }
}

#[test]
fn images_without_records_come_back() {
    for kind in common::kinds() {
        there_and_back(kind, &kind.header());
    }
}

#[test]
fn unknown_fields_come_back_in_their_place() {
    // cwd_id, root_id and the unknown fields 9 and 300.
    let record = [0x08, 1, 0x10, 2, 0x4a, 2, b'h', b'i', 0xe0, 0x12, 5];
    let bytes = [&ImageKind::Fs.header()[..], &(record.len() as u32).to_le_bytes(), &record].concat();
    there_and_back(ImageKind::Fs, &bytes);
}

#[test]
fn values_outside_an_enumeration_come_back() {
    let record = [0x08, 1, 0x10, 0, 0x18, 99, 0x20, 3];
    let bytes = [&ImageKind::Fdinfo.header()[..], &(record.len() as u32).to_le_bytes(), &record].concat();
    there_and_back(ImageKind::Fdinfo, &bytes);
}

#[test]
fn addresses_are_those_of_python() {
    let address = |words: &str| {
        let text = format!(
            r#"{{"magic": "NETDEV", "entries": [{{"type": "SIT", "ifindex": 1, "mtu": 1, "flags": 1, "name": "", "sit": {{"local": {words}}}}}]}}"#
        );
        let bytes = json::encode_json(&text).expect("it is an image");
        let pretty = json::decode_bytes(&bytes, Path::new("test"), true).expect("it is an image");
        assert_eq!(json::encode_json(&pretty).expect("it is an image"), bytes);
        let pretty: serde_json::Value = serde_json::from_str(&pretty).expect("it is JSON");
        pretty["entries"][0]["sit"]["local"].to_string()
    };
    assert_eq!(address(r#"["127.0.0.1"]"#), r#"["127.0.0.1"]"#);
    assert_eq!(address("[16777343]"), r#"["127.0.0.1"]"#);
    assert_eq!(address(r#"["fe80::1:0:0:2"]"#), r#"["fe80::1:0:0:2"]"#);
    assert_eq!(address(r#"["::ffff:1.2.3.4"]"#), r#"["::ffff:102:304"]"#);
    assert_eq!(address(r#"["::1.2.3.4"]"#), r#"["::102:304"]"#);
    assert_eq!(address(r#"["::1"]"#), r#"["::1"]"#);
    assert_eq!(address("[1, 2]"), "[1,2]");
}

#[test]
fn mistakes_are_named_with_their_place() {
    let error = |text: &str| match json::encode_json(text) {
        Err(e @ ImageError::Json { .. }) => e.to_string(),
        other => panic!("{text}: {other:?}"),
    };
    let fs = |entry: &str| error(&format!(r#"{{"magic": "FS", "entries": [{{"cwd_id": 1, "root_id": 2}}, {entry}]}}"#));
    assert_eq!(fs(r#"{"cwd_id": 1}"#), "entries[1]: the required field fs_entry.root_id is missing");
    assert_eq!(fs(r#"{"cwd": 1}"#), "entries[1].cwd: fs_entry has no such field");
    assert_eq!(fs(r#"{"cwd_id": -1}"#), "entries[1].cwd_id: -1 does not fit into 32 bits without sign");
    assert_eq!(fs(r#"{"cwd_id": "x"}"#), "entries[1].cwd_id: \"x\" is no number that is known here");
    assert_eq!(fs("1"), "entries[1]: an object is expected here");
    assert_eq!(fs(r#"{"cwd_id": 1, "root_id": 2, "extra": ""}"#), "entries[1].extra: records of FS have no payload");
    assert!(error("{").starts_with(": this is not JSON"));
    assert!(error(r#"{"magic": "PAGES", "entries": []}"#).starts_with("magic: PAGES is no kind"));
    let pipe = r#"{"magic": "PIPES_DATA", "entries": [{"pipe_id": 1, "bytes": 5, "extra": "YQ==\n"}]}"#;
    assert_eq!(error(pipe), "entries[0].extra: this is 1 bytes, but its record says 5; change one of them");
    let fd = r#"{"magic": "FDINFO", "entries": [{"type": "PIPO"}]}"#;
    assert!(error(fd).starts_with("entries[0].type: PIPO is none of UND, REG, PIPE"));
}

#[test]
fn payloads_can_be_left_out() {
    let bytes =
        json::encode_json(r#"{"magic": "PIPES_DATA", "entries": [{"pipe_id": 1, "bytes": 1, "extra": "YQ==\n"}]}"#);
    let dir = common::scratch("nopl");
    let path = dir.join("pipes-data.img");
    std::fs::write(&path, bytes.expect("it is an image")).expect("the scratch directory can be written");
    assert!(json::show(&path, false).expect("it is an image").contains(r#""extra": "... <1B>""#));
    let info = json::info(&path).expect("it is an image");
    assert_eq!(info, "{\n    \"magic\": \"PIPES_DATA\",\n    \"count\": 1,\n    \"size\": 17\n}");
    for kind in common::kinds().filter(|k| k.body() != Body::Plain) {
        std::fs::write(&path, common::image(kind, 7)).expect("the scratch directory can be written");
        json::show(&path, false).expect("it is an image");
        json::info(&path).expect("it is an image");
    }
}
