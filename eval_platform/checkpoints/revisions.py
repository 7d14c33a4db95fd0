"""Which revisions of a repository on the Hugging Face hub are checkpoints, and which of them are new?"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from eval_platform.checkpoints import hub
from eval_platform.checkpoints.description import describe_path
from eval_platform.checkpoints.discovery import Found, with_base
from eval_platform.checkpoints.downloads import fetch
from eval_platform.checkpoints.hashing import Meter, Progress
from eval_platform.checkpoints.identification import identify
from eval_platform.checkpoints.walk import make_key, too_long
from eval_platform.config import S3, Root, hub_address
from eval_platform.errors import CheckpointError, EvalPlatformError
from eval_platform.values import Arrival, Incomplete

_JUDGED_PER_LOOK = 8  # a dozen requests each; a repository may have a thousand revisions


def revisions_of(root: Root) -> list[hub.Revision]:
    """Those of the repository that is `root` which count as checkpoints. Raises as `hub.commit_of`."""
    repository, only = _repository(root.path)
    return hub.recent_revisions(repository, only, root.revisions)


def look(root: Root, known: Mapping[str, str], again: Collection[str], s3: S3) -> Iterator[Found | Incomplete]:
    """New and changed revisions of the repository that is `root`, the highest step first.

    Of what is known, `again` alone is looked at. What the hub refuses is Incomplete and stops nothing else.
    """
    repository, _ = _repository(root.path)
    try:
        revisions = revisions_of(root)
    except EvalPlatformError as error:
        yield Incomplete(root.name, root.path, str(error), refused=error.class_ == "deterministic")
        return
    step = {one.name: describe_path(root.name, one.name, root.pattern).step or 0 for one in revisions}
    left = _JUDGED_PER_LOOK
    for one in sorted(revisions, key=lambda one: (-step[one.name], one.name)):
        key = make_key(root.name, one.name)
        if (key in known and key not in again) or known.get(key) == hub.fingerprint(repository, one.commit):
            continue
        uri = hub.place(repository, one.commit).uri
        if reason := too_long(key):
            yield Incomplete(key, uri, reason, refused=True)
            continue
        is_new = not hub.is_judged(repository, one.commit)
        if not left and is_new:
            yield Incomplete(key, uri, "waits its turn behind other new revisions")
            continue
        left -= is_new
        try:
            yield _judge_revision(root, repository, one, s3)
        except EvalPlatformError as error:
            yield Incomplete(key, uri, str(error), refused=error.class_ == "deterministic")
            if is_new:  # the others may wait for the same, or be refused alike: they have their turn later
                left = 0


def _judge_revision(root: Root, repository: str, revision: hub.Revision, s3: S3) -> Found | Incomplete:
    place = hub.place(repository, revision.commit)
    key = make_key(root.name, revision.name)
    try:
        listing, judged = hub.judge(repository, revision.commit)
        found = with_base(judged, s3)
        if not found.complete:
            # A commit never changes; its base may.
            return Incomplete(key, place.uri, found.reason, refused=not judged.complete or found.refused)
        about = place.describe(listing, root.name, revision.name, root.pattern)
    except OSError as error:
        return Incomplete(key, place.uri, f"cannot be looked at: {error.filename or 'a file'}: {error.strerror}")
    fingerprint = hub.fingerprint(repository, revision.commit)
    tags = {"hub": f"{repository}@{revision.name}", **about.tags}
    return Found(key, place.uri, fingerprint, about.run, about.step, about.tokens_seen, tags)


def _repository(path: str) -> tuple[str, str | None]:
    address = hub_address(path)
    if address is None:
        raise CheckpointError(f"{path} is no address on the hub", remedy="write hf://org/model@revision")
    return address


def locate_revision(named: str, roots: Sequence[Root], cache: Path, progress: Progress, s3: S3) -> Found:
    """As `discovery.locate`, of hf://org/model@revision or org/model@revision; main where no revision is named."""
    repository, revision = _repository(named if named.startswith("hf://") else f"hf://{named}")
    revision = revision or "main"
    one = hub.Revision(revision, hub.commit_of(repository, revision))
    around = [root for root in roots if hub_address(root.path) in ((repository, None), (repository, revision))]
    root = next(
        (root for root in around if hub.is_wanted(revision, root.revisions)),
        Root(name="adhoc", path=f"hf://{repository}"),
    )
    judged = _judge_revision(root, repository, one, s3)
    if isinstance(judged, Incomplete):
        raise CheckpointError(f"hf://{repository}@{revision} is no checkpoint to evaluate: {judged.reason}")
    if root.name != "adhoc":
        return judged
    arrival = Arrival(judged.key, 1, judged.fingerprint, judged.uri, judged.run)
    folder, descriptor = fetch(arrival, cache, s3, lambda total: Meter(progress, total))
    try:
        identity = identify(folder, cache, lambda done, total: None, s3, judged.uri)
    finally:
        os.close(descriptor)
    name = repository.rpartition("/")[2]
    run = name if judged.run == "adhoc" else judged.run
    return replace(judged, key=make_key("adhoc", f"{name}-{identity.checkpoint_id[:8]}"), run=run)
