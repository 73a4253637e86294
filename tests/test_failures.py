"What is claimed and what is true: on real captions, and with the bootstrap."

import csv
from collections import Counter

import numpy as np
import pytest
from toys import NO_RISCM, RISCM

from rsstudy.evaluation.claims import RISC_WORDS, check_references, named
from rsstudy.evaluation.failures import class_of, failure_scores, failure_table
from rsstudy.stats.intervals import bootstrap_interval, error_rate, weighted_error_rate


@pytest.fixture(scope="module")
def riscm():
    if not (RISCM / "captions.csv").is_file():
        pytest.skip(NO_RISCM)
    with open(RISCM / "captions.csv", encoding="utf-8") as f:
        return [(r["image"], [r[f"caption_{i}"] for i in range(1, 6)]) for r in csv.DictReader(f)]


def test_the_vocabulary_knows_what_annotators_name(riscm):
    "Of all captions 99 in 100 name at least one object, and every group but a handful is in use."
    used = Counter(name for _, five in riscm for c in five for names in named(c) for name in names)
    assert np.mean([bool(named(c)) for _, five in riscm for c in five]) > 0.99
    unused = {n for names, _ in RISC_WORDS.values() for n in names if used[n] < 3}
    assert len(unused) <= 5, unused


def test_people_seldom_invent_and_strangers_do(riscm):
    "One reference against the other four, and against those of another image: CHAIR-i."
    some = riscm[::7]

    def chair(pairs):
        return (lambda claims: sum(c.wrong for c in claims) / len(claims))(
            [c for caption, refs in pairs for c in check_references(caption, refs)]
        )

    assert chair([(five[k], five[:k] + five[k + 1 :]) for _, five in some for k in range(5)]) < 0.1
    assert chair([(five[0], some[i - 500][1]) for i, (_, five) in enumerate(some)]) > 0.6


@pytest.mark.parametrize(
    "word, land",
    [
        ("runway", "airport"),
        ("desert", "desert"),
        ("wetland", "wetland"),
        ("bunkers", "golf course"),
        ("tennis", "tennis court"),
        ("plane", "airplane"),
    ],
)
def test_numbers_tell_the_class(riscm, word, land):
    "The captions of a class talk of it more than those of any other class of the same source, on average."
    share = {True: [], False: []}
    for image, five in riscm:
        if (known := class_of(image)) != "unknown":
            share[known == land].append(any(word in c.lower() for c in five))
    assert np.mean(share[True]) > 0.6 > 3 * np.mean(share[False])


def test_an_interval_of_a_share_of_claims():
    """The bootstrap draws images with whatever they claim.

    The value is the ratio of the sums, also where many images claim nothing.
    """
    rng = np.random.default_rng(0)
    claims = rng.integers(0, 3, (2, 300))
    counts = np.stack([rng.binomial(claims, 0.3), claims], -1)
    assert np.isclose(
        bootstrap_interval(counts, 100, statistic=weighted_error_rate).value, np.mean([error_rate(c) for c in counts])
    )  # two seeds
    found = bootstrap_interval(counts[0], 400, statistic=weighted_error_rate)
    assert (
        found.value == error_rate(counts[0]) and found.low < 0.3 < found.high and 0.07 < found.high - found.low < 0.14
    )  # 1.96 x 2 x sqrt(.3 x .7 / 300) = .10
    table = failure_table(
        counts[0],
        {"half": ["a", "b"] * 150},
        interval=lambda v: bootstrap_interval(v, 100, statistic=weighted_error_rate),
    )
    assert table.loc[("half", "a"), "interval"].value == table.loc[("half", "a"), "mean"]


def test_a_test_split_is_checked_in_a_second(riscm):
    "4,454 predictions against five references each: CPU seconds, one thread."
    import time

    some = riscm[:4454]
    named.cache_clear()
    start = time.process_time()
    counts, corpus, _ = failure_scores([five[0] for _, five in some], [five for _, five in some])
    assert (
        time.process_time() - start < 4
        and corpus["hallucinated-chair.v1"] == 0
        and len(counts["hallucinated-chair.v1"]) == 4454
    )
