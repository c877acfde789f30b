"""Mask filling: an encoder with a masked-language-model head predicts a text's masked tokens.

Devlin et al. 2019. Masks are filled one at a time, the most confident first, each after a forward
pass (Wang & Cho 2019; order by confidence: Ghazvininejad et al. 2019).
"""

import math
import random
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from lmcli.config import GenerateConfig, ModelConfig
from lmcli.errors import UsageError
from lmcli.generation import sampling
from lmcli.generation.decoding import Generated
from lmcli.generation.prompts import too_long
from lmcli.model import finite
from lmcli.model.cached_forward import pad
from lmcli.model.transformer import Transformer
from lmcli.text.tokenizer import Tokenizer


@dataclass
class FillState:
    """A partly filled text; `filled` maps positions to log-probabilities (nats) of their token."""

    ids: list[int]
    open_masks: list[int]  # positions
    random: random.Random
    seed: int
    filled: dict[int, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The sum of the log-probabilities of all filled tokens."""
        return sum(self.filled.values())

    def with_token(self, position: int, token: int, logprob: float) -> "FillState":
        """A copy with one more mask filled."""
        ids = [*self.ids[:position], token, *self.ids[position + 1 :]]
        still_open = [i for i in self.open_masks if i != position]
        filled = {**self.filled, position: logprob}
        return FillState(ids, still_open, self.random, self.seed, filled)


@dataclass
class MaskFiller:
    """A model that fills `mask` tokens; with `sampled` by chance, by the filters of `config`."""

    model: Transformer
    tokenizer: Tokenizer
    config: GenerateConfig
    mask: int
    sampled: bool = False
    one_row_per_sample = False  # all results of a prompt come from one row
    first_token_at = None  # they are chosen in any order

    def __post_init__(self) -> None:
        if self.config.logprobs:
            raise UsageError(
                "an encoder has no steps with alternatives",
                where="--logprobs",
                hint="use --num-samples 5 --json for the likeliest fillings",
            )

    @property
    def model_config(self) -> ModelConfig:
        """The sizes of the model."""
        return self.model.config

    @property
    def device_type(self) -> str:
        """Where the model is: cpu, cuda or mps."""
        return self.model.embedding.weight.device.type

    def fit(self, prompt: list[int]) -> list[int]:
        """The prompt (ids); raises UserError if it is longer than the context."""
        context = self.model_config.max_position_embeddings
        if len(prompt) > context:
            raise too_long(prompt, context, "shorten it; masks are filled in whole prompts")
        return prompt

    def cost(self, prompt: list[int], num_samples: int) -> int:
        """Tokens of the forward passes of a row."""
        return len(prompt) * num_samples

    @torch.inference_mode()
    def complete(self, prompts: list[list[int]], seeds: list[list[int]]) -> list[list[Generated]]:
        """A result for each seed of each prompt (ids, special tokens included).

        The best by beam search, best first (fewer if there are fewer tokens), or if `sampled`
        independent draws. `text` is the whole text, `tokens` are the filled ones in text order.
        """
        count = len(seeds[0])
        texts = [
            [self._start(prompt, seed) for seed in (row if self.sampled else row[:1])]
            for prompt, row in zip(prompts, seeds, strict=True)
        ]
        while any(state.open_masks for states in texts for state in states):
            rows = [state for states in texts for state in states if state.open_masks]
            logits = iter(self._logits(rows))
            for i, states in enumerate(texts):
                filled = [
                    self._fill_next(state, next(logits), count) if state.open_masks else [state]
                    for state in states
                ]
                texts[i] = list(chain(*filled))
                if not self.sampled:
                    texts[i] = sorted(texts[i], key=lambda state: -state.score)[:count]
        return [[self._result(state) for state in states] for states in texts]

    def _start(self, ids: list[int], seed: int) -> FillState:
        masks = [i for i, token in enumerate(ids) if token == self.mask]
        return FillState(ids, masks, random.Random(seed), seed)

    def _logits(self, rows: list[FillState]) -> list[Tensor]:
        """Logits (masks, V) of each text's open masks."""
        device = self.model.embedding.weight.device
        ids, mask = pad([row.ids for row in rows], 0, left=False, device=device)
        hidden = self.model.hidden(ids, mask)  # (B, T, C)
        states = [hidden[i, position] for i, row in enumerate(rows) for position in row.open_masks]
        logits = self.model.head(torch.stack(states)).float()  # (all masks, V)
        return list(logits.split([len(row.open_masks) for row in rows]))

    def _fill_next(self, state: FillState, logits: Tensor, count: int) -> list[FillState]:
        """The text with its most confident mask filled: by a drawn token, or the `count` best."""
        logprobs = logits.log_softmax(-1)  # (masks, V)
        surest = int(logprobs.amax(-1).argmax())
        if self.sampled:
            row = logits[surest].cpu().numpy()
            tokens = [sampling.choose(row, self.config, state.random) or 0]
        else:
            tokens = logprobs[surest].topk(min(count, logprobs.shape[1])).indices.tolist()
        return [
            state.with_token(state.open_masks[surest], token, logprobs[surest, token].item())
            for token in tokens
        ]

    def _result(self, state: FillState) -> Generated:
        positions = sorted(state.filled)
        all_finite = all(map(math.isfinite, state.filled.values()))
        return Generated(
            self.tokenizer.decode(state.ids, special=False),
            "stop",
            [state.ids[i] for i in positions],
            [state.filled[i] for i in positions],
            state.seed,
            "" if all_finite else finite.LOGPROB,
        )
