//! A machine that starts from a served point: its firmware finds a boot sector there and runs it.

use crate::rig::{DISK_BYTES, Serve, back_up, content, read};
use crate::support::{Process, TestEnv, wait_until};

/// Where the program reads its text from, and where it writes itself to: far behind the first chunk.
const TEXT_SECTOR: usize = 10_000;
const COPY_SECTOR: usize = 10_001;

/// What it says.
const TEXT: &[u8] = b"started from the backup ";

/// The program of a disk that can be started. The firmware loads it to 0x7c00 and jumps there.
#[rustfmt::skip]
const PROGRAM: [u8; 66] = [
    0xfc,             //        cld
    0x31, 0xc0,       //        xor   ax, ax
    0x8e, 0xd8,       //        mov   ds, ax
    0x8e, 0xd0,       //        mov   ss, ax
    0xbc, 0x00, 0x7c, //        mov   sp, 0x7c00
    0xbe, 0x60, 0x7c, //        mov   si, 0x7c60      ; the packet of the text
    0xb4, 0x42,       //        mov   ah, 0x42        ; extended read
    0xb2, 0x80,       //        mov   dl, 0x80        ; of the first disk
    0xcd, 0x13,       //        int   0x13
    0x72, 0xfe,       //        jc    $
    0xbe, 0x00, 0x7e, //        mov   si, 0x7e00
    0xba, 0xfd, 0x03, // next:  mov   dx, 0x3fd
    0xec,             // full:  in    al, dx          ; the first serial port takes a byte?
    0xa8, 0x20,       //        test  al, 0x20
    0x74, 0xfb,       //        jz    full
    0xac,             //        lodsb
    0x84, 0xc0,       //        test  al, al
    0x74, 0x06,       //        jz    write
    0xba, 0xf8, 0x03, //        mov   dx, 0x3f8
    0xee,             //        out   dx, al
    0xeb, 0xed,       //        jmp   next
    0xbe, 0x70, 0x7c, // write: mov   si, 0x7c70      ; the packet of the copy
    0xb8, 0x00, 0x43, //        mov   ax, 0x4300      ; extended write
    0xb2, 0x80,       //        mov   dl, 0x80
    0xcd, 0x13,       //        int   0x13
    0xb0, b'W',       //        mov   al, 'W'
    0x73, 0x02,       //        jnc   say
    0xb0, b'R',       //        mov   al, 'R'
    0xba, 0xf8, 0x03, // say:   mov   dx, 0x3f8
    0xee,             //        out   dx, al
    0xf4,             // halt:  hlt
    0xeb, 0xfd,       //        jmp   halt
];

/// One sector between `sector` of the disk and this address ("disk address packet" of the EDD
/// specification).
fn packet(address: u16, sector: usize) -> Vec<u8> {
    let [low, high] = address.to_le_bytes();
    [&[16, 0, 1, 0, low, high, 0, 0][..], &(sector as u64).to_le_bytes()].concat()
}

/// The first sector of the disk.
fn boot_sector() -> Vec<u8> {
    let mut sector = PROGRAM.to_vec();
    sector.resize(0x60, 0);
    sector.extend(packet(0x7e00, TEXT_SECTOR));
    sector.extend(packet(0x7c00, COPY_SECTOR));
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector
}

/// A disk that can be started.
fn disk() -> Vec<u8> {
    let mut disk = content(5);
    disk[..512].copy_from_slice(&boot_sector());
    let text = TEXT_SECTOR * 512;
    disk[text..text + 512].fill(0);
    disk[text..text + TEXT.len()].copy_from_slice(TEXT);
    const { assert!((COPY_SECTOR + 1) * 512 <= DISK_BYTES) };
    disk
}

/// Starts a machine that has nothing but this disk, and waits until it has said `expected`.
fn start(env: &TestEnv, uri: &str, options: &str, expected: &str) {
    let serial = env.path("serial");
    let _ = std::fs::remove_file(&serial);
    let mut command = env.command("qemu-system-x86_64");
    command
        .args(["-machine", "pc,accel=tcg", "-m", "32", "-nodefaults", "-display", "none"])
        .args(["-serial", &format!("file:{}", serial.display())])
        .args(["-drive", &format!("file={uri},format=raw,if=none,id=d{options}")])
        .args(["-device", "virtio-blk-pci,drive=d,bootindex=1"]);
    let mut machine = Process::spawn(&mut command);
    wait_until("what the disk's program says", 60, || {
        assert!(machine.is_running(), "QEMU ended");
        std::fs::read_to_string(&serial).is_ok_and(|said| said.contains(expected))
    });
}

#[test]
fn a_machine_starts_from_a_served_point() {
    let env = TestEnv::new();
    env.init_repo();
    std::fs::write(env.path("disk.raw"), disk()).unwrap();
    let point = back_up(&env);
    std::fs::remove_file(env.path("disk.raw")).unwrap();
    let serve = Serve::start(&env, &[&point]);
    start(&env, &serve.uri(0), ",readonly=on", "started from the backup R");
    serve.stop();
    let serve = Serve::start(&env, &[&point, "--writable"]);
    start(&env, &serve.uri(0), "", "started from the backup W");
    let mut expected = disk();
    expected[COPY_SECTOR * 512..][..512].copy_from_slice(&boot_sector());
    assert!(read(&env, &serve.uri(0)) == expected, "what it wrote is read back");
    serve.stop();
    env.vmbackup(&["copy", &format!("point:{point}"), "after.raw"]).ok();
    assert!(std::fs::read(env.path("after.raw")).unwrap() == disk(), "the point is as it was");
}
