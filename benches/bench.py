"""Measures vmbackup against the tools of the field and prints a table in Markdown.

Method: every case runs ours and the other in turn (interleaved pairs), so that both see the same
machine; a row is the median of each side and the median of the ratios of the pairs. Both sides end
durable (fsync, nbdcopy --flush and sync of the file), on the same file system; sources are in the
page cache; targets are new files. Ours is timed end to end as a user types it, with freeze, job
begin and end, checkpoint and manifest. Peak memory is that of our process (wait4), the highest of
all runs. On tmpfs the disk is out of the picture: what remains is processor time.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import time

import disk

DOMAIN = "vmbackup-bench"

# A bitmap of every other 64 KiB, in the image that has them.
RANGES = "ranges"

# Touches 5 GiB and lets go of them.
TOUCH = "import mmap; n = 5 << 30; m = mmap.mmap(-1, n); m[0:n:4096] = bytes(n >> 12)"


class Rows:
    """The table, filled row by row and printed as it grows."""

    def __init__(self):
        self.lines = ["| case | ours s | other s | ratio | target | peak MiB | other is |",
                      "|---|---:|---:|---:|---:|---:|---|"]
        self.raw = {}

    def add(self, name, ours, others, target, other_is, memory):
        ratios = [a / b for a, b in zip(ours, others)]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
        other = f"{statistics.median(others):.2f}" if others else ""
        self.lines.append(f"| {name} | {statistics.median(ours):.2f} | {other} | {ratio} | {target} "
                          f"| {memory / 1024:.0f} | {other_is} |")
        self.raw[name] = {"ours": ours, "other": others, "ratios": ratios}
        say(self.lines[-1])


def say(*text):
    print(*text, file=sys.stderr, flush=True)


def run(*command, **options):
    """Runs a command that must succeed and returns what it printed."""
    done = subprocess.run([str(c) for c in command], text=True, capture_output=True, **options)
    if done.returncode != 0:
        sys.exit(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def timed(*command):
    """Runs a command that must succeed; seconds and peak memory in KiB."""
    start = time.monotonic()
    child = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True)
    errors = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.exit(f"{command}: exit code {child.returncode}\n{errors}")
    return time.monotonic() - start, usage.ru_maxrss


def nbdcopy(source, target):
    """nbdcopy with its defaults, durable, to a new file."""
    return timed("sh", "-c", 'nbdcopy --flush "$1" "$2" && sync -d "$2"', "sh", source, target)


class Domain:
    """A paused domain of libvirt with one qcow2 disk: its exports are live, its content stands."""

    def __init__(self, work, image):
        self.work, self.image = work, image
        self.socket = work / "bench.sock"
        self.scratch = work / "scratch.qcow2"

    def start(self):
        xml = f"""<domain type='qemu'><name>{DOMAIN}</name><memory unit='MiB'>64</memory>
          <os><type arch='x86_64' machine='q35'>hvm</type></os><devices>
          <disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>
          <source file='{self.image}'/><target dev='vda' bus='virtio'/>
          <alias name='ua-bench'/></disk></devices></domain>"""
        (self.work / "domain.xml").write_text(xml)
        run("virsh", "define", self.work / "domain.xml")
        run("virsh", "start", "--paused", DOMAIN)

    def stop(self):
        """Ends the domain and forgets every checkpoint, so that each run starts from nothing."""
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(["virsh", "destroy", DOMAIN], **quiet)
        subprocess.run(["virsh", "undefine", DOMAIN, "--checkpoints-metadata"], **quiet)
        info = json.loads(run("qemu-img", "info", "-U", "--output=json", self.image))
        bitmaps = info["format-specific"]["data"].get("bitmaps", [])
        for bitmap in bitmaps:
            if bitmap["name"] != RANGES:
                run("qemu-img", "bitmap", "--remove", self.image, bitmap["name"])

    def restart(self):
        self.stop()
        self.start()

    def write(self, offsets, length):
        """Overwrites blocks as the guest would."""
        # One virsh for all: a process per block would take half a minute.
        device = "/machine/peripheral/ua-bench/virtio-backend"
        script = ""
        for offset in offsets:
            write = f'qemu-io -d {device} "write -P {(offset >> 16) % 255 + 1} {offset} {length}"'
            script += f"qemu-monitor-command --hmp {DOMAIN} '{write}'\n"
        errors = run("virsh", "-q", input=script)
        if "error" in errors.lower() or "failed" in errors.lower():
            sys.exit(f"the guest's writes failed:\n{errors}")

    def change_ranges(self):
        """Has every checkpoint's bitmap say that the ranges of RANGES changed."""
        def monitor(command, **arguments):
            text = json.dumps({"execute": command, "arguments": arguments})
            answer = json.loads(run("virsh", "qemu-monitor-command", DOMAIN, text))
            if "error" in answer:
                sys.exit(f"{command}: {answer['error']}")
            return answer["return"]
        for node in monitor("query-named-block-nodes"):
            names = [bitmap["name"] for bitmap in node.get("dirty-bitmaps", [])]
            for target in [name for name in names if RANGES in names and name != RANGES]:
                monitor("block-dirty-bitmap-merge", node=node["node-name"], target=target, bitmaps=[RANGES])

    def backup_begin(self, mode, target):
        disks = f"<disk name='vda' type='file'><driver type='{'qcow2' if mode == 'pull' else 'raw'}'/>"
        inner = f"<scratch file='{target}'/>" if mode == "pull" else f"<target file='{target}'/>"
        server = f"<server transport='unix' socket='{self.socket}'/>" if mode == "pull" else ""
        xml = f"<domainbackup mode='{mode}'>{server}<disks>{disks}{inner}</disk></disks></domainbackup>"
        (self.work / "backup.xml").write_text(xml)
        run("virsh", "backup-begin", DOMAIN, self.work / "backup.xml")

    def pull(self):
        """Begins a pull job; the URI of its export."""
        self.backup_begin("pull", self.scratch)
        return f"nbd+unix:///vda?socket={self.socket}"

    def end(self):
        run("virsh", "domjobabort", DOMAIN)

    def push(self, target):
        """libvirt's own push mode to a raw file, durable; seconds."""
        pathlib.Path(target).unlink(missing_ok=True)
        start = time.monotonic()
        self.backup_begin("push", target)
        while "None" not in run("virsh", "domjobinfo", DOMAIN).split("\n")[0]:
            time.sleep(0.02)
        run("sync", "-d", target)
        return time.monotonic() - start


class Bench:
    def __init__(self, options):
        self.options = options
        self.work = pathlib.Path(options.dir).resolve()
        self.rows = Rows()
        self.tool = pathlib.Path(options.vmbackup).resolve()
        self.use("log")

    def use(self, text):
        """Takes the disk whose text is of this kind (disk.TEXTS)."""
        self.text, self.raw = text, self.work / f"{text}.raw"
        self.qcow2 = self.work / "disk.qcow2"
        self.domain = Domain(self.work, self.qcow2)

    def prepare(self):
        self.work.mkdir(parents=True, exist_ok=True)
        os.chmod(self.work, 0o777)  # QEMU runs as libvirt-qemu and binds its socket here.
        if not self.raw.exists():
            say("making the disk")
            # In a process of its own: the peak memory of a child counts from its fork on.
            run(sys.executable, disk.__file__, self.raw, self.text)
        # Always anew: a case may have written to it.
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.raw, self.qcow2)
        os.chmod(self.qcow2, 0o666)
        run("sh", "-c", 'cat "$1" "$2" >/dev/null', "sh", self.raw, self.qcow2)

    def repository(self, name="repo"):
        """A new repository without a key (everything is sealed all the same)."""
        path = self.work / name
        shutil.rmtree(path, ignore_errors=True)
        run(self.tool, "repo", "init", "--no-key", "--repo", path)
        return path

    def pairs(self, ours, other):
        """Runs both in turn; seconds of each and our peak memory."""
        a, b, memory = [], [], 0
        for _ in range(self.options.pairs):
            seconds, peak = ours()
            a.append(seconds)
            memory = max(memory, peak)
            if other:
                result = other()
                b.append(result[0] if isinstance(result, tuple) else result)
        return a, b, memory

    def settled(self, work, source):
        """Runs `work` with what it reads (a file or directory) in the page cache, the write-back of
        what came before out of the way, and free memory that is really there: a virtual machine's
        host takes free pages back, and the first touch of each then costs several times what
        copying it costs."""
        run("sync")
        run(sys.executable, "-c", TOUCH)
        run("sh", "-c", 'find "$1" -type f -exec cat {} + >/dev/null', "sh", source)
        return work()

    def backup(self, mode, repository):
        return timed(self.tool, mode, "--domain", DOMAIN, "--repo", repository, "--quiet")

    # -- cases ----------------------------------------------------------------------------------

    def ours_full(self):
        repository = self.repository()
        self.domain.restart()
        return self.settled(lambda: self.backup("full", repository), self.qcow2)

    def their_copy(self, target):
        target.unlink(missing_ok=True)
        self.domain.restart()
        uri = self.domain.pull()
        try:
            return self.settled(lambda: nbdcopy(uri, target), self.qcow2)
        finally:
            self.domain.end()

    def full(self, name="full backup"):
        """Full backup of the running domain."""
        target = self.work / "copy.raw"
        ours, other, memory = self.pairs(self.ours_full, lambda: self.their_copy(target))
        self.rows.add(name, ours, other, "1.3", "nbdcopy of the same export to raw", memory)
        target.unlink()

    def numbered(self):
        """Full backup and restore of a disk whose text compresses eightfold, not fivefold."""
        self.domain.stop()
        self.use("numbered")
        self.prepare()
        self.full("full backup, numbered lines")
        self.restore(name="restore to raw, numbered lines")
        self.domain.stop()
        self.raw.unlink()
        self.use("log")
        self.prepare()

    def push(self):
        """Full backup against libvirt's push mode."""
        target = self.work / "push.raw"

        def theirs():
            self.domain.restart()
            return self.settled(lambda: self.domain.push(target), self.qcow2)
        ours, other, memory = self.pairs(self.ours_full, theirs)
        self.rows.add("full backup", ours, other, "", "libvirt push mode to raw", memory)
        target.unlink()

    def virtnbdbackup(self):
        """Full backup against virtnbdbackup, with and without its compression."""
        if not shutil.which("virtnbdbackup"):
            return
        for name, extra in (("lz4", ["-z"]), ("no compression", [])):
            def theirs():
                target = self.work / "virtnbdbackup"
                shutil.rmtree(target, ignore_errors=True)
                self.domain.restart()
                command = ["virtnbdbackup", "-d", DOMAIN, "-l", "full", "-o", str(target), *extra]

                def work():
                    start = time.monotonic()
                    run(*command)
                    run("sync", "-f", target)
                    return time.monotonic() - start
                return self.settled(work, self.qcow2)
            ours, other, memory = self.pairs(self.ours_full, theirs)
            self.rows.add("full backup", ours, other, "", f"virtnbdbackup, {name}", memory)
        shutil.rmtree(self.work / "virtnbdbackup", ignore_errors=True)

    def point(self):
        """A repository with one point of the domain."""
        repository = self.repository("repo-restore")
        self.domain.restart()
        self.backup("full", repository)
        return repository

    def restore(self, base=None, name="restore to raw"):
        """Restore to a raw image."""
        base = base or self.work
        repository = self.point()
        if base != self.work:
            repository = shutil.move(repository, base / "repo-restore")
        target, copy = base / "restored", base / "copy.raw"

        def ours():
            shutil.rmtree(target, ignore_errors=True)
            return self.settled(lambda: timed(
                self.tool, "restore", f"{DOMAIN}@latest", "--to", target, "--repo", repository, "--quiet"), repository)
        source = self.raw
        if base != self.work:
            source = shutil.copy(self.raw, base / "disk.raw")

        def theirs():
            copy.unlink(missing_ok=True)
            return self.settled(lambda: nbdcopy(source, copy), source)
        result = self.pairs(ours, theirs)
        self.rows.add(name, *result[:2], "1.2", "nbdcopy raw to raw", result[2])
        run("cmp", target / "vda.raw", self.raw)
        shutil.rmtree(target)
        copy.unlink()
        shutil.rmtree(repository)
        if base != self.work:
            os.unlink(source)

    def tmpfs(self):
        """Full backup and restore with repository and targets in memory."""
        base = pathlib.Path("/dev/shm/vmbackup-bench")
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir()
        try:
            def ours():
                path = base / "repo"
                shutil.rmtree(path, ignore_errors=True)
                run(self.tool, "repo", "init", "--no-key", "--repo", path)
                self.domain.restart()
                return self.settled(lambda: self.backup("full", path), self.qcow2)
            ours, other, memory = self.pairs(ours, lambda: self.their_copy(base / "copy.raw"))
            self.rows.add("full backup, tmpfs", ours, other, "1.3", "nbdcopy to raw", memory)
            shutil.rmtree(base / "repo")
            (base / "copy.raw").unlink()
            self.restore(base, "restore, tmpfs")
        finally:
            shutil.rmtree(base, ignore_errors=True)

    def incremental(self):
        """Incrementals: nothing changed, and 1 % in scattered 64 KiB blocks."""
        repository = self.point()
        ours, _, memory = self.pairs(lambda: self.backup("incremental", repository), None)
        self.rows.add("incremental, nothing changed", ours, [], "1 s", "", memory)
        idle = statistics.median(ours)
        ours, reads, memory = [], [], 0
        chunk = 256 * 1024
        for seed in range(self.options.pairs):
            offsets = disk.scattered(0.01, 65536, seed)
            self.domain.write(offsets, 65536)
            chunks = sorted({offset // chunk * chunk for offset in offsets})
            uri = self.domain.pull()
            commands = "".join(f"aio_read -q {offset} {chunk}\n" for offset in chunks) + "aio_flush\n"
            start = time.monotonic()
            run("qemu-io", "-r", "-f", "raw", uri, input=commands)
            reads.append(time.monotonic() - start)
            self.domain.end()
            seconds, peak = self.backup("incremental", repository)
            ours.append(seconds)
            memory = max(memory, peak)
        bound = idle + 2.5 * statistics.median(reads)
        self.rows.add("incremental, 1 % in 64 KiB blocks", ours, reads, f"{bound:.2f} s",
                      "qemu-io reading just those chunks", memory)
        shutil.rmtree(repository)
        self.domain.stop()
        self.prepare()

    def second(self):
        """A second VM with the same content: what it adds to the repository."""
        def size(path):
            return int(run("du", "-sB1", path).split()[0])
        repository = self.point()
        before = size(repository)
        self.domain.restart()  # without a uuid in its XML, this is another domain of libvirt
        seconds, peak = self.backup("full", repository)
        share = 100 * (size(repository) - before) / before
        self.rows.add(f"second VM, same content (stores {share:.2f} % more)", [seconds], [], "1 %", "", peak)
        shutil.rmtree(repository)

    def extents(self):
        """The extent phase over 1.6 million ranges, alone and in whole backups."""
        image, socket = self.work / "ranges.qcow2", self.work / "ranges.sock"
        size, step = 200 << 30, 128 << 10
        if not image.exists():
            say("making an image with 1.6 million ranges")
            run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", image, size)
            run("qemu-img", "bitmap", "--add", image, RANGES)
            # Not as one string: what this process takes counts as the peak of those it starts.
            tool = subprocess.Popen(["qemu-io", "-d", "unmap", "-f", "qcow2", str(image)], text=True,
                                    stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            tool.stdin.writelines(f"discard -q {offset} 64k\n" for offset in range(0, size, step))
            tool.stdin.close()
            if tool.wait() != 0:
                raise SystemExit("qemu-io could not make the ranges")
        server = subprocess.Popen(["qemu-nbd", "-r", "-t", "-e", "16", "-f", "qcow2", "-B", RANGES,
                                   "-k", str(socket), str(image)])
        try:
            while not socket.exists():
                time.sleep(0.05)
            uri = f"nbd+unix:///?socket={socket}"
            walk = [self.tool.parent / "examples" / "extents", uri]
            contexts = {"dirty bitmap": f"qemu:dirty-bitmap:{RANGES}", "allocation": "base:allocation"}
            for name, context in contexts.items():
                extra = [RANGES] if name == "dirty bitmap" else []
                ours, other, memory = self.pairs(
                    lambda: timed(*walk, *extra),
                    lambda: timed("nbdinfo", f"--map={context}", "--totals", uri))
                self.rows.add(f"extents, 1.6 M of {name}", ours, other, "5 s", "nbdinfo --map --totals", memory)
        finally:
            server.terminate()
            server.wait()
            socket.unlink(missing_ok=True)
        self.whole_ranges(image)

    def whole_ranges(self, image):
        """A full backup and an incremental of a running domain with that disk."""
        self.domain.stop()
        os.chmod(image, 0o666)
        repository, domain = self.repository(), Domain(self.work, image)
        domain.stop()
        domain.start()
        seconds, peak = self.backup("full", repository)
        self.rows.add("full backup, 1.6 M of allocation", [seconds], [], "", "", peak)

        def ours():
            domain.change_ranges()
            return self.backup("incremental", repository)
        ours, _, peak = self.pairs(ours, None)
        self.rows.add("incremental, 1.6 M of dirty bitmap", ours, [], "", "", peak)
        domain.stop()
        shutil.rmtree(repository)


def main():
    cases = ["full", "restore", "numbered", "tmpfs", "incremental", "second", "extents", "push", "virtnbdbackup"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(cases)}")
    parser.add_argument("--vmbackup", default="target/release/vmbackup")
    parser.add_argument("--dir", default="/var/tmp/vmbackup-bench")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--list", action="store_true", help="name the cases")
    options = parser.parse_args()
    bench = Bench(options)
    if options.list:
        for case in cases:
            print(f"{case}: {getattr(Bench, case).__doc__}")
        return
    unknown = set(options.cases) - set(cases)
    if unknown:
        sys.exit(f"no such case: {', '.join(sorted(unknown))}; see --list")
    bench.prepare()
    try:
        for case in options.cases or cases:
            say(f"{case}: {getattr(Bench, case).__doc__}")
            getattr(bench, case)()
    finally:
        bench.domain.stop()
    model = re.search(r"model name\s*:\s*(.*)", pathlib.Path("/proc/cpuinfo").read_text())
    machine = f"{os.cpu_count()} x {model[1] if model else os.uname().machine}"
    print(f"{datetime.date.today()}, {machine}, Linux {os.uname().release}, "
          f"{options.pairs} pairs\n")
    print("\n".join(bench.rows.lines))
    (bench.work / "results.json").write_text(json.dumps(bench.rows.raw, indent=1))


if __name__ == "__main__":
    main()
