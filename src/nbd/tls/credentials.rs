//! The files of [`Credentials`](super::Credentials), read and taken apart without a word of their
//! content in an error.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use openssl::pkey::{PKey, Private};
use openssl::x509::X509;
use zeroize::Zeroizing;

use super::{CA_CERTIFICATES, CA_REVOCATIONS, PSK_FILE};
use crate::error::{Error, Kind, Result};

/// Longest file: a bundle of all authorities of the web has a quarter of it.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Longest user name (OpenSSL 1.1's `PSK_MAX_IDENTITY_LEN`).
const USER_BYTES_MAX: usize = 128;
/// Shortest key: what is shorter can be guessed from one recorded handshake.
const KEY_BYTES_MIN: usize = 16;
/// Longest key (OpenSSL 1.1's `PSK_MAX_PSK_LEN`).
const KEY_BYTES_MAX: usize = 256;

/// What others may do with a file that is theirs to read or to write.
const EVERYBODY: u32 = 0o006;
/// Files that were warned of are remembered up to this number.
const TOLD_MAX: usize = 1000;

/// Whose certificate in a directory is ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Client,
    Server,
}

impl Role {
    fn files(self) -> [&'static str; 2] {
        match self {
            Self::Client => ["client-cert.pem", "client-key.pem"],
            Self::Server => ["server-cert.pem", "server-key.pem"],
        }
    }
}

/// What a directory of certificates holds.
pub(super) struct Certificates {
    pub(super) authorities: Vec<X509>,
    /// Of revocations; OpenSSL reads it itself.
    pub(super) revocations: Option<PathBuf>,
    pub(super) own: Option<Identity>,
}

/// A certificate of our own, those between it and the authority, and its key.
pub(super) struct Identity {
    pub(super) chain: Vec<X509>,
    pub(super) key: PKey<Private>,
}

impl Certificates {
    /// Reads the directory; a client may be without a certificate, a server may not.
    pub(super) fn load(dir: &Path, role: Role) -> Result<Self> {
        let authorities = certificates(&dir.join(CA_CERTIFICATES))?;
        let crl = dir.join(CA_REVOCATIONS);
        let revocations = if crl.exists() {
            // Checked to be a file of bounded size, like all of them.
            read(&crl)?;
            Some(crl)
        } else {
            None
        };
        let [certificate, key] = role.files().map(|name| dir.join(name));
        let own = if role == Role::Server || certificate.exists() || key.exists() {
            Some(Identity { chain: certificates(&certificate)?, key: private_key(&key)? })
        } else {
            None
        };
        Ok(Self { authorities, revocations, own })
    }
}

fn certificates(path: &Path) -> Result<Vec<X509>> {
    let found = X509::stack_from_pem(&read(path)?).map_err(|e| invalid(path, "PEM").source(e))?;
    if found.is_empty() {
        return Err(invalid(path, "a PEM file with a certificate"));
    }
    Ok(found)
}

fn private_key(path: &Path) -> Result<PKey<Private>> {
    // An encrypted key is an error: the library would else ask on the terminal.
    let no_password = |_: &mut [u8]| Ok(0);
    PKey::private_key_from_pem_callback(&read_secret(path)?, no_password)
        .map_err(|e| invalid(path, "a PEM file with a private key that has no password").source(e))
}

fn invalid(path: &Path, what: &str) -> Error {
    Error::new(Kind::Usage, format!("{} is not {what}", path.display()))
}

/// A key and whose it is.
struct Key {
    user: Vec<u8>,
    secret: Zeroizing<Vec<u8>>,
}

/// The keys of a PSK file.
pub(super) struct Keys(Vec<Key>);

impl Keys {
    /// Reads `place`, or the `keys.psk` in it.
    pub(super) fn load(place: &Path) -> Result<Self> {
        let path = if place.is_dir() { place.join(PSK_FILE) } else { place.to_owned() };
        let bytes = read_secret(&path)?;
        let keys = Self::parse(&bytes)
            .map_err(|why| invalid(&path, "a file of USER:HEXKEY lines").source(why))?;
        Ok(keys)
    }

    /// What is wrong is told by line, never by content.
    fn parse(bytes: &[u8]) -> std::result::Result<Self, String> {
        let mut keys: Vec<Key> = Vec::new();
        for (number, line) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
            let line = line.trim_ascii();
            if line.is_empty() {
                continue;
            }
            let bad = |what: &str| format!("line {number}: {what}");
            let colon = line.iter().rposition(|byte| *byte == b':');
            let (user, key) = line.split_at(colon.ok_or_else(|| bad("there is no colon"))?);
            // GnuTLS writes users that are not plain text as # and hexadecimal digits.
            let user = match user.strip_prefix(b"#") {
                Some(hex) => unhex(hex).map(|user| user.to_vec()),
                None => Some(user.to_vec()),
            };
            let user = user.filter(|user| !user.is_empty() && user.len() <= USER_BYTES_MAX);
            let user = user.filter(|user| !user.contains(&0));
            let user = user.ok_or_else(|| bad("the user is not valid"))?;
            let secret = unhex(&key[1..]).ok_or_else(|| bad("the key is not hexadecimal"))?;
            if !(KEY_BYTES_MIN..=KEY_BYTES_MAX).contains(&secret.len()) {
                return Err(bad("the key has not 16 to 256 bytes"));
            }
            if keys.iter().any(|key| key.user == user) {
                return Err(bad("the user has a key already"));
            }
            keys.push(Key { user, secret });
        }
        if keys.is_empty() { Err("it has no line".to_owned()) } else { Ok(Self(keys)) }
    }

    /// The key of a user.
    pub(super) fn find(&self, user: &[u8]) -> Option<&[u8]> {
        self.0.iter().find(|key| key.user == user).map(|key| key.secret.as_slice())
    }

    /// The user, if there is one only.
    pub(super) fn only_user(&self) -> Option<&[u8]> {
        match self.0.as_slice() {
            [only] => Some(&only.user),
            _ => None,
        }
    }
}

fn unhex(text: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|d| u8::try_from(d).ok());
    let mut bytes = Zeroizing::new(Vec::with_capacity(text.len() / 2));
    let (pairs, []) = text.as_chunks::<2>() else { return None };
    for [high, low] in pairs {
        bytes.push(digit(*high)? << 4 | digit(*low)?);
    }
    Some(bytes)
}

/// Reads a file that nobody else should; says so, once, if everybody can. Who may must be decided by
/// whoever keeps it: groups (root and qemu, say) are for that.
fn read_secret(path: &Path) -> Result<Zeroizing<Vec<u8>>> {
    static TOLD: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    let mode = path.metadata().map_or(0, |metadata| metadata.permissions().mode());
    // Every connection reads the file anew.
    let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    if mode & EVERYBODY != 0 && told.len() < TOLD_MAX && told.insert(path.to_owned()) {
        let (path, mode) = (path.display(), mode & 0o777);
        tracing::warn!(
            "everybody on this host can get at the key in {path} ({mode:03o}): chmod 600 {path}"
        );
    }
    drop(told);
    read(path)
}

/// Reads a file that must be one, and short.
fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>> {
    let failed = |e| Error::io(format!("cannot read {}", path.display()), e);
    // Opening a FIFO would wait for ever.
    let metadata = path.metadata().map_err(failed)?;
    if !metadata.is_file() || metadata.len() > FILE_BYTES_MAX {
        return Err(invalid(path, "a file of at most 1 MiB"));
    }
    // As much room as it takes, so that no piece of a key is left behind by growing.
    let room = usize::try_from(metadata.len()).expect("at most 1 MiB") + 1;
    let mut bytes = Zeroizing::new(Vec::with_capacity(room));
    let file = File::open(path).map_err(failed)?;
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "000102030405060708090a0b0c0d0e0F";

    #[test]
    fn users_have_the_keys_of_their_lines() {
        let text = format!("alice:{KEY}\r\n\nb:ob:{KEY}ff\n#6361726c:{KEY}aa\n");
        let keys = Keys::parse(text.as_bytes()).unwrap();
        let plain: Vec<u8> = (0..16).collect();
        assert_eq!(keys.find(b"alice"), Some(plain.as_slice()));
        assert_eq!(keys.find(b"b:ob").unwrap().len(), 17);
        assert_eq!(keys.find(b"carl").unwrap()[16], 0xaa);
        assert_eq!(keys.find(b"dave"), None);
        assert_eq!(keys.only_user(), None);
        assert_eq!(
            Keys::parse(format!("a:{KEY}").as_bytes()).unwrap().only_user(),
            Some(&b"a"[..])
        );
    }

    #[test]
    fn what_is_no_key_file_is_refused_without_telling_its_content() {
        for text in [
            String::new(),
            "\n".into(),
            KEY.into(),
            format!(":{KEY}"),
            format!("a:{KEY}0"),
            format!("a:{}", KEY.replace('a', "g")),
            "a:".into(),
            "a:0011223344".into(),
            format!("a:{}", KEY.repeat(17)),
            format!("{}:{KEY}", "a".repeat(129)),
            format!("#616:{KEY}"),
            format!("#00:{KEY}"),
            format!("a:{KEY}\na:{KEY}"),
        ] {
            let why = Keys::parse(text.as_bytes()).err().expect(&text);
            assert!(!why.contains(&KEY[..8]) && !why.contains("0011"), "{why}");
        }
    }
}
