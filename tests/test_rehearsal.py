"""Programs on several processes with a limit: what they tell, and how those end that do not."""

import subprocess
import sys
import time

import pytest

from lsdl import rehearsal

# None of these programs needs jax: what they do is as true of processes that have joined.
TELL = """
import sys
from lsdl import rehearsal
number = int(sys.argv[-1].split("=")[1])
rehearsal.tell(number=number)
"""


def test_each_process_tells_its_own():
    found = rehearsal.rehearse(f"{TELL}rehearsal.tell(more=[1, 2])", processes=3, limit_s=60)
    assert [process.told for process in found] == [{"number": i, "more": [1, 2]} for i in range(3)]
    assert all(process.finished for process in found)
    assert [[word for word, _ in process.marks] for process in found] == [["end"]] * 3


def test_what_fails_has_not_finished_and_says_why():
    found = rehearsal.rehearse(f"{TELL}if number:\n    raise OSError('no disk')", limit_s=60)
    assert [process.finished for process in found] == [True, False]
    assert found[1].code == 1
    assert found[1].told == {"number": 1}
    assert "no disk" in found[1].error


@pytest.mark.parametrize("joins", [True, False])
def test_what_hangs_is_ended_and_what_it_told_is_kept(joins):
    hang = "import time\nif not number:\n    time.sleep(600)"
    text = TELL + hang if joins else hang.replace("if not number:\n    ", "")
    began = time.monotonic()
    found = rehearsal.rehearse(text, limit_s=0.5, join_s=60 if joins else 0.5)
    assert time.monotonic() - began < 60
    assert [process.finished for process in found] == [False, joins]
    assert found[0].code is None
    assert [process.told for process in found] == (
        [{"number": 0}, {"number": 1}] if joins else [{}, {}]
    )


def test_who_watches_may_do_harm_and_nobody_is_left():
    sleeps = (sys.executable, "-c", "import time; time.sleep(600)")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = [subprocess.Popen(sleeps, **pipes) for _ in range(2)]
    codes, _ = rehearsal.watched(children, limit_s=0.2, during=children[0].terminate)
    assert codes == [-15, None]
    assert all(child.poll() is not None for child in children)
