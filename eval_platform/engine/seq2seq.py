"""How do encoder-decoders answer? The context goes to the encoder, the continuation to the decoder.

The plain engine for T5, BART and their like: one part of the engine package beside `plain`, and equal to
lm-evaluation-harness 0.4.13 with backend="seq2seq" (api/model.py:_encode_pair, models/huggingface.py). A rolling
window's encoder reads the tokens before the window's targets, as there. Otherwise than there, a completion
has at most max_new_tokens tokens (there the limit grows with the length of the batch's longest prompt), and the head
that T5 1.1 and Flan-T5 have of their own is used (there transformers 5.23 overwrites it with the embedding).
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.modeling_outputs import BaseModelOutput

from eval_platform.engine.batching import run_batches
from eval_platform.engine.encoding import Tokens, encode_pairs_apart, encode_prompts_apart
from eval_platform.engine.face import EngineInfo
from eval_platform.engine.likelihood import Row, Scored, gather
from eval_platform.engine.plain import LOGITS, PlainEngine, same_length
from eval_platform.engine.reading import Reader
from eval_platform.errors import CheckpointError
from eval_platform.values import RunSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What the encoder reads and what the decoder is to say.
Pair = tuple[tuple[int, ...], tuple[int, ...]]


class Seq2SeqReader(Reader):
    """A row's tokens_in are the encoder's; each of its targets is a text of the decoder's. Each side has the window."""

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
        return encode_pairs_apart(self._tokenizer, pairs)

    def _encode_prompts(self, texts: Sequence[str]) -> list[Tokens]:
        return encode_prompts_apart(self._tokenizer, texts)

    def _input(self, context: Tokens, continuation: Tokens) -> tuple[Tokens, int]:
        return context[-self._max_length :], max(0, len(context) - self._max_length)

    def _windows(self, tokens: Tokens) -> Iterator[tuple[Tokens, Tokens]]:
        for tokens_in, targets in super()._windows(tokens):
            yield tokens_in[: len(tokens_in) - len(targets) + 1], targets

    def _most_new_tokens(self) -> int:
        return self._max_length

    def _room(self, max_new_tokens: int) -> int:
        return self._max_length


class Seq2SeqEngine(PlainEngine):
    """Answers through one encoder-decoder; see `face.Engine` for what it promises.

    Raises CheckpointError when config.json does not say what the decoder's texts start with or are filled up with.
    """

    _reader_type = Seq2SeqReader

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        settings: RunSettings,
        info: EngineInfo,
    ) -> None:
        super().__init__(model, tokenizer, settings, info)
        for field in ("decoder_start_token_id", "pad_token_id"):
            if getattr(model.config, field, None) is None:
                raise CheckpointError(
                    f"{model.name_or_path}/config.json: field {field} is missing, and an encoder-decoder needs it",
                    remedy="add the token's id, as the model was trained with",
                )
        # Prompts are padded on the right, and an encoder is told what is padding.
        self._mixes_prompts = self._mixes_rows

    @torch.inference_mode()
    def _target_logits(self, tokens_in: Sequence[int], targets: Sequence[int]) -> torch.Tensor:
        device = self._model.device
        return self._model(
            input_ids=torch.tensor([list(tokens_in)], device=device),
            decoder_input_ids=_decoder_inputs(self._model, [tuple(targets)]).to(device),
            use_cache=False,
        ).logits[0]

    def _score(self, rows: Sequence[Row]) -> Iterator[Scored]:
        owners: dict[Pair, list[int]] = {}
        for row in rows:
            for owner, tokens in row.targets:
                owners.setdefault((row.tokens_in, tokens), []).append(owner)
        # Longest first, so that memory runs out at once or never; equal contexts together, to be encoded once.
        pairs = sorted(owners, key=lambda pair: (-len(pair[0]), pair[0], -len(pair[1]), pair[1]))

        def take(rest: Sequence[Pair], share: float) -> int:
            size, longest = 0, 1
            for _, tokens in rest:
                longest = max(longest, len(tokens))
                positions = (size + 1) * max(len(rest[0][0]), longest)
                logits = (size + 1) * longest * self._vocab_size
                if positions > self._batch_tokens * share or logits > LOGITS * share:
                    break
                size += 1
            lengths = [(len(rest[i][0]), len(rest[i][1])) for i in range(size)]
            return size if self._mixes_rows else same_length(lengths)

        def run(batch: list[Pair]) -> list[tuple[float, bool]]:
            return score(self._model, batch)

        for batch, scored in run_batches(pairs, run, take):
            for pair, (value, is_greedy) in zip(batch, scored, strict=True):
                for owner in owners[pair]:
                    yield Scored(owner, value, is_greedy)


@torch.inference_mode()
def score(model: "PreTrainedModel", pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """(log-likelihood in nats of the decoder's tokens, whether each was the most probable) of every pair.

    Each distinct encoder text is encoded once.
    """
    rows = {tokens: i for i, tokens in enumerate(dict.fromkeys(tokens for tokens, _ in pairs))}
    inputs = _padded(list(rows), 0).to(model.device)
    mask = _padded([(1,) * len(tokens) for tokens in rows], 0).to(model.device)
    encoded = cast(Any, model.get_encoder())(input_ids=inputs, attention_mask=mask, return_dict=True)
    row_of = torch.tensor([rows[tokens] for tokens, _ in pairs], device=model.device)
    targets = [tokens for _, tokens in pairs]
    logits = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded.last_hidden_state[row_of]),
        attention_mask=mask[row_of],
        decoder_input_ids=_decoder_inputs(model, targets).to(model.device),
        use_cache=False,
    ).logits

    asked = [(i, j, token) for i, tokens in enumerate(targets) for j, token in enumerate(tokens)]
    values, greedy = gather(logits, torch.tensor(asked, device=logits.device).T)
    lengths = [len(tokens) for tokens in targets]
    return [
        (float(value.sum()), bool(flag.all()))
        for value, flag in zip(values.split(lengths), greedy.split(lengths), strict=True)
    ]


def _decoder_inputs(model: "PreTrainedModel", targets: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """`targets` moved one place to the right behind the token a decoder's text starts with, [rows, longest].

    By the model's own rule where its class has one (mBART starts with a text's last token), as when it is trained.
    """
    # -100 is transformers' mark for "no target"; the rule makes padding of it.
    labels = _padded(targets, -100)
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        return prepare(labels=labels)
    start = model.config.decoder_start_token_id
    return torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1].clamp_min(0)], dim=1)


def _padded(rows: Sequence[tuple[int, ...]], filler: int) -> torch.Tensor:
    """`rows` one below the other, [rows, longest], filled up on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])
