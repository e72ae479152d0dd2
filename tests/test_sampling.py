"What is drawn is a function of what is asked: published runs can be repeated only as long as it stays the same one."
import pytest

from mapo.sampling import request_seed

ASKED = dict(run_seed=0, split='train', purpose='train', problem_id='p1', iteration=1, agent='ada', role='critic',
             round=1, parent_ids=('t1', 't2'))


@pytest.mark.parametrize('part,other', dict(run_seed=1, split='dev', purpose='evaluate', problem_id='p2', iteration=2,
                                            agent='bob', role='generator', round=2, parent_ids=('t2', 't1')).items())
def test_every_part_of_a_request_changes_its_seed(part, other):
    assert request_seed(**ASKED | {part: other}) != request_seed(**ASKED)


def test_seeds_are_those_of_published_runs():
    assert request_seed(**ASKED) == 2811847227773331419
    assert all(0 <= request_seed(**ASKED | dict(problem_id=f'p{i}')) < 2**62 for i in range(1000))
