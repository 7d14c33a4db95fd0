"""What does it answer? Log-likelihoods and completions of one checkpoint, equal to lm-evaluation-harness's HF back end.

`load` imports torch and transformers when it is called; importing this package does not.
"""

from eval_platform.engine.face import Engine, EngineInfo
from eval_platform.engine.loading import load
from eval_platform.engine.settings import resolve_settings

__all__ = ["Engine", "EngineInfo", "load", "resolve_settings"]
