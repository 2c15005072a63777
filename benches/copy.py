"""Measures `vmbackup copy` against nbdcopy and qemu-img convert, and `vmbackup serve` of a point
against qemu-nbd of the raw file, and prints tables in Markdown.

Method: each round of a case runs the three in turn (interleaved), every one on a fresh target, and
what fills the page cache with memory that is really there; a row has the median of each side, the
median of the rounds' ratios to the better of the two (that over which this median is higher: the
faster of two in each round by itself would be a chance of its own, and an equal have more than 1), and
the median of the ratios of processor time (user and system, of the copying process alone) to nbdcopy's. All sides end durable where the target can be (nbdcopy --flush and sync of a file).
With latency a second table has what our requests in flight allow: the time of the disk at (in flight x
request size / latency), or at the rate without latency where that is lower, and ours as a multiple of it
(1.10 is the target). The start of the program, and the ramp of the first requests, are in ours.
Serving: both servers run side by side with warm caches and are read in turn, to the end by nbdcopy and
for a few seconds in random 4 KiB by `vmbackup nbd bench`; a row has the rates, and the median of ours
as a share of qemu-nbd's.
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

MIB = 1 << 20

# What `vmbackup copy` has in flight by default from a server that lets it have two connections:
# CONNECTIONS_DEFAULT and IN_FLIGHT_DEFAULT (src/nbd/client.rs), REQUEST_BYTES (src/copy/mod.rs).
IN_FLIGHT = 2 * 16
REQUEST_MIB = 1

# Touches and gives back memory: see `settle`.
TOUCH = "import mmap; n = 5 << 30; m = mmap.mmap(-1, n); m[0:n:4096] = bytes(n >> 12)"


def say(*text):
    print(*text, file=sys.stderr, flush=True)


def run(*command):
    done = subprocess.run([str(c) for c in command], text=True, capture_output=True)
    if done.returncode != 0:
        sys.exit(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def timed(command, sync=None):
    """Wall-clock and processor seconds of a command that must succeed."""
    start = time.monotonic()
    child = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True)
    errors = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.exit(f"{command}: exit code {child.returncode}\n{errors}")
    if sync:
        run("sync", "-d", sync)
    return time.monotonic() - start, usage.ru_utime + usage.ru_stime


class Server:
    """An NBD server on a socket of its own, ended with the block."""

    def __init__(self, work, *command):
        self.socket = work / f"copy-{id(self)}.sock"
        self.command = [str(c).replace("SOCKET", str(self.socket)) for c in command]

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        while not self.socket.exists():
            time.sleep(0.01)
        return f"nbd+unix:///?socket={self.socket}"

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        self.socket.unlink(missing_ok=True)


class Bench:
    def __init__(self, options):
        self.options = options
        self.work = pathlib.Path(options.dir).resolve()
        self.tool = pathlib.Path(options.vmbackup).resolve()
        self.lines = ["| case | ours s | nbdcopy s | qemu-img s | ratio | ours CPU s | nbdcopy CPU s | CPU ratio |",
                      "|---|---:|---:|---:|---:|---:|---:|---:|"]
        self.latencies = []
        self.served = []
        for kind in ("STATE", "RUNTIME", "CACHE"):
            os.environ[f"VMBACKUP_{kind}_DIR"] = str(self.work / kind.lower())

    def nbdkit(self, *args):
        return Server(self.work, "nbdkit", "-f", "-U", "SOCKET", *args)

    # What the three are told. A target is a URI, a file, or None for nowhere.

    def ours(self, source, target):
        goal = target or "null:"
        if not str(goal).startswith("nbd") and target:
            pathlib.Path(target).unlink(missing_ok=True)
        return timed([self.tool, "copy", "--quiet", source, goal])

    def nbdcopy(self, source, target):
        if target is None:
            return timed(["nbdcopy", source, "null:"])
        if str(target).startswith("nbd"):
            return timed(["nbdcopy", "--flush", source, target])
        pathlib.Path(target).unlink(missing_ok=True)
        return timed(["nbdcopy", "--flush", source, target], sync=target)

    def qemu_img(self, source, target):
        parallel = ["-W", "-m", "16", "-f", "raw"]
        if target is None:
            size = json.loads(run("qemu-img", "info", "-f", "raw", "--output=json", source))["virtual-size"]
            return timed(["qemu-img", "convert", "-n", "--target-image-opts", *parallel, source,
                          f"driver=null-co,size={size}"])
        command = ["qemu-img", "convert", *parallel, "-O", "raw", source]
        if str(target).startswith("nbd"):
            return timed([*command[:2], "-n", *command[2:], target])
        pathlib.Path(target).unlink(missing_ok=True)
        return timed([*command, target], sync=target)

    def case(self, name, source, target):
        """`target` makes a fresh one: a server, a path or None."""
        sides = {"ours": self.ours, "nbdcopy": self.nbdcopy, "qemu-img": self.qemu_img}
        wall, cpu = {side: [] for side in sides}, {side: [] for side in sides}
        for round_ in range(self.options.pairs):
            order = list(sides) if round_ % 2 == 0 else list(sides)[::-1]
            for side in order:
                if target and not isinstance(source, str):
                    run("sync", "-f", self.work)
                made = target() if target else None
                if isinstance(made, pathlib.Path):
                    self.settle(source)
                if isinstance(made, Server):
                    with made as uri:
                        seconds, busy = sides[side](source, uri)
                else:
                    seconds, busy = sides[side](source, made)
                wall[side].append(seconds)
                cpu[side].append(busy)
        median = statistics.median
        ratio = max(median(a / b for a, b in zip(wall["ours"], wall[other]))
                    for other in ("nbdcopy", "qemu-img"))
        busy = median(a / b for a, b in zip(cpu["ours"], cpu["nbdcopy"]))
        self.lines.append(f"| {name} | {median(wall['ours']):.2f} | {median(wall['nbdcopy']):.2f} | "
                          f"{median(wall['qemu-img']):.2f} | {ratio:.2f} | {median(cpu['ours']):.2f} | "
                          f"{median(cpu['nbdcopy']):.2f} | {busy:.2f} |")
        say(self.lines[-1])
        return median(wall["ours"])

    def settle(self, source):
        """A virtual machine's host takes free pages back, and the first touch of each then costs
        several times what copying it costs: what fills the page cache is measured with memory that
        is really there, the old target gone and its write-back out of the way."""
        (self.work / "copy-out.raw").unlink(missing_ok=True)
        run("sync")
        run(sys.executable, "-c", TOUCH)
        if isinstance(source, pathlib.Path):
            run("sh", "-c", 'cat "$1" >/dev/null', "sh", source)

    def raw(self):
        """The raw source: data and holes of 32 MiB in turn, in the page cache."""
        path = self.work / "copy.raw"
        size = self.options.mib * MIB
        if not path.exists() or path.stat().st_size != size:
            say("making the disk")
            noise = os.urandom(32 * MIB)
            with open(path, "wb") as disk:
                disk.truncate(size)
                for offset in range(0, size, 64 * MIB):
                    disk.seek(offset)
                    disk.write(noise)
        run("sh", "-c", 'cat "$1" >/dev/null', "sh", path)
        return path

    # -- cases ----------------------------------------------------------------------------------

    def memory(self):
        """nbdkit memory to nbdkit memory, all data."""
        size = f"{self.options.mib // 2}M"
        with self.nbdkit("memory", size) as source:
            run("nbdcopy", "--", "[", "nbdkit", "--exit-with-parent", "pattern", size, "]", source)
            self.case("memory to memory", source, lambda: self.nbdkit("memory", size))

    def qcow2(self):
        """qcow2 over qemu-nbd to a raw file."""
        image = self.work / "copy.qcow2"
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.raw(), image)
        server = Server(self.work, "qemu-nbd", "-r", "-t", "-e", "16", "-f", "qcow2", "-k", "SOCKET", image)
        with server as source:
            self.case("qcow2 over qemu-nbd to raw file", source, lambda: self.work / "copy-out.raw")

    def null(self):
        """A raw file to nowhere."""
        self.case("raw file to null", self.raw(), None)

    def file(self):
        """A raw file to a raw file."""
        self.case("raw file to raw file", self.raw(), lambda: self.work / "copy-out.raw")

    def sparse(self):
        """Many small extents: nbdkit's sparse-random disk to a memory disk."""
        # qemu-img takes minutes for more.
        size = f"{min(256, self.options.mib)}M"
        args = ["sparse-random", f"size={size}", "seed=1", "runlength=16384", "percent=10"]
        with self.nbdkit(*args) as source:
            self.case(f"sparse-random ({size}) to memory", source, lambda: self.nbdkit("memory", size))

    def latency(self):
        """1, 5 and 20 ms per read, and none to compare with, to nowhere."""
        # Large enough for the start of the programs not to count.
        mib, without = self.options.mib, 0
        for delay in (0, 1, 5, 20):
            with self.nbdkit("--filter=delay", "pattern", f"{mib}M", f"rdelay={delay}ms") as source:
                ours = self.case(f"{delay} ms per read ({mib}M) to null", source, None)
            if delay == 0:
                without = ours
                continue
            latency = mib / (IN_FLIGHT * REQUEST_MIB) * delay / 1000
            ideal = max(latency, without)
            self.latencies.append(f"| {delay} ms | {ours:.2f} | {latency:.2f} | {ideal:.2f} | {ours / ideal:.2f} |")
            say(self.latencies[-1])

    def serve(self):
        """A point served from the repository, and its raw file by qemu-nbd."""
        raw, repository = self.raw(), self.work / "serve-repo"
        shutil.rmtree(repository, ignore_errors=True)
        run(self.tool, "repo", "init", "--no-key", "--repo", repository)
        run(self.tool, "full", "--image", f"raw:{raw}", "--name", "served", "--quiet", "--repo", repository)
        ours = Server(self.work, self.tool, "serve", "served@latest", "--socket", "SOCKET", "--cache",
                      f"{self.options.mib * 2}M", "--repo", repository)
        theirs = Server(self.work, "qemu-nbd", "-r", "-t", "-e", "16", "-f", "raw", "-k", "SOCKET", raw)
        with ours as our_uri, theirs as their_uri:
            uris = {"ours": our_uri, "qemu-nbd": their_uri}
            for uri in uris.values():
                run("nbdcopy", uri, "null:")
            self.serving("sequential read, MiB/s", 0.5, uris, self.sequential)
            self.serving("random 4 KiB reads, requests/s", 0.7, uris, self.random)
        shutil.rmtree(repository)

    def sequential(self, uri):
        seconds, _ = timed(["nbdcopy", uri, "null:"])
        return self.options.mib / seconds

    def random(self, uri):
        report = run(self.tool, "nbd", "bench", uri, "--random", "--request-size", "4k", "--time", "3", "--json")
        return json.loads(report)["requests_per_second"]

    def serving(self, name, target, uris, measure):
        rates = {side: [] for side in uris}
        for round_ in range(self.options.pairs):
            for side in list(uris) if round_ % 2 == 0 else list(uris)[::-1]:
                rates[side].append(measure(uris[side]))
        median = statistics.median
        share = median(a / b for a, b in zip(rates["ours"], rates["qemu-nbd"]))
        self.served.append(f"| {name} | {median(rates['ours']):.0f} | {median(rates['qemu-nbd']):.0f} | "
                           f"{share:.2f} | {target:.2f} |")
        say(self.served[-1])


def main():
    cases = ["memory", "qcow2", "null", "file", "sparse", "latency", "serve"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(cases)}")
    parser.add_argument("--vmbackup", default="target/release/vmbackup")
    parser.add_argument("--dir", default="/var/tmp/vmbackup-bench")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--mib", type=int, default=2048, help="size of the disks")
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
    bench.work.mkdir(parents=True, exist_ok=True)
    for case in options.cases or cases:
        say(f"{case}: {getattr(Bench, case).__doc__}")
        getattr(bench, case)()
    model = re.search(r"model name\s*:\s*(.*)", pathlib.Path("/proc/cpuinfo").read_text())
    machine = f"{os.cpu_count()} x {model[1] if model else os.uname().machine}"
    print(f"{datetime.date.today()}, {machine}, Linux {os.uname().release}, {options.pairs} rounds\n")
    if len(bench.lines) > 2:
        print("\n".join(bench.lines))
    if bench.latencies:
        print("\n| latency | ours s | in flight allow s | ideal s | ratio |\n|---|---:|---:|---:|---:|")
        print("\n".join(bench.latencies))
    if bench.served:
        print("\n| serve | ours | qemu-nbd | share | target |\n|---|---:|---:|---:|---:|")
        print("\n".join(bench.served))


if __name__ == "__main__":
    main()
