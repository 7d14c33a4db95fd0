"""In which language is a text? By langdetect (extra `ifeval`), whose answers are made repeatable here."""

from functools import lru_cache
from typing import Any


def is_in_language(text: str, code: str) -> bool:
    """Whether langdetect takes the text for the language `code` ("en", "pt", "zh-cn").

    A text that it can say nothing about (no letters) counts as in the language: so IFEval's own verdicts have it.
    """
    from langdetect.lang_detect_exception import LangDetectException

    detector = _profiles().create()
    try:
        detector.append(text)
        return detector.detect() == code
    except LangDetectException:
        return True


@lru_cache(maxsize=1)
def _profiles() -> Any:
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    # A factory of our own: langdetect draws at random, and its seed is otherwise shared by the whole process.
    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.seed = 0
    return factory
