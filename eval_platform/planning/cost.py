"""What will a task cost on a model? From what it took before, else from tokens, parameters and a measured rate.

Seconds are of one worker, whatever devices it has; loading is counted apart. Pure functions, of what `history` reads.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from eval_platform.tasks import Size

# Two models of one size: their parameters differ by less than this share.
_SAME_SIZE = 0.01
# Two counts of one model, by its files and when it was loaded: tied weights may be saved twice. Other models of a
# folder differ by more.
_SAME_MODEL = 0.3


@dataclass(frozen=True, slots=True)
class Past:
    """What an evaluation took, as often as it was asked in whole by one worker.

    seconds: without loading. computed_tokens: positions that went through the model, generated_tokens of them drawn one
    after another; None where nobody counted them. load_seconds: None where an older release did not tell it, 0 where
    the model was loaded already. is_here: on the kind of device that is used for the run. characters: of what was
    asked, None where an older release did not tell it.
    """

    run: str
    task_id: str
    n_parameters: int | None
    seconds: float
    answer_seconds: float
    load_seconds: float | None = None
    computed_tokens: float | None = None
    generated_tokens: float | None = None
    is_here: bool = True
    requests: float | None = None
    characters: float | None = None

    @property
    def is_counted(self) -> bool:
        return None not in (self.computed_tokens, self.generated_tokens, self.n_parameters)


@dataclass(frozen=True, slots=True)
class Rate:
    """Parameters times tokens per second: of tokens computed together, and of those drawn one after another."""

    prefill: float | None
    decode: float | None


def answer_seconds(prompt_tokens: float, generated_tokens: float, n_parameters: int, rate: Rate) -> float | None:
    """Seconds inside the engine; None where a rate that it takes was never measured."""
    if (prompt_tokens and rate.prefill is None) or (generated_tokens and rate.decode is None):
        return None
    prefill = prompt_tokens / rate.prefill if rate.prefill else 0.0
    decode = generated_tokens / rate.decode if rate.decode else 0.0
    return n_parameters * (prefill + decode)


def rate(known: Iterable[Past]) -> Rate:
    """What was measured: the medians, of prefill where nothing was drawn, of decoding where that is what is left."""
    counted = [one for one in known if one.is_counted and one.answer_seconds > 0]
    prefill = _median(_work(one) / one.answer_seconds for one in counted if not one.generated_tokens)
    decode = None
    if prefill:
        left = [(one, one.answer_seconds - _prompt_work(one) / prefill) for one in counted if one.generated_tokens]
        decode = _median((_work(one) - _prompt_work(one)) / seconds for one, seconds in left if seconds > 0)
    return Rate(prefill or None, decode or None)


def task_seconds(task_id: str, n_parameters: int | None, alike: Sequence[Past], known: Iterable[Past]) -> float | None:
    """Expected seconds of a task, without loading; None where nothing tells. alike: of `known` (`alike`).

    The median of what it took on those. Else what it takes beside the model on the models nearest in size, and for the
    model its tokens at this size's rate, or, where that was here, the time there by the sizes' ratio.
    """
    own = [one.seconds for one in alike if one.task_id == task_id]
    if own:
        return median(own)
    if n_parameters is None:
        return None
    here = rate(alike)
    answers = {one: _answers(one, n_parameters, here) for one in known if one.task_id == task_id}
    nearest = _nearest([one for one, seconds in answers.items() if seconds is not None], n_parameters)
    return _median(one.seconds - one.answer_seconds + (answers[one] or 0.0) for one in nearest)


def new_task_seconds(size: Size, n_parameters: int | None, alike: Sequence[Past]) -> float | None:
    """Expected seconds of a task that nobody was asked yet, without loading; None where nothing tells.

    What was asked of those alike tells how many tokens a character makes, how many a completion, how long these take,
    and how long a request takes beside the model.
    """
    per_character = _median(_prompt_tokens(one) / one.characters for one in alike if one.is_counted and one.characters)
    beside = _median((one.seconds - one.answer_seconds) / one.requests for one in alike if one.requests)
    drawn = _median(one.generated_tokens / one.requests for one in alike if one.generated_tokens and one.requests)
    if n_parameters is None or per_character is None or beside is None or (size.longest and drawn is None):
        return None
    generated = size.requests * min(drawn or 0.0, size.longest)
    answers = answer_seconds(size.characters * per_character, generated, n_parameters, rate(alike))
    return None if answers is None else size.requests * beside + answers


def load_seconds(run: str | None, n_parameters: int | None, known: Sequence[Past]) -> float | None:
    """Expected seconds to load the model; None where nothing tells."""
    loaded = [one for one in known if one.load_seconds and one.is_here]
    own = _median(one.load_seconds for one in alike(run, n_parameters, loaded) if one.load_seconds)
    if own is not None:
        return own
    nearest = _nearest(loaded, n_parameters)
    if n_parameters is None:
        return None
    return _median((one.load_seconds or 0.0) * n_parameters / (one.n_parameters or 1) for one in nearest)


def parameters_of(run: str, known: Iterable[Past]) -> int | None:
    """How many parameters the run's models have; None where none was loaded, or they differ."""
    sizes = [one.n_parameters for one in known if one.run == run and one.n_parameters]
    return sizes[0] if sizes and _distance(min(sizes), max(sizes)) < _SAME_SIZE else None


def alike(run: str | None, n_parameters: int | None, known: Iterable[Past]) -> list[Past]:
    """What was asked here of the run's own models of this size, or of models as large where it has none yet.

    run None: one of which nothing was asked. n_parameters None: of a run whose models have no size that is known,
    served ones.
    """
    here = [one for one in known if one.is_here]
    own = [one for one in here if one.run == run]
    if n_parameters is None:
        return [one for one in own if one.n_parameters is None]
    nearest = _nearest(own, n_parameters)
    if nearest and _distance(nearest[0].n_parameters or 1, n_parameters) < _SAME_MODEL:
        return nearest
    return [one for one in here if one.n_parameters and _distance(one.n_parameters, n_parameters) < _SAME_SIZE]


def _nearest(known: Iterable[Past], n_parameters: int | None) -> list[Past]:
    sized = [one for one in known if one.n_parameters]
    if n_parameters is None or not sized:
        return []
    least = min(_distance(one.n_parameters or 1, n_parameters) for one in sized)
    return [one for one in sized if _distance(one.n_parameters or 1, n_parameters) <= least + _SAME_SIZE]


def _distance(one: int, other: int) -> float:
    return abs(math.log(one / other))


def _answers(one: Past, n_parameters: int, here: Rate) -> float | None:
    """What the model is expected to take for what `one` was asked; None where another device's time tells nothing."""
    if one.is_counted:
        generated = one.generated_tokens or 0.0
        counted = answer_seconds(_prompt_tokens(one), generated, n_parameters, here)
        if counted is not None:
            return counted
    return one.answer_seconds * n_parameters / (one.n_parameters or 1) if one.is_here and one.n_parameters else None


def _work(one: Past) -> float:
    return (one.n_parameters or 0) * (one.computed_tokens or 0.0)


def _prompt_work(one: Past) -> float:
    return (one.n_parameters or 0) * _prompt_tokens(one)


def _prompt_tokens(one: Past) -> float:
    return (one.computed_tokens or 0.0) - (one.generated_tokens or 0.0)


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return median(found) if found else None
