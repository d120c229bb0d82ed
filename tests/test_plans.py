import dataclasses

import pytest

from densenet_jax.planning import plans
from densenet_jax.planning.chips import Chip
from densenet_jax.planning.compiled import Program

PROGRAM = Program(
    argument_bytes=2_000_000,
    output_bytes=1_500_000,
    alias_bytes=1_500_000,
    temp_bytes=5_500_000,
    code_bytes=500_000,
    flops=3e9,
    bytes_accessed=4e6,
    cycles=4_000_000,
    layer_cycles={"a": 2_500_000, "b": 1_000_000, "c": 400_000, "d": 100_000},
    without_estimate={"copy": 2},
    collective_bytes={},
)
CHIP = Chip(1e12, 1e9, 10_000_000, ("1x1",), "a page")
TARGET = plans.Target("v0:1x1", [None] * 4, CHIP.memory, CHIP)


def test_the_slower_of_arithmetic_and_memory_sets_the_time():
    assert plans.least_seconds(PROGRAM, CHIP) == (pytest.approx(4e-3), "bytes")
    fast = dataclasses.replace(CHIP, bandwidth=2e9)
    assert plans.least_seconds(PROGRAM, fast) == (pytest.approx(3e-3), "FLOPs")


def test_a_program_fits_up_to_the_last_byte():
    assert plans.Compilation(PROGRAM, None, 1.0).fits(
        dataclasses.replace(TARGET, memory=8_000_000)
    )
    assert not plans.Compilation(PROGRAM, None, 1.0).fits(
        dataclasses.replace(TARGET, memory=7_999_999)
    )
    assert not plans.Compilation(None, "Ran out of memory", 1.0).fits(TARGET)


@pytest.mark.parametrize("start", [8, 24, 104])
@pytest.mark.parametrize("most", [0, 7, 8, 9, 100, 104, 999, 5000])
def test_the_largest_batch_is_found_with_few_attempts(start, most):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= most

    found = plans.largest_that_fits(fits, start=start, unit=8, limit=1000)
    assert found == min(most // 8 * 8, 1000)
    assert all(size % 8 == 0 for size in tried)
    assert len(tried) == len(set(tried)) <= 15


def test_a_start_beyond_the_limit_is_tried():
    found = plans.largest_that_fits(
        lambda size: True, start=16, unit=8, limit=9
    )
    assert found == 16


def test_policies_are_a_line_each():
    compiled = {
        "none": plans.Compilation(None, "Ran out of memory", 8.4),
        "layer": plans.Compilation(PROGRAM, None, 1234.5),
    }
    header, _, none, block = plans.policy_table(compiled, TARGET).splitlines()
    cells = [
        ("remat", "none", "layer"),
        ("temp MB", "-", "5.50"),
        ("total MB", "-", "8.00"),
        ("of memory", "-", "80.0%"),
        ("GFLOP", "-", "3.00"),
        ("moved MB", "-", "4.00"),
        ("FLOP/B", "-", "750.0"),
        ("Mcycles", "-", "4.00"),
        ("least ms by", "-", "4.00 bytes"),
        ("compile s", "8", "1,234"),
    ]
    for line, column in zip((header, none, block), zip(*cells)):
        assert line.split() == " ".join(column).split()
    assert len(header) <= 100


def test_the_cycles_beyond_the_first_are_summed():
    table = plans.cycles_table(PROGRAM, "cycles", num_lines=2)
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["a", "2.50", "62.5%"],
        ["b", "1.00", "25.0%"],
        ["the", "rest", "0.50", "12.5%"],
    ]


@pytest.mark.parametrize(
    ("values", "unit", "expected"),
    [
        ([1.5e6, 2e5], "B", ("MB", ["1.50", "0.20"])),
        ([123e9], "FLOP", ("GFLOP", ["123.0"])),
        ([0.0794, 0.001], "s", ("ms", ["79.40", "1.00"])),
        ([0], "B", ("B", ["0.00"])),
        ([], "B", ("B", [])),
    ],
)
def test_columns_are_scaled(values, unit, expected):
    assert plans.scaled(values, unit) == expected
