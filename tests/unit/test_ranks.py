"""Which worker this is, and in what order it goes through a list."""

import pytest

from llfast.fleet.ranks import find_rank, in_order


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "8"}, (5, 8)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "5",
                "SLURM_ARRAY_TASK_COUNT": "5",
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "1",
            },
            (0, 5),
        ),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (3, 4)),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (1, 2)),
        ({"JOB_COMPLETION_INDEX": "7", "JOB_COMPLETIONS": "9"}, (7, 9)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"}, (1, 3)),
    ],
)
def test_schedulers_say_who_this_is(environment, expected):
    assert find_rank(environment=environment) == expected
    assert find_rank(0, 2, environment) == (0, 2), "what is given counts"


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        ((None, 3), {}, "must both be known, got rank None of 3"),
        ((1, None), {}, "must both be known, got rank 1 of None"),
        ((None, None), {"JOB_COMPLETION_INDEX": "7"}, "must both be known, got rank 7 of None"),
        ((3, 3), {}, r"rank must be in \[0, 3\), got 3"),
        ((-1, 3), {}, r"rank must be in \[0, 3\), got -1"),
        ((None, None), {"RANK": "one", "WORLD_SIZE": "2"}, "RANK must be a number, got 'one'"),
    ],
)
def test_what_says_no_rank(given, environment, message):
    with pytest.raises(ValueError, match=message):
        find_rank(*given, environment)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_each_worker_goes_through_all_and_begins_with_a_share_of_its_own(count, world_size):
    items = list(range(count))
    firsts = []
    for rank in range(world_size):
        order = in_order(items, rank, world_size)
        assert sorted(order) == items
        own = len(items[rank::world_size])
        assert order[:own] == items[rank::world_size]
        firsts += order[:own]
    assert sorted(firsts) == items


def test_who_helps_begins_where_the_other_is_last():
    assert in_order(range(6), 0, 2) == [0, 2, 4, 5, 3, 1]
    assert in_order(range(6), 2, 3) == [2, 5, 3, 0, 4, 1]
