//! Checkpoints that libvirt has metadata of when a backup begins: those of others stay and go on working, one
//! of ours counts for what its bitmaps are worth and goes.

use std::path::Path;

use crate::bare::{Bare, qcow2};
use crate::support::{TestEnv, assert_same_content, wait_until};

/// A running domain of two disks, full of something.
fn begun(env: &TestEnv) -> Bare<'_> {
    env.init_repo();
    let bare = Bare::start(env, &(qcow2(env, 'a', "4M") + &qcow2(env, 'b', "4M")));
    bare.io(0, "write -P 1 0 4M");
    bare.io(1, "write -P 2 0 4M");
    bare
}

/// Takes a point and restores it: each disk equals what its image holds, which nobody writes to meanwhile. How
/// each was read.
fn take(bare: &Bare<'_>, command: &str) -> Vec<serde_json::Value> {
    let env = bare.env;
    let report = env.vmbackup(&[command, "--domain", &bare.name, "--json"]).json();
    let point = report["point"].as_str().expect("a point id");
    let to = env.path(point);
    let to_directory = to.to_string_lossy();
    env.vmbackup(&["restore", point, "--to", &to_directory, "--format", "raw"]).ok();
    for (index, disk) in ["vda", "vdb"].into_iter().enumerate() {
        bare.io(index, "flush");
        let (image, oracle) = (env.path(&format!("{disk}.qcow2")), env.path("oracle.raw"));
        raw_copy(env, &image, &oracle);
        assert_same_content(env, (&to.join(format!("{disk}.raw")), "raw"), (&oracle, "raw"));
    }
    let disks = report["disks"].as_array().expect("disks").iter();
    disks.map(|disk| disk["read"].clone()).collect()
}

fn raw_copy(env: &TestEnv, image: &Path, to: &Path) {
    let (image, to) = (image.to_string_lossy(), to.to_string_lossy());
    env.run("qemu-img", &["convert", "-U", "-f", "qcow2", "-O", "raw", &image, &to]).ok();
}

/// Takes a backup of vda with libvirt alone, of what changed since a checkpoint: an image of just that.
fn push(bare: &Bare<'_>, since: &str) -> std::path::PathBuf {
    let target = bare.env.open_dir("pushed").join(format!("{since}.qcow2"));
    let xml = bare.env.path("push.xml");
    let text = format!(
        "<domainbackup mode='push'><incremental>{since}</incremental><disks>\
         <disk name='vda' type='file'><driver type='qcow2'/><target file='{}'/></disk>\
         <disk name='vdb' backup='no'/></disks></domainbackup>",
        target.display()
    );
    std::fs::write(&xml, text).expect("own directory");
    bare.virsh(&["backup-begin", &bare.name, &xml.to_string_lossy()]).ok();
    wait_until("the push job ends", 30, || {
        bare.virsh(&["domjobinfo", &bare.name]).text().contains("None")
    });
    target
}

#[test]
fn checkpoints_of_others_stay_and_go_on_working() {
    let env = TestEnv::new();
    let bare = begun(&env);
    let create = |name: &str| {
        bare.virsh(&["checkpoint-create-as", &bare.name, name]).ok();
    };
    create("theirs-before");
    bare.io(0, "write -P 3 1M 64k");
    take(&bare, "full");
    assert_eq!(bare.checkpoints(), ["theirs-before"]);
    bare.io(0, "write -P 4 2M 64k");
    create("theirs-between");
    for pattern in [5, 6] {
        bare.io(0, &format!("write -P {pattern} {pattern}00k 64k"));
        bare.io(1, &format!("write -P {pattern} 3M 64k"));
        let read = take(&bare, "incremental");
        assert!(read.iter().all(|read| read["mode"] == "incremental"), "{read:?}");
        assert_eq!(bare.checkpoints(), ["theirs-before", "theirs-between"]);
    }
    let ours: Vec<_> =
        bare.bitmaps().into_iter().filter(|name| !name.starts_with("theirs")).collect();
    assert_eq!((ours.len(), bare.bitmaps().len()), (1, 3), "{:?}", bare.bitmaps());

    // Theirs recorded everything, from each of their instants on.
    let written = ["read -P 4 2M 64k", "read -P 5 500k 64k", "read -P 6 600k 64k"];
    for (since, all) in [("theirs-before", true), ("theirs-between", false)] {
        // Without what libvirt has put below it: the disk itself.
        let alone = format!(
            "json:{{\"driver\":\"qcow2\",\"backing\":null,\
             \"file\":{{\"driver\":\"file\",\"filename\":\"{}\"}}}}",
            push(&bare, since).display()
        );
        let reads = |what: &str| {
            let read = env.run("qemu-io", &["-r", "-c", what, &alone]);
            assert!(read.stdout.contains("read 65536/65536"), "{read:?}");
            !read.stdout.contains("verification failed")
        };
        assert_eq!((reads("read -P 3 1M 64k"), reads(written[0])), (all, all), "{since}");
        assert!(written[1..].iter().all(|what| reads(what)), "{since}");
    }
    // And they can be deleted by those whose they are.
    for name in ["theirs-before", "theirs-between"] {
        bare.virsh(&["checkpoint-delete", &bare.name, name]).ok();
    }
    assert_eq!(bare.bitmaps(), ours);
    take(&bare, "incremental");
}

/// Somebody dumped our checkpoint, lost its bitmap and defined it again.
#[test]
fn a_checkpoint_of_ours_that_libvirt_knows_without_its_bitmap_is_not_believed_and_goes() {
    let env = TestEnv::new();
    let bare = begun(&env);
    take(&bare, "full");
    let name = bare.bitmaps().remove(0);
    bare.virsh(&["destroy", "--graceful", &bare.name]).ok();
    let image = env.path("vdb.qcow2");
    env.run("qemu-img", &["bitmap", "--remove", &image.to_string_lossy(), &name]).ok();
    bare.virsh(&["start", "--paused", &bare.name]).ok();
    let xml = env.path("redefined.xml");
    let disk = |disk: &str| format!("<disk name='{disk}' checkpoint='bitmap' bitmap='{name}'/>");
    let text = format!(
        "<domaincheckpoint><name>{name}</name><creationTime>1</creationTime>\
         <disks>{}{}</disks></domaincheckpoint>",
        disk("vda"),
        disk("vdb")
    );
    std::fs::write(&xml, text).expect("own directory");
    let redefine = ["checkpoint-create", &bare.name, &xml.to_string_lossy(), "--redefine"];
    bare.virsh(&redefine).ok();
    assert_eq!(bare.checkpoints(), [name]);
    bare.io(0, "write -P 3 1M 64k");
    bare.io(1, "write -P 4 1M 64k");
    let read = take(&bare, "incremental");
    assert_eq!(read[0]["mode"], "incremental", "{read:?}");
    assert_eq!(read[1]["reason"], "bitmap-missing", "{read:?}");
    assert_eq!(bare.checkpoints(), Vec::<String>::new());
    assert_eq!(bare.bitmaps().len(), 1, "{:?}", bare.bitmaps());
    let read = take(&bare, "incremental");
    assert!(read.iter().all(|read| read["mode"] == "incremental"), "{read:?}");
}
