"""Do the sandbox's verdicts agree with what is known to be right, and does it leave nothing behind?

    EVAL_PLATFORM_DATA=... python -m benchmarks.verify_code [path/to/instruct-eval]

All 164 canonical solutions of HumanEval and all 974 reference solutions of MBPP must pass, through the programs of the
tasks that are shipped, and none may pass with the bodies of its functions removed. 1,000 programs that fork, write and
allocate must leave no process, file, mount or memory behind. Then milliseconds a program, cold and warm. With a
checkout of github.com/declare-lab/instruct-eval its functions that write HumanEval's prompts and cut completions are
run beside ours. Exits with 1 when something is not as it must be.
"""

import ast
import os
import random
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from eval_platform.sandbox import MODES, Mode, Program, Verdict, describe, run_programs
from eval_platform.sandbox.verdict import FIRST_USER
from eval_platform.scoring.filters import extract
from eval_platform.tasks import build_task, catalogue, render
from eval_platform.tasks.documents import as_documents
from eval_platform.tasks.programs import program_text
from eval_platform.tasks.sync import LIBRARY

MOST_MB = 200  # others write to tmpfs meanwhile
UNTIDY = """
import os, threading, time
held = bytearray({n} % 7 << 20)
for name in range({n} % 5):
    with open(f"/tmp/{{name}}", "wb") as file:
        file.write(bytes(1 << 20))
if {n} % 3 == 0 and os.fork() == 0:
    os.setsid()
    time.sleep(600)
if {n} % 4 == 0:
    threading.Thread(target=time.sleep, args=(600,)).start()
assert sum(range({n})) == {n} * ({n} - 1) // 2
"""


def without_bodies(source: str) -> str:
    """The program with `pass` for what every function does."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body = [ast.Pass()]
        elif isinstance(node, ast.Lambda):
            node.body = ast.Constant(None)
    return ast.unparse(tree)


def programs(
    name: str, rows: Sequence[Mapping[str, Any]], completion: Callable[[Mapping[str, Any]], str]
) -> list[Program]:
    """The shipped task's programs for these rows. Time is no matter here (MBPP's 123 needs seconds)."""
    task = build_task(LIBRARY / f"{name}.yaml")
    return [
        Program(program_text(task, document, completion(document.fields)), timeout=60.0)
        for document in as_documents(rows)
    ]


def count(what: str, verdicts: Sequence[Verdict], wanted: int) -> bool:
    """Say how many passed and why the others did not; whether it is as many as wanted."""
    passed = sum(verdict.passed for verdict in verdicts)
    others = dict(Counter(verdict.reason for verdict in verdicts if not verdict.passed))
    print(f"{what}: {passed} of {len(verdicts)} pass (wanted: {wanted}) {others or ''}", flush=True)
    if passed != wanted:
        for n, verdict in enumerate(verdicts):
            if verdict.passed != (wanted > 0):
                print(f"  item {n}: {verdict}")
    return passed == wanted


def left_behind() -> dict[str, Any]:
    """What there is on this machine that a program could have left: a slot's user has whatever is its own."""
    return {
        "processes": sum(_is_a_slots(f"/proc/{process}") for process in filter(str.isdigit, os.listdir("/proc"))),
        "files": sum(
            _is_a_slots(f"{folder}/{name}") or name.startswith("eval-platform-")
            for folder in ("/tmp", "/var/tmp", "/dev/shm")
            for name in os.listdir(folder)
        ),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "shared memory": len(Path("/proc/sysvipc/shm").read_text().splitlines()),
    }


def _is_a_slots(path: str) -> bool:
    try:
        return os.stat(path).st_uid >= FIRST_USER
    except (FileNotFoundError, ProcessLookupError):
        return False


def shared_mb() -> float:
    """Memory in files that lie in memory (tmpfs), mounted anywhere: what a /tmp that stayed would hold."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Shmem:")) / 1024


def leaves_nothing(mode: Mode) -> bool:
    """1,000 untidy programs: as much of everything afterwards as before."""
    before, memory = left_behind(), shared_mb()
    verdicts = run_programs([Program(UNTIDY.format(n=n)) for n in range(1000)], mode)
    passed = sum(verdict.passed for verdict in verdicts)
    time.sleep(1)  # the kernel frees mounts and namespaces a little after their last process
    after, more = left_behind(), shared_mb() - memory
    print(f"1,000 untidy programs, {mode}: {passed} pass; before {before}, after {after}; {more:+.0f} MB in tmpfs")
    return passed == 1000 and before == after and more < MOST_MB  # they wrote 2,000 MB there, and twice


def speed(mode: Mode, few: int = 5, many: int = 55, rounds: int = 5) -> None:
    """Milliseconds a program: one that fails its test, so runs once, and one that passes, so runs twice.

    The difference between many and few leaves out the supervisor's start. Wall clock: the least of the rounds, as a
    machine that does other things makes it only longer. CPU: all processes together.
    """
    for what, text in (("fails", "assert {n} < 0"), ("passes", "assert {n} >= 0")):
        alone = [Program(text.format(n=i)) for i in range(many)]
        walls, cpus = [], []
        for _ in range(rounds):
            (wall_few, cpu_few), (wall_many, cpu_many) = (_timed(alone[:n], mode) for n in (few, many))
            walls.append(1000 * (wall_many - wall_few) / (many - few))
            cpus.append(1000 * (cpu_many - cpu_few) / (many - few))
        print(
            f"{mode}, one at a time, a program that {what}: {min(walls):.1f} ms at best, "
            f"{statistics.median(walls):.1f} in the middle of {rounds} rounds; {statistics.median(cpus):.1f} ms of CPU",
            flush=True,
        )
        slots = len(os.sched_getaffinity(0))
        wall, _ = _timed(alone, mode, slots)
        print(f"{mode}, {slots} at a time, programs that {what}: {many / wall:.0f} a second, start and all", flush=True)


def _timed(alone: Sequence[Program], mode: Mode, slots: int = 1) -> tuple[float, float]:
    """Seconds of wall clock, and of CPU in the processes that are waited for (warm programs have others)."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    run_programs(alone, mode, slots=slots)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def like_instructeval(checkout: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Its prompts, and what it makes of completions: of right ones, badly indented ones and made-up ones."""
    from benchmarks.verify_instructeval import theirs  # reads pandas

    names = ("gen_prompt", "count_indent", "fix_indents", "filter_code")
    code = theirs(checkout, "human_eval/main.py", *names, EvalModel=SimpleNamespace)
    model = SimpleNamespace(model_path="some/model")
    task = build_task(LIBRARY / "humaneval_instructeval.yaml")
    prompts = [item.requests[0].context for item in render(task)]
    same = sum(ours == code["gen_prompt"](row["prompt"], model) for ours, row in zip(prompts, rows, strict=True))
    print(f"INSTRUCTEVAL's prompts: {same} of {len(rows)} are ours")

    random_ = random.Random(0)
    texts = [row["canonical_solution"] for row in rows]
    texts += [text[1:] for text in texts] + [f"\n\n{text}\n\ndef more(): pass" for text in texts]
    texts += ["".join(random_.choices(" \n\tab", k=60)) for _ in range(1000)]
    steps = task.definition.filter_list[0].filter
    ours = [extract(steps, [text])[0].text for text in texts]
    cut = sum(
        mine == code["filter_code"](code["fix_indents"](text), model) for mine, text in zip(ours, texts, strict=True)
    )
    print(f"INSTRUCTEVAL's cuts: {cut} of {len(texts)} completions become what ours become")
    return same == len(rows) and cut == len(texts)


def main(checkout: Path | None) -> int:
    humaneval = catalogue.read("humaneval", "test")
    mbpp = [row for split in ("prompt", "test", "validation", "train") for row in catalogue.read("mbpp", split)]
    fine = checkout is None or like_instructeval(checkout, humaneval)
    for mode in MODES:
        print(describe(mode))
    for mode in ("cold", "warm"):
        started = time.perf_counter()
        right = run_programs(programs("humaneval", humaneval, lambda row: row["canonical_solution"]), mode)
        fine &= count(f"HumanEval, canonical solutions, {mode}", right, len(humaneval))
        fine &= count(
            f"HumanEval, without bodies, {mode}", run_programs(programs("humaneval", humaneval, lambda _: ""), mode), 0
        )
        right = run_programs(programs("mbpp", mbpp, lambda row: row["code"]), mode)
        fine &= count(f"MBPP, reference solutions, {mode}", right, len(mbpp))
        wrong = run_programs(programs("mbpp", mbpp, lambda row: without_bodies(row["code"])), mode)
        fine &= count(f"MBPP, without bodies, {mode}", wrong, 0)
        print(f"{mode}: {time.perf_counter() - started:.0f} s")
        fine &= leaves_nothing(mode)
    for mode in MODES:
        speed(mode)
    print("as it must be" if fine else "NOT as it must be")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
