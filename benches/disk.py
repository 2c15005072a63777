"""The disks all benchmarks copy: 4 GiB, half of it holes, a quarter noise, a quarter text.

Noise cannot be compressed; text is log lines (about fivefold with zstd level 1) or numbered lines
(about eightfold: every line of one form, as a program writes them); data lies in pieces of 32 MiB so
that holes and data alternate as on a file system that is half full. The same every time.
"""

import random
import sys

MIB = 1 << 20
SIZE = 4096 * MIB
PIECE = 32 * MIB


def log(rng, size):
    """Log lines: a few hundred kinds of message with times, names and numbers in them."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 10))) for _ in range(800)]
    kinds = [" ".join(rng.choices(words, k=rng.randint(4, 12))) for _ in range(300)]
    daemons = rng.choices(words, k=30)
    lines, length, second = [], 0, 0
    while length < size:
        second += rng.random() < 0.3
        clock = f"{second // 3600 % 24:02}:{second // 60 % 60:02}:{second % 60:02}"
        text = rng.choices(kinds, weights=[1 / (rank + 1) for rank in range(300)])[0]
        line = f"Nov 21 {clock} node{rng.randrange(8)} {rng.choice(daemons)}[{rng.randrange(30000)}]: " \
               f"{text} id={rng.randrange(1 << 32):x} took {rng.randrange(5000)} ms\n"
        lines.append(line)
        length += len(line)
    return "".join(lines).encode()[:size]


def numbered(rng, size):
    """Numbered lines of one form with a random value each."""
    lines, length = [], 0
    while length < size:
        line = f"line {len(lines) + 1} of the text that is written to the disk, value {rng.randrange(1 << 30)}\n"
        lines.append(line)
        length += len(line)
    return "".join(lines).encode()[:size]


TEXTS = {"log": log, "numbered": numbered}


def make(path, kind):
    """Writes the disk whose text is of this kind to `path` as a sparse raw image."""
    rng = random.Random(20261121)
    text = TEXTS[kind](rng, PIECE)
    with open(path, "wb") as disk:
        disk.truncate(SIZE)
        for index, offset in enumerate(range(0, SIZE, 2 * PIECE)):
            disk.seek(offset)
            if index % 2 == 0:
                disk.write(rng.randbytes(PIECE))
                continue
            # Rotated and stamped every 4 KiB: text that repeats must not become dedup.
            cut = rng.randrange(PIECE)
            piece = bytearray(text[cut:] + text[:cut])
            for block in range(0, PIECE, 4096):
                piece[block:block + 16] = b"%016d" % (offset + block)
            disk.write(piece)


def scattered(share, block, seed):
    """Offsets of blocks that together are `share` of the disk, in order, none twice."""
    count = int(SIZE * share) // block
    return sorted(random.Random(seed).sample(range(0, SIZE, block), count))


if __name__ == "__main__":
    make(*sys.argv[1:])
