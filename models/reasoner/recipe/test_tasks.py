"""The chains must be right: each states its question as arithmetic, and its last line gives Python's answer.

    python test_tasks.py        (or through pytest)
"""

import random

from tasks import FAMILIES, generate

TARGETS = (25, 60, 149, 290, 500, 1500)


def test_arithmetic_agrees_with_python():
    rng = random.Random(1)
    for _ in range(4000):
        for family in ("add", "sub", "mul", "expr"):
            p = generate(family, rng, rng.choice(TARGETS))
            stated = p.chain.split("\n")[0].split("=")[0]
            assert str(eval(stated)) == p.answer, (stated, p.answer)
            last = p.chain.rstrip().split("\n")[-1]
            if family in ("sub", "expr") or last.startswith("so "):
                assert last.endswith(p.answer), p.chain


def test_same_seed_same_problem():
    for family in FAMILIES:
        one, two = (generate(family, random.Random("seed"), 300) for _ in range(2))
        assert one == two


def test_plain_wording_has_no_talk_around_it():
    rng = random.Random(2)
    for family in FAMILIES:
        for _ in range(50):
            assert "\n" not in generate(family, rng, 200, plain=True).prompt


if __name__ == "__main__":
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
            print(name, "passed")
