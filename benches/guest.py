"""Measures what a guest feels while it is backed up, with vmbackup and with the tools of the field.

Method: a real guest writes 4 KiB at a time, past its page cache, to random places of the first GiB of
its disk, 250 times a second, and notes how long each write takes (benches/latency.rs). Each round gives
each tool a new domain and disk in turn: quiet, a full backup, some seconds of writes, an incremental.
The same once more with a target that takes 5 MB/s, of which a minute is looked at: an nbdkit rate filter
under a file system mounted `sync`. The latencies of all rounds are pooled. Ratios are of the p99 to that
of the better of the other two.
"""

import argparse
import contextlib
import math
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

import bench
from bench import run, say

DOMAIN = "vmbackup-bench-guest"
SPAN_MIB, PERIOD_US = 1024, 4000
QUIET_SECONDS, DIRTY_SECONDS, SLOW_SECONDS = 10, 5, 60
# Incrementals of a round, and how long the guest is looked at from the beginning of each.
INCREMENTALS, WINDOW_SECONDS = 3, 5
WINDOW = f"first {WINDOW_SECONDS} s of it"
# Writes that took longer are counted: a run of a second has few of which ten are 1 %.
LATE_US = 5000
SLOW_BITS_PER_SECOND = 5 * 8 * 1000 * 1000
SLOW_MIB = 2048


class Guest:
    """The command channel of tests/support/guest/init."""

    def __init__(self, path):
        self.id = 0
        deadline = time.monotonic() + 180
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            with contextlib.suppress(OSError):
                self.socket.connect(str(path))
                break
            if time.monotonic() > deadline:
                raise SystemExit("the guest's serial port does not appear")
            time.sleep(0.2)
        self.socket.settimeout(2)
        self.lines = self.socket.makefile("r", errors="replace")
        while time.monotonic() < deadline:
            self.socket.sendall(b"hello -\n")
            with contextlib.suppress(TimeoutError):
                if self.line() == "@ready":
                    return
            self.lines = self.socket.makefile("r", errors="replace")
        raise SystemExit("the guest is not up after 180 s")

    def line(self):
        line = self.lines.readline()
        if not line:
            raise SystemExit("the guest is gone")
        return line.strip()

    def run(self, command):
        self.id += 1
        self.socket.settimeout(120)
        self.socket.sendall(f"{self.id} {command}\n".encode())
        said = []
        while True:
            line = self.line()
            if line.startswith(f"@done {self.id} "):
                if not line.endswith(" 0"):
                    raise SystemExit(f"{command}: {line}: {said}")
                return said
            said.append(line)

    @contextlib.contextmanager
    def writing(self, into):
        """Writes while the body runs; when each began and what it took, in microseconds, is added to `into`."""
        self.run("rm -f /tmp/stop /tmp/status")
        writer = f"latency /dev/vda {SPAN_MIB} {PERIOD_US} /tmp/stop"
        self.run(f"( {writer} >/tmp/latency; echo $? >/tmp/status ) &")
        yield
        self.run(": >/tmp/stop; while [ ! -s /tmp/status ]; do sleep 0.1; done; [ $(cat /tmp/status) = 0 ]")
        for line in self.run("cat /tmp/latency"):
            begun, took = line.split()
            into.append((int(begun), int(took)))


class Domain:
    """A running domain with the real guest on a new copy of the disk."""

    def __init__(self, work, source, guest_files):
        self.work, self.source, self.files = work, source, guest_files
        self.image, self.serial = work / "guest.qcow2", work / "guest.serial"

    def __enter__(self):
        self.stop()
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.source, self.image)
        os.chmod(self.image, 0o666)
        xml = f"""<domain type='qemu'><name>{DOMAIN}</name><memory unit='MiB'>192</memory><vcpu>1</vcpu>
          <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{self.files}/vmlinuz</kernel>
          <initrd>{self.files}/initrd</initrd><cmdline>console=ttyS0 quiet panic=-1</cmdline></os><devices>
          <disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>
          <source file='{self.image}'/><target dev='vda' bus='virtio'/></disk>
          <serial type='null'/>
          <serial type='unix'><source mode='bind' path='{self.serial}'/><target port='1'/></serial>
          </devices></domain>"""
        (self.work / "guest.xml").write_text(xml)
        run("virsh", "define", self.work / "guest.xml")
        run("virsh", "start", DOMAIN)
        self.guest = Guest(self.serial)
        run("sync")
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(["virsh", "destroy", DOMAIN], **quiet)
        subprocess.run(["virsh", "undefine", DOMAIN, "--checkpoints-metadata"], **quiet)
        self.serial.unlink(missing_ok=True)
        self.image.unlink(missing_ok=True)


class Vmbackup:
    name = "vmbackup"

    def __init__(self, tool, target):
        self.tool, self.repository = tool, target / "repo"
        shutil.rmtree(self.repository, ignore_errors=True)
        run(tool, "repo", "init", "--no-key", "--repo", self.repository)

    def command(self, mode):
        return [self.tool, mode, "--domain", DOMAIN, "--repo", self.repository, "--quiet"]

    def start(self, mode):
        return Process(self.command(mode))


class Virtnbdbackup:
    name = "virtnbdbackup"

    def __init__(self, _tool, target):
        self.output = target / "virtnbdbackup"
        shutil.rmtree(self.output, ignore_errors=True)

    def start(self, mode):
        return Process(["virtnbdbackup", "-n", "-d", DOMAIN, "-l", {"full": "full", "incremental": "inc"}[mode],
                        "-o", self.output])


class Push:
    name = "libvirt push mode"

    def __init__(self, _tool, target):
        self.target = target / "push"
        shutil.rmtree(self.target, ignore_errors=True)
        self.target.mkdir(mode=0o777)
        os.chmod(self.target, 0o777)
        self.points = 0

    def start(self, mode):
        since = f"<incremental>point-{self.points}</incremental>" if mode == "incremental" else ""
        self.points += 1
        name = f"point-{self.points}"
        (self.target / "backup.xml").write_text(
            f"<domainbackup mode='push'>{since}<disks><disk name='vda' type='file'><driver type='qcow2'/>"
            f"<target file='{self.target}/{name}.qcow2'/></disk></disks></domainbackup>")
        (self.target / "checkpoint.xml").write_text(f"<domaincheckpoint><name>{name}</name></domaincheckpoint>")
        run("virsh", "backup-begin", DOMAIN, self.target / "backup.xml", self.target / "checkpoint.xml")
        return self

    def is_running(self):
        return "None" not in run("virsh", "domjobinfo", DOMAIN).split("\n")[0]

    def wait(self):
        while self.is_running():
            time.sleep(0.05)

    def cancel(self):
        if self.is_running():
            run("virsh", "domjobabort", DOMAIN)


class Process:
    """A backup that is a process."""

    def __init__(self, command):
        self.command = [str(part) for part in command]
        self.child = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def is_running(self):
        return self.child.poll() is None

    def wait(self):
        said, _ = self.child.communicate()
        if self.child.returncode != 0:
            raise SystemExit(f"{self.command}: exit code {self.child.returncode}\n{said}")

    def cancel(self):
        self.child.send_signal(signal.SIGINT)
        try:
            self.child.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.communicate()
            # What it held open on the domain ends with the domain.


@contextlib.contextmanager
def slow_directory(work):
    """A file system that takes SLOW_BITS_PER_SECOND and says "written" when it is."""
    image, fuse, mount = work / "slow.img", work / "slow.fuse", work / "slow"
    with open(image, "wb") as file:
        file.truncate(SLOW_MIB << 20)
    run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0", image)
    for path in (fuse, mount):
        path.mkdir(exist_ok=True)
    server = subprocess.Popen(["nbdfuse", str(fuse), "--command", "nbdkit", "-s", "--exit-with-parent", "--filter=rate",
                               "file", str(image), f"rate={SLOW_BITS_PER_SECOND}"])
    try:
        while not (fuse / "nbd").exists():
            if server.poll() is not None:
                raise SystemExit("nbdfuse ended")
            time.sleep(0.1)
        run("mount", "-o", "loop,sync,noatime", fuse / "nbd", mount)
        try:
            os.chmod(mount, 0o777)
            yield mount
        finally:
            run("umount", "-l", mount)
    finally:
        time.sleep(1)
        subprocess.run(["umount", "-l", str(fuse)], check=False)
        server.terminate()
        server.wait()
        image.unlink()


def percentile(sorted_values, share):
    return sorted_values[min(len(sorted_values) - 1, int(share * len(sorted_values)))]


class Measured:
    """Latencies by phase and tool."""

    def __init__(self):
        self.pooled, self.seconds = {}, {}

    def of(self, phase, tool):
        return self.pooled.setdefault((phase, tool), [])

    def table(self, tools):
        lines = [f"| phase | tool | writes | median ms | p99 ms | over {LATE_US // 1000} ms, a run | longest ms "
                 "| p99 to the better other | seconds |",
                 "|---|---|---:|---:|---:|---:|---:|---:|---:|"]
        for phase in ("quiet", "full", "incremental", WINDOW, "slow target"):
            p99 = {}
            for tool in tools:
                values = sorted(self.pooled.get((phase, tool), []))
                if values:
                    p99[tool] = percentile(values, 0.99)
            others = [value for tool, value in p99.items() if tool != Vmbackup.name]
            for tool in p99:
                values = sorted(self.pooled[phase, tool])
                ratio = f"{p99[tool] / min(others):.2f}" if tool == Vmbackup.name and others else ""
                took = self.seconds.get((phase, tool), [])
                late = sum(value > LATE_US for value in values) / max(1, len(took))
                took = f"{sorted(took)[len(took) // 2]:.1f}" if took else ""
                lines.append(f"| {phase} | {tool} | {len(values)} | {percentile(values, 0.5) / 1000:.2f} | "
                             f"{p99[tool] / 1000:.2f} | {late:.0f} | {values[-1] / 1000:.0f} | {ratio} | {took} |")
        return "\n".join(lines)


class Bench:
    def __init__(self, options):
        self.options = options
        self.tool = pathlib.Path(options.vmbackup).resolve()
        self.work = pathlib.Path(options.dir).resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        os.chmod(self.work, 0o777)
        self.tools = [Vmbackup, Push] + ([Virtnbdbackup] if shutil.which("virtnbdbackup") else [])
        self.measured = Measured()
        self.source = self.work / "log.raw"
        if not self.source.exists():
            say("making the disk")
            run("python3", pathlib.Path(bench.__file__).parent / "disk.py", self.source, "log")
        self.files = self.guest_files()

    def guest_files(self):
        """The tests' guest, with the writer in a second archive behind its own."""
        files, tree = self.work / "guest", self.work / "guest-tree"
        here = pathlib.Path(bench.__file__).resolve().parent
        run(here.parent / "tests/support/guest/build.sh", files)
        shutil.rmtree(tree, ignore_errors=True)
        writer = self.tool.parent / "examples" / "latency"
        (tree / "bin").mkdir(parents=True)
        shutil.copy(writer, tree / "bin" / "latency")
        run("strip", tree / "bin" / "latency")
        for line in run("ldd", writer).splitlines():
            path = next((part for part in line.split() if part.startswith("/")), None)
            if path:
                (tree / path[1:]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tree / path[1:])
        archive = subprocess.run("find . | cpio -o -H newc --quiet -R 0:0 | gzip -1", shell=True, cwd=tree,
                                 check=True, capture_output=True).stdout
        own = files / "initrd"
        with_writer = files / "with-writer"
        with_writer.mkdir(exist_ok=True)
        (with_writer / "initrd").write_bytes(own.read_bytes() + archive)
        shutil.copy(files / "vmlinuz", with_writer / "vmlinuz")
        shutil.rmtree(tree)
        return with_writer

    def phase(self, domain, name, tool, work, window=0):
        """Adds what the guest felt while `work` ran, and up to `window` seconds from then on."""
        writes, begun = [], time.monotonic()
        with domain.guest.writing(writes):
            work()
            took = time.monotonic() - begun
            time.sleep(max(0, window - took))
        # The writer's clock begins a little later than ours: to its end, and a little past it.
        parts = {name: math.inf} if not window else {name: took + 0.1, WINDOW: max(window, took + 0.1)}
        for part, seconds in parts.items():
            self.measured.of(part, tool).extend(took for at, took in writes if at <= seconds * 1e6)
            self.measured.seconds.setdefault((part, tool), []).append(took)

    def round(self, tool):
        """Quiet, a full, writes, incrementals: on a target as fast as the disk."""
        target = self.work / "target"
        target.mkdir(exist_ok=True)
        os.chmod(target, 0o777)
        with Domain(self.work, self.source, self.files) as domain:
            backup = tool(self.tool, target)
            self.phase(domain, "quiet", tool.name, lambda: time.sleep(QUIET_SECONDS))
            self.phase(domain, "full", tool.name, lambda: backup.start("full").wait())
            for _ in range(INCREMENTALS):
                with domain.guest.writing([]):
                    time.sleep(DIRTY_SECONDS)
                self.phase(domain, "incremental", tool.name, lambda: backup.start("incremental").wait(),
                           WINDOW_SECONDS)
        shutil.rmtree(target)

    def slow(self, tool):
        """The first minute of a full to a slow target."""
        with slow_directory(self.work) as target, Domain(self.work, self.source, self.files) as domain:
            backup = tool(self.tool, target)

            def work():
                running = backup.start("full")
                time.sleep(SLOW_SECONDS)
                if not running.is_running():
                    raise SystemExit(f"{tool.name}: the target was not slow")
                self.running = running
            self.phase(domain, "slow target", tool.name, work)
            self.running.cancel()

    def run(self):
        for number in range(self.options.rounds):
            for tool in self.tools[number % len(self.tools):] + self.tools[:number % len(self.tools)]:
                say(f"round {number + 1}: {tool.name}")
                self.round(tool)
        for number in range(self.options.slow_rounds):
            for tool in self.tools:
                say(f"slow target, round {number + 1}: {tool.name}")
                self.slow(tool)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vmbackup", default="target/release/vmbackup")
    parser.add_argument("--dir", default="/var/tmp/vmbackup-bench")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-rounds", type=int, default=2)
    measuring = Bench(parser.parse_args())
    try:
        measuring.run()
    finally:
        print(measuring.measured.table([tool.name for tool in measuring.tools]))


if __name__ == "__main__":
    main()
