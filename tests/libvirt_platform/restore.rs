//! Captured descriptions, defined again by a real libvirt.

use std::path::PathBuf;

use vmbackup::control::Control;
use vmbackup::error::Kind;
use vmbackup::platform::Platform;
use vmbackup::platform::libvirt::restore::define::{Existing, Target};
use vmbackup::platform::libvirt::restore::{
    DiskPlace, Emulator, Identity, RestoredDisk, RewriteOptions, choose, rewrite,
};
use vmbackup::vm::{ArtifactKind, Uuid};

use crate::bare::{Bare, qcow2, request};
use crate::support::TestEnv;

const MORE: &str = "<interface type='user'><mac address='52:54:00:aa:bb:cc'/><model type='virtio'/>\
    </interface><channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
    <serial type='pty'/><graphics type='vnc' autoport='yes' passwd='tellnone'/>\
    <disk type='file' device='cdrom'><source file='@ISO@'/><target dev='hdc' bus='ide'/></disk>";

/// What a backup records of the running domain.
async fn captured(bare: &Bare<'_>) -> (String, Option<String>) {
    let platform = bare.platform().await;
    let snapshot = platform.open_snapshot(&request(1), &Control::new()).await;
    let snapshot = snapshot.expect("opens");
    let text = |kind| {
        let artifact = snapshot.artifacts().iter().find(|artifact| artifact.kind == kind);
        artifact.map(|artifact| String::from_utf8(artifact.bytes.clone()).expect("XML"))
    };
    let found =
        (text(ArtifactKind::DomainXmlLive).expect("live"), text(ArtifactKind::DomainXmlInactive));
    snapshot.abort().await.expect("aborts");
    found
}

fn options(env: &TestEnv, identity: Identity) -> RewriteOptions {
    let path: PathBuf = env.path("restored.qcow2");
    env.run("qemu-img", &["create", "-q", "-f", "qcow2", &path.to_string_lossy(), "8M"]).ok();
    RewriteOptions {
        identity,
        disks: vec![RestoredDisk {
            name: "vda".into(),
            place: DiskPlace::File { path, format: "qcow2".into() },
        }],
        nvram: None,
        kernel: None,
        initrd: None,
        emulator: Emulator::Keep,
    }
}

fn domain(env: &TestEnv) -> Bare<'_> {
    let iso = env.path("media.iso");
    std::fs::write(&iso, vec![0; 1 << 20]).expect("own directory");
    let more = MORE.replace("@ISO@", &iso.to_string_lossy());
    let bare = Bare::define(env, "", &qcow2(env, 'a', "8M"), &more);
    bare.virsh(&["start", "--paused", &bare.name]).ok();
    bare
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_domain_starts_beside_the_original_from_either_description() {
    let env = TestEnv::new();
    let bare = domain(&env);
    let (live, inactive) = captured(&bare).await;
    for (suffix, xml) in [("live", &live), ("inactive", inactive.as_ref().unwrap())] {
        let name = env.name(suffix);
        let uuid = Uuid::new_v4();
        let identity = Identity::New { name: name.clone(), uuid };
        let out = rewrite(xml, &options(&env, identity)).unwrap();
        let target = Target::open(None).await.unwrap();
        let copy = Bare { env: &env, name: name.clone(), uuid };
        target.define(&out, Existing::Refuse).await.unwrap();
        target.start(&out).await.unwrap();
        assert_eq!(copy.virsh(&["domstate", &name]).text().trim(), "running");
        let defined = copy.virsh(&["dumpxml", "--security-info", &name]).text();
        assert!(defined.contains("restored.qcow2") && defined.contains("tellnone"), "{defined}");
        assert!(!defined.contains("52:54:00:aa:bb:cc"));
        let again = target.define(&out, Existing::Replace).await.unwrap_err();
        assert_eq!(again.kind(), Kind::Busy);
        assert!(again.to_string().contains("running"), "{again}");
        copy.virsh(&["destroy", &name]).ok();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lost_vm_is_defined_and_an_existing_one_only_by_force() {
    let env = TestEnv::new();
    let bare = domain(&env);
    let (live, inactive) = captured(&bare).await;
    let xml = choose(&live, inactive.as_deref()).unwrap();
    let out = rewrite(xml, &options(&env, Identity::Original)).unwrap();
    assert_eq!((&out.name, out.uuid), (&bare.name, bare.uuid));
    let target = Target::open(None).await.unwrap();
    assert!(target.is_local());
    let error = target.define(&out, Existing::Replace).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Busy);

    bare.virsh(&["destroy", &bare.name]).ok();
    let error = target.define(&out, Existing::Refuse).await.unwrap_err();
    assert!(error.hint_text().unwrap().contains("--force"));
    target.define(&out, Existing::Replace).await.unwrap();

    // Lost altogether, the medium too: it comes back with its MAC address.
    bare.virsh(&["undefine", &bare.name]).ok();
    std::fs::remove_file(env.path("media.iso")).unwrap();
    target.define(&out, Existing::Refuse).await.unwrap();
    target.start(&out).await.unwrap();
    let defined = bare.virsh(&["dumpxml", &bare.name]).text();
    assert!(defined.contains("52:54:00:aa:bb:cc") && defined.contains("restored.qcow2"));
    let uuid_taken = target.check("another", bare.uuid, Existing::Replace).await.unwrap_err();
    assert_eq!(uuid_taken.kind(), Kind::Busy);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_this_host_lacks_is_known_beforehand() {
    let env = TestEnv::new();
    let bare = domain(&env);
    let (_, inactive) = captured(&bare).await;
    let xml = inactive.unwrap();
    let target = Target::open(None).await.unwrap();
    let there = target.survey(&xml).await.unwrap();
    assert_eq!((there.emulator, there.missing.len()), (Emulator::Keep, 0));

    let network = "<interface type='network'><source network='no-such-net'/></interface></devices>";
    let program = xml.split_once("<emulator>").unwrap().1.split_once('<').unwrap().0;
    let other = xml.replace("</devices>", network).replace(program, "/no/such/qemu");
    let lacks = target.survey(&other).await.unwrap();
    assert_eq!(lacks.emulator, Emulator::HostDefault);
    assert!(lacks.missing[0].contains("no-such-net"), "{lacks:?}");

    let machine = xml.split_once("machine='").unwrap().1.split_once('\'').unwrap().0;
    let old = xml.replace(&format!("machine='{machine}'"), "machine='pc-antique-0.1'");
    let error = target.survey(&old).await.unwrap_err();
    assert!(error.to_string().contains("pc-antique-0.1"), "{error:?}");
    assert!(error.hint_text().unwrap().contains("domcapabilities"), "{error:?}");
}
