"""What a plan says in sentences: its heading, outcomes and notes."""

import textwrap
from collections.abc import Mapping

from ml_collections import ConfigDict

from densenet_jax.planning import plans
from densenet_jax.planning.plans import Compilation, Target
from densenet_jax.training import experiment

_NUM_LAYERS_SHOWN = 12


def heading(
    config: ConfigDict,
    planned: experiment.Experiment,
    target: Target,
    remark: str,
) -> str:
    shape = "x".join(map(str, planned.batch["image"].shape[1:]))
    count = len(target.devices)
    lines = [
        f"{config.model.name}, {config.model.dtype}, batch "
        f"{config.batch_size:,} of {shape} images on {target.name}: "
        f"{config.batch_size // count:,} on each of {count:,} "
        f"device{'s' if count > 1 else ''}.",
    ]
    chip = target.chip
    if chip is None:
        lines.append(f"A device's memory: {target.memory / 2**30:,.1f} GiB.")
    else:
        lines.append(
            f"A chip: {chip.peak / 1e12:,.0f} TFLOP/s in bfloat16, "
            f"{chip.bandwidth / 1e9:,.0f} GB/s, {chip.memory >> 30} GiB "
            f"({chip.source})."
        )
    if remark:
        lines.append(remark)
    return "\n".join(map(_fill, lines))


def notes(
    compiled: Mapping[str, Compilation], shown: str, config: ConfigDict
) -> str:
    """What the table of policies has no column for."""
    lines = [
        f"remat={policy} does not fit: {compilation.problem}"
        for policy, compilation in compiled.items()
        if compilation.program is None
    ]
    program = compiled[shown].program
    if program is None:
        return "\n".join(map(_fill, lines))
    if config.accumulate > 1:
        lines.append(
            "The body of a loop counts once in FLOPs, bytes and cycles: it "
            f"runs for each of the {config.accumulate} parts of a batch."
        )
    if program.collective_bytes:
        sizes = ", ".join(
            f"{kind} {size / 1e6:,.2f} MB"
            for kind, size in program.collective_bytes.items()
        )
        lines.append(f"Collectives of a device, remat={shown}: {sizes}.")
    if program.cycles is not None:
        unknown = ", ".join(
            f"{count} {kind}"
            for kind, count in program.without_estimate.items()
        )
        lines.append(f"Operations without an estimate of cycles: {unknown}.")
    lines = list(map(_fill, lines))
    if program.cycles is not None:
        title = f"cycles, remat={shown}"
        table = plans.cycles_table(program, title, _NUM_LAYERS_SHOWN)
        lines += ["", table]
    return "\n".join(lines)


def outcome(compilation: Compilation) -> str:
    """The figures that a plan which is cut short leaves behind."""
    if compilation.program is None:
        return "does not fit"
    figures = [
        f"{compilation.program.temp_bytes / 1e9:.2f} GB temp",
        f"{compilation.program.bytes_accessed / 1e9:.2f} GB moved",
    ]
    if compilation.program.cycles is not None:
        figures.append(f"{compilation.program.cycles / 1e6:.2f} Mcycles")
    return ", ".join(figures)


def _fill(line: str) -> str:
    return textwrap.fill(line, 80, break_long_words=False)
