"""Question answering against transformers: logits, loss, and brute-force answers."""

import json
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

import lmcli
from lmcli.data import squad
from lmcli.data.documents import DocumentFormat, survey
from lmcli.data.squad import QaEncoder, QuestionWindows
from lmcli.training.objectives import OBJECTIVES

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
CONTEXT = 128


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    """A BERT with random weights that matter, context 128, and MiniLM's vocabulary."""
    found = tmp_path_factory.mktemp("qa")
    torch.manual_seed(1)
    model = transformers.BertForQuestionAnswering(
        transformers.BertConfig(**SMALL, max_position_embeddings=CONTEXT, initializer_range=0.6)
    )
    model.save_pretrained(found)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (found / file).write_bytes((shared / "tokenizers" / "bert-minilm" / file).read_bytes())
    return found


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.BertForQuestionAnswering.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def rows(shared):
    lines = (shared / "qa" / "squad-dev-small.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[::50]]


@pytest.fixture
def windows(folder, rows, tmp_path, monkeypatch):
    """The rows' windows, as lm train has them: of context 128, 40 apart."""
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    layout, tokenizer = (
        DocumentFormat(fields=("context", "question"), answers="answers"),
        lmcli.load(folder).tokenizer,
    )
    surveyed = survey([str(tmp_path / "rows.jsonl")], layout)
    found = squad.build(surveyed.documents, surveyed.hashes, layout, tokenizer)
    return QuestionWindows(found, QaEncoder(tokenizer, CONTEXT, 40))


def theirs_encoded(folder, row, stride):
    """Windows by transformers' own tokenizer; its stride is what two windows share."""
    words = transformers.AutoTokenizer.from_pretrained(folder)
    return words(
        row["question"],
        row["context"],
        truncation="only_second",
        max_length=CONTEXT,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def test_rows_types_and_targets_are_those_that_its_tokenizer_makes(folder, rows, windows):
    made = [windows.feature(i) for i in range(len(windows))]
    batch, at = windows.batch(np.arange(len(windows))), 0
    for number, row in enumerate(rows):
        mine = np.flatnonzero(windows.spans[:, 0] == number)
        room = CONTEXT - 3 - len(windows.questions.questions[number])
        found = theirs_encoded(folder, row, room - min(40, room // 2))
        assert [made[i].ids for i in mine] == found["input_ids"]
        assert [made[i].types for i in mine] == found["token_type_ids"]
        answer = row["answers"][0]
        start, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
        for i, (window, offsets) in enumerate(zip(mine, found["offset_mapping"])):
            of_context = [j for j, which in enumerate(found.sequence_ids(i)) if which == 1]
            inside = [j for j in of_context if offsets[j][1] > start and offsets[j][0] < end]
            whole = offsets[of_context[0]][0] <= start and offsets[of_context[-1]][1] >= end
            assert batch.targets[window].tolist() == ([inside[0], inside[-1]] if whole else [0, 0])
        at += len(mine)
    assert (
        at == len(windows) > len(rows)
        and (batch.targets[:, 0] == 0).any()
        and (batch.targets[:, 0] > 0).any()
    )


@torch.no_grad()
def test_logits_and_the_loss_of_a_batch_are_those_of_transformers(
    folder, theirs, windows, difference
):
    ours = lmcli.load(folder, device="cpu").model
    batch = windows.batch(np.arange(0, len(windows), 3))
    starts, ends = torch.from_numpy(batch.targets).T
    read = {
        "input_ids": torch.from_numpy(batch.ids),
        "token_type_ids": torch.from_numpy(batch.types),
        "attention_mask": torch.from_numpy(batch.token_mask).long(),
    }
    expected = theirs(**read)
    found = ours(read["input_ids"], read["attention_mask"], token_type_ids=read["token_type_ids"])
    mask = torch.from_numpy(batch.token_mask)
    assert difference(found[..., 0][mask], expected.start_logits[mask]) < 1e-5
    assert difference(found[..., 1][mask], expected.end_logits[mask]) < 1e-5
    may = torch.from_numpy(batch.candidates)
    masked = [
        F.cross_entropy(logits.masked_fill(~may, -torch.inf), positions)
        for logits, positions in ((expected.start_logits, starts), (expected.end_logits, ends))
    ]
    loss = OBJECTIVES["span"].loss(ours, batch).item() / batch.count
    assert loss == pytest.approx(sum(masked).item() / 2, rel=1e-6)
    full = windows.batch(np.flatnonzero(windows.lengths == CONTEXT)[::4])
    assert full.token_mask is None and full.rows > 3
    full.candidates = None  # as transformers has it, over the question as well
    starts, ends = torch.from_numpy(full.targets).T
    expected = theirs(
        input_ids=torch.from_numpy(full.ids),
        token_type_ids=torch.from_numpy(full.types),
        start_positions=starts,
        end_positions=ends,
    )
    loss = OBJECTIVES["span"].loss(ours, full).item() / full.count
    assert loss == pytest.approx(expected.loss.item(), rel=1e-6)


def by_brute_force(theirs, found, longest):
    """(characters, logit) of the best span, and the lowest no-answer logit, from transformers."""
    best, none = (-np.inf, (0, 0)), np.inf
    for i, offsets in enumerate(found["offset_mapping"]):
        with torch.no_grad():
            out = theirs(
                input_ids=torch.tensor([found["input_ids"][i]]),
                token_type_ids=torch.tensor([found["token_type_ids"][i]]),
            )
        starts, ends = out.start_logits[0].tolist(), out.end_logits[0].tolist()
        none = min(none, starts[0] + ends[0])
        of_context = [j for j, which in enumerate(found.sequence_ids(i)) if which == 1]
        best = max(
            best,
            *(
                (starts[a] + ends[b], (offsets[a][0], offsets[b][1]))
                for a, b in product(of_context, repeat=2)
                if 0 <= b - a < longest
            ),
        )
    return best[1], best[0], none


@pytest.mark.parametrize("stride", [0, 20])
def test_answers_are_the_best_spans_of_transformers_logits(folder, theirs, rows, stride):
    chosen = rows[:12]
    lm = lmcli.load(folder, device="cpu")
    found = lm.answer(
        [row["question"] for row in chosen],
        [row["context"] for row in chosen],
        threshold=1.0,
        max_answer_tokens=8,
        stride=stride,
        batch=600,
    )
    margins = sorted(np.log(answer.no_answer) - np.log(answer.score) for answer in found)
    margin = (
        margins[5] + margins[6]
    ) / 2  # half of the answers are given; what transformers calls the threshold
    unsure = lm.answer(
        [row["question"] for row in chosen],
        [row["context"] for row in chosen],
        max_answer_tokens=8,
        stride=stride,
        threshold=1 / (1 + np.exp(-margin)),
    )
    several = 0
    for row, answer, careful in zip(chosen, found, unsure):
        room = CONTEXT - 3 - len(lm.encode(row["question"]))
        encoded = theirs_encoded(folder, row, room - min(stride or room, room // 2))
        several += len(encoded["input_ids"]) > 1
        (start, end), best, none = by_brute_force(theirs, encoded, 8)
        assert answer.text == row["context"][start:end]
        assert row["context"].encode()[answer.start : answer.end].decode() == answer.text
        assert np.log(answer.no_answer) - np.log(answer.score) == pytest.approx(
            none - best, abs=1e-3
        )
        assert careful.text == (None if none - best > margin else answer.text)
        assert careful.no_answer == pytest.approx(answer.no_answer, rel=1e-4)
        assert (careful.score is None) == (careful.text is None)
    assert several > 3 and [answer.text is None for answer in unsure].count(True) == 6
