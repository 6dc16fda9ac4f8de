"""Threads beside the one that learns: the pool they fill, and the captures that wait for them."""

import queue
import random
import threading
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor

import pytest

from training.pool import Pool
from training.turns import alone, beside


def test_the_pool_forgets_the_oldest():
    pool = Pool(4, lambda seed: seed, first_seed=7, begin_with=2)
    assert set(pool.draw(50, random.Random(0))) == {7, 8}
    pool.refresh(4)
    assert set(pool.draw(99, random.Random(0))) == {9, 10, 11, 12}


def test_threads_fill_a_pool_and_wait_while_a_graph_is_captured():
    made = queue.SimpleQueue()
    pool = Pool(100, lambda seed: made.put(seed) or seed, first_seed=0, begin_with=1, beside=True)
    assert made.get(timeout=5) == 0, "what it begins with"
    with alone():
        pool.refresh(40)
        with pytest.raises(queue.Empty):
            made.get(timeout=0.2)
    assert sorted(made.get(timeout=5) for _ in range(40)) == list(range(1, 41)), "every seed once"


def test_a_capture_waits_for_who_works_beside():
    order, begun, end = [], threading.Event(), threading.Event()

    def work() -> None:
        with beside():
            begun.set()
            assert end.wait(5)
            order.append("worked")

    def capture() -> None:
        with alone():
            order.append("captured")

    with ThreadPoolExecutor(2) as threads:
        done = [threads.submit(work)]
        assert begun.wait(5)
        done.append(threads.submit(capture))
        assert not futures.wait(done, timeout=0.2).done
        end.set()
        for one in done:
            one.result(timeout=5)
    assert order == ["worked", "captured"]
