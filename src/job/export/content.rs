//! What the first bytes of a disk look like. For people who ask what they have before them: nothing
//! decides by it, least of all in which format a disk is opened.

/// How much is looked at: the label of a CD-ROM ends there, and btrfs's superblock begins there.
pub(super) const HEAD_BYTES: u64 = 72 << 10;

/// A place, what stands there, and what that means. From the outermost to the innermost: a boot
/// sector may stand before all of them.
const SIGNS: [(usize, &[u8], &str); 25] = [
    (0, b"QFI\xfb", "QEMU qcow image"),
    (0, b"KDMV", "VMware disk image"),
    (0, b"# Disk DescriptorFile", "VMware disk descriptor"),
    (0, b"vhdxfile", "VHDX image"),
    (0, b"conectix", "VHD image"),
    (64, b"\x7f\x10\xda\xbe", "VirtualBox disk image"),
    (0, b"QED\0", "QED image"),
    (0, b"LUKS\xba\xbe", "LUKS encrypted volume"),
    (0, b"-FVE-FS-", "BitLocker encrypted volume"),
    (3, b"-FVE-FS-", "BitLocker encrypted volume"),
    (0, b"\x1f\x8b", "gzip data"),
    (0, b"\xfd7zXZ\0", "xz data"),
    (0, b"\x28\xb5\x2f\xfd", "Zstandard data"),
    (0, b"BZh", "bzip2 data"),
    (0, b"PK\x03\x04", "zip archive"),
    (257, b"ustar", "tar archive"),
    (512, b"EFI PART", "disk with a GUID partition table"),
    (4096, b"EFI PART", "disk with a GUID partition table, blocks of 4096 bytes"),
    (512, b"LABELONE", "LVM physical volume"),
    (0, b"XFSB", "XFS file system"),
    (1080, b"\x53\xef", "ext2, ext3 or ext4 file system"),
    (65600, b"_BHRfS_M", "btrfs file system"),
    (3, b"NTFS    ", "NTFS file system"),
    (32769, b"CD001", "ISO 9660 file system"),
    (4086, b"SWAPSPACE2", "Linux swap space"),
];

/// What a disk that begins so looks like.
pub(super) fn of_head(head: &[u8]) -> &'static str {
    if head.is_empty() {
        return "nothing";
    }
    let stands = |at: usize, sign: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(sign));
    if let Some((.., meaning)) = SIGNS.iter().find(|(at, sign, _)| stands(*at, sign)) {
        return meaning;
    }
    if stands(510, b"\x55\xaa") {
        let fat = [(54, &b"FAT"[..]), (82, b"FAT32")].iter().any(|(at, sign)| stands(*at, sign));
        return if fat { "FAT file system" } else { "disk with a boot sector (MBR)" };
    }
    if head.iter().all(|byte| *byte == 0) { "zeroes" } else { "data" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_are_found_at_their_places_only() {
        let mut head = vec![0; usize::try_from(HEAD_BYTES).unwrap()];
        assert_eq!(of_head(&head), "zeroes");
        assert_eq!(of_head(&[]), "nothing");
        for (at, sign, meaning) in SIGNS {
            head.fill(0);
            head[at..at + sign.len()].copy_from_slice(sign);
            assert_eq!(of_head(&head), meaning, "at {at}");
            for len in [1, at.max(1), at + sign.len() - 1] {
                // Cut off before the sign ends.
                assert!(["zeroes", "data"].contains(&of_head(&head[..len])), "{meaning} of {len}");
            }
        }
        head.fill(0);
        head[510..512].copy_from_slice(b"\x55\xaa");
        assert_eq!(of_head(&head), "disk with a boot sector (MBR)");
        head[82..87].copy_from_slice(b"FAT32");
        assert_eq!(of_head(&head), "FAT file system");
    }
}
