//! The rewriting of domain XML, each rule on the smallest description that shows it.

use proptest::prelude::*;

use super::*;

const LIVE: &str = include_str!("testdata/live.xml");

fn options(identity: Identity) -> RewriteOptions {
    RewriteOptions {
        identity,
        disks: vec![file("vda"), file("vdb")],
        nvram: Some("/new/nvram.fd".into()),
        kernel: None,
        initrd: None,
        emulator: Emulator::Keep,
    }
}

fn file(name: &str) -> RestoredDisk {
    let path = format!("/new/{name}.qcow2").into();
    RestoredDisk { name: name.into(), place: DiskPlace::File { path, format: "qcow2".into() } }
}

fn new() -> Identity {
    Identity::New { name: "copy".into(), uuid: Uuid::from_u128(0x99) }
}

fn parse(xml: &str) -> Element {
    Element::parse("test", xml).unwrap()
}

fn devices<'e>(root: &'e Element, name: &'e str) -> Vec<&'e Element> {
    root.child("devices").unwrap().all(name).collect()
}

#[test]
fn the_lost_vm_comes_back_as_itself() {
    let out = rewrite(LIVE, &options(Identity::Original)).unwrap();
    let expected = include_str!("testdata/original.xml");
    assert_eq!(out.xml, expected, "--- got ---\n{}\n---", out.xml);
    assert_eq!(out.name, "web");
    let changes = out.changes.join("\n");
    for part in
        ["disk vda: /new/vda.qcow2", "NVRAM: /new/nvram.fd", "host device of type pci is kept"]
    {
        assert!(changes.contains(part), "{part} in\n{changes}");
    }
}

#[test]
fn a_new_vm_shares_nothing_with_the_original() {
    let out = rewrite(LIVE, &options(new())).unwrap();
    let root = parse(&out.xml);
    assert_eq!(root.text_at(&["name"]), Some("copy"));
    let uuid = Uuid::from_u128(0x99).to_string();
    assert_eq!(root.text_at(&["uuid"]), Some(&*uuid));
    assert_eq!(root.text_at(&["sysinfo", "system", "entry"]), Some(&*uuid));
    assert!(devices(&root, "hostdev").is_empty());
    assert!(devices(&root, "interface").iter().all(|i| i.child("mac").is_none()));
    let disks: Vec<_> = devices(&root, "disk")
        .iter()
        .map(|d| d.attr_at(&["target"], "dev").unwrap().to_owned())
        .collect();
    // vdc is writable and was not restored.
    assert_eq!(disks, ["vda", "vdb", "sda"]);
    assert_eq!(root.attr_at(&["devices", "vsock", "cid"], "auto"), Some("yes"));
    assert_eq!(root.attr_at(&["devices", "serial", "source"], "path"), Some("/run/web.sock-copy"));
    let tpm = out.tpm_dir.unwrap();
    assert_eq!(tpm, PathBuf::from(format!("/var/lib/libvirt/swtpm/{uuid}/tpm2")));
}

#[test]
fn what_makes_the_machine_stays_byte_for_byte() {
    for identity in [Identity::Original, new()] {
        let out = rewrite(LIVE, &options(identity)).unwrap().xml;
        for kept in [
            "<type arch='x86_64' machine='pc-q35-9.2'>hvm</type>",
            "<loader readonly='yes' secure='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.ms.fd</loader>",
            "<blockio logical_block_size='4096' physical_block_size='4096'/>",
            "<serial>WD-1234&amp;5</serial>",
            "<vendor:note xmlns:vendor='urn:x'><!-- keep me --> a &lt; b </vendor:note>",
            "<alias name='ua-bootdisk'/>",
            "<address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>",
        ] {
            assert!(out.contains(kept), "{kept} in\n{out}");
        }
    }
}

#[test]
fn runtime_leftovers_are_gone() {
    let out = rewrite(LIVE, &options(Identity::Original)).unwrap().xml;
    for gone in [
        "id='7'",
        "vnet3",
        "virtio-disk0",
        "imagelabel",
        "/dev/pts/4",
        "<backingStore type",
        "<mirror",
        "index='",
        "port='5907'",
        "domain-7-web",
        "state='connected'",
    ] {
        assert!(!out.contains(gone), "{gone} in\n{out}");
    }
    // Rewriting what was rewritten changes nothing more.
    assert_eq!(rewrite(&out, &options(Identity::Original)).unwrap().xml, out);
}

#[test]
fn a_description_that_is_right_already_is_not_touched() {
    let xml = "<domain type='kvm'>\n <name>a</name>\n <uuid>00000000-0000-0000-0000-000000000001</uuid>\n \
        <devices>\n  <disk type='file' device='disk'>\n   <driver name='qemu' type='qcow2'/>\n   \
        <source file='/new/vda.qcow2'/>\n   <target dev='vda' bus='virtio'/>\n  </disk>\n </devices>\n</domain>\n";
    let mut options = options(Identity::Original);
    options.disks = vec![file("vda")];
    let out = rewrite(xml, &options).unwrap();
    assert_eq!(out.xml, xml);
    assert_eq!(out.changes, Vec::<String>::new());
}

#[test]
fn the_live_description_is_used_only_when_its_disks_differ() {
    let inactive = LIVE.replace("id='7'", "");
    assert_eq!(choose(LIVE, Some(&inactive)).unwrap(), inactive);
    let unplugged = LIVE.replace("<target dev='vdb'", "<target dev='vdx'");
    assert_eq!(choose(LIVE, Some(&unplugged)).unwrap(), LIVE);
    assert_eq!(choose(LIVE, None).unwrap(), LIVE);
}

#[test]
fn a_disk_the_domain_does_not_have_is_an_error() {
    let mut options = options(Identity::Original);
    options.disks.push(file("vdz"));
    assert_eq!(rewrite(LIVE, &options).unwrap_err().kind(), Kind::Usage);
    assert_eq!(rewrite("<network/>", &options).unwrap_err().kind(), Kind::Corrupt);
}

#[test]
fn nvram_that_was_not_captured_begins_fresh_for_a_new_vm() {
    let mut wanted = options(new());
    wanted.nvram = None;
    let out = rewrite(LIVE, &wanted).unwrap();
    assert!(
        out.xml.contains("<nvram template='/usr/share/OVMF/OVMF_VARS_4M.ms.fd'></nvram>"),
        "{}",
        out.xml
    );
    let typed = LIVE.replace(
        "<nvram template='/usr/share/OVMF/OVMF_VARS_4M.ms.fd'>/var/lib/libvirt/qemu/nvram/web_VARS.fd</nvram>",
        "<nvram type='network'><source protocol='nbd' name='x'/></nvram>",
    );
    let out = rewrite(&typed, &options(Identity::Original)).unwrap();
    assert!(
        out.xml.contains("<nvram type='file'><source file='/new/nvram.fd'/></nvram>"),
        "{}",
        out.xml
    );
}

/// Disk elements of every source type, with what may hang on them.
fn disk(index: usize) -> impl Strategy<Value = String> {
    let source = prop_oneof![
        Just("type='file'|<source file='/o/a.img' index='1'/>".to_owned()),
        Just("type='file'|<source file='/o/a.img'><encryption format='luks'><secret type='passphrase' uuid='u'/></encryption><slices><slice type='storage' offset='0' size='9'/></slices></source>".to_owned()),
        Just("type='block'|<source dev='/dev/vg/a'><reservations managed='yes'/></source>".to_owned()),
        Just("type='network'|<auth username='u'><secret type='ceph' uuid='x'/></auth><source protocol='rbd' name='p/i'><host name='h'/></source>".to_owned()),
        Just("type='volume'|<source pool='p' volume='v'/>".to_owned()),
        Just("type='nvme'|<source type='pci' managed='yes' namespace='1'><address domain='0'/></source>".to_owned()),
        Just("type='file'|".to_owned()),
    ];
    let extras = prop::collection::vec(
        prop::sample::select(vec![
            "<backingStore type='file'><format type='raw'/><source file='/b'/><backingStore/></backingStore>",
            "<mirror type='file' job='copy'><source file='/m'/></mirror>",
            "<iotune><total_iops_sec>5</total_iops_sec></iotune>",
            "<serial>S</serial>",
            "<blockio logical_block_size='512'/>",
            "<alias name='virtio-disk9'/>",
            "<address type='pci' slot='0x05'/>",
        ]),
        0..5,
    );
    let driver = prop::sample::select(vec![
        "",
        "<driver name='qemu' type='raw' cache='none'/>",
        "<driver name='qemu' type='qcow2'><metadata_cache><max_size unit='KiB'>9</max_size></metadata_cache></driver>",
    ]);
    (source, extras, driver).prop_map(move |(source, extras, driver)| {
        let (kind, source) = source.split_once('|').unwrap();
        let mut extras = extras;
        extras.sort_unstable();
        extras.dedup();
        let target = format!(
            "<target dev='vd{}' bus='virtio'/>",
            char::from(b'a' + u8::try_from(index).unwrap())
        );
        format!("<disk {kind} device='disk'>{driver}{source}{target}{}</disk>", extras.concat())
    })
}

proptest! {
    #[test]
    fn every_disk_source_type_becomes_the_restored_image(
        a in disk(0), b in disk(1), device in any::<bool>(), original in any::<bool>(),
    ) {
        let xml = format!(
            "<domain><name>n</name><uuid>{}</uuid><devices>{a}\n{b}</devices></domain>",
            Uuid::from_u128(1)
        );
        let mut options = options(if original { Identity::Original } else { new() });
        if device {
            options.disks[1].place = DiskPlace::Device { path: "/dev/new".into() };
        }
        let out = rewrite(&xml, &options).unwrap();
        let before = parse(&xml);
        let root = parse(&out.xml);
        let places = [("file", "file", "/new/vda.qcow2", "qcow2"),
            if device { ("block", "dev", "/dev/new", "raw") } else { ("file", "file", "/new/vdb.qcow2", "qcow2") }];
        for ((old, new), (kind, attribute, path, format)) in
            devices(&before, "disk").iter().zip(devices(&root, "disk")).zip(places)
        {
            prop_assert_eq!(new.attr("type"), Some(kind));
            prop_assert_eq!(new.all("source").count(), 1);
            let source = new.child("source").unwrap();
            prop_assert_eq!(source.attr(attribute), Some(path));
            prop_assert!(source.children.is_empty() && source.attr("index").is_none());
            prop_assert_eq!(new.attr_at(&["driver"], "type"), Some(format));
            for gone in ["backingStore", "mirror", "encryption", "auth"] {
                prop_assert!(new.child(gone).is_none(), "{}", gone);
            }
            for kept in ["iotune", "serial", "blockio", "address", "target"] {
                let text = |e: &Element, doc: &str| e.child(kept).map(|c| c.source(doc).to_owned());
                prop_assert_eq!(text(old, &xml), text(new, &out.xml));
            }
        }
        prop_assert_eq!(&rewrite(&out.xml, &options).unwrap().xml, &out.xml);
    }
}
