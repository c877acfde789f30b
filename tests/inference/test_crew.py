"""The leader of a crew beside processes that only look like such: order, reading ahead, errors in their place, an end."""

import json
import threading
import time
from queue import SimpleQueue

import pytest

from lmcli.errors import Lost, UserError
from lmcli.inference import crew
from lmcli.inference.crew import ALONE, Crew, Errand


@pytest.fixture
def others(monkeypatch):
    """others(errand, size): a Crew whose others are threads, which run the errand on what JSON leaves of a part."""
    def make(errand: Errand, size: int) -> Crew:
        boxes = {other: (SimpleQueue(), SimpleQueue()) for other in range(1, size)}

        def send(word, to):
            boxes[to][0].put(json.dumps(word))

        def follow(inbox, outbox):
            while (word := json.loads(inbox.get())) is not None:
                try:
                    outbox.put({"found": errand.work(errand.heard(word[1]))})
                except UserError as error:
                    outbox.put(crew._told(error))

        def receive(source):
            answer = boxes[source][1].get()
            if isinstance(answer, Exception):
                raise answer
            return json.loads(json.dumps(answer))

        monkeypatch.setattr(crew, "_send", send)
        monkeypatch.setattr(crew, "_receive", receive)
        for box in boxes.values():
            threading.Thread(target=follow, args=box, daemon=True).start()
        made = Crew(0, size)
        made.boxes = boxes
        return made
    return make


def slowly(part: list[int]) -> list[int]:
    time.sleep(0.002 * (part[0] * 7 % 5))
    if part[0] == 13:
        raise UserError("thirteen", where="here", hint="leave it out")
    return [2 * number for number in part]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_what_was_found_comes_in_order(others, size):
    parts = [[i, i] for i in range(13)]
    with others(Errand(slowly), size) as made:
        assert list(made.in_order(parts, Errand(slowly))) == [(part, [2 * part[0]] * 2) for part in parts]
    assert not any(thread.is_alive() for thread in made._threads)


@pytest.mark.parametrize("size", [1, 3])
def test_an_error_of_the_work_comes_in_its_place(others, size):
    made = others(Errand(slowly), size) if size > 1 else ALONE
    found = []
    with pytest.raises(UserError, match="thirteen") as caught:
        for (number,), _ in made.in_order(([i] for i in range(30)), Errand(slowly)):
            found.append(number)
    assert found == list(range(13))
    assert (caught.value.where, caught.value.hint) == ("here", "leave it out")


def test_an_error_of_the_reading_comes_in_its_place(others):
    def parts():
        yield from ([i] for i in range(5))
        raise UserError("no more")

    found = []
    with pytest.raises(UserError, match="no more"):
        for part, _ in others(Errand(slowly), 2).in_order(parts(), Errand(slowly)):
            found.append(part)
    assert len(found) == 5


def test_little_is_read_ahead(others):
    read = []

    def parts():
        for i in range(12):
            read.append(i)
            yield [i]

    for (number,), _ in others(Errand(slowly), 2).in_order(parts(), Errand(slowly)):
        assert len(read) <= number + 2 + crew.READ_AHEAD * 2


def test_a_slow_pipe_is_answered_while_nothing_more_comes(others):
    more = threading.Event()

    def parts():
        yield [1]
        more.wait(10)
        yield [2]

    found = others(Errand(slowly), 2).in_order(parts(), Errand(slowly))
    assert next(found) == ([1], [2]) and not more.is_set()
    more.set()
    assert list(found) == [([2], [4])]


def test_one_who_has_gone_is_told_by_place(others):
    errand = Errand(lambda part: time.sleep(0.01))
    made = others(Errand(lambda part: time.sleep(10)), 2)
    made.boxes[1][1].put(Lost("gone"))
    with pytest.raises(Lost, match="process 1 of 2 has ended before its time"):
        list(made.in_order(([i] for i in range(100)), errand))
