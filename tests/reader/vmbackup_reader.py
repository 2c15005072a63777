#!/usr/bin/python3
"""Reads a vmbackup repository without vmbackup, written from docs/repository-format.md alone.

  vmbackup_reader.py [--password-file F | --key-file F] REPOSITORY                   lists points
  vmbackup_reader.py [--password-file F | --key-file F] REPOSITORY POINT WHAT FILE   restores

POINT is an id or the beginning of one; WHAT is a disk (vda) or an artefact (domain-xml-live). FILE
is written sparse and proven equal to the content root in the manifest.

Needs Debian's python3-cryptography, python3-argon2, b3sum and zstd. Slow and simple on purpose: your
backups outlive our program.
"""
import argparse, json, os, struct, subprocess, sys
from pathlib import Path

from argon2.low_level import Type, hash_secret_raw
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

LEAF, ZERO, HEADER = 256 * 1024, bytes(32), 40


def run(command, data, fds=()):
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True, pass_fds=fds).stdout


def blake3_derive(context, data):
    return run(["b3sum", "--raw", "--derive-key", context], data)


def blake3_keyed(key, data):
    with os.fdopen(os.memfd_create("data"), "w+b", buffering=0) as file:  # b3sum takes the key on stdin
        file.write(data)
        file.seek(0)
        return run(["b3sum", "--raw", "--keyed", f"/dev/fd/{file.fileno()}"], key, [file.fileno()])


def hkdf(salt, secret, info):
    return HKDF(SHA256(), 32, salt, info).derive(secret)


class Repository:
    def __init__(self, path, password=None, key_file=None):
        self.path = Path(path)
        line, mac = (self.path / "config").read_text().splitlines()
        self.config = json.loads(line)
        assert self.config["format"] == "vmbackup repository" and self.config["version"] == 1
        self.master = self.unwrap(password, key_file)
        mac_key = hkdf(b"", self.master, b"vmbackup v1 config")
        assert blake3_keyed(mac_key, line.encode()).hex() == mac, "the configuration was changed"
        self.id_key = hkdf(b"", self.master, b"vmbackup v1 blob id")
        self.keys = {}
        self.index = self.read_index()

    def unwrap(self, password, key_file):
        for file in sorted((self.path / "keys").iterdir()):
            slot = json.loads(file.read_text().splitlines()[0])
            master, salt = bytes.fromhex(slot["master"]), bytes.fromhex(slot.get("salt", ""))
            if slot["kind"] == "clear":
                return master
            if slot["kind"] == "password" and password is not None:
                kdf = slot["argon2id"]
                key = hash_secret_raw(password, salt, kdf["passes"], kdf["memory_kib"], kdf["lanes"], 32, Type.ID)
            elif slot["kind"] == "key-file" and key_file is not None:
                key = hkdf(salt, key_file, b"vmbackup v1 key file")
            else:
                continue
            aad = b"vmbackup v1 key slot" + bytes.fromhex(self.config["id"]) + f"keys/{file.name}".encode()
            try:
                return AESGCM(key).decrypt(bytes(12), master, aad)
            except Exception:
                continue
        sys.exit("nothing given opens this repository")

    def open(self, header, name, counter, sealed):
        """The plaintext of one sealed part of the object `name`."""
        assert header[:4] == b"VMBK" and header[4:6] == b"\1\0"
        if header not in self.keys:
            self.keys[header] = hkdf(header[8:40], self.master, b"vmbackup v1 object" + header[6:7])
        number = struct.pack("<Q", counter)
        aad = header[:8] + number + name.encode()
        return AESGCM(self.keys[header]).decrypt(number + bytes(4), sealed, aad)

    def objects(self, folder):
        return sorted(p for p in (self.path / folder).rglob("*") if p.is_file()) if (self.path / folder).is_dir() else []

    def read_index(self):
        segments, superseded = {}, set()
        for file in self.objects("index"):
            name, data = f"index/{file.name}", file.read_bytes()
            header, at = data[:HEADER], 0
            length, magic = struct.unpack("<Q8s", data[-16:])
            assert magic == b"VMBINDX1"
            directory = self.open(header, name, 0, data[-16 - length:-16])
            entries, count = struct.unpack_from("<QI", directory)
            packs = [(directory[12 + 56 * n:28 + 56 * n], directory[28 + 56 * n:68 + 56 * n]) for n in range(count)]
            at = 12 + 56 * count
            (replaced,) = struct.unpack_from("<I", directory, at)
            superseded.update(directory[at + 4 + 16 * n:at + 20 + 16 * n].hex() for n in range(replaced))
            found, blocks, size = {}, data[HEADER:-16 - length], 256 * 53 + 16
            for number in range(-(-entries // 256)):
                block = self.open(header, name, number + 1, blocks[number * size:(number + 1) * size])
                for *_, at in ((0, n) for n in range(0, len(block), 53)):
                    pack, *place, encoding = struct.unpack_from("<IIIIIB", block, at + 32)
                    found.setdefault(block[at:at + 32], []).append((packs[pack], *place, encoding))
            segments[file.name] = found
        index = {}
        for name, found in segments.items():
            for key, places in found.items() if name not in superseded else ():
                index.setdefault(key, []).extend(places)
        return index

    def blob(self, kind, content_hash):
        """A blob from the first of its copies that opens: one pack may be damaged or gone."""
        places = self.index[blake3_keyed(self.id_key, bytes([kind]) + content_hash)]
        for number, place in enumerate(places, 1):
            try:
                return self.copy(*place)
            except (InvalidTag, OSError):
                if number == len(places):
                    raise

    def copy(self, pack_and_header, counter, offset, stored, plain, encoding):
        pack, header = pack_and_header
        name = f"packs/{pack.hex()[:2]}/{pack.hex()}"
        with open(self.path / name, "rb") as file:
            file.seek(offset)
            data = self.open(header, name, counter, file.read(stored))
        data = run(["zstd", "-dcq"], data) if encoding == 1 else data
        assert len(data) == plain
        return data

    def points(self):
        forgotten = {file.name for file in self.objects("tombstones")}
        for file in self.objects("points"):
            if file.name.split("-")[1] not in forgotten:
                data, name = file.read_bytes(), str(file.relative_to(self.path))
                yield json.loads(self.open(data[:HEADER], name, 0, data[HEADER:]))

    def chunks(self, height, content_hash, index):
        """The chunks below a node, as (number, bytes); those that are zero are left out."""
        if content_hash == ZERO:
            return
        data = self.blob(height, content_hash)
        if height == 0:
            yield index, data
            return
        bitmap, at = data[:32], 32
        for child in range(256):
            if bitmap[child // 8] >> child % 8 & 1:
                yield from self.chunks(height - 1, data[at:at + 32], index * 256 + child)
                at += 32

    def restore(self, stored, path):
        size, chunk = stored["size_bytes"], self.config["chunk_bytes"]
        height, nodes = 1, max(1, -(-size // chunk))
        while (nodes := -(-nodes // 256)) > 1:
            height += 1
        leaves = {}
        with open(path, "wb") as file:
            file.truncate(size)
            for number, data in self.chunks(height, bytes.fromhex(stored["top"]), 0):
                file.seek(number * chunk)
                file.write(data[:size - number * chunk])
                for at in range(0, len(data), LEAF):
                    leaf = data[at:at + LEAF].ljust(LEAF, b"\0")
                    if any(leaf):
                        leaves[(number * chunk + at) // LEAF] = blake3_derive("vmbackup 2026-11-21 content leaf v1", leaf)
        return content_root(size, leaves) == stored["root"]


def content_root(size, row):
    """The content root over the leaves that are not zero, as {number: hash}."""
    levels = max(4, (max(1, -(-size // LEAF)) - 1).bit_length())
    for _ in range(levels):
        pairs = {n // 2 for n in row}
        row = {n: blake3_derive("vmbackup 2026-11-21 content node v1", row.get(2 * n, ZERO) + row.get(2 * n + 1, ZERO)) for n in pairs}
    return blake3_derive("vmbackup 2026-11-21 content root v1", struct.pack("<Q", size) + row.get(0, ZERO)).hex()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--password-file")
    parser.add_argument("--key-file")
    parser.add_argument("repository")
    parser.add_argument("restore", nargs="*", metavar="POINT WHAT FILE")
    args = parser.parse_args()
    password = Path(args.password_file).read_bytes().split(b"\n")[0] if args.password_file else None
    repository = Repository(args.repository, password, Path(args.key_file).read_bytes() if args.key_file else None)
    if not args.restore:
        for point in repository.points():
            print(point["point"], point["sequence"], point["vm"]["name"], point["taken"], *(d["description"]["name"] for d in point["disks"]))
        return
    point_id, what, path = args.restore
    found = [point for point in repository.points() if point["point"].startswith(point_id)]
    if len(found) != 1:
        sys.exit(f"{len(found)} points begin with {point_id}")
    named = {a["kind"]: a["stored"] for a in found[0]["artifacts"]}
    named.update({d["description"]["name"]: d["stored"] for d in found[0]["disks"]})
    if not repository.restore(named[what], path):
        sys.exit(f"{path} does not have the content root of the manifest")


if __name__ == "__main__":
    main()
