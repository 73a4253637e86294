"""07_comparison on made-up chapters in the schema that the chapters write: run for real by the runner, its JSON checked row by row."""
import json

import numpy as np
import pytest
from toys import ROOT, rsstudy

LEVELS = dict(none=.2, lora=.9, lora_vision=1., qlora=.88, prompt=.6, adapter=.95, adapter_pfeiffer=.9, full=1.1)
TRAINED = dict(none=0, lora=60_000, lora_vision=110_000, qlora=60_000, prompt=2_000, adapter=90_000, adapter_pfeiffer=45_000, full=3_800_000)
CHAPTERS = {'02_baseline': ['none'], '03_lora': ['lora', 'qlora', 'lora_vision'], '04_prompt_tuning': ['prompt'], '05_adapter': ['adapter', 'adapter_pfeiffer', 'full']}


def write_chapters(folder, n=120, sources=('NWPU', 'RSICD', 'UCM')):
    """Made-up results of 02 to 06 in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    hard = np.random.default_rng(0).normal(0, .4, n) # an image that is hard for one method is hard for all
    def run(name, seed):
        rng = np.random.default_rng([list(LEVELS).index(name), seed or 0])
        cider = (LEVELS[name] + hard + rng.normal(0, .2, n)).clip(0)
        length = rng.integers(8, 15, n)
        guess = np.stack([length - k for k in range(4)], 1)
        correct = rng.binomial(guess, (LEVELS[name]*.6/np.arange(1, 5)).clip(0, 1))
        counts = np.column_stack([correct, guess, length, np.full(n, 11)])
        per_image = {'cider-coco.v1': cider.tolist(), 'meteor-nltk.v1': (cider/4).tolist(), 'rouge_l-coco.v1': (cider/3).clip(0, 1).tolist(),
            'bertscore_f1-minilm.v1': (.5 + cider/5).tolist(), 'empty.v1': [0]*n, 'bleu_counts': counts.tolist()}
        scores = {k: float(np.mean(v)) for k, v in per_image.items() if k != 'bleu_counts'} | {f'bleu{k}-coco.v1': None for k in range(1, 5)} | {'distinct.v1': .5}
        return dict(seed=seed, scores=scores, per_image=per_image, history=[], predictions=['a plane']*n)
    for chapter, names in CHAPTERS.items():
        methods = {name: dict(label=name, config={}, lr=1e-3, sweep=[], runs=[run(name, s) for s in ([None] if name == 'none' else [0, 1, 2])],
            cost=dict(trainable_parameters=TRAINED[name], seconds=TRAINED[name]**.3 + 20 if TRAINED[name] else 0, peak_memory_bytes=2*10**9,
                adapter_bytes=4*TRAINED[name])) for name in names}
        data = dict(manifest=dict(settings=dict(rank=8)), image_ids=[f'{i}.jpg' for i in range(n)], sources=[sources[i % len(sources)] for i in range(n)], methods=methods)
        (folder/f'{chapter}.json').write_text(json.dumps(data))
    rng = np.random.default_rng(1)
    rows = [dict(method=m, attribution=a, metric=metric, value=(v := float(rng.normal(.3*(a not in ('random', 'blob')), .1))), low=v - .15, high=v + .15, n=24)
        for m in ('none', 'lora', 'qlora', 'prompt', 'adapter', 'full') for a in ('integrated_gradients', 'grad_cam', 'shap', 'pixelshap', 'random', 'blob')
        for metric in ('deletion_gain.v1', 'insertion_gain.v1', 'pointing_game.v1')]
    (folder/'06_xai.json').write_text(json.dumps(dict(manifest=dict(settings=dict(rank=8)), faithfulness=rows)))


def run_comparison(tmp_path, *words):
    return rsstudy(ROOT, 'run', '--only', '07_comparison', '--set', f'results={tmp_path}/results', '--set', f'work={tmp_path}/runs', '--set', 'resamples=200', *words)


def test_comparison(tmp_path):
    """Every row the comparison promises, the figures, and the table on the terminal."""
    write_chapters(tmp_path/'results/nano')
    run = run_comparison(tmp_path)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path/'results/nano/07_comparison.json').read_text())
    methods, groups = ['none', 'lora', 'qlora', 'prompt', 'adapter', 'full'], {'all', 'NWPU', 'RSICD', 'UCM'}
    assert [r['method'] for r in result['cost']] == methods
    assert {(r['method'], r['source']) for r in result['scores']} == {(m, s) for m in methods for s in groups}
    for row in result['scores']:
        assert set(row) == {'method', 'source', 'metric', 'value', 'low', 'high', 'n', 'seed'}
        if row['low'] is not None: assert row['low'] <= row['value'] <= row['high'], row
    full = [r for r in result['scores'] if (r['method'], r['source'], r['metric']) == ('full', 'all', 'cider-coco.v1')]
    assert [r['seed'] for r in full] == [0, 1, 2, None]
    chapter = json.loads((tmp_path/'results/nano/05_adapter.json').read_text())
    for row, source_run in zip(full, chapter['methods']['full']['runs']): assert row['value'] == pytest.approx(source_run['scores']['cider-coco.v1'], rel=1e-5)
    assert full[3]['value'] == pytest.approx(np.mean([r['value'] for r in full[:3]]), rel=1e-5)
    paired = [r for r in result['differences'] if r['metric'] == 'cider-coco.v1' and r['source'] == 'all']
    assert {(r['method'], r['against']): r['verdict'] for r in paired}['full', 'none'] == 'better'
    assert {(r['method'], r['against']): r['verdict'] for r in paired}['qlora', 'lora'] == 'tie'
    assert {r['method'] for r in result['variants']['scores']} == {'lora_vision', 'adapter_pfeiffer'}
    figures = sorted(f.name for f in (tmp_path/'results/nano').glob('*.png'))
    assert figures == [f'07_comparison_{name}.png' for name in ('faithfulness', 'quality_cost', 'sources')]
    assert 'Quality, cost and faithfulness: 120 test images, 3 seeds' in run.stdout and all(name in run.stdout for name in figures)


def test_other_images_are_refused(tmp_path):
    """Chapters that scored different images cannot be compared, and the message says which."""
    write_chapters(tmp_path/'results/nano')
    other = json.loads((tmp_path/'results/nano/04_prompt_tuning.json').read_text())
    other['image_ids'].reverse()
    (tmp_path/'results/nano/04_prompt_tuning.json').write_text(json.dumps(other))
    run = run_comparison(tmp_path)
    assert run.returncode == 1 and '04_prompt_tuning scored other images than 02_baseline' in run.stderr


def test_missing_chapter_is_named(tmp_path):
    """`--only 07_comparison` without the adapter chapter says so before anything runs."""
    write_chapters(tmp_path/'results/nano')
    (tmp_path/'results/nano/05_adapter.json').unlink()
    run = run_comparison(tmp_path)
    assert run.returncode == 2 and 'run 05_adapter first' in run.stderr and run.stderr.count('\n') == 1
