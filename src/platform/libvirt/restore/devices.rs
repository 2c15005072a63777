//! All other devices of a rewritten description: runtime leftovers go, what two domains cannot
//! share becomes the new one's own.

use std::path::{Path, PathBuf};

use super::{Emulator, Rewriter};
use crate::platform::libvirt::artifacts::SWTPM_DIR;
use crate::platform::libvirt::xml::Element;
use crate::vm::Uuid;

/// Prefix of aliases users give themselves (formatdomain.rst, "alias"); all others are libvirt's.
const USER_ALIAS: &str = "ua-";

/// Prefixes of interface names libvirt makes (`VIR_NET_GENERATED_*_PREFIX`).
const GENERATED_INTERFACES: [&str; 5] = ["vnet", "vif", "macvtap", "macvlan", "veth"];

/// Character devices.
const CHARACTER_DEVICES: [&str; 6] =
    ["serial", "parallel", "console", "channel", "smartcard", "redirdev"];

impl<'a> Rewriter<'a> {
    /// Rewrites everything but disks.
    pub(super) fn devices(&mut self, uuid: Uuid) {
        let root: &'a Element = self.root;
        for label in root.all("seclabel") {
            // Chosen at each start; a static one is the user's.
            if label.attr("type") == Some("dynamic") {
                self.remove(label);
            }
        }
        let Some(devices) = root.child("devices") else { return };
        let mut aliases = Vec::new();
        devices.walk(&mut |element| {
            let libvirts =
                |alias: &&Element| !alias.attr("name").is_some_and(|n| n.starts_with(USER_ALIAS));
            aliases.extend(element.child("alias").filter(libvirts));
        });
        for alias in aliases {
            self.remove(alias);
        }
        for device in &devices.children {
            match device.name.as_str() {
                "emulator" if self.options.emulator == Emulator::HostDefault => {
                    self.say(format!("emulator: the host's default (was {})", device.text));
                    self.remove(device);
                }
                "interface" => self.interface(device),
                "graphics" => self.graphics(device),
                "hostdev" => self.hostdev(device),
                "tpm" => self.tpm(device, uuid),
                "vsock" => self.vsock(device),
                "memory" => self.memory(device),
                name if CHARACTER_DEVICES.contains(&name) => self.character(device),
                _ => {}
            }
        }
    }

    fn interface(&mut self, device: &Element) {
        if device.attr("type") == Some("hostdev") && self.new_name().is_some() {
            self.say("a network card passed through from the host is left out");
            return self.remove(device);
        }
        let generated = |name: &str| {
            GENERATED_INTERFACES.iter().any(|prefix| {
                name.strip_prefix(prefix).is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()))
            })
        };
        if let Some(target) =
            device.child("target").filter(|t| t.attr("dev").is_some_and(generated))
        {
            self.remove(target);
        }
        if let Some(source) = device.child("source") {
            // Both are made for each start.
            self.remove_attr(source, "portid");
            if source.attr("network").is_some() {
                self.remove_attr(source, "bridge");
            }
        }
        if self.new_name().is_none() {
            return;
        }
        if let Some(mac) = device.child("mac") {
            let old = mac.attr("address").unwrap_or_default();
            self.say(format!("network card {old}: gets a new MAC address"));
            self.remove(mac);
        }
        if let Some(parameters) = device.at(&["virtualport", "parameters"]) {
            for name in ["interfaceid", "instanceid"] {
                self.remove_attr(parameters, name);
            }
        }
    }

    fn graphics(&mut self, device: &Element) {
        let automatic = device.attr("autoport") == Some("yes");
        if automatic {
            self.remove_attr(device, "port");
            self.remove_attr(device, "tlsPort");
        } else if self.new_name().is_some() && device.attr("port").is_some_and(|port| port != "-1")
        {
            let kind = device.attr("type").unwrap_or("graphics");
            let port = device.attr("port").unwrap_or_default();
            self.say(format!("{kind}: a free port (was {port})"));
            self.remove_attr(device, "port");
            self.remove_attr(device, "tlsPort");
            self.set_attr(device, "autoport", "yes");
        }
        if self.new_name().is_some() && device.attr("socket").is_some() {
            self.say("graphics: the socket becomes libvirt's own choice");
            self.remove_attr(device, "socket");
        }
        for listen in device.all("listen") {
            // Resolved from the network or made for each start.
            if listen.attr("type") == Some("network") {
                self.remove_attr(listen, "address");
            }
            if listen.attr("type") == Some("socket") && self.new_name().is_some() {
                self.remove_attr(listen, "socket");
            }
        }
    }

    fn hostdev(&mut self, device: &Element) {
        let kind = device.attr("type").unwrap_or("unknown");
        if self.new_name().is_some() {
            self.say(format!("host device of type {kind} is left out: the original may use it"));
            self.remove(device);
        } else {
            self.say(format!("host device of type {kind} is kept and must exist on the host"));
        }
    }

    fn tpm(&mut self, device: &Element, uuid: Uuid) {
        let Some(backend) = device.child("backend") else { return };
        if backend.attr("type") != Some("emulator") {
            if self.new_name().is_some() {
                self.say("the TPM of the host is left out: the original may use it");
                self.remove(device);
            }
            return;
        }
        let source = backend.child("source");
        let part = if backend.attr("version") == Some("1.2") { "tpm1.2" } else { "tpm2" };
        let standard = || Path::new(SWTPM_DIR).join(uuid.to_string()).join(part);
        match (source, self.new_name()) {
            (Some(source), Some(_)) => {
                self.say("TPM state: in libvirt's own directory for the new UUID");
                self.remove(source);
                self.tpm_dir = Some(standard());
            }
            (Some(source), None) => {
                self.tpm_dir = source.attr("path").map(PathBuf::from).or_else(|| Some(standard()));
            }
            (None, _) => self.tpm_dir = Some(standard()),
        }
    }

    fn vsock(&mut self, device: &Element) {
        let Some(cid) = device.child("cid") else { return };
        let automatic = cid.attr("auto") == Some("yes");
        if automatic || self.new_name().is_some() {
            if !automatic {
                let old = cid.attr("address").unwrap_or_default();
                self.say(format!("vsock: a free address (was {old})"));
                self.set_attr(cid, "auto", "yes");
            }
            self.remove_attr(cid, "address");
        }
    }

    fn memory(&mut self, device: &Element) {
        let Some(path) = device.text_at(&["source", "path"]) else { return };
        if self.new_name().is_some() {
            self.say(format!("memory kept in {path} is left out: it is the original's"));
            self.remove(device);
        } else {
            self.say(format!("memory kept in {path} was not captured and must exist"));
        }
    }

    fn character(&mut self, device: &Element) {
        if device.attr("type") == Some("pty") {
            // The terminal of the last start.
            self.remove_attr(device, "tty");
            if let Some(source) = device.child("source") {
                self.remove(source);
            }
            return;
        }
        if let Some(target) = device.child("target") {
            self.remove_attr(target, "state");
        }
        let name = self.new_name();
        for part in ["source", "log"] {
            let Some(source) = device.child(part) else { continue };
            let attribute = if part == "log" { "file" } else { "path" };
            let Some(path) = source.attr(attribute).map(str::to_owned) else { continue };
            let bound =
                device.attr("type") == Some("unix") && source.attr("mode") != Some("connect");
            if part == "source" && bound && is_made_by_libvirt(&path) {
                self.remove(source);
            } else if let Some(name) = name
                && (part == "log" || bound || device.attr("type") == Some("file"))
            {
                let own = format!("{path}-{name}");
                self.say(format!("{}: {own} (was {path})", device.name));
                self.set_attr(source, attribute, &own);
            }
        }
    }
}

/// Sockets libvirt names by the running domain (`qemuDomainChrDefDropDefaultPath`).
fn is_made_by_libvirt(path: &str) -> bool {
    path.contains("/libvirt/qemu/") && path.contains("channel/")
}
