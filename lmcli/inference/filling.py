"""Filling masks: an encoder with a masked-language-model head writes a text's masked tokens (Devlin et al. 2019).

Of several masks the one that the model is surest of is filled first, then the model looks again (Wang & Cho 2019; the
order by confidence is that of Ghazvininejad et al. 2019). `count` results of a text are its best fillings, kept as a beam
search keeps its beams, or with `drawn` so many independent draws.
"""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmcli.config import GenerateConfig
from lmcli.inference import sampling
from lmcli.inference.decoding import Generated
from lmcli.inference.ordering import pad
from lmcli.model.transformer import Transformer
from lmcli.text.tokenizer import Tokenizer


@dataclass
class Filling:
    """A text on its way: ids, the masks still open, and by position what was filled in and its natural log-probability."""

    ids: list[int]
    open: list[int]
    seed: int
    filled: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    @property
    def score(self) -> float:
        """Log-probability of all that was filled in."""
        return sum(self.filled.values())

    def with_token(self, position: int, token: int, logprob: float) -> "Filling":
        """The same with one mask less."""
        new = Filling([*self.ids[:position], token, *self.ids[position + 1:]], [i for i in self.open if i != position],
                      self.seed, {**self.filled, position: logprob})
        new.random = self.random
        return new


@dataclass
class Filler:
    """A model that fills the tokens `mask` of texts; with `drawn` by chance, as temperature and filters of `config` say."""

    model: Transformer
    tokenizer: Tokenizer
    config: GenerateConfig
    mask: int
    drawn: bool = False

    @torch.inference_mode()
    def fill(self, prompts: list[list[int]], count: int, seeds: list[list[int]]) -> list[list[Generated]]:
        """`count` fillings of each prompt (ids, special tokens included), best first; `seeds[i]` has one for each.

        Fewer where there are no more tokens. `text` is the whole text, `tokens` what was filled in, in its order.
        """
        texts = [[self._begin(prompt, seed) for seed in (own if self.drawn else own[:1])]
                 for prompt, own in zip(prompts, seeds, strict=True)]
        while any(filling.open for fillings in texts for filling in fillings):
            rows = [filling for fillings in texts for filling in fillings if filling.open]
            logits = iter(self._logits(rows))
            texts = [self._best([new for old in fillings for new in (self._continued(old, next(logits), count)
                                                                      if old.open else [old])], count)
                     for fillings in texts]
        return [[self._result(filling) for filling in fillings] for fillings in texts]

    def _begin(self, ids: list[int], seed: int) -> Filling:
        return Filling(ids, [i for i, token in enumerate(ids) if token == self.mask], seed)

    def _logits(self, rows: list[Filling]) -> list[Tensor]:
        """Logits (masks, V) of each text's open masks."""
        device = self.model.embedding.weight.device
        ids, real = pad([row.ids for row in rows], 0, left=False, device=device)
        hidden = self.model.hidden(ids, real)  # (B, T, C)
        places = [(i, at) for i, row in enumerate(rows) for at in row.open]
        found = self.model.head(torch.stack([hidden[place] for place in places])).float()  # (all masks, V)
        return list(found.split([len(row.open) for row in rows]))

    def _continued(self, filling: Filling, logits: Tensor, count: int) -> list[Filling]:
        """A text with its surest mask filled: by the `count` likeliest tokens, or by one drawn."""
        logprobs = logits.log_softmax(-1)  # (masks, V)
        surest = int(logprobs.amax(-1).argmax())
        if self.drawn:
            allowed = sampling.filtered(logits[surest:surest + 1], self.config)
            tokens = sampling.draw(allowed, torch.tensor([filling.random.random()], dtype=torch.float64))
        else:
            tokens = logprobs[surest].topk(min(count, logprobs.shape[1])).indices
        return [filling.with_token(filling.open[surest], token, logprobs[surest, token].item()) for token in tokens.tolist()]

    def _best(self, fillings: list[Filling], count: int) -> list[Filling]:
        return fillings if self.drawn else sorted(fillings, key=lambda filling: -filling.score)[:count]

    def _result(self, filling: Filling) -> Generated:
        places = sorted(filling.filled)
        return Generated(self.tokenizer.decode(filling.ids, special=False), "stop", [filling.ids[i] for i in places],
                         [filling.filled[i] for i in places], filling.seed)
