"""The command line: what is wrong is said in one sentence, with exit status 2, before anything runs."""
import subprocess, sys, time

import pytest
from toys import journal, project, rsstudy

ONE = 'journal("one"); write("01_one", 1)'
TWO = 'journal("two"); write("02_two", read("01_one") + 1) # reads "01_one"'


@pytest.mark.parametrize('words, sentence', [
    (['--set', 'rnak=4'], "unknown setting 'rnak'"),
    (['--set', 'rank=four'], "setting 'rank' must be int, got 'four'"),
    (['--set', 'rank=0'], "setting 'rank' must be at least 1"),
    (['--set', 'strict=maybe'], "setting 'strict' must be true or false, got 'maybe'"),
    (['--set', 'rank'], '--set wants SETTING=VALUE'),
    (['--seeds', '0,one'], "setting 'seeds' must be"),
    (['--seeds', '0', '--set', 'seeds=1'], "setting 'seeds' is given twice"),
    (['--data', 'nowhere'], 'data folder nowhere does not exist'),
    (['--data', 'nbs'], 'data folder nbs holds no captions.csv'),
    (['--data', 'hub:'], 'no dataset after hub:'),
    (['--profile', 'nanno'], "unknown profile 'nanno'"),
    (['--only', '03_lora'], "unknown notebook '03_lora': the study has 01_one, 02_two"),
    (['--only', '02_two'], 'run 01_one first'),
])
def test_wrong_requests(tmp_path, words, sentence):
    project(tmp_path, one=ONE, two=TWO)
    run = rsstudy(tmp_path, 'run', *words)
    assert run.returncode == 2
    assert run.stderr.startswith('rsstudy: ') and sentence in run.stderr and run.stderr.count('\n') == 1, run.stderr
    assert journal(tmp_path) == [] and not (tmp_path/'results').exists()


@pytest.mark.parametrize('words', [['--track', 'trackio'], ['--set', 'track=trackio']])
def test_tracker_missing(tmp_path, words):
    """A tracker that is not installed is said in one sentence, however it was asked for."""
    project(tmp_path, one=ONE)
    without = "import sys; sys.modules['trackio'] = None; from rsstudy.cli import main; sys.exit(main())"
    run = subprocess.run([sys.executable, '-c', without, 'run', *words], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("rsstudy: setting 'track' asks for trackio, which is not installed") and run.stderr.count('\n') == 1, run.stderr
    assert journal(tmp_path) == [] and not (tmp_path/'results').exists()


def test_only_and_overrides(tmp_path):
    """`--only` runs just that; overrides of every type reach the notebook as the settings they name."""
    project(tmp_path, one='write("01_one", [P.rank, P.lr, list(P.seeds), P.strict, P.lr_grid_lora])', two=TWO)
    run = rsstudy(tmp_path, 'run', '--only', '01_one', '--seeds', '3,4', *'--set rank=4 --set lr=1e-4 --set strict=true --set lr_grid_lora=1,2'.split())
    assert run.returncode == 0, run.stderr
    assert (tmp_path/'results/nano/01_one.json').read_text() == '[4, 0.0001, [3, 4], true, [1.0, 2.0]]'
    assert journal(tmp_path) == []
    assert rsstudy(tmp_path, 'run', '--only', '02_two', '--set', 'lr=none').returncode == 1 # it ran: the list cannot be added to
    assert journal(tmp_path) == ['two']


def test_help_is_complete_and_fast(tmp_path):
    began = time.monotonic()
    run = rsstudy(tmp_path, 'run', '--help')
    assert run.returncode == 0 and time.monotonic() - began < 3 # under a second on an idle machine
    for option in ('--profile', '--data', '--only', '--set', '--seeds', '--force', '--track', '--engine', '--address'): assert option in run.stdout
    loaded = 'import sys, rsstudy.cli; print([m for m in ("torch", "transformers", "pandas", "papermill", "ray") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', loaded], capture_output=True, text=True).stdout == '[]\n'


def test_profiles_table_version(tmp_path):
    project(tmp_path, one=ONE)
    assert rsstudy(tmp_path, '--version').stdout.startswith('rsstudy ')
    shown = rsstudy(tmp_path, 'profiles', '--profile', 'nano', '--set', 'rank=4').stdout
    assert any(line.split() == ['rank', '4'] for line in shown.splitlines())
    assert all(name in rsstudy(tmp_path, 'profiles').stdout for name in ('nano', 'riscm-nano', 'paligemma'))
    missing = rsstudy(tmp_path, 'table')
    assert missing.returncode == 2 and '--only 07_comparison' in missing.stderr and missing.stderr.count('\n') == 1
