"""The leader of a worker pool with threads as workers: order, reading ahead, errors, the end."""

import json
import threading
import time
from queue import SimpleQueue

import pytest

from lmcli.distributed import work_queue
from lmcli.distributed.work_queue import LOCAL_POOL, RemoteTask, WorkerPool
from lmcli.errors import ProcessLost, UserError


@pytest.fixture
def pool_of_threads(monkeypatch):
    """pool_of_threads(task, size): a pool whose workers are threads that get items as JSON."""

    def make(task: RemoteTask, size: int) -> WorkerPool:
        boxes = {rank: (SimpleQueue(), SimpleQueue()) for rank in range(1, size)}

        def send(message, rank):
            boxes[rank][0].put(json.dumps(message))

        def serve(inbox, outbox):
            while (message := json.loads(inbox.get())) is not None:
                try:
                    result = task.encode_result(task.work(task.decode(message[1])))
                    outbox.put({"result": result})
                except UserError as error:
                    outbox.put(work_queue._error_answer(error))

        def receive(rank):
            answer = boxes[rank][1].get()
            if isinstance(answer, Exception):
                raise answer
            return json.loads(json.dumps(answer))

        monkeypatch.setattr(work_queue, "_send", send)
        monkeypatch.setattr(work_queue, "_receive", receive)
        for box in boxes.values():
            threading.Thread(target=serve, args=box, daemon=True).start()
        pool = WorkerPool(0, size)
        pool.boxes = boxes
        pools.append(pool)
        return pool

    pools: list[WorkerPool] = []
    yield make
    for pool in pools:  # its threads must not take part in the next test
        with pool._change:
            pool._open.clear()
            pool._closing = True
            pool._change.notify_all()
        for thread in pool._threads:
            thread.join(10)


def double_slowly(item: list[int]) -> list[int]:
    time.sleep(0.002 * (item[0] * 7 % 5))
    if item[0] == 13:
        raise UserError("thirteen", where="here", hint="leave it out")
    return [2 * number for number in item]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_results_come_in_order(pool_of_threads, size):
    items = [[i, i] for i in range(13)]
    with pool_of_threads(RemoteTask(double_slowly), size) as pool:
        assert list(pool.map_in_order(items, RemoteTask(double_slowly))) == [
            (item, [2 * item[0]] * 2) for item in items
        ]
    assert not any(thread.is_alive() for thread in pool._threads)


@pytest.mark.parametrize("size", [1, 3])
def test_an_error_of_the_work_is_raised_in_input_order(pool_of_threads, size):
    pool = pool_of_threads(RemoteTask(double_slowly), size) if size > 1 else LOCAL_POOL
    numbers = []
    with pytest.raises(UserError, match="thirteen") as caught:
        for (number,), _ in pool.map_in_order(([i] for i in range(30)), RemoteTask(double_slowly)):
            numbers.append(number)
    assert numbers == list(range(13))
    assert (caught.value.where, caught.value.hint) == ("here", "leave it out")


def test_an_error_of_the_reading_is_raised_in_input_order(pool_of_threads):
    def items():
        yield from ([i] for i in range(5))
        raise UserError("no more")

    read = []
    with pytest.raises(UserError, match="no more"):
        for item, _ in pool_of_threads(RemoteTask(double_slowly), 2).map_in_order(
            items(), RemoteTask(double_slowly)
        ):
            read.append(item)
    assert len(read) == 5


def test_few_items_are_read_ahead(pool_of_threads):
    read = []

    def items():
        for i in range(12):
            read.append(i)
            yield [i]

    for (number,), _ in pool_of_threads(RemoteTask(double_slowly), 2).map_in_order(
        items(), RemoteTask(double_slowly)
    ):
        assert len(read) <= number + 2 + work_queue.READ_AHEAD * 2


def test_results_appear_while_a_slow_pipe_blocks(pool_of_threads):
    more = threading.Event()

    def items():
        yield [1]
        more.wait(10)
        yield [2]

    results = pool_of_threads(RemoteTask(double_slowly), 2).map_in_order(
        items(), RemoteTask(double_slowly)
    )
    assert next(results) == ([1], [2]) and not more.is_set()
    more.set()
    assert list(results) == [([2], [4])]


def test_a_lost_worker_is_reported_by_rank(pool_of_threads):
    task = RemoteTask(lambda item: time.sleep(0.01))
    pool = pool_of_threads(RemoteTask(lambda item: time.sleep(10)), 2)
    pool.boxes[1][1].put(ProcessLost("gone"))
    with pytest.raises(ProcessLost, match="process 1 of 2 has exited early"):
        list(pool.map_in_order(([i] for i in range(100)), task))


def test_results_of_workers_pass_through_json_and_back(pool_of_threads):
    task = RemoteTask(
        lambda number: complex(number, 1),
        encode=lambda number: [number],
        decode=lambda encoded: encoded[0],
        encode_result=lambda result: [result.real, result.imag],
        decode_result=lambda encoded: complex(*encoded),
    )
    with pool_of_threads(task, 3) as pool:
        assert list(pool.map_in_order(range(9), task)) == [(i, complex(i, 1)) for i in range(9)]
