"""What the fuzzing scripts share: changes at random, and a watch over what reads the results."""

import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = 5
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


def mutated(data: bytes, pieces: tuple[bytes, ...], rng: random.Random) -> bytes:
    """`data` with one to four changes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at : at + rng.randint(0, 8)] = rng.choice(pieces) if pieces else b""
            case 2:
                number = rng.choice(NUMBERS).to_bytes(8, "little")[: rng.choice((1, 2, 4, 8))]
                changed[at : at + len(number)] = number
            case 3:
                del changed[at : at + rng.randint(1, 64)]
            case 4:
                start = rng.randrange(len(changed) + 1)
                changed[at:at] = changed[start : start + rng.randint(1, 64)]
            case 5 if rng.random() < 0.2:
                del changed[at:]
    return bytes(changed)


def fuzz(
    kind: str,
    make: Callable[[random.Random], bytes],
    read: Callable[[Path], object],
    refusal: type[Exception],
    count: int,
    seed: int,
) -> list[str]:
    """Reads `count` files; what went wrong with which.

    `read` may raise `refusal`. All else is wrong: another exception, more than `SECONDS`, an
    import, a file made.
    """
    signal.signal(signal.SIGALRM, _too_long)
    failures, opened, slowest = [], 0, 0.0
    for i in range(count):
        content = make(random.Random(f"{kind} {seed} {i}"))
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            path = Path(folder) / "case"
            path.write_bytes(content)
            modules = set(sys.modules)
            start = time.monotonic()
            signal.alarm(SECONDS)
            try:
                read(path)
                opened += 1
            except refusal:
                pass
            except Exception as error:
                failures.append(f"{kind} {i}: {type(error).__name__}: {error}")
            finally:
                signal.alarm(0)
            took = time.monotonic() - start
            slowest = max(slowest, took)
            if took > SECONDS:  # also if what was read took the alarm for an error of its own
                failures.append(f"{kind} {i}: took {took:.1f} s")
            if new := set(sys.modules) - modules:
                failures.append(f"{kind} {i}: imported {sorted(new)}")
            if os.listdir(folder) != ["case"]:
                failures.append(f"{kind} {i}: made {os.listdir(folder)}")
            os.chdir("/")
    print(f"{kind}: {count} files, {opened} opened, slowest {slowest:.2f} s, "
          f"{len(failures)} failures")  # fmt: skip
    return failures


def finish(failures: list[str], memory_before: int, megabytes: int) -> None:
    """Reports memory and failures, and exits: with 1 if there were any.

    Args:
        failures: what went wrong.
        memory_before: `most_memory()` before the first case.
        megabytes: how much more there may be since.
    """
    grown = most_memory() - memory_before
    print(f"memory: {grown} MB more")
    if grown > megabytes:
        failures.append(f"{grown} MB more than before")
    print("\n".join(failures[:20]))
    sys.exit(bool(failures))


def most_memory() -> int:
    """The most that this process has ever had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")
