//! No bytes make the reader panic, hang, or allocate what the file does not hold.

mod common;

use std::path::Path;

use dormouse_images::{Body, ImageError, ImageKind, Records, json};
use proptest::prelude::*;

/// Reads everything in every way.
fn read(kind: ImageKind, bytes: &[u8]) -> Result<(), ImageError> {
    let records = || Records::new(kind, bytes, bytes.len() as u64, Path::new("test"));
    let mut reader = records()?;
    while reader.raw()?.is_some() {
        if kind == ImageKind::IpcnsMsg && reader.count() % 2 == 0 {
            reader.messages()?;
        } else {
            reader.payload()?;
        }
    }
    assert_eq!(reader.position(), bytes.len() as u64);
    json::decode(records()?, true, true)?;
    json::decode(records()?, false, false)?;
    Ok(())
}

#[test]
fn every_cut_is_noticed() {
    for kind in common::kinds() {
        let whole = common::image(kind, 3);
        read(kind, &whole).expect("it is whole");
        let mut ends = Vec::new();
        let mut reader = Records::new(kind, &*whole, whole.len() as u64, Path::new("test")).expect("it is whole");
        ends.push(reader.position());
        while reader.raw().expect("it is whole").is_some() {
            reader.skip_payload().expect("it is whole");
            ends.push(reader.position());
        }
        for cut in 0..whole.len() {
            let result = read(kind, &whole[..cut]);
            // Between records a cut cannot be told from an end; nor in a ghost without chunks.
            if ends.contains(&(cut as u64)) {
                result.expect("it is whole up to there");
            } else if kind.body() != Body::Ghost {
                assert!(matches!(result, Err(ImageError::Truncated { .. })), "{} {cut}: {result:?}", kind.name());
            }
        }
    }
}

#[test]
fn lengths_beyond_the_file_are_refused_before_anything_is_allocated() {
    for len in [12, 1 << 28, (1 << 28) + 1, u32::MAX] {
        let bytes = [&ImageKind::Fs.header()[..], &len.to_le_bytes(), b"short"].concat();
        match read(ImageKind::Fs, &bytes) {
            Err(ImageError::Truncated { record: 0, needed, left: 5, .. }) => assert_eq!(needed, u64::from(len)),
            Err(ImageError::TooLong { len: l, .. }) => assert_eq!(l, u64::from(len)),
            other => panic!("{len}: {other:?}"),
        }
    }
    let huge = [
        // size: 2^63
        (ImageKind::IpcnsShm, r#"{"desc": DESC, "size": 9223372036854775808, "in_pagemaps": true}"#, [0x18, 1]),
        (ImageKind::IpcnsMsg, r#"{"desc": DESC, "qbytes": 1, "qnum": 0}"#, [0x18, 0]),
    ];
    for (kind, entry, end) in huge {
        let desc = r#"{"key": 1, "uid": 1, "gid": 1, "cuid": 1, "cgid": 1, "mode": 1, "id": 1}"#;
        let text = format!(r#"{{"magic": "{}", "entries": [{}]}}"#, kind.name(), entry.replace("DESC", desc));
        let mut bytes = json::encode_json(&text).expect("it is an image");
        assert!(bytes.ends_with(&end));
        // The payload is there after all; the queue has 127 messages.
        *bytes.last_mut().expect("it is not empty") = if end[1] == 1 { 0 } else { 127 };
        assert!(matches!(read(kind, &bytes), Err(ImageError::Truncated { .. })), "{}", kind.name());
    }
}

#[test]
fn a_missing_required_field_is_named() {
    let bytes = [&ImageKind::Fs.header()[..], &2u32.to_le_bytes(), &[0x08, 1]].concat();
    let error = read(ImageKind::Fs, &bytes).expect_err("root_id is missing");
    assert!(
        matches!(&error, ImageError::MissingField { record: 0, field, .. } if field == "fs_entry.root_id"),
        "{error}"
    );
}

#[test]
fn a_field_of_a_later_version_is_refused_in_sidecars_alone() {
    let record = [0x08, 1, 0x78, 1];
    let image = |kind: ImageKind| [&kind.header()[..], &4u32.to_le_bytes(), &record].concat();
    let sidecar = read(ImageKind::DormouseThreads, &image(ImageKind::DormouseThreads));
    assert!(matches!(sidecar, Err(ImageError::UnknownTag { tag: 15, .. })), "{sidecar:?}");
    read(ImageKind::Pagemap, &image(ImageKind::Pagemap)).expect("CRIU would read it");
}

#[test]
fn headers_of_other_kinds_are_refused() {
    for kind in common::kinds() {
        let mut other = kind.header();
        *other.last_mut().expect("it has one") ^= 1;
        assert!(matches!(read(kind, &other), Err(ImageError::Magic { .. })));
        assert!(matches!(read(kind, &[]), Err(ImageError::Truncated { .. })));
        // Version 1 of the format: the magic alone.
        let old = kind.magic().expect("it has one").to_le_bytes();
        read(kind, &old).expect("CRIU reads it");
    }
    let service = [&ImageKind::Stats.header()[..4], &ImageKind::Fs.header()[4..]].concat();
    assert!(matches!(read(ImageKind::Fs, &service), Err(ImageError::Magic { .. })));
    assert!(matches!(read(ImageKind::Pages, &[]), Err(ImageError::WrongMessage { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn noise_is_survived(seed: u64, noise: Vec<u8>) {
        for kind in common::kinds() {
            let _ = read(kind, &[&kind.header()[..], &noise].concat());
            let framed = [&kind.header()[..], &(noise.len() as u32).to_le_bytes(), &noise].concat();
            let _ = read(kind, &framed);
            let mut bent = common::image(kind, seed);
            let mut dice = common::Dice::new(seed ^ 1);
            for _ in 0..1 + dice.below(4) {
                let at = dice.below(bent.len() as u64) as usize;
                bent[at] = dice.roll() as u8;
            }
            let _ = read(kind, &bent);
            let _ = json::decode_bytes(&bent, Path::new("test"), true);
        }
    }

    #[test]
    fn any_text_is_survived(text: String) {
        let _ = json::encode_json(&text);
        let _ = json::encode_json(&format!(r#"{{"magic": "FS", "entries": [{{"cwd_id": "{text}"}}]}}"#));
    }
}
