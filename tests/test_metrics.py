"""Every metric against its reference implementation, on captions written in the manner of the data; and what must hold for any caption."""
import json, time
import numpy as np, pytest
from rsstudy.bleu import bleu_from_counts
from rsstudy.intervals import bootstrap_interval, corpus_bleu, paired_difference, verdict
from rsstudy.metrics import BLEU, CIDER, ROUGE_L, Scores, family, find_metric, score_captions
from rsstudy.tokens import tokenize

HARD = ['', ' ', '.', '✈️ 🛩️', '一座机场', 'हवाई अड्डा', '\u200b', "don't", 'a', 'tree ' * 3_000, '(( -- ))', 'NULL', '0', '-lrb- x -rrb-']

def captions(n, seed):
    "n images with five references each, and one prediction that shares words with them."
    rng = np.random.default_rng(seed)
    things = 'trees buildings planes cars boats storage tanks courts houses ships'.split()
    places = 'a road|a river|the sea|an airport|a large lawn|the bird\'s nest stadium|a parking lot|semi-circle farmland'.split('|')
    def one(): return rng.choice(['Many', 'Some', 'Two', 'Several green', 'There are many']) + f' {rng.choice(things)} ' + rng.choice(['are near', 'are in', 'surround', 'next to']) + f' {rng.choice(places)}' + rng.choice([' .', '.', ', and more .', ''])
    references = [[one() for _ in range(5)] for _ in range(n)]
    predictions = [one().lower() if rng.random() < .6 else rng.choice(rs)[:-3] for rs in references]
    return [str(p) for p in predictions], [[str(r) for r in rs] for rs in references]

@pytest.fixture(scope='module')
def data():
    predictions, references = captions(150, 0)
    return predictions + HARD, references + [[h, 'a road', HARD[i - 1]] for i, h in enumerate(HARD)]

@pytest.fixture(scope='module')
def scores(data): return score_captions(*data, metrics=('bleu', 'rouge_l', 'cider', 'meteor', 'shares'))

def coco(data):
    "The captions as the COCO toolkit wants them: already tokenized."
    text = lambda ts: [' '.join(tokenize(t)) for t in ts]
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
    said = np.array([bool(tokenize(p)) for p in data[0]]) # the toolkit gives 1 to an empty caption with an empty reference; here it is 0
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
    from rsstudy.meteor import MemoWordNet
    name = find_metric(scores.corpus, 'meteor')
    assert name == ('meteor-nltk.v1' if scores.info['meteor']['wordnet'] != 'none' else 'meteor-nltk_nosyn.v1')
    theirs = reader if name == 'meteor-nltk.v1' else MemoWordNet()
    expected = [meteor_score([tokenize(r) for r in rs], tokenize(p), wordnet=theirs) for p, rs in zip(*data)]
    np.testing.assert_allclose(scores.per_image[name], expected, atol=1e-9)

def test_synonyms_are_nltks():
    "The light reader and nltk's own give the same synonyms."
    from rsstudy.wordnet import wordnet
    if wordnet() is None: pytest.skip('no WordNet on this machine')
    from nltk.corpus import wordnet as theirs
    ours = wordnet()[0]
    names = lambda reader, word: [(s.name(), [l.name() for l in s.lemmas()]) for s in reader.synsets(word)]
    for word in 'plane planes better geese lay green road build storag car auto circle semi-circle xyz went 一座 100 A'.split(): assert names(ours, word) == names(theirs, word)

def test_bertscore_is_bert_scores():
    "bert_score pads a batch, which lifts a token's best match to 0 except in the longest sentence: one longer pair beside each batch makes it the same for all."
    from rsstudy.bertscore import bertscore, encoder
    if encoder() is None: pytest.skip('no encoder on this machine')
    predictions, references = captions(25, 1)
    long = ' '.join(['many planes'] * 40)
    theirs = encoder().scorer.score(predictions + [long], references + [[long]], batch_size=1_000)[2][:-1].numpy()
    ours, info = bertscore(predictions, references)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert family(info['name']) == 'bertscore_f1' and encoder().name in info['name']
    again, _ = bertscore(predictions[:7], references[:7], batch_size=3) # whatever else is in the batch, and from memory
    np.testing.assert_allclose(again, ours[:7], atol=1e-6)

def test_bertscore_of_hard_captions_is_defined():
    from rsstudy.bertscore import bertscore, encoder
    if encoder() is None: pytest.skip('no encoder on this machine')
    values, _ = bertscore(HARD, [['a road', h] for h in HARD])
    assert np.isfinite(values).all() and (abs(values) <= 1.00001).all()
    assert values[0] == values[1] == values[6] == 0 # nothing for the encoder to read

def test_without_wordnet_the_name_says_so(monkeypatch, data):
    import rsstudy.meteor, rsstudy.runs
    monkeypatch.setattr(rsstudy.runs, 'FALLBACKS', {})
    monkeypatch.setattr(rsstudy.meteor, 'wordnet', lambda: None)
    rsstudy.meteor._helpers.cache_clear()
    with pytest.warns(UserWarning, match='words and stems only'): scores = score_captions(*data, metrics='meteor')
    rsstudy.meteor._helpers.cache_clear()
    assert list(scores.corpus) == ['meteor-nltk_nosyn.v1'] and scores.info['meteor'] == {'wordnet': 'none'}

def test_without_encoder_bertscore_is_left_out(monkeypatch):
    import rsstudy.bertscore
    monkeypatch.setattr(rsstudy.bertscore, 'encoder', lambda: None)
    assert score_captions(['a'], [['a']], metrics=('bertscore', 'rouge_l')).corpus == {ROUGE_L: 1.}

@pytest.mark.parametrize('predictions, references', [
    ([''], [['']]), (['', ''], [['a road'], ['']]), (['a road'], [['a road']]), (['a road', ''], [['', ''], ['a']]), (HARD, [HARD]*len(HARD)), (['word ' * 10_000], [['word ' * 9_000, 'x']])])
def test_every_caption_has_a_value(predictions, references):
    scores = score_captions(predictions, references, metrics=('bleu', 'rouge_l', 'cider', 'meteor', 'shares'))
    for name, values in scores.per_image.items(): assert np.isfinite(values).all() and (values >= 0).all(), name
    for name, value in scores.corpus.items():
        if family(name) not in ('cider', 'length'): assert 0 <= value <= 1 + 1e-9, name

@pytest.mark.parametrize('predictions, references, message', [
    (['a'], [], '1 predictions but references for 0 images'), ([], [], 'at least one image'), (['a', 'b', 'c'], [['a'], ['b'], []], 'image 2 has no references'),
    (['a'], ['a road'], 'references of image 0 are one text'), ([None], [['a']], 'prediction 0 is NoneType'), (['a'], [['a', None]], 'a reference of image 0 is NoneType')])
def test_lists_that_do_not_fit_are_errors(predictions, references, message):
    with pytest.raises(ValueError, match=message): score_captions(predictions, references)

def test_round_trip_and_subsets(data, scores):
    back = Scores.from_json(json.loads(json.dumps(scores.to_json())))
    assert back.info == scores.info and set(back.per_image) == set(scores.per_image)
    for name, value in back.over().items(): assert value == pytest.approx(scores.corpus[name], abs=2e-6)
    some = np.arange(0, len(data[0]), 3)
    alone = score_captions([data[0][i] for i in some], [data[1][i] for i in some], metrics=('bleu', 'rouge_l', 'meteor', 'shares'))
    for name, value in scores.over(some).items():
        if family(name) != 'cider': assert value == pytest.approx(alone.corpus[name], abs=1e-9) # CIDEr keeps the whole set's document frequencies

def test_intervals_are_fast_and_match_the_scores(data, scores):
    rng = np.random.default_rng(0)
    values = rng.random((3, 1238))
    start = time.process_time()
    bootstrap_interval(values)
    assert time.process_time() - start < 1
    counts = scores.per_image['bleu_counts']
    for order, name in enumerate(BLEU, 1):
        interval = bootstrap_interval(counts, statistic=corpus_bleu(order))
        assert interval.value == pytest.approx(scores.corpus[name], abs=1e-12) and interval.low < interval.value < interval.high and interval.n == len(counts)
    assert verdict(paired_difference(counts, counts, statistic=corpus_bleu(4))) == 'tie'
    # a resample by weights is a resample by images
    drawn = rng.integers(0, len(counts), len(counts))
    weights = np.bincount(drawn, minlength=len(counts))[None].astype(float)
    assert corpus_bleu(4)(weights, counts[None])[0, 0] == pytest.approx(bleu_from_counts(counts[drawn].sum(0))[3], abs=1e-12)

def test_difference_covers_its_true_value():
    "200 simulated comparisons, three seeds against one, true difference 0.1: the 95 % interval holds it in about 95 % of them."
    hits = 0
    for i in range(200):
        rng = np.random.default_rng([3, i])
        hard = rng.exponential(1., 200)
        a = hard + .1 + rng.normal(0, .5, 200) + rng.normal(0, .01, (3, 1)) + rng.normal(0, .2, (3, 200))
        b = hard + rng.normal(0, .5, 200)
        interval = paired_difference(a, b, 400, rng)
        hits += interval.low <= .1 <= interval.high
    assert .89 <= hits/200 <= .99
