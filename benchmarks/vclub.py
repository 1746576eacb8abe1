"""vCLUB: cost of its two forms, and of all kinds. Bias and variance are in ``studies.estimators``.

``python -m benchmarks.vclub`` prints a table of the forms; with ``--kinds`` instead what every ``mi.kind``
costs in a training step: its fit, value and gradient on both sides, as a ratio to ``vclub``.

Cost: the closed form, O(B D), against all B * B negatives, O(B^2 D). Both forms run in one process, forward
and backward, taking turns within every repetition; the table shows medians. Seconds depend on the machine;
the element counts (what every torch operation of a forward and backward pass wrote) do not. The network that
predicts mean and log-variance is left out: both forms need the same one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel_decoupling.objective.vclub import Kind, MutualInformation, vclub_bound
from parallel_decoupling.training.optimization import MIConfig
from parallel_decoupling.training.terms import GatheredPairs, estimator_nll, mutual_information_terms

Bound = Callable[[Tensor, Tensor, Tensor], Tensor]


def quadratic_vclub(target: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """The bound as written, vectorised over all pairs of rows: ``[M, B, D]`` each, returns ``[M]``."""
    precision = (-log_variance).exp()
    positive_MBD = -0.5 * (target - mean).square() * precision
    negative_MBCD = -0.5 * (target.unsqueeze(1) - mean.unsqueeze(2)).square() * precision.unsqueeze(2)
    return (positive_MBD - negative_MBCD.mean(dim=2)).mean(dim=(1, 2))


class ElementCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the elements that torch operations write while it is active; views count nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and add the size of its outputs."""
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            outputs = result if isinstance(result, tuple | list) else (result,)
            self.elements += sum(output.numel() for output in outputs if isinstance(output, Tensor))
        return result


def inputs(num_pairs: int, batch_size: int, embed_dim: int) -> list[Tensor]:
    """Seeded target, mean and log-variance, each ``[M, B, D]`` with gradient."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_pairs, batch_size, embed_dim)
    return [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]


def step(bound: Bound, arguments: list[Tensor]) -> Tensor:
    """One forward and backward pass; the value."""
    value = bound(*arguments)
    torch.autograd.grad(value.sum(), arguments)
    return value.detach()


def count_elements(bound: Bound, num_pairs: int, batch_size: int, embed_dim: int) -> int:
    """Elements written in one forward and backward pass."""
    arguments = inputs(num_pairs, batch_size, embed_dim)
    counter = ElementCounter()
    with counter:
        step(bound, arguments)
    return counter.elements


def seconds(bounds: Sequence[Bound], arguments: list[Tensor], repetitions: int) -> list[float]:
    """Median time of each form; the forms alternate, after one round that is not measured."""
    times: list[list[float]] = [[] for _ in bounds]
    for _ in range(repetitions + 1):
        for bound, measured in zip(bounds, times, strict=True):
            start = time.perf_counter()
            step(bound, arguments)
            measured.append(time.perf_counter() - start)
    return [statistics.median(measured[1:]) for measured in times]


def print_costs(args: argparse.Namespace) -> None:
    """Print time and element counts of both forms over B."""
    where = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"M = {args.num_pairs}, D = {args.embed_dim}, float32, median of {args.repetitions}, {where}")
    print(f"{'B':>5} {'closed ms':>10} {'quadratic ms':>13} {'time ratio':>11}", end=" ")
    print(f"{'closed elements':>16} {'quadratic elements':>19} {'count ratio':>12} {'max difference':>15}")
    forms = (vclub_bound, quadratic_vclub)
    for batch_size in args.batch_sizes:
        size = (args.num_pairs, batch_size, args.embed_dim)
        arguments = inputs(*size)
        closed_s, quadratic_s = seconds(forms, arguments, args.repetitions)
        closed_count, quadratic_count = (count_elements(form, *size) for form in forms)
        difference = (step(vclub_bound, arguments) - step(quadratic_vclub, arguments)).abs().max().item()
        print(f"{batch_size:>5} {1e3 * closed_s:>10.3f} {1e3 * quadratic_s:>13.3f}", end=" ")
        print(f"{quadratic_s / closed_s:>11.1f} {closed_count:>16,} {quadratic_count:>19,}", end=" ")
        print(f"{quadratic_count / closed_count:>12.1f} {difference:>15.1e}")


def kind_seconds(
    num_paths: int,
    batch_size: int,
    embed_dim: int,
    repetitions: int,
    device: str = "cpu",
    kinds: Sequence[Kind] = tuple(kind for kind in get_args(Kind) if kind != "none"),
) -> dict[str, float]:
    """Median time of kinds in a training step: fits of q, its NLL, the term and its gradient."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.randn(2, batch_size, num_paths, embed_dim, generator=generator).to(device)
    query, candidate = (each.requires_grad_() for each in torch.nn.functional.normalize(sides, dim=-1))
    rows = torch.arange(batch_size, device=device)
    pairs = GatheredPairs(query, candidate, query[:, :1], candidate[:, :1], rows[:, None], rows)
    options = {"num_paths": num_paths, "embed_dim": embed_dim}
    estimators = {kind: MutualInformation(kind, **options).to(device) for kind in kinds}

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(repetitions + 1):
        for kind, estimator in estimators.items():
            start = now()
            for _ in range(MIConfig().fit_steps * estimator.needs_fit):
                torch.autograd.backward(estimator_nll(estimator, pairs))
            estimator_nll(estimator, pairs.detach())
            torch.autograd.grad(mutual_information_terms(estimator, pairs).sum(), (query, candidate))
            times[kind].append(now() - start)
    return {kind: statistics.median(measured[1:]) for kind, measured in times.items()}


def print_kinds(args: argparse.Namespace) -> None:
    """Print the ratio of every kind's time to that of ``vclub`` over B."""
    print(f"N = {args.num_paths}, D = {args.embed_dim}, ratio of a step's estimator to vclub's")
    for batch_size in args.batch_sizes:
        seconds_of = kind_seconds(args.num_paths, batch_size, args.embed_dim, args.repetitions)
        ratios = (f"{kind} {each / seconds_of['vclub']:.2f}" for kind, each in seconds_of.items())
        print(f"B = {batch_size}, vclub {1e3 * seconds_of['vclub']:.1f} ms: {', '.join(ratios)}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512])
    parser.add_argument("--embed_dim", type=int, default=64)
    parser.add_argument("--num_pairs", type=int, default=1)
    parser.add_argument("--num_paths", type=int, default=3, help="of the kinds")
    parser.add_argument("--kinds", action="store_true", help="print the costs of all kinds instead")
    parser.add_argument("--repetitions", type=int, default=15)
    args = parser.parse_args()
    if args.kinds:
        print_kinds(args)
    else:
        print_costs(args)


if __name__ == "__main__":
    main()
