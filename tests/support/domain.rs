//! A libvirt domain of a test: described by [`DomainSpec`], gone with [`Domain`].
//!
//! Boots the real guest under emulation (`/dev/kvm` may exist and yet not run a kernel). Disks are
//! files in the test's directory, with stable serials; the guest is controlled through a unix
//! socket there too.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::env::TestEnv;
use super::guest::{Guest, GuestFiles};
use super::libvirt::{self, ensure_libvirt, remove_domain, virsh};
use super::luks::Secret;
use super::outcome::Outcome;
use super::tools::wait_until;

/// Image format of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DiskFormat {
    /// qcow2.
    Qcow2,
    /// qcow2 on a backing file (with data of its own).
    Qcow2Backed,
    /// raw.
    Raw,
    /// qcow2 with LUKS inside.
    Qcow2Luks,
    /// raw in a LUKS container.
    RawLuks,
}

impl DiskFormat {
    /// The name QEMU knows it by.
    pub(crate) fn name(self) -> &'static str {
        if matches!(self, Self::Raw | Self::RawLuks) { "raw" } else { "qcow2" }
    }

    fn is_encrypted(self) -> bool {
        matches!(self, Self::Qcow2Luks | Self::RawLuks)
    }
}

/// One disk of a domain to be; they become vda, vdb, … in order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DiskSpec {
    /// Format of the image.
    pub(crate) format: DiskFormat,
    /// Size in MiB.
    pub(crate) size_mib: u64,
}

/// A domain to be.
#[derive(Clone, Debug)]
pub(crate) struct DomainSpec {
    /// Its disks.
    pub(crate) disks: Vec<DiskSpec>,
    /// Whether it has UEFI firmware with an NVRAM file.
    pub(crate) uefi: bool,
    /// Whether it has an emulated TPM.
    pub(crate) tpm: bool,
    /// Whether its disks are volumes of a directory pool of its own.
    pub(crate) pool: bool,
    /// Distinguishes several domains of one test; part of name and file names.
    pub(crate) suffix: &'static str,
}

impl DomainSpec {
    /// A domain with BIOS firmware and disks of the given formats, 64 MiB each.
    pub(crate) fn with_disks(formats: &[DiskFormat]) -> Self {
        let disks = formats.iter().map(|&format| DiskSpec { format, size_mib: 64 }).collect();
        Self { disks, uefi: false, tpm: false, pool: false, suffix: "" }
    }
}

/// A defined domain, destroyed and undefined on drop.
pub(crate) struct Domain<'env> {
    env: &'env TestEnv,
    name: String,
    disks: Vec<(PathBuf, DiskFormat)>,
    /// Of its encrypted disks.
    secret: Option<Secret<'env>>,
    pool: Option<Pool<'env>>,
}

/// A directory pool of libvirt, gone on drop; its files stay.
pub(crate) struct Pool<'env> {
    env: &'env TestEnv,
    /// Its name.
    pub(crate) name: String,
}

impl<'env> Pool<'env> {
    /// Defines and starts a pool of the files of a directory.
    pub(crate) fn make(env: &'env TestEnv, name: &str, directory: &Path) -> Self {
        ensure_libvirt(env);
        let pool = Self { env, name: name.to_owned() };
        virsh(env, &["pool-define-as", name, "dir", "--target", &directory.to_string_lossy()]).ok();
        pool.virsh("pool-start");
        pool
    }

    /// Runs a command of virsh on it: `pool-start`, `pool-destroy` (which only stops it), ….
    pub(crate) fn virsh(&self, command: &str) {
        virsh(self.env, &[command, &self.name]).ok();
    }
}

impl Drop for Pool<'_> {
    fn drop(&mut self) {
        for command in ["pool-destroy", "pool-undefine"] {
            virsh(self.env, &[command, &self.name]);
        }
    }
}

impl<'env> Domain<'env> {
    /// Makes the disks and defines the domain; it is not started.
    pub(crate) fn define(env: &'env TestEnv, spec: &DomainSpec) -> Self {
        ensure_libvirt(env);
        let name = env.name(spec.suffix);
        let guest = GuestFiles::into_dir(env.dir());
        let encrypted = spec.disks.iter().any(|disk| disk.format.is_encrypted());
        let secret = encrypted.then(|| Secret::define(env, spec.suffix));
        let mut disks = Vec::new();
        let directory = if spec.pool { env.open_dir("pool") } else { env.dir().to_owned() };
        for (index, disk) in spec.disks.iter().enumerate() {
            let image = make_disk(env, (&directory, spec.suffix, index), *disk, secret.as_ref());
            disks.push((image, disk.format));
        }
        let pool = spec.pool.then(|| Pool::make(env, &format!("{name}-pool"), &directory));
        let domain = Self { env, name, disks, secret, pool };
        let file = env.path(&format!("domain{}.xml", spec.suffix));
        std::fs::write(&file, domain.xml(&guest, spec)).expect("own directory");
        domain.virsh(&["define", &file.to_string_lossy()]).ok();
        domain
    }

    /// Defines and starts the domain and waits until its guest is up.
    pub(crate) fn boot(env: &'env TestEnv, spec: &DomainSpec) -> (Self, Guest) {
        let domain = Self::define(env, spec);
        let guest = domain.start();
        (domain, guest)
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Image file of a disk by index.
    pub(crate) fn disk(&self, index: usize) -> &Path {
        &self.disks[index].0
    }

    /// The pool its disks are in.
    pub(crate) fn pool(&self) -> &Pool<'env> {
        self.pool.as_ref().expect("a domain with a pool")
    }

    /// Number of disks.
    pub(crate) fn disk_count(&self) -> usize {
        self.disks.len()
    }

    /// Its UUID.
    pub(crate) fn uuid(&self) -> String {
        self.virsh(&["domuuid", &self.name]).text()
    }

    /// Its description as it will be on the next start.
    pub(crate) fn dump(&self) -> String {
        self.virsh(&["dumpxml", "--inactive", &self.name]).text()
    }

    /// Starts it and waits until its guest is up.
    pub(crate) fn start(&self) -> Guest {
        self.virsh(&["start", &self.name]).ok();
        self.guest()
    }

    /// Connects to the guest of the running domain, also one that somebody else defined and
    /// started: the socket is the one its description names.
    pub(crate) fn guest(&self) -> Guest {
        let xml = self.virsh(&["dumpxml", &self.name]).text();
        let port = xml.split_once("<serial type='unix'").expect("a serial port on a socket").1;
        let path = port.split_once("path='").expect("a socket path").1;
        Guest::connect(Path::new(path.split('\'').next().expect("a closing quote")))
    }

    /// Ends it the hard way, as a power cut would.
    pub(crate) fn destroy(&self) {
        self.virsh(&["destroy", &self.name]).ok();
    }

    /// Ends it from inside, as a user would, and waits until it is off. While it is backed up libvirt gives
    /// the end of its agent 30 s before it takes note of its own.
    pub(crate) fn shut_down(&self, guest: &mut Guest) {
        guest.start("sync; poweroff -f");
        wait_until("the domain is off", 100, || self.state() == "shut off");
    }

    /// Kills its QEMU without a chance to clean up, as a crash of the host would.
    pub(crate) fn kill_qemu(&self) {
        let pid_file = format!("/run/libvirt/qemu/{}.pid", self.name);
        let pid = std::fs::read_to_string(pid_file).expect("a running domain has a pid file");
        self.env.run("kill", &["-KILL", pid.trim()]).ok();
        wait_until("the domain is off", 30, || self.state() == "shut off");
    }

    /// Loses it: destroyed, undefined, all its files deleted.
    pub(crate) fn lose(&self) {
        remove_domain(self.env, &self.name);
        self.virsh(&["domstate", &self.name]).fails();
        for (path, _) in &self.disks {
            std::fs::remove_file(path).expect("own disk");
        }
        for file in ["vmlinuz", "initrd"] {
            std::fs::remove_file(self.env.path(file)).expect("own file");
        }
    }

    /// A domain somebody else will define under this name; removed on drop like any other.
    pub(crate) fn adopt(env: &'env TestEnv, name: &str) -> Self {
        Self { env, name: name.to_owned(), disks: Vec::new(), secret: None, pool: None }
    }

    /// The same as another host has it, with its disks.
    pub(crate) fn on<'other>(&self, env: &'other TestEnv, disks: &[PathBuf]) -> Domain<'other> {
        let formats = self.disks.iter().map(|(_, format)| *format);
        let disks = disks.iter().cloned().zip(formats).collect();
        Domain { env, name: self.name.clone(), disks, secret: None, pool: None }
    }

    /// Pauses it.
    pub(crate) fn suspend(&self) {
        self.virsh(&["suspend", &self.name]).ok();
    }

    /// Lets it run on.
    pub(crate) fn resume(&self) {
        self.virsh(&["resume", &self.name]).ok();
    }

    /// `running`, `paused`, `shut off`, …
    pub(crate) fn state(&self) -> String {
        self.virsh(&["domstate", &self.name]).text().trim().to_owned()
    }

    /// Names of the checkpoints libvirt knows.
    pub(crate) fn checkpoints(&self) -> Vec<String> {
        libvirt::checkpoints(self.env, &self.name)
    }

    /// Whether a backup job is active.
    pub(crate) fn has_backup_job(&self) -> bool {
        libvirt::has_backup_job(self.env, &self.name)
    }

    /// Bitmaps with a name that its QEMU has, asked of QEMU itself.
    pub(crate) fn bitmaps(&self) -> Vec<String> {
        libvirt::bitmaps(self.env, &self.name)
    }

    /// Sockets of ours in the running domain's directory.
    pub(crate) fn sockets(&self) -> Vec<PathBuf> {
        libvirt::sockets(self.env, &self.name)
    }

    /// Waits until the guest's agent answers: the guest says that it is up before its agent is.
    pub(crate) fn wait_for_agent(&self) {
        let ping = r#"{"execute":"guest-ping"}"#;
        wait_until("the guest agent", 60, || {
            self.virsh(&["qemu-agent-command", &self.name, ping]).code == Some(0)
        });
    }

    /// Waits until a backup job is active.
    pub(crate) fn wait_for_backup_job(&self) {
        wait_until("a backup job", 30, || self.has_backup_job());
    }

    /// [`Self::oracle`] of every disk.
    pub(crate) fn oracles(&self, label: &str) -> Vec<PathBuf> {
        (0..self.disks.len()).map(|index| self.oracle(index, label)).collect()
    }

    /// Copies a disk of the suspended (or stopped) domain as raw: the oracle for this instant,
    /// independent of what is tested.
    pub(crate) fn oracle(&self, index: usize, label: &str) -> PathBuf {
        let (disk, format) = &self.disks[index];
        let copy = self.env.path(&format!("oracle-{}-{label}-{index}.raw", self.name));
        let mut command = self.env.command("qemu-img");
        command.args(["convert", "-U", "-O", "raw"]);
        match &self.secret {
            Some(secret) if format.is_encrypted() => {
                command.args(["--object", &secret.object(), "--image-opts"]);
                command.arg(Secret::image_options(format.name(), disk));
            }
            _ => {
                command.args(["-f", format.name()]).arg(disk);
            }
        }
        command.arg(&copy);
        Outcome::of(&mut command).ok();
        copy
    }

    /// Runs virsh on the tests' libvirt.
    pub(crate) fn virsh(&self, args: &[&str]) -> Outcome {
        virsh(self.env, args)
    }

    fn xml(&self, guest: &GuestFiles, spec: &DomainSpec) -> String {
        let mut disks = String::new();
        for (index, (path, format)) in self.disks.iter().enumerate() {
            let letter = char::from(b'a' + u8::try_from(index).expect("a few disks"));
            let (kind, source) = match &self.pool {
                None => ("file", format!("file='{}'", path.display())),
                Some(pool) => {
                    let volume = path.file_name().expect("a file").to_string_lossy();
                    ("volume", format!("pool='{}' volume='{volume}'", pool.name))
                }
            };
            let _ = write!(
                disks,
                "<disk type='{kind}' device='disk'>\
                 <driver name='qemu' type='{}' discard='unmap'/><source {source}>{}</source>\
                 <target dev='vd{letter}' bus='virtio'/><serial>vmbtest-{index}</serial></disk>",
                format.name(),
                self.secret
                    .as_ref()
                    .filter(|_| format.is_encrypted())
                    .map_or_else(String::new, Secret::xml)
            );
        }
        let (machine, firmware) = if spec.uefi {
            // The NVRAM file is made by libvirt from the template on the first start.
            let nvram = self.env.path(&format!("nvram{}.fd", spec.suffix));
            let loader = "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd\
                          </loader>";
            let template = "/usr/share/OVMF/OVMF_VARS_4M.fd";
            ("q35", format!("{loader}<nvram template='{template}'>{}</nvram>", nvram.display()))
        } else {
            ("pc", String::new())
        };
        format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='{machine}'>hvm</type>{firmware}\
             <kernel>{kernel}</kernel><initrd>{initrd}</initrd>\
             <cmdline>console=ttyS0 quiet panic=-1</cmdline></os>\
             <features><acpi/></features><cpu mode='maximum'/><clock offset='utc'/>\
             <on_reboot>restart</on_reboot><devices>{disks}\
             <serial type='file'><source path='{console}'/></serial>\
             <serial type='unix'><source mode='bind' path='{control}'/></serial>\
             <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
             <interface type='user'><model type='virtio'/></interface>\
             {tpm}<memballoon model='none'/></devices></domain>",
            tpm = if spec.tpm {
                "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
            } else {
                ""
            },
            name = self.name,
            kernel = guest.kernel.display(),
            initrd = guest.initrd.display(),
            console = self.env.path(&format!("console{}.log", spec.suffix)).display(),
            control = self.env.path(&format!("control{}.sock", spec.suffix)).display(),
        )
    }
}

impl Drop for Domain<'_> {
    fn drop(&mut self) {
        remove_domain(self.env, &self.name);
    }
}

/// Makes an image; the backing file of a backed one has data in it.
fn make_disk(
    env: &TestEnv,
    (directory, suffix, index): (&Path, &str, usize),
    disk: DiskSpec,
    secret: Option<&Secret<'_>>,
) -> PathBuf {
    let path = directory.join(format!("disk{suffix}{index}.{}", disk.format.name()));
    let size = format!("{}M", disk.size_mib);
    if disk.format.is_encrypted() {
        let secret = secret.expect("defined for the domain");
        secret.make_image(disk.format.name(), &path, &size);
        return path;
    }
    let mut command = env.command("qemu-img");
    command.args(["create", "-q", "-f", disk.format.name()]);
    if disk.format == DiskFormat::Qcow2Backed {
        let base = env.path(&format!("base{suffix}{index}.qcow2"));
        env.run("qemu-img", &["create", "-q", "-f", "qcow2", &base.to_string_lossy(), &size]).ok();
        for write in ["write -q -P 0x5a 1M 3M", "write -q -P 0xa5 20M 777k"] {
            env.run("qemu-io", &["-f", "qcow2", "-c", write, &base.to_string_lossy()]).ok();
        }
        command.args(["-F", "qcow2", "-b"]).arg(base);
    }
    Outcome::of(command.arg(&path).arg(&size)).ok();
    path
}
