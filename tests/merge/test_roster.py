"""The roster: who gets which unit, without Ray."""

from rvdist.merge.plan import OutputFile, Segment, Unit
from rvdist.merge.roster import ATTEMPTS, Roster


class FakePlan:
    """As much of a plan as the roster knows: files, the largest first."""

    def __init__(self, **files):
        self.files = [
            OutputFile(
                tuple(Unit(0, name, (Segment("w", 0, 1, start),), 1) for start in range(count)),
                dict.fromkeys(needs, 1),
                0,
            )
            for name, (count, needs) in files.items()
        ]


A, B = ("base", "a"), ("base", "b")


def drain(roster, node, unreadable=frozenset(), others=None):
    taken = []
    while unit := roster.take(node, unreadable, others or {}):
        taken.append((unit.file, unit.start))
    return taken


def test_a_file_belongs_to_the_node_that_began_it():
    roster = Roster(FakePlan(big=(2, [A]), small=(1, [A])))
    for node in ("x", "y"):
        roster.meet(node, frozenset())
    assert roster.take("x", frozenset(), {"y": frozenset()}).file == "big"
    assert drain(roster, "y") == [("small", 0)]  # and nothing of big
    assert roster.is_left and drain(roster, "x") == [("big", 1)]
    assert not roster.is_left


def test_of_what_a_node_can_read_it_takes_first_what_fewest_others_can():
    roster = Roster(FakePlan(both=(1, [A]), mine=(1, [B])))
    roster.meet("x", frozenset())
    roster.meet("y", frozenset([B]))
    assert roster.take("x", frozenset(), {"y": frozenset([B])}).file == "mine"
    assert drain(roster, "y", frozenset([B])) == [("both", 0)]


def test_what_no_node_can_read_is_named():
    roster = Roster(FakePlan(f=(1, [A, B])))
    roster.meet("x", frozenset([A]))
    assert not roster.unreadable().together
    assert roster.unreadable().need == A and roster.missing(frozenset([A])) == A
    roster.meet("y", frozenset([B]))
    assert roster.unreadable().together
    roster.meet("z", frozenset())
    assert roster.unreadable() is None


def test_what_a_death_frees_goes_back_whole_and_first():
    roster = Roster(FakePlan(f=(3, [A]), g=(1, [A])))
    roster.meet("x", frozenset())
    first, second = (roster.take("x", frozenset(), {}) for _ in range(2))
    roster.give_back("x", [first, second])
    assert drain(roster, "x")[:2] == [("f", 0), ("f", 1)]
    roster.give_back("x", [second])
    assert roster.orphans({"x"}) == [] and roster.orphans({None, "y"}) == ["x"]
    roster.free("x")
    roster.meet("y", frozenset())
    assert drain(roster, "y") == [("f", 1)] and not roster.is_left


def test_a_unit_that_kills_again_and_again_is_returned():
    roster = Roster(FakePlan(f=(2, [A])))
    roster.meet("x", frozenset())
    unit, other = (roster.take("x", frozenset(), {}) for _ in range(2))
    assert [roster.count_deaths([other, unit]) for _ in range(ATTEMPTS - 1)] == [None] * (ATTEMPTS - 1)
    assert roster.count_deaths([unit]) == unit


def test_a_unit_at_which_a_worker_may_have_died_is_given_alone_and_counts_then():
    roster = Roster(FakePlan(f=(3, [A])))
    roster.meet("x", frozenset())
    first, second = (roster.take("x", frozenset(), {}, idle) for idle in (True, False))
    for _ in range(ATTEMPTS):
        assert roster.count_deaths([first, second], known=False) is None
    roster.give_back("x", [first, second])
    assert roster.take("x", frozenset(), {}, idle=False) is None
    assert [roster.take("x", frozenset(), {}) for _ in range(2)] == [first, second]
    assert not roster.is_suspect(roster.take("x", frozenset(), {}, idle=False))
    assert [roster.count_deaths([second]) for _ in range(ATTEMPTS)] == [None] * (ATTEMPTS - 1) + [second]
