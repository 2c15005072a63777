//! What a served point tells beside its bytes: what changed since another point, and where they are.

use serde_json::Value;

use crate::rig::{DISK_BYTES, Serve, back_up, content, env_with_point, qemu_io};
use crate::support::TestEnv;

/// Extents that nbdinfo reads: offset, length, value.
fn map(env: &TestEnv, context: &str, uri: &str) -> Vec<(usize, usize, u64)> {
    let all = env.run("nbdinfo", &[&format!("--map={context}"), "--json", uri]).ok().json();
    let number = |extent: &Value, name: &str| extent[name].as_u64().unwrap();
    let extents = all.as_array().unwrap().iter();
    extents
        .map(|e| {
            let place = ["offset", "length"].map(|name| usize::try_from(number(e, name)).unwrap());
            (place[0], place[1], number(e, "type"))
        })
        .collect()
}

fn context(serve: &Serve, export: usize, index: usize) -> String {
    let changes = &serve.report["exports"][export]["changes"];
    changes[index]["context"].as_str().unwrap_or_else(|| panic!("{changes}")).to_owned()
}

#[test]
fn what_changed_between_two_points_is_a_dirty_bitmap() {
    let (env, first) = env_with_point();
    let mut disk = content(1);
    disk[3 << 20..(3 << 20) + 10].fill(0);
    disk[(1 << 20) + 7] = 1;
    disk[DISK_BYTES - 1] ^= 1;
    std::fs::write(env.path("disk.raw"), &disk).unwrap();
    let second = back_up(&env);
    let serve = Serve::start(&env, &[&second, "--changes-since", &first]);
    assert_eq!(context(&serve, 0, 0), format!("qemu:dirty-bitmap:{}", &first[..8]));
    let uri = serve.uri(0);
    // Whoever has the first point and takes what is dirty has the second.
    let (mut taken, mut copy) = (0, content(1));
    for (offset, len, dirty) in map(&env, &context(&serve, 0, 0), &uri) {
        if dirty == 1 {
            taken += len;
            copy[offset..offset + len].copy_from_slice(&disk[offset..offset + len]);
        }
    }
    assert!(copy == disk);
    assert_eq!(taken, (256 << 10) * 2 + 4096, "and no more than the chunks that differ");
    // Our own client and QEMU read it, too.
    let totals = env.vmbackup(&["nbd", "map", &uri, "--totals", "--json"]).ok().json();
    let contexts = totals["contexts"].as_array().unwrap();
    let dirty = contexts.iter().find(|c| c["name"] == context(&serve, 0, 0).as_str()).unwrap();
    let of_state = |state| dirty["totals"].as_array().unwrap().iter().find(|t| t["state"] == state);
    assert_eq!(of_state("dirty").unwrap()["bytes"], taken, "{totals}");
    let image = format!(
        "driver=nbd,server.type=unix,server.path={},export=,x-dirty-bitmap={}",
        serve.socket().display(),
        context(&serve, 0, 0)
    );
    let qemu = env.run("qemu-img", &["map", "--output=json", "--image-opts", &image]).ok().json();
    let clean = qemu.as_array().unwrap().iter().filter(|e| e["data"] == true);
    let clean: u64 = clean.map(|e| e["length"].as_u64().unwrap()).sum();
    assert_eq!(usize::try_from(clean).unwrap(), DISK_BYTES - taken, "{qemu}");
}

#[test]
fn changes_are_told_since_several_points_and_to_older_ones_as_well() {
    let (env, first) = env_with_point();
    std::fs::write(env.path("disk.raw"), content(2)).unwrap();
    let second = back_up(&env);
    std::fs::write(env.path("disk.raw"), content(1)).unwrap();
    let third = back_up(&env);
    let args = [&third, "--changes-since", &first, "--changes-since", &second];
    let serve = Serve::start(&env, &args);
    let dirty = |index| map(&env, &context(&serve, 0, index), &serve.uri(0));
    assert_eq!(dirty(0), [(0, DISK_BYTES, 0)], "it is the first again, whatever was in between");
    // The hole is equal in both.
    let hole = [(0, 1 << 20, 1), (1 << 20, 1 << 20, 0), (2 << 20, DISK_BYTES - (2 << 20), 1)];
    assert_eq!(dirty(1), hole);
    let back = Serve::start(&env, &[&first, "--changes-since", &second, "--socket", "back"]);
    assert_eq!(map(&env, &context(&back, 0, 0), &back.uri(0)), hole);
}

#[test]
fn changes_of_what_has_none_are_refused() {
    let (env, point) = env_with_point();
    let code = |args: &[&str]| {
        let all: Vec<&str> = ["serve"].iter().chain(args).copied().collect();
        env.vmbackup(&all).code
    };
    assert_eq!(code(&["disk.raw", "--changes-since", &point]), Some(2), "no point is served");
    assert_eq!(code(&[&point, "--writable", "--changes-since", &point]), Some(2));
    assert_eq!(code(&[&point, "--changes-since", "nobody@latest"]), Some(3));
    std::fs::write(env.path("other.raw"), content(2)).unwrap();
    let both = ["full", "--image", "disk.raw", "--image", "other.raw", "--name", "two", "--json"];
    let two = env.vmbackup(&both).json()["point"].as_str().unwrap().to_owned();
    let shown = env.vmbackup(&["show", &two, "--json"]).json();
    let last = shown["disks"][1]["name"].as_str().unwrap();
    let only_last = [&two, "--disk", last, "--changes-since", &point];
    assert_eq!(code(&only_last), Some(3), "the other point has no such disk");
    // A disk that the other point has not is served without.
    let serve = Serve::start(&env, &[&two, "--changes-since", &point]);
    assert_eq!(serve.report["exports"][0]["changes"][0]["since"], point.as_str());
    assert_eq!(serve.report["exports"][1]["changes"], serde_json::json!([]));
}

#[test]
fn the_allocation_depth_tells_overlay_point_and_nothing_apart() {
    let (env, point) = env_with_point();
    let serve = Serve::start(&env, &[&point]);
    let depth = |serve: &Serve| map(&env, "qemu:allocation-depth", &serve.uri(0));
    let end = DISK_BYTES - (2 << 20);
    assert_eq!(
        depth(&serve),
        [(0, 1 << 20, 1), (1 << 20, 1 << 20, 0), (2 << 20, end, 1)],
        "in the point, or nowhere"
    );
    let serve = Serve::start(&env, &[&point, "--writable", "--socket", "w"]);
    let mib = 1 << 20;
    let commands = ["write -P 7 512k 64k", "write -P 7 1M 64k", "write -z 1984k 64k", "flush"];
    qemu_io(&env, &serve.uri(0), &commands).ok();
    let expected = [
        (0, 512 << 10, 2),
        (512 << 10, 64 << 10, 1),
        (576 << 10, 448 << 10, 2),
        (mib, 64 << 10, 1),
        (1088 << 10, 896 << 10, 0),
        (1984 << 10, 64 << 10, 1),
        (2 << 20, end, 2),
    ];
    assert_eq!(depth(&serve), expected);
    // Images of other kinds do not know.
    let serve = Serve::start(&env, &["disk.raw", "--socket", "i"]);
    let contexts = env.vmbackup(&["nbd", "info", &serve.uri(0), "--json"]).ok().json();
    assert_eq!(contexts["exports"][0]["contexts"], serde_json::json!(["base:allocation"]));
}
