"""Text to tokens, exactly as lm-evaluation-harness 0.4.13 does it (api/model.py, models/huggingface.py, utils.py).

The boundary between context and continuation is where two correct programs come to differ, so each rule is a
function of its own. Tokens are plain lists of vocabulary indices.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from eval_platform.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = list[int]


def prefix_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """What stands before a text without context: BOS, else EOS. Raises CheckpointError when there is neither."""
    found = _prefix_or_none(tokenizer)
    if found is None:
        raise CheckpointError(
            f"the tokenizer in {tokenizer.name_or_path} has neither a BOS nor an EOS token, "
            "so a text without context has nothing to stand on",
            remedy="name bos_token or eos_token in tokenizer_config.json",
        )
    return found


def _prefix_or_none(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            # transformers types these as possibly a list, which they are only for extra special tokens.
            assert isinstance(token, int)
            return token
    return None


def encode_texts(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]) -> dict[str, Tokens]:
    """Tokens of each text with the special tokens the tokenizer adds, unless the text already begins with the prefix.

    Each distinct text is encoded once, and all in one call, which a fast tokenizer spreads over its threads.
    """
    prefix = _prefix_or_none(tokenizer)
    return _encode(tokenizer, texts, None if prefix is None else str(tokenizer.decode([prefix])))


def encode_prompts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[Tokens]:
    """Tokens of prompts to be completed. Here lm-evaluation-harness looks for BOS only, not for EOS in its place.

    It looks at the first prompt of a batch only; here every prompt is looked at, so no neighbour changes it.
    An empty prompt becomes the prefix token (there: an error).
    """
    tokens = _encode(tokenizer, texts, None if tokenizer.bos_token is None else str(tokenizer.bos_token))
    return [tokens[text] or [prefix_token(tokenizer)] for text in texts]


def encode_pairs(tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
    """Tokens of each (context, continuation). The continuation's may be empty: the caller must refuse that.

    Spaces at the end of the context move to the continuation; context and whole are encoded separately, and the
    continuation is what the whole has beyond the context's length. A context that is empty, or empty once its
    spaces have moved and no special token stands for it (there: an assertion fails), is the prefix token, unless the
    continuation begins with just that token, which then serves as the context.
    """
    # Stripped context + moved spaces + continuation is the whole, so the whole is what it was.
    texts = [text for context, continuation in pairs if context for text in (context.rstrip(), context + continuation)]
    tokens = encode_texts(tokenizer, texts)
    encoded = []
    for context, continuation in pairs:
        context_tokens = tokens[context.rstrip()] if context else []
        if context_tokens:
            encoded.append((context_tokens, tokens[context + continuation][len(context_tokens) :]))
            continue
        prefix = prefix_token(tokenizer)
        bare = tokenizer.encode(context + continuation, add_special_tokens=False)
        encoded.append((bare[:1], bare[1:]) if bare and bare[0] == prefix else ([prefix], bare))
    return encoded


def encode_pairs_apart(
    tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[tuple[str, str]]
) -> list[tuple[Tokens, Tokens]]:
    """`encode_pairs` for an encoder-decoder, whose halves are two texts: the continuation is encoded by itself.

    The context gets the special tokens that the tokenizer adds, the continuation none, so its end is no part of it.
    """
    moved = [context[len(context.rstrip()) :] + continuation for context, continuation in pairs]
    contexts = encode_texts(tokenizer, [context.rstrip() for context, _ in pairs if context])
    continuations = _encode(tokenizer, moved, "")
    encoded = []
    for (context, _), text in zip(pairs, moved, strict=True):
        tokens, targets = contexts[context.rstrip()] if context else [], continuations[text]
        if not tokens:
            prefix = prefix_token(tokenizer)
            tokens, targets = (targets[:1], targets[1:]) if targets[:1] == [prefix] else ([prefix], targets)
        encoded.append((tokens, targets))
    return encoded


def encode_prompts_apart(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[Tokens]:
    """`encode_prompts` for an encoder-decoder: special tokens are added whatever the text begins with."""
    tokens = _encode(tokenizer, texts, None)
    return [tokens[text] or [prefix_token(tokenizer)] for text in texts]


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str], begins: str | None) -> dict[str, Tokens]:
    """Tokens of the distinct `texts`, without special tokens for those that begin with the text `begins`."""
    found: dict[str, Tokens] = {}
    for special in (True, False):
        batch = [t for t in dict.fromkeys(texts) if (begins is None or not t.startswith(begins)) is special]
        if batch:
            ids = tokenizer(batch, add_special_tokens=special, return_attention_mask=False)["input_ids"]
            found |= zip(batch, ids, strict=True)
    return found


def model_input(context: Tokens, continuation: Tokens, max_length: int) -> tuple[Tokens, int]:
    """What the model reads to score `continuation`, and how many context tokens were cut off on the left to fit.

    The last max_length + 1 tokens are kept, and the very last is never read: it is only predicted. The prediction of
    continuation[j] is thus at position len(input) - len(continuation) + j.
    """
    tokens = context + continuation
    cut = max(0, len(tokens) - (max_length + 1))
    return tokens[cut:-1], cut


def rolling_windows(
    tokens: Tokens, prefix: int, max_length: int, stride: int | None = None
) -> Iterator[tuple[Tokens, Tokens]]:
    """Cut a document into (input, targets) windows in which every token is predicted exactly once.

    The first window predicts the first max_length tokens after `prefix`; each later one up to max_length more, given
    the token before them (context length 1). The last is shorter in targets but not in input: it is filled up with
    the tokens before, so its first target still has as much context as fits. With a `stride` (at most max_length) each
    later window predicts that many more tokens only, given all the context that fits beside them.
    """
    if not tokens:
        return
    first = tokens[:max_length]
    yield [prefix, *first[:-1]], first
    done = len(first)
    while done < len(tokens):
        end = min(len(tokens), done + (stride or max_length))
        yield tokens[end - max_length - 1 : end - 1], tokens[done:end]
        done = end
