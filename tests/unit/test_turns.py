"""Which thread runs when, by what each of them writes down."""

import _thread
import threading

import pytest

from jointspar.comm.turns import Turns

NEVER, AT_ONCE = (lambda: False), (lambda: True)


def run(functions):
    """functions[k](turns) on thread k, the first on this one."""
    turns = Turns(len(functions))

    def run_one(number):
        if number > 0:
            turns.begin(number)
        functions[number](turns)
        turns.end(number)

    threads = [threading.Thread(target=run_one, args=(number,)) for number in range(1, len(functions))]
    for thread in threads:
        thread.start()
    run_one(0)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_the_turn_goes_round_in_the_order_of_numbers():
    seen = []

    def three_times(number):
        def function(turns):
            for k in range(3):
                seen.append((k, number))
                assert turns.wait_until(number, AT_ONCE)

        return function

    run([three_times(number) for number in range(4)])
    assert seen == [(k, number) for k in range(3) for number in range(4)]


def test_a_wait_that_is_not_over_is_passed_over_until_it_is():
    seen = []

    def waiter(turns):
        assert turns.wait_until(0, lambda: "told" in seen)
        seen.append("woken")

    def teller(turns):
        for k in range(3):
            seen.append(k)
            assert turns.wait_until(1, AT_ONCE)
        seen.append("told")

    run([waiter, teller])
    assert seen == [0, 1, 2, "told", "woken"]


def test_threads_that_wait_for_what_cannot_come_are_told_so_one_after_the_other():
    seen = []

    def waiter(number):
        def function(turns):
            seen.append((number, turns.wait_until(number, NEVER)))

        return function

    run([waiter(0), lambda turns: None, waiter(2)])
    assert seen == [(0, False), (2, False)]


def test_the_first_to_be_told_may_still_free_another_one():
    seen = []

    def first(turns):
        assert not turns.wait_until(0, NEVER)
        seen.append("freed")

    def second(turns):
        assert turns.wait_until(1, lambda: "freed" in seen)

    run([first, second])


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_wait_leaves_the_turn_with_the_others():
    seen = []

    def interrupted(turns):
        with pytest.raises(KeyboardInterrupt):
            turns.wait_until(0, NEVER)

    def interrupting(turns):
        _thread.interrupt_main()
        for k in range(3):
            seen.append(k)
            assert turns.wait_until(1, AT_ONCE)

    run([interrupted, interrupting])
    assert seen == [0, 1, 2]
