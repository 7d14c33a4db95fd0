"""What does it answer? Log-likelihoods and completions of one checkpoint, equal to lm-evaluation-harness's HF back end.

`load` imports torch and transformers when it is called; importing this package does not.
"""

from eval_platform.engine.chat import ChatTemplate
from eval_platform.engine.face import Engine, EngineInfo, TokenScore
from eval_platform.engine.lengths import PromptLengths
from eval_platform.engine.loading import chat_template, load, prompt_lengths
from eval_platform.engine.served import Messages, ServedEngine, load_served
from eval_platform.engine.settings import resolve_settings

__all__ = [
    "ChatTemplate",
    "Engine",
    "EngineInfo",
    "Messages",
    "PromptLengths",
    "ServedEngine",
    "TokenScore",
    "chat_template",
    "load",
    "load_served",
    "prompt_lengths",
    "resolve_settings",
]
