"""Log-probabilities by the decoder in C: those of the tokens as `lm generate` computes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lmcli.kernels.fast_decoding import TOKENS_AT_ONCE, FastDecodingState
from lmcli.model.likelihood import token_distributions
from lmcli.scoring.scorer import Scorer
from lmcli.scoring.token_logprobs import (
    CausalLogprobs,
    ScoreFields,
    ScoreRequest,
    TokenScores,
    WindowJob,
)
from lmcli.terminal import progress

# (sequences, None, capacity) → the state after reading them, as of a Decoder
DecodingStates = Callable[[list[list[int]], None, int], FastDecodingState]


@dataclass
class DecodeStepLogprobs(CausalLogprobs):
    """Scores texts by the states of a Decoder: its weights, its activations, its cache."""

    decoding_state: DecodingStates

    def _compute(self, requests: Sequence[ScoreRequest], fields: ScoreFields) -> list[TokenScores]:
        scores, jobs = self._jobs(requests, fields)
        for job in jobs:
            self._score_window(job, fields)
            progress.current().advance(job.size)
        return scores

    def _score_window(self, job: WindowJob, fields: ScoreFields) -> None:
        (row,), targets = self._rows([job]), torch.tensor(job.targets())
        first = len(row) - job.size  # a scored token follows each from here on
        state = self.decoding_state([row[: first + 1]], None, len(row))
        logits, done = state.logits, 0
        while done < job.size:
            of_targets = targets[done : done + len(logits)]
            distribution = token_distributions(
                torch.from_numpy(logits), nn.Identity(), of_targets, *fields
            )
            job.scores.put(job.request.leading_bos + job.window.first + done, distribution)
            done += len(logits)
            if done < job.size:
                tokens = row[first + done : first + done + TOKENS_AT_ONCE]
                logits = state.look_ahead(np.array(tokens, np.int64))
                state.accept(len(tokens))


def as_generated(scorer: Scorer, decoding_state: DecodingStates) -> Scorer:
    """The scorer of a decoder, with log-probabilities by these states."""
    backend = scorer.backend
    assert isinstance(backend, CausalLogprobs)
    sizes = backend.context, backend.stride, backend.batch
    scorer.backend = DecodeStepLogprobs(scorer.model, scorer.bos, *sizes, decoding_state)
    return scorer
