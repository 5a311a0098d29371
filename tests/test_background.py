"""Work beside the caller: in order, bounded, and never a lost error."""

import threading

import pytest

from llamagen_unitok.runtime.background import WAITING, Background


@pytest.mark.parametrize("beside", [True, False])
def test_pieces_are_done_in_order_and_all_before_the_end(beside):
    done, threads = [], set()

    def work(number):
        threads.add(threading.current_thread())
        done.append(number)
        return number**2

    with Background(beside) as background:
        results = [background.submit(work, number) for number in range(20)]
    assert done == list(range(20)) and [r.result() for r in results] == [n**2 for n in range(20)]
    assert len(threads) == 1 and (threading.current_thread() in threads) != beside


def test_the_caller_waits_when_too_much_is_unfinished():
    go, started = threading.Event(), []
    with Background() as background:
        for _ in range(WAITING):
            background.submit(go.wait)

        def one_more():
            background.submit(lambda: None)
            started.append(True)

        caller = threading.Thread(target=one_more)
        caller.start()
        caller.join(0.2)
        assert not started
        go.set()
        caller.join(10)
        assert started


@pytest.mark.parametrize("more", [0, WAITING])
def test_a_failed_piece_raises_at_the_next_call_or_the_end(more):
    def fail():
        raise ValueError("disk full")

    with pytest.raises(ValueError, match="disk full"), Background() as background:
        background.submit(fail)
        for _ in range(more):
            background.submit(lambda: None)


def test_an_error_of_the_caller_is_not_replaced_by_one_of_the_work():
    with pytest.raises(KeyboardInterrupt), Background() as background:
        background.submit(int, "x")
        raise KeyboardInterrupt
