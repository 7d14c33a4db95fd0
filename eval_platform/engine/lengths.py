"""How long is a prompt for a model, and how long may it be?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PromptLengths:
    """count: tokens of each prompt as it would be asked. window: of the model, in tokens, which prompt and completion
    share unless it is an encoder-decoder.
    """

    count: Callable[[Sequence[str]], list[int]]
    window: int
    is_shared: bool

    def room(self, max_new_tokens: int) -> int:
        """How many tokens of a prompt fit beside a completion."""
        return self.window - max_new_tokens if self.is_shared else self.window
