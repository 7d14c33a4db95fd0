"""The commands that keep a results root: verify, rebuild, prune, export, both imports; thin calls into `keeping`."""

import getpass
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eval_platform.cli_shared import EXIT_FAILED, AsJson, example, opened
from eval_platform.errors import ConfigError
from eval_platform.store import Store, open_store

if TYPE_CHECKING:
    from eval_platform.config import Config
    from eval_platform.keeping import Moved

store_app = typer.Typer()


@store_app.command(epilog=example("eval-platform verify"))
def verify(as_json: AsJson = False) -> None:
    """Read every file of the results and the catalog's every row, and say what is lost, altered or left over.

    Changes nothing. Ends with 1 when something is damaged; leftovers (of a kill, or of work under way) are harmless.
    """
    from eval_platform import keeping
    from eval_platform.terminal import print_json, print_verified, steps

    config, store = opened()
    with steps() as step:
        found = keeping.verify(store, config.catalog_path, step)
    if as_json:
        told = [asdict(finding) for finding in found.findings]
        print_json({"ok": found.ok, "files": found.files, "bytes": found.n_bytes, "findings": told})
    else:
        print_verified(found)
    if not found.ok:
        raise typer.Exit(EXIT_FAILED)


@store_app.command(epilog=example("eval-platform rebuild"))
def rebuild(as_json: AsJson = False) -> None:
    """Make the catalog, and the log entries that are missing, again from the files alone.

    For a catalog that says something else than `verify`, a log that was lost, files that came by another way.
    """
    from eval_platform import keeping
    from eval_platform.terminal import print_json, say, steps

    config, store = opened()
    with steps() as step:
        announced = keeping.rebuild(store, config.catalog_path, step)
    if as_json:
        print_json({"catalog": str(config.catalog_path), "announced": announced})
    else:
        say(f"{config.catalog_path} is built anew from {config.results}; {announced} missing log entries were written")


@store_app.command(epilog=example("eval-platform compact"))
def compact(as_json: AsJson = False) -> None:
    """Copy the small records of results in a bucket into few objects, so that a new machine reads them in seconds.

    Nothing is removed and nothing reads differently; results in a folder gain nothing. Dagster does it every night.
    """
    from eval_platform.store.bundles import bundle
    from eval_platform.terminal import print_json, say

    config, store = opened()
    bundled = 0 if store.requests_at_once == 1 else bundle(store)
    if as_json:
        print_json({"root": config.results, "bundled": bundled})
    elif store.requests_at_once == 1:
        say(f"{config.results} is a folder: its records are read as they are")
    else:
        say(f"{bundled} records of {config.results} were bundled")


@store_app.command(epilog=example("eval-platform prune --keep-last 3 --keep-every 10000 --keep-best gsm8k_50"))
def prune(
    keep_last: Annotated[int | None, typer.Option(min=1, metavar="N", help="The N newest steps of each run.")] = None,
    keep_every: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Every step that K divides, and checkpoints without a step.")
    ] = None,
    keep_best: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK[:METRIC]", help="Of each run the checkpoint with the best published value."),
    ] = None,
    published_only: Annotated[
        bool, typer.Option("--published-only", help="Of what the other rules keep, only what stands published.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this it is only shown.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove the samples (every prompt's answer) of evaluations that no rule keeps. Shows what it would do first.

    Scores, decisions and boards stay, and nothing pruned is ever asked again; but its answers can no longer be looked
    at, rechecked or scored anew. A checkpoint is kept when any rule names it. What is not decided yet is kept.
    """
    from eval_platform import keeping
    from eval_platform.terminal import print_chosen, print_json, say, steps

    config, store = opened()
    keep = keeping.Keep(keep_last, keep_every, tuple(keep_best or ()), published_only)
    chosen = keeping.choose(store, config.catalog_path, keep)
    if yes:
        with steps() as step:
            keeping.prune(store, chosen.prune, actor=getpass.getuser(), rule=str(keep), step=step)
        _refresh(config, store)
    if as_json:
        told = [asdict(one) for one in chosen.prune]
        print_json({"done": yes, "kept": chosen.kept, "bytes": chosen.n_bytes, "pruned": told})
        return
    print_chosen(chosen, done=yes)
    if chosen.prune and not yes:
        say("nothing is removed yet; the same command with --yes does it")


@store_app.command("export", epilog=example("eval-platform export s3://evals/team"))
def export(
    target: Annotated[str, typer.Argument(help="Another results root: a folder, or s3://bucket/prefix.")],
    as_json: AsJson = False,
) -> None:
    """Copy these results into another root, beside what it has: tasks, checkpoints' records, evaluations, decisions.

    What is there is not copied again, and stands. Ends with 1 when something was not taken over; it says what and why.
    """
    config, store = opened()
    moved = _transfer(store, _other(config, target))
    _tell(moved, store.uri, target, as_json)


@store_app.command("import", epilog=example("eval-platform import ../laptop/results"))
def import_(
    source: Annotated[str, typer.Argument(help="Another results root: a folder, or s3://bucket/prefix.")],
    as_json: AsJson = False,
) -> None:
    """Copy another root's results into these, as `export` does the other way round."""
    config, store = opened()
    moved = _transfer(_other(config, source), store)
    _refresh(config, store)
    _tell(moved, source, store.uri, as_json)


@store_app.command("import-lm-eval", epilog=example("eval-platform import-lm-eval ../lm_eval_results --run pythia"))
def import_lm_eval(
    source: Annotated[Path, typer.Argument(help="What lm-eval's --output_path named, or one results_<time>.json.")],
    run: Annotated[str | None, typer.Option(help="The run of all these models; else as their paths say.")] = None,
    step: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="The step of all these models; else as their paths say.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take over results of lm-evaluation-harness 0.4: scores, standard errors and, where they were logged, samples.

    They stand beside the platform's own, marked as imported (`kind` on boards, `evaluations.origin`), as tasks of
    their own (`arc_easy@lm-eval`), and are never taken for an answer to one of ours. The gate looks at the numbers:
    what is NaN, or not what its samples say, is held. Importing a file again adds nothing. Groups are left out, their
    tasks are not. Ends with 1 when something could not be read; the rest is taken over.
    """
    from eval_platform import keeping
    from eval_platform.terminal import print_json, print_taken_over, steps

    config, store = opened()
    with steps() as progress:
        done = keeping.take_over(
            store,
            config.catalog_path,
            source.resolve(),
            roots=config.checkpoints,
            run=run,
            step=step,
            actor=getpass.getuser(),
            progress=progress,
        )
    _refresh(config, store)
    if as_json:
        print_json({"ok": done.ok, "source": str(source), "told": [asdict(one) for one in done.told]})
    else:
        print_taken_over(done, str(source))
    if not done.ok:
        raise typer.Exit(EXIT_FAILED)


def _transfer(source: Store, target: Store) -> "Moved":
    from eval_platform import keeping
    from eval_platform.terminal import steps

    with steps() as step:
        return keeping.transfer(source, target, step)


def _tell(moved: "Moved", source: str, target: str, as_json: bool) -> None:
    from eval_platform.terminal import print_json, print_moved

    if as_json:
        print_json({"ok": moved.ok, "source": source, "target": target, **asdict(moved)})
    else:
        print_moved(moved, source, target)
    if not moved.ok:
        raise typer.Exit(EXIT_FAILED)


def _other(config: "Config", root: str) -> Store:
    """The root that a person named; a folder is looked for from where they stand."""
    if not root.strip():
        raise ConfigError("no results root was named", remedy="give a folder, or s3://bucket/prefix")
    return open_store(root if "://" in root else str(Path(root).resolve()), config.s3)


def _refresh(config: "Config", store: Store) -> None:
    from eval_platform import warehouse

    warehouse.refresh(store, config.catalog_path)
