//! One key slot: the master key wrapped by a password, by a key file, or by nothing.
//!
//! ```text
//!  keys/<kind>-<16 hex> = JSON on one line ‖ "\n" ‖ BLAKE3 of the line, in hex ‖ "\n"
//!  wrap key = Argon2id(password, salt; parameters of the slot), version 0x13, 32 bytes
//!           | HKDF-SHA256(salt, key file, "vmbackup v1 key file")
//!  wrapped  = AES-256-GCM(wrap key, nonce = 0[12], aad = "vmbackup v1 key slot" ‖ repository id[16]
//!             ‖ name of the slot, master[32])
//! ```
//!
//! The salt is random per slot, so a wrap key seals once and the nonce may be zero. The checksum
//! tells a damaged slot from a wrong password.

use argon2::{Algorithm, Argon2, Params, Version};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{Credentials, Kdf, SlotInfo, SlotKind};
use crate::clock::Timestamp;
use crate::error::{Error, Kind, Result};
use crate::repo::config::RepositoryId;
use crate::repo::seal::{FORMAT_VERSION, MasterKey, derive, random};
use crate::repo::store::{Folder, ObjectName, from_hex, hex};

const KEY_FILE_INFO: &[u8] = b"vmbackup v1 key file";
const WRAP_AAD: &[u8] = b"vmbackup v1 key slot";

/// Most memory a slot may ask for: a store must not be able to exhaust ours. In KiB.
const MEMORY_KIB_MAX: u32 = 256 * 1024;
/// Most passes over it.
const PASSES_MAX: u32 = 64;
/// Most lanes.
const LANES_MAX: u32 = 64;

/// A slot as it is stored.
#[derive(Clone, Serialize, Deserialize)]
struct Wire {
    version: u16,
    kind: SlotKind,
    created: String,
    label: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    argon2id: Option<Kdf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    salt: Option<String>,
    /// The wrapped master key; of a clear slot the key itself, which is in the store for all to
    /// see, so there is nothing to wipe.
    master: String,
}

/// A slot that was read.
pub(super) struct Slot {
    pub(super) info: SlotInfo,
    wire: Wire,
}

/// What a new slot is made of.
pub(super) struct NewSlot<'a> {
    pub(super) repository: RepositoryId,
    pub(super) credentials: &'a Credentials,
    pub(super) kdf: Kdf,
    pub(super) label: &'a str,
    pub(super) created: Timestamp,
}

impl NewSlot<'_> {
    /// The slot's name and bytes. Burns CPU and memory for a password.
    pub(super) fn encode(&self, master: &MasterKey) -> Result<(SlotInfo, Vec<u8>)> {
        self.credentials.check_strength()?;
        let kind = self.credentials.kind();
        let name =
            ObjectName::new(Folder::Keys, &format!("{}-{}", kind.prefix(), hex(&random::<8>())));
        let salt = random::<32>();
        let mut wire = Wire {
            version: FORMAT_VERSION,
            kind,
            created: self.created.to_string(),
            label: self.label.to_owned(),
            argon2id: (kind == SlotKind::Password).then_some(self.kdf),
            salt: (kind != SlotKind::Clear).then(|| hex(&salt)),
            master: hex(master.expose()),
        };
        if let Some(key) = wrap_key(self.credentials, &wire)? {
            let mut wrapped = master.expose().to_vec();
            let (nonce, aad) = nonce_and_aad(self.repository, &name);
            key.seal_in_place_append_tag(nonce, aad, &mut wrapped)
                .expect("32 bytes are within the bounds of AES-GCM");
            wire.master = hex(&wrapped);
        }
        let line = serde_json::to_string(&wire).expect("plain fields serialise");
        let check = blake3::hash(line.as_bytes()).to_hex();
        let info = SlotInfo { name, kind, label: self.label.to_owned(), created: self.created };
        Ok((info, format!("{line}\n{check}\n").into_bytes()))
    }
}

impl Slot {
    /// Reads a slot's bytes: damage and newer versions show here, without any key.
    pub(super) fn parse(name: &ObjectName, bytes: &[u8]) -> Result<Self> {
        let corrupt = |what: &str| Error::new(Kind::Corrupt, format!("key slot {name} {what}"));
        let text = std::str::from_utf8(bytes).map_err(|_| corrupt("is damaged"))?;
        let (line, check) = text.split_once('\n').ok_or_else(|| corrupt("is damaged"))?;
        if check.trim_end() != blake3::hash(line.as_bytes()).to_hex().as_str() {
            return Err(corrupt("is damaged"));
        }
        let value: serde_json::Value =
            serde_json::from_str(line).map_err(|e| corrupt("is not JSON").source(e))?;
        let version = value.get("version").and_then(serde_json::Value::as_u64).unwrap_or(0);
        if version > u64::from(FORMAT_VERSION) {
            let message = format!("key slot {name} has format version {version}");
            return Err(
                Error::new(Kind::TooNew, message).hint("use a newer version of this program")
            );
        }
        let wire: Wire =
            serde_json::from_value(value).map_err(|e| corrupt("lacks a field").source(e))?;
        let created = wire.created.parse().map_err(|_| corrupt("has no valid time"))?;
        let info =
            SlotInfo { name: name.clone(), kind: wire.kind, label: wire.label.clone(), created };
        Ok(Self { info, wire })
    }

    /// The master key, if these credentials open the slot; `None` when they are of another kind or
    /// wrong. Burns CPU and memory for a password.
    pub(super) fn unwrap(
        &self,
        repository: RepositoryId,
        credentials: &Credentials,
    ) -> Result<Option<MasterKey>> {
        if credentials.kind() != self.info.kind {
            return Ok(None);
        }
        let bad = || {
            Error::new(Kind::Corrupt, format!("key slot {} holds no master key", self.info.name))
        };
        let Some(key) = wrap_key(credentials, &self.wire)? else {
            return from_hex(&self.wire.master)
                .map(MasterKey::from_bytes)
                .map(Some)
                .ok_or_else(bad);
        };
        let mut wrapped = Zeroizing::new(from_hex::<48>(&self.wire.master).ok_or_else(bad)?);
        let (nonce, aad) = nonce_and_aad(repository, &self.info.name);
        let Ok(master) = key.open_in_place(nonce, aad, &mut wrapped[..]) else { return Ok(None) };
        let master: [u8; 32] = (&*master).try_into().map_err(|_| bad())?;
        Ok(Some(MasterKey::from_bytes(master)))
    }
}

/// The key that wraps the master in a slot; none for a clear slot.
fn wrap_key(credentials: &Credentials, wire: &Wire) -> Result<Option<LessSafeKey>> {
    let bad = |what| Error::new(Kind::Corrupt, format!("a key slot has {what}"));
    let salt = || wire.salt.as_deref().and_then(from_hex::<32>).ok_or_else(|| bad("no salt"));
    let mut secret = Zeroizing::new([0; 32]);
    match credentials {
        Credentials::None => return Ok(None),
        Credentials::KeyFile(bytes) => {
            *secret = derive(bytes.expose(), &salt()?, &[KEY_FILE_INFO]);
        }
        Credentials::Password(password) => {
            let kdf = wire.argon2id.ok_or_else(|| bad("no parameters"))?;
            if kdf.memory_kib > MEMORY_KIB_MAX || kdf.passes > PASSES_MAX || kdf.lanes > LANES_MAX {
                return Err(bad("parameters beyond what this program grants"));
            }
            let params = Params::new(kdf.memory_kib, kdf.passes, kdf.lanes, Some(32))
                .map_err(|_| bad("invalid parameters"))?;
            Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
                .hash_password_into(password.expose(), &salt()?, &mut *secret)
                .map_err(|_| bad("invalid parameters"))?;
        }
    }
    let key = UnboundKey::new(&AES_256_GCM, &*secret).expect("32 bytes are an AES-256 key");
    Ok(Some(LessSafeKey::new(key)))
}

fn nonce_and_aad(repository: RepositoryId, name: &ObjectName) -> (Nonce, Aad<Vec<u8>>) {
    let aad = [WRAP_AAD, &repository.0, name.as_str().as_bytes()].concat();
    (Nonce::assume_unique_for_key([0; NONCE_LEN]), Aad::from(aad))
}
