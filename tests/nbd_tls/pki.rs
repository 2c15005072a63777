//! Authorities, certificates and keys, made for one test, in the file layout of GnuTLS.

use std::path::{Path, PathBuf};
use std::process::Command;

use openssl::asn1::{Asn1Integer, Asn1Time};
use openssl::bn::BigNum;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::x509::extension::{
    BasicConstraints, ExtendedKeyUsage, KeyUsage, SubjectAlternativeName,
};
use openssl::x509::{X509, X509Builder, X509Name};
use tempfile::TempDir;

/// Names in the server's certificate.
pub const SERVER_NAME: &str = "disks.example";
/// The key of user "vmbackup".
pub const KEY: &str = "9c1dd3d0b2f6f4b4a51e28bdc0a7c1c93ab1a5c1a3b0ff3ac5bb7a7b6b2d6b10";
/// Serial number of each server's certificate.
const SERIAL_SERVER: u32 = 2;
/// Serial number of each client's certificate.
const SERIAL_CLIENT: u32 = 3;
const DAY: i64 = 24 * 3600;

/// An authority.
pub struct Authority {
    certificate: X509,
    key: PKey<Private>,
}

/// From when to when a certificate holds, in days from now.
pub type Days = (i64, i64);

impl Authority {
    pub fn new(name: &str) -> Self {
        let key = key();
        let mut builder = builder(name, name, 1, (-1, 2), &key);
        builder.append_extension(BasicConstraints::new().critical().ca().build().unwrap()).unwrap();
        let usage = KeyUsage::new().critical().key_cert_sign().crl_sign().build().unwrap();
        builder.append_extension(usage).unwrap();
        builder.sign(&key, MessageDigest::sha256()).unwrap();
        Self { certificate: builder.build(), key }
    }

    /// Writes `WHO-cert.pem` and `WHO-key.pem`.
    fn issue(&self, dir: &Path, who: &str, serial: u32, days: Days) {
        let key = key();
        let issuer = self.certificate.subject_name();
        let issuer = issuer.entries().next().unwrap().data().to_string().unwrap();
        let mut builder = builder(&issuer, who, serial, days, &key);
        let mut usage = ExtendedKeyUsage::new();
        if who == "server" {
            usage.server_auth();
            let context = builder.x509v3_context(None, None);
            let names = SubjectAlternativeName::new()
                .dns(SERVER_NAME)
                .dns("localhost")
                .ip("127.0.0.1")
                .build(&context)
                .unwrap();
            builder.append_extension(names).unwrap();
        } else {
            usage.client_auth();
        }
        builder.append_extension(usage.build().unwrap()).unwrap();
        builder.sign(&self.key, MessageDigest::sha256()).unwrap();
        std::fs::write(dir.join(format!("{who}-cert.pem")), builder.build().to_pem().unwrap())
            .unwrap();
        let pem = key.private_key_to_pem_pkcs8().unwrap();
        std::fs::write(dir.join(format!("{who}-key.pem")), pem).unwrap();
    }

    fn trust_in(&self, dir: &Path) {
        std::fs::write(dir.join("ca-cert.pem"), self.certificate.to_pem().unwrap()).unwrap();
    }

    /// A list of revocations with these serial numbers.
    fn revoke(&self, dir: &Path, serials: &[u32]) {
        let work = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &[u8]| std::fs::write(work.path().join(name), text).unwrap();
        let line = |n: &u32| format!("R\t491231235959Z\t200101000000Z\t{n:02X}\tunknown\t/CN=x\n");
        let index: Vec<String> = serials.iter().map(line).collect();
        write("index", index.concat().as_bytes());
        write("ca.pem", &self.certificate.to_pem().unwrap());
        write("key.pem", &self.key.private_key_to_pem_pkcs8().unwrap());
        let config = "[ca]\ndefault_ca=a\n[a]\ndatabase=index\ndefault_md=sha256\n\
                      default_crl_days=2\ncertificate=ca.pem\nprivate_key=key.pem\n";
        write("config", config.as_bytes());
        let out = dir.join("ca-crl.pem");
        let output = Command::new("openssl")
            .args(["ca", "-gencrl", "-config", "config", "-out", out.to_str().unwrap()])
            .current_dir(work.path())
            .output()
            .expect("openssl is needed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

fn key() -> PKey<Private> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
    PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap()
}

fn name(text: &str) -> X509Name {
    let mut name = X509Name::builder().unwrap();
    name.append_entry_by_nid(Nid::COMMONNAME, text).unwrap();
    name.build()
}

fn builder(
    issuer: &str,
    subject: &str,
    serial: u32,
    (from, to): Days,
    key: &PKey<Private>,
) -> X509Builder {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let day =
        |n: i64| Asn1Time::from_unix(i64::try_from(now.as_secs()).unwrap() + n * DAY).unwrap();
    let mut builder = X509Builder::new().unwrap();
    builder.set_version(2).unwrap();
    let serial = Asn1Integer::from_bn(&BigNum::from_u32(serial).unwrap()).unwrap();
    builder.set_serial_number(&serial).unwrap();
    builder.set_issuer_name(&name(issuer)).unwrap();
    builder.set_subject_name(&name(subject)).unwrap();
    builder.set_not_before(&day(from)).unwrap();
    builder.set_not_after(&day(to)).unwrap();
    builder.set_pubkey(key).unwrap();
    builder
}

/// One authority; directories of a server and of clients that it should or should not like.
pub struct Pki {
    dir: TempDir,
    authority: Authority,
}

impl Pki {
    pub fn new() -> Self {
        Self::with_server_days((-1, 1))
    }

    /// With a server's certificate that holds in these days.
    pub fn with_server_days(days: Days) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new("the authority");
        let pki = Self { dir, authority };
        pki.authority.issue(&pki.subdir("server"), "server", SERIAL_SERVER, days);
        pki.authority.trust_in(&pki.server());
        pki.authority.issue(&pki.subdir("client"), "client", SERIAL_CLIENT, (-1, 1));
        pki.authority.trust_in(&pki.client());
        pki.authority.trust_in(&pki.subdir("bare"));
        std::fs::write(pki.psk(), format!("other:{}\nvmbackup:{KEY}\n", KEY.replace('9', "1")))
            .unwrap();
        pki
    }

    fn subdir(&self, name: &str) -> PathBuf {
        let dir = self.dir.path().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    /// Certificates of the server.
    pub fn server(&self) -> PathBuf {
        self.dir.path().join("server")
    }

    /// Certificates of a client.
    pub fn client(&self) -> PathBuf {
        self.dir.path().join("client")
    }

    /// A client that has no certificate of its own.
    pub fn bare_client(&self) -> PathBuf {
        self.dir.path().join("bare")
    }

    /// A client with a certificate of another authority, which trusts ours.
    pub fn foreign_client(&self) -> PathBuf {
        let dir = self.subdir("foreign");
        Authority::new("another authority").issue(&dir, "client", SERIAL_CLIENT, (-1, 1));
        self.authority.trust_in(&dir);
        dir
    }

    /// A client with our certificate that trusts another authority of the same name.
    pub fn misled_client(&self) -> PathBuf {
        let dir = self.subdir("misled");
        self.authority.issue(&dir, "client", SERIAL_CLIENT, (-1, 1));
        Authority::new("the authority").trust_in(&dir);
        dir
    }

    /// Puts a list that revokes the server's certificate, or another's, beside the client's.
    pub fn revoke(&self, whose: Revoked) {
        let serial = if whose == Revoked::Server { SERIAL_SERVER } else { 99 };
        self.authority.revoke(&self.client(), &[serial]);
    }

    /// Puts a list that revokes the client's certificate, or another's, beside the server's.
    pub fn revoke_client(&self, whose: Revoked) {
        let serial = if whose == Revoked::Client { SERIAL_CLIENT } else { 99 };
        self.authority.revoke(&self.server(), &[serial]);
    }

    /// The file of keys; its directory is what QEMU wants.
    pub fn psk(&self) -> PathBuf {
        self.subdir("psk").join("keys.psk")
    }

    /// Another file of keys, with `line`.
    pub fn psk_with(&self, line: &str) -> PathBuf {
        let path = self.subdir("psk-of-client").join("keys.psk");
        std::fs::write(&path, line).unwrap();
        path
    }
}

/// Whose certificate a list names.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Revoked {
    Server,
    Client,
    Another,
}
