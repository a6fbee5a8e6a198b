"""What a device sends and receives for its norms does not depend on how many devices there are.

Over 8, 16 and 32 devices of this host, in a process of its own, and over 8, 64 and 512 TPU chips
ahead of time where the compiler is installed; nothing runs.
"""

import functools
import json
import subprocess
import sys

import pytest

from normlab.experiments.programs.config import Ledger
from normlab.experiments.programs.ledger import compile_all
from normlab.experiments.programs.machines import missing
from tests.helpers import environment

HERE = (8, 16, 32)
CHIPS = {8: "v5p:2x2x2", 64: "v5p:4x4x4", 512: "v5p:8x8x8"}
WIDTHS = (64, 32)
BATCH = 4


def blocks(size, of, devices):
    """Groups of `size` devices: neighbours, strided, or uneven by one."""
    if of == "strided":
        stride = devices // size
        return [range(i, devices, stride) for i in range(stride)]
    cuts = range(0, devices, 2 * size)
    return [g for i in cuts for g in (range(i, i + size - 1), range(i + size - 1, i + 2 * size))]


def words(groups):
    return "groups=" + "|".join(",".join(map(str, group)) for group in groups)


CASES = {
    "all": lambda d: {"sync": ("all",)},
    "flax": lambda d: {"sync": ("all",), "norms": ("flax",)},
    "groups": lambda d: {"sync": ("groups=4",)},
    "strided": lambda d: {"sync": (words(blocks(4, "strided", d)),)},
    "uneven": lambda d: {"sync": (words(blocks(4, "uneven", d)),)},
    "ring": lambda d: {"sync": ("ring=1",)},
    "virtual": lambda d: {"sync": (f"virtual={2 * BATCH}",)},
    "ghost": lambda d: {"sync": ("ghost=2+groups=8",)},
    "inner": lambda d: {"sync": ("inner",), "mesh": (d // 4, 4)},
    "exchange": lambda d: {"sync": ("all+every=2",), "program": "step"},
}
NAMES = [
    name if name in ("all", "groups") else pytest.param(name, marks=pytest.mark.slow)
    for name in CASES
    if name != "flax"
]


def measure(**options):
    """Of both passes, but for the parameters' gradients and the loss, on each device.

    What runs when needed is counted by itself, under `"rare"`.
    """
    options = {"norms": ("batch",), "program": "both", **options}
    config = Ledger(model="mlp", widths=WIDTHS, per_device=BATCH, **options)
    (account,) = compile_all(config).accounts
    found = {"temporary": account.program.memory["temporary"], "asked": account.asked}
    for key, rare in (("steady", False), ("rare", True)):
        ones = [
            one
            for entry in account.entries
            if entry.when_needed == rare
            and not {p.what for p in entry.purposes} & {"gradients", "loss"}
            for one in entry.collectives
        ]
        found[key] = {
            "count": sum(one.times for one in ones),
            "sent": sum(one.times * one.nbytes for one in ones),
            "received": sum(one.times * one.received for one in ones),
        }
    return found


def measure_here(name):
    """By the number of devices."""
    return [measure(devices=count, **CASES[name](count)) for count in HERE]


@functools.cache
def here(name):
    code = "import json, jax; jax.devices()\nfrom tests.experiments import test_ledger_scale as t\n"
    env = environment()
    env["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={max(HERE)}"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}print(json.dumps(t.measure_here({name!r})))"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@functools.cache
def chips(name, count):
    if command := missing("tpu"):
        pytest.skip(f"no compiler for a TPU; to install it: {command}")
    return measure(topology=(CHIPS[count],), **CASES[name](count))


@pytest.mark.parametrize("name", NAMES)
def test_on_this_host_nothing_grows_with_the_number_of_devices(name):
    first, *more = here(name)
    assert first["steady"]["count"] + first["rare"]["count"] > 0
    for found in more:
        assert (found["steady"], found["rare"]) == (first["steady"], first["rare"])


@pytest.mark.parametrize("name", NAMES)
def test_on_tpus_neither_bytes_nor_temporaries_grow_with_the_number_of_chips(name):
    first, *more = (chips(name, count) for count in CHIPS)
    for found in more:
        assert (found["steady"], found["rare"]) == (first["steady"], first["rare"])
        assert found["temporary"] <= 1.1 * first["temporary"] + 2**17


def test_whole_batches_cost_what_flaxs_cost():
    for ours, flax in zip(here("all"), here("flax"), strict=True):
        cheap_enough(ours["steady"], flax["steady"])


@pytest.mark.parametrize("count", CHIPS)
def test_whole_batches_cost_what_flaxs_cost_on_tpus(count):
    cheap_enough(chips("all", count)["steady"], chips("flax", count)["steady"])


def cheap_enough(ours, flax):
    assert ours["count"] <= flax["count"]
    assert max(ours["sent"], ours["received"]) <= 1.05 * flax["sent"]


@pytest.mark.parametrize("name", ["groups", *NAMES[2:-1]])
def test_nobody_is_asked_for_the_sake_of_a_group(name):
    assert [found["asked"] for found in here(name)] == [""] * len(HERE)
