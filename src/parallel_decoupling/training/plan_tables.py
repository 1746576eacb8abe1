"""The tables of ``lightning plan``. The numbers are in ``training.plan``."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from parallel_decoupling.training.plan import (
    CANDIDATE_IMAGES,
    PEAK_FLOPS,
    QUERY_IMAGES,
    USABLE,
    UTILISATION,
    Plan,
)

GIB = 2**30


def plan_tables(plan: Plan) -> list[Table]:
    """Batch arithmetic, parameters, memory of one GPU, and the work, one table each."""
    return [_batch(plan), _parameters(plan), _memory(plan), _work(plan)]


def _batch(plan: Plan) -> Table:
    table = Table("quantity", "value", title="Batch arithmetic")
    layout, model = plan.layout, plan.model
    processes, queries, candidates = layout.processes, plan.queries, plan.candidates
    strategy = {"single": "one process", "ddp": "DDP", "fsdp2": "FSDP2"}[layout.strategy]
    table.add_row("layout", f"{strategy}: {layout.nodes} node(s) x {layout.devices} device(s)")
    table.add_row("global batch", f"{queries} pairs, {queries // processes} per process")
    table.add_row("negatives per query", f"{candidates - 1} (gathered from all processes)")
    for side, rows in (("query", queries), ("candidate", candidates)):
        rows, chunk = rows // processes, model[f"{side}_chunk_size"]
        text = (
            f"{rows} rows at once"
            if chunk is None
            else f"{-(-rows // chunk)} chunks of {min(chunk, rows)} rows"
        )
        table.add_row(f"{side} forward passes", f"{text}, x {model['num_paths']} paths in the language model")
    table.add_row("batches per main step", str(plan.accumulate))
    return table


def _parameters(plan: Plan) -> Table:
    table = Table("group", "parameters", "GiB", "trains", title="Parameters")
    for group in plan.parameters:
        trains = ("yes" if group.trains else "no") + (", sharded" if group.sharded else "")
        table.add_row(group.name, f"{group.count:,}", f"{group.num_bytes / GIB:.2f}", trains)
    total = sum(group.count for group in plan.parameters if group.trains)
    table.add_row("all that train", f"{total:,}", "", "")
    return table


def _memory(plan: Plan) -> Table:
    gib = plan.gpu_memory_gib
    table = Table("part", "GiB", title=f"Memory of one GPU of {gib:g} GiB (floor)")
    for name, size in plan.memory.items():
        if size:
            table.add_row(name, f"{size / GIB:.2f}")
    table.add_row("at the worst moment", f"{plan.peak / GIB:.2f}")
    verdict = (
        f"yes: at most {USABLE:.0%} of it"
        if plan.fits
        else f"no: more than {USABLE:.0%} of it; {_advice(plan)}"
    )
    table.add_row("fits", verdict)
    return table


def _advice(plan: Plan) -> str:
    """The setting that would save most."""
    largest = max(plan.memory, key=lambda name: plan.memory[name])
    if largest == "activations":
        if not plan.model["gradient_checkpointing"]:
            return "set model.gradient_checkpointing=true"
        return "lower model.query_chunk_size and model.candidate_chunk_size, or the image size"
    if largest.startswith("weights") and plan.layout.strategy != "fsdp2":
        return "shard the weights with trainer.strategy=fsdp2"
    if largest.startswith("pixels"):
        return "use more processes, smaller images or a smaller data.batch_size"
    if largest == "estimator":
        return "use fewer paths or a smaller data.batch_size"
    return "use more processes with trainer.strategy=fsdp2"


def _work(plan: Plan) -> Table:
    table = Table("quantity", "value", title="Work")
    for name, value in _work_rows(plan):
        table.add_row(name, value)
    return table


def _work_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    yield (
        "assumed",
        f"{plan.text_tokens} text tokens per input, {plan.image.tokens} per image; "
        f"{QUERY_IMAGES:.0%} of queries and {CANDIDATE_IMAGES:.0%} of candidates have one",
    )
    yield "tokens per main step", f"{plan.tokens * plan.accumulate:,.0f}"
    passes = plan.token_passes * plan.accumulate
    yield "token passes per main step", f"{passes:,.0f} ({plan.paths_per_layer:g} paths)"
    yield "floating-point operations per main step", f"{plan.flops:.3g}"
    yield (
        f"seconds per main step, H100 at {UTILISATION:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s",
        f"{plan.seconds:,.1f}",
    )
    if plan.steps is not None:
        hours = plan.steps * plan.seconds / 3600
        yield (
            "main steps of the run",
            f"{plan.steps:,} ({plan.steps * plan.accumulate * plan.queries:,} pairs)",
        )
        yield (
            "hours of the run",
            f"{hours:.1f} on {plan.layout.processes} GPUs, {hours * plan.layout.processes:.0f} GPU-hours",
        )
