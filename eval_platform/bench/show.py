"""How does a report of the bench look in a terminal?"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from eval_platform.bench import processes
from eval_platform.bench.agreement import Agreement, equal_answers
from eval_platform.bench.processes import Measured, Rates
from eval_platform.bench.report import MachineReport, Report
from eval_platform.terminal import err, print_rows, say

Step = Callable[[str], None]


@contextmanager
def progress() -> Iterator[tuple[Step, processes.Progress]]:
    """(call with what comes next, call with how much of it is done). Shown where standard error is a terminal."""
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    ) as bars:
        bar = bars.add_task("reading the requests", total=None)

        def step(text: str) -> None:
            bars.reset(bar, total=None, description=text)

        def done(count: int, total: int) -> None:
            bars.update(bar, completed=count, total=total)

        yield step, done


def print_machine(report: MachineReport) -> None:
    """Rates by dtype."""
    say(f"{report.processor}, {report.device}, {report.threads} threads")
    rows = [(dtype, *_rates(rates)) for dtype, rates in report.rates.items()]
    print_rows(("dtype", "matrix GFLOP/s", "memory GB/s", "best kernel"), rows, right=(1, 2))


def print_report(report: Report) -> None:
    """Machine, work, floor, and a line for each side."""
    work, decoding = report.work, report.decoding
    matrix, memory, kernels = _rates(report.rates)
    say(f"{report.processor}, {report.device}, {report.threads} threads, {report.dtype}")
    say(f"machine   {matrix} GFLOP/s at this model's shapes ({kernels}), memory {memory} GB/s")
    layers, head = report.layer_weights / 1e6, report.head_weights / 1e6
    say(f"model     {layers:.1f} M weights in its layers, {head:.1f} M in its head")
    say(
        f"work      {report.requests:,} requests, {work.input_tokens:,} tokens, {work.unique_tokens:,} of them unique; "
        f"{work.head_rows:,} rows of the head"
    )
    told = f"floor     {_seconds(report.floor_prefill)}"
    if decoding.tokens:
        told += f" and {_seconds(report.floor_decode)} for {decoding.tokens:,} tokens drawn"
    say(told)
    rows = [("ours", *_side(report.ours), f"{report.fraction:.0%}", "1.00")]
    if report.theirs is not None:
        floor = report.floor_prefill + report.floor_decode
        fraction = floor / report.theirs.seconds
        ratio = report.theirs.seconds / report.ours.seconds
        name = f"lm-eval, batch {report.theirs.batch_size}"
        rows.append((name, *_side(report.theirs), f"{fraction:.0%}", f"{ratio:.2f}"))
    print_rows(("engine", "path", "seconds", "memory MB", "of the floor", "ratio"), rows, right=(2, 3, 4, 5))
    if report.agreement is not None:
        say(f"answers   {agreement_text(report.agreement)}")
    else:
        say("lm-eval is not installed: `pip install 'eval-platform[lm-eval]'` sets it beside")


def agreement_text(found: Agreement) -> str:
    """The agreement in a line."""
    parts = []
    if found.worst is not None:
        parts.append(f"log-likelihoods differ by at most {found.largest:.1e} ({found.worst:.2f} of the tolerance)")
    return ", ".join([*parts, *equal_answers(found)])


def _rates(rates: Rates) -> tuple[str, str, str]:
    kernels = ", ".join(dict.fromkeys(rates.kernels.values()))
    return f"{rates.matrix / 1e9:,.0f}", f"{rates.memory / 1e9:,.1f}", kernels


def _side(measured: Measured) -> tuple[str, str, str]:
    return measured.engine_path, f"{measured.seconds:.2f}", f"{measured.extra_bytes / 2**20:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1e3:.2g} ms"
