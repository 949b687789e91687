//! Command lines as getopt_long(3) reads them: options anywhere, abbreviated, with values attached or in the next word.
//!
//! CRIU's users write `criu -vvvv restore --images=dir --restore-d`, and a clap parser takes neither. So the words are
//! taken apart here first, by the option table alone, and clap is given the same again in one fixed form.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use anyhow::{Result, bail};

use super::table::{CRIU, Known, OURS, Takes};

/// One option as it was given.
#[derive(Clone, Debug)]
pub struct Given {
    /// Which.
    pub known: &'static Known,
    /// Its value.
    pub value: Option<OsString>,
    /// It was given as `--no-…`.
    pub negated: bool,
}

impl Given {
    /// An option without a value.
    fn plain(known: &'static Known, negated: bool) -> Self {
        Self { known, value: None, negated }
    }
}

/// Words taken apart.
#[derive(Clone, Debug, Default)]
pub struct Words {
    /// The options, in order.
    pub options: Vec<Given>,
    /// The other words, in order; the first is the command.
    pub operands: Vec<OsString>,
}

/// The option with this exact name.
pub fn find(long: &str) -> Option<&'static Known> {
    CRIU.iter().chain(OURS).find(|known| known.long == long)
}

/// The option that a name, a `no-` name or a unique beginning of one means, and whether it is negated.
fn resolve(name: &str) -> Result<(&'static Known, bool)> {
    let negation = |known: &Known| known.negatable.then(|| format!("no-{}", known.long));
    if let Some(known) = find(name) {
        return Ok((known, false));
    }
    if let Some(known) = CRIU.iter().find(|known| negation(known).as_deref() == Some(name)) {
        return Ok((known, true));
    }
    let mut found = Vec::new();
    for known in CRIU {
        if known.long.starts_with(name) {
            found.push((known, false));
        }
        if negation(known).is_some_and(|no| no.starts_with(name)) {
            found.push((known, true));
        }
    }
    match found[..] {
        [one] => Ok(one),
        [] => bail!("unknown option --{name}; `dormouse help dump` and `dormouse help restore` list them"),
        _ => {
            let name_of =
                |(known, negated): &(&Known, bool)| format!("--{}{}", if *negated { "no-" } else { "" }, known.long);
            let names: Vec<String> = found.iter().map(name_of).collect();
            bail!("option --{name} may be {}; write more of it", names.join(" or "))
        }
    }
}

/// Takes words apart; the name of the program is not one of them.
///
/// # Errors
/// An option is not known, is ambiguous, lacks its value or has one that it does not take.
pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Words> {
    let mut parsed = Words::default();
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        match word.as_bytes() {
            b"--" => {
                parsed.operands.extend(words);
                break;
            }
            [b'-', b'-', long @ ..] => parsed.options.push(parse_long(long, &mut words)?),
            [b'-', cluster @ ..] if !cluster.is_empty() => parse_short(cluster, &mut words, &mut parsed.options)?,
            _ => parsed.operands.push(word),
        }
    }
    Ok(parsed)
}

/// `--name`, `--name=value`, `--name value`.
fn parse_long(long: &[u8], words: &mut impl Iterator<Item = OsString>) -> Result<Given> {
    let equals = long.iter().position(|byte| *byte == b'=');
    let (name, attached) = match equals {
        Some(at) => (&long[..at], Some(OsStr::from_bytes(&long[at + 1..]).to_owned())),
        None => (long, None),
    };
    let (known, negated) = resolve(&String::from_utf8_lossy(name))?;
    let value = match (if negated { Takes::Nothing } else { known.takes }, attached) {
        (Takes::Nothing, Some(value)) => bail!("option --{} takes no value, not even {value:?}", known.long),
        (Takes::Nothing | Takes::MaybeValue, None) => None,
        (Takes::Value | Takes::MaybeValue, Some(value)) => Some(value),
        (Takes::Value, None) => match words.next() {
            Some(value) => Some(value),
            None => bail!("option --{} needs a value", known.long),
        },
    };
    Ok(Given { known, value, negated })
}

/// `-a`, `-abc`, `-aVALUE`, `-a VALUE`.
fn parse_short(cluster: &[u8], words: &mut impl Iterator<Item = OsString>, options: &mut Vec<Given>) -> Result<()> {
    for (i, letter) in cluster.iter().enumerate() {
        let letter = char::from(*letter);
        let Some(known) = CRIU.iter().find(|known| known.short == Some(letter)) else {
            bail!("unknown option -{letter} in -{}", String::from_utf8_lossy(cluster));
        };
        if known.takes == Takes::Nothing {
            options.push(Given::plain(known, false));
            continue;
        }
        let rest = &cluster[i + 1..];
        let mut value = (!rest.is_empty()).then(|| OsString::from_vec(rest.to_vec()));
        if value.is_none() && known.takes == Takes::Value {
            value = words.next();
            if value.is_none() {
                bail!("option -{letter} (--{}) needs a value", known.long);
            }
        }
        options.push(Given { known, value, negated: false });
        break;
    }
    Ok(())
}

/// The log level that the options ask for: 2 at first, each `-v` adds one, `-vN` sets it, as in CRIU, where whatever is
/// no number counts as 0 and `-vvv` as three.
pub fn verbosity(options: &[Given]) -> u8 {
    let mut level = 2u32;
    for given in options.iter().filter(|given| given.known.long == "verbosity") {
        level = match given.value.as_deref().map(OsStr::as_bytes) {
            None => level + 1,
            Some(value) if value.first() == Some(&b'v') => level + value.len() as u32 + 1,
            Some(value) => {
                let digits = value.iter().take_while(|byte| byte.is_ascii_digit());
                digits.fold(0, |number: u32, digit| number.saturating_mul(10).saturating_add(u32::from(digit - b'0')))
            }
        }
        .min(100);
    }
    level as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Words {
        parse(line.split(' ').filter(|word| !word.is_empty()).map(OsString::from)).expect(line)
    }

    fn error(line: &str) -> String {
        parse(line.split(' ').map(OsString::from)).expect_err(line).to_string()
    }

    fn text(words: &Words) -> Vec<String> {
        let one = |given: &Given| {
            let no = if given.negated { "no-" } else { "" };
            match &given.value {
                Some(value) => format!("{no}{}={}", given.known.long, value.to_string_lossy()),
                None => format!("{no}{}", given.known.long),
            }
        };
        words.options.iter().map(one).collect()
    }

    #[test]
    fn options_stand_anywhere() {
        let parsed = words("-v4 -D dir restore -d --shell-job");
        assert_eq!(text(&parsed), ["verbosity=4", "images-dir=dir", "restore-detached", "shell-job"]);
        assert_eq!(parsed.operands, ["restore"]);
    }

    #[test]
    fn values_are_attached_or_follow() {
        assert_eq!(text(&words("dump -t7 -t 8 --tree=9 --tree 10")), ["tree=7", "tree=8", "tree=9", "tree=10"]);
        assert_eq!(text(&words("--manage-cgroups full")), ["manage-cgroups"]);
        assert_eq!(text(&words("--manage-cgroups=full")), ["manage-cgroups=full"]);
        assert_eq!(text(&words("-jdo log")), ["shell-job", "restore-detached", "log-file=log"]);
        assert!(error("dump --tree").contains("needs a value"));
        assert!(error("dump -t").contains("needs a value"));
        assert!(error("dump --shell-job=yes").contains("takes no value"));
    }

    #[test]
    fn long_options_may_be_abbreviated() {
        assert_eq!(text(&words("--images d --leave-r --no-shell")), ["images-dir=d", "leave-running", "no-shell-job"]);
        assert_eq!(text(&words("--tcp-e --ext-u")), ["tcp-established", "ext-unix-sk"]);
        let ambiguous = error("--leave");
        assert!(ambiguous.contains("--leave-stopped or --leave-running"), "{ambiguous}");
        assert!(error("--no-such-thing").contains("unknown option"));
        assert!(error("-q").contains("unknown option -q"));
    }

    #[test]
    fn an_exact_name_is_never_ambiguous() {
        assert_eq!(text(&words("--tls --root / --external a")), ["tls", "root=/", "external=a"]);
    }

    #[test]
    fn own_options_do_not_shadow_abbreviations() {
        assert_eq!(text(&words("--pidf f")), ["pidfile=f"]);
        assert_eq!(text(&words("--pi f")), ["pidfile=f"]);
        assert!(error("--wait").contains("unknown"));
    }

    #[test]
    fn two_dashes_end_the_options() {
        let parsed = words("restore --exec-cmd -D d -- sleep -v 5");
        assert_eq!(text(&parsed), ["exec-cmd", "images-dir=d"]);
        assert_eq!(parsed.operands, ["restore", "sleep", "-v", "5"]);
    }

    #[test]
    fn verbosity_counts_as_in_criu() {
        for (line, level) in [
            ("", 2),
            ("-v", 3),
            ("-vv", 4),
            ("-vvvv", 6),
            ("-v4", 4),
            ("-v -v", 4),
            ("-v0", 0),
            ("--verbosity=3", 3),
            ("--verbosity", 3),
            ("-v1 -v", 2),
            ("-verbosity=0", 0), // CRIU's own test suite writes it so
            ("-v99999999999", 100),
        ] {
            assert_eq!(verbosity(&words(line).options), level, "{line}");
        }
    }
}
