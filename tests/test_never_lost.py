"""A run that is killed, at any moment, ends bit for bit where an undisturbed run ends."""

import json
import subprocess
import sys

import pytest

# One process imports everything once and forks a child a run.
# The parent computes nothing itself, so the children's threads start fresh.
SCRIPT = r'''
import json, os, random, signal, sys, time
import numpy as np, torch
torch.set_num_threads(1)
from pathlib import Path
from safetensors.torch import load_file
import peft, rsstudy.metrics.cider
from rsstudy.common import files
from rsstudy.model.features import cache_features
from rsstudy.model.generate import Captioner
from rsstudy.tuning.lora import Lora
from rsstudy.model.nano import nano_model, nano_processor
from rsstudy.training.loader import CaptionRows
from rsstudy.training.fit import fit
from rsstudy.training.plan import TrainingPlan
here = Path(sys.argv[1])
PLAN = TrainingPlan(
    lr=5e-3, epochs=6, batch_images=2, evaluate_every=7, checkpoint_every=3,
    val_captions=3, max_new_tokens=5, patience=3, warmup=.2)

def run(folder, **more):
    """LoRA with dropout on eight images, by a plan that evaluates, saves and may stop early, each in its own rhythm."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (224, 224, 3), np.uint8) for _ in range(8)]
    colours = 'red green blue gray'.split() * 2
    captions = [[f'a {colours[i]} field .', 'a field near a road .'][:1 + i % 2] for i in range(8)]
    torch.manual_seed(0)
    captioner = Lora(dropout=.2).attach(Captioner(nano_model(seed=0), nano_processor()))
    rows = CaptionRows(captioner, images, captions, features=cache_features(captioner, images))
    history = fit(captioner, rows, rows.first(4), PLAN, here/folder, **more)
    kept = {k: history[k] for k in ('losses', 'evaluations', 'best_step', 'collapse')}
    weights = {n: p.tolist() for n, p in captioner.model.named_parameters() if p.requires_grad}
    (here/f'{folder}.json').write_text(json.dumps(kept | dict(weights=weights)))

def child(job, *args):
    pid = os.fork()
    if pid: return pid
    try: job(*args); os._exit(0)
    except BaseException as error: print(f'{type(error).__name__}: {error}', file=sys.stderr); os._exit(1)

def end(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def full_disk(folder):
    """Every write of tensors after the second fails in its middle."""
    import safetensors.torch
    real, calls = safetensors.torch.save_file, []
    def save_file(tensors, path):
        calls.append(1)
        if len(calls) <= 2: return real(tensors, path)
        Path(path).write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    safetensors.torch.save_file = save_file
    run(folder)

assert end(child(run, 'undisturbed')) == 0
rng, seen, steps = random.Random(), {''}, []
def newest(): return max((p.name for p in (here/'killed').glob('step-*')), default='')
while len(steps) < 5:  # each child is killed some time after its own first checkpoint
    pid, deadline = child(run, 'killed'), time.monotonic() + 60
    while newest() in seen and time.monotonic() < deadline: time.sleep(.01)
    time.sleep(rng.uniform(0, .1))
    os.kill(pid, signal.SIGKILL)
    if end(pid) != -signal.SIGKILL or not newest(): break  # it had ended before
    steps.append(newest())
    seen.add(steps[-1])
kills = len(steps)
assert end(child(run, 'killed')) == 0
failed = end(child(full_disk, 'full'))
left = sorted(p.name for p in (here/'full').iterdir() if p.name != '.lock')
assert end(child(run, 'full')) == 0
holder = child(lambda: exec("with files.locked(here/'held'): (here/'held'/'ready').touch(); time.sleep(60)"))
while not (here/'held'/'ready').exists(): time.sleep(.05)
refused = end(child(run, 'held'))
os.kill(holder, signal.SIGKILL); end(holder)
again = end(child(run, 'held'))
print(json.dumps(dict(kills=kills, steps=steps, failed=failed, left=left, refused=refused, again=again)))
'''


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    said = subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, timeout=900)
    assert said.returncode == 0, said.stderr[-3000:]
    return folder, json.loads(said.stdout.splitlines()[-1]), said.stderr


def outcome(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_killed_at_random_moments(story):
    folder, facts, _ = story
    assert facts["kills"] >= 3 and facts["steps"] == sorted(
        set(facts["steps"])
    )  # each time in its middle, and further on
    assert outcome(folder, "killed") == outcome(folder, "undisturbed")
    assert len(outcome(folder, "killed")["losses"]) > 7  # more than one evaluation


def test_disk_full(story):
    folder, facts, said = story
    assert (
        facts["failed"] == 1 and "could not be written, the one before it is whole" in said and "No space left" in said
    )
    assert facts["left"] == ["step-00000006"]  # the last whole one, and nothing half-written
    assert outcome(folder, "full") == outcome(folder, "undisturbed")


def test_second_process_refuses(story):
    folder, facts, said = story
    assert facts["refused"] == 1 and "is in use by another run" in said
    assert facts["again"] == 0 and outcome(folder, "held") == outcome(
        folder, "undisturbed"
    )  # the lock goes with its process
