"""What must always hold, for every tuning method: no leak, the base's own masks, labels, gradients, round trip, repeatability."""
import dataclasses, json, re, subprocess, sys
import numpy as np, pytest, torch
from rsstudy.batch import caption_loss, core, encode_example, pack, pixel_tensor
from rsstudy.generate import Captioner, generate_captions
from rsstudy.methods import load_tuned, methods, tuned_folder
from rsstudy.model import load_base
from rsstudy.prompt_tuning import PromptTuning
from rsstudy.settings import load_profile
from rsstudy.train import CaptionRows, TrainingPlan, fit
from rsstudy.tuning import attach, save_tuned

P = load_profile('nano', prompt_length=4, adapter_width=8, rank=4)
NAMES = list(methods(P))
TUNED = [name for name in NAMES if name != 'none']
CAPTIONS = ['two planes are parked near a runway .', 'two planes .', 'a gray runway with two white planes .', 'two planes .', 'some trees near a runway .']


def images(n=4):
    rng = np.random.default_rng(0)
    return [np.kron(rng.integers(0, 255, (8, 8, 3), np.uint8), np.ones((28, 28, 1), np.uint8)) for _ in range(n)]


def disturbed(name):
    "A captioner whose trained parameters have left their start, as after training."
    captioner = attach(P, methods(P)[name], seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in captioner.model.parameters():
            if parameter.requires_grad: parameter.add_(.02 * torch.randn(parameter.shape, generator=generator))
    return captioner


def written_out(captioner, caption):
    "One caption as PaliGemma's own processor writes it."
    return captioner.processor(images=images(1), text=[f'<image>{captioner.prompt}'], suffix=[caption], return_tensors='pt')


def logits_of(captioner, inputs):
    with torch.no_grad(): return core(captioner.model)(**{k: v for k, v in inputs.items() if k != 'labels'}).logits


@pytest.mark.parametrize('name', NAMES)
def test_no_leak(name):
    captioner = disturbed(name)
    inputs = written_out(captioner, CAPTIONS[0])
    before = logits_of(captioner, inputs)
    changed = dict(inputs, input_ids=inputs['input_ids'].clone())
    changed['input_ids'][0, -2] = captioner.processor.tokenizer.convert_tokens_to_ids('▁river')
    after = logits_of(captioner, changed)
    assert not torch.equal(before[0, -2:], after[0, -2:])
    assert torch.equal(before[0, :-2], after[0, :-2])


@pytest.mark.parametrize('name', NAMES)
def test_prefix_is_bidirectional(name):
    captioner = disturbed(name)
    inputs = written_out(captioner, CAPTIONS[0])
    last_of_prefix = int((inputs['token_type_ids'][0] == 0).sum()) - 2
    changed = dict(inputs, input_ids=inputs['input_ids'].clone())
    changed['input_ids'][0, last_of_prefix] = captioner.processor.tokenizer.convert_tokens_to_ids('▁river')
    assert not torch.equal(logits_of(captioner, inputs)[0, 0], logits_of(captioner, changed)[0, 0])


@pytest.mark.parametrize('name', NAMES)
def test_starts_as_the_base(name):
    method = methods(P)[name]
    if name == 'prompt': method = PromptTuning(length=4, start='') # from words it starts as those words, which its notebook tests
    captioner = attach(P, method)
    base = Captioner(*load_base(P, **method.base_options(P)), captioner.prompt)
    inputs = written_out(captioner, CAPTIONS[0])
    torch.testing.assert_close(logits_of(captioner, inputs), logits_of(base, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_labels_are_the_caption(name):
    captioner = attach(P, methods(P)[name])
    tokenizer = captioner.processor.tokenizer
    inputs = written_out(captioner, CAPTIONS[0])
    labelled = inputs['labels'][0][inputs['labels'][0] != -100].tolist()
    packed = pack([encode_example(captioner.processor, captioner.prompt, CAPTIONS[:1])], tokenizer.eos_token_id)
    assert labelled == packed['targets'].tolist() == [*tokenizer(CAPTIONS[0], add_special_tokens=False).input_ids, tokenizer.eos_token_id]


@pytest.mark.parametrize('name', NAMES)
def test_shared_prefix_equals_five_sequences(name):
    captioner = disturbed(name)
    eos, pixels = captioner.processor.tokenizer.eos_token_id, pixel_tensor(captioner.processor, images(1))

    def loss(captions):
        return caption_loss(captioner.model, pack([encode_example(captioner.processor, captioner.prompt, captions)], eos) | dict(pixel_values=pixels))

    with torch.no_grad(): (shared, count), separate = loss(CAPTIONS), [loss([caption]) for caption in CAPTIONS]
    assert count == sum(n for _, n in separate)
    torch.testing.assert_close(shared, sum(total for total, _ in separate), rtol=1e-5, atol=0)


@pytest.mark.parametrize('name', TUNED)
def test_gradients_reach_what_the_method_names(name):
    method, captioner = methods(P)[name], disturbed(name)
    rows = CaptionRows(captioner, images(), [CAPTIONS] * 4)
    total, count = caption_loss(captioner.model, rows.collate([rows[i] for i in range(4)]))
    (total / count).backward()
    for parameter_name, parameter in captioner.model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == bool(re.fullmatch(method.trains, parameter_name)), parameter_name


LOAD = '''
import dataclasses, json, sys
sys.path.insert(0, sys.argv[2])
from test_methods import P, TUNED, images
from rsstudy.generate import generate_captions
from rsstudy.methods import load_tuned
there = dataclasses.replace(P, work=sys.argv[1])
print(json.dumps({name: generate_captions(load_tuned(there, name, 0), images(), max_new_tokens=8) for name in TUNED}))
'''


def test_round_trip_in_a_fresh_process(tmp_path):
    there, captions = dataclasses.replace(P, work=str(tmp_path)), {}
    for name in TUNED:
        captioner = disturbed(name)
        save_tuned(captioner, methods(P)[name], tuned_folder(there, name, 0), seed=0)
        captions[name] = generate_captions(captioner, images(), max_new_tokens=8)
    said = subprocess.run([sys.executable, '-c', LOAD, str(tmp_path), str(__import__('pathlib').Path(__file__).parent)], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-2000:]
    assert json.loads(said.stdout.splitlines()[-1]) == captions


@pytest.mark.parametrize('name', [name for name in TUNED if name in ('lora', 'lora_vision', 'dora')])
def test_merged_gives_the_same_captions(name):
    captioner = disturbed(name)
    before = generate_captions(captioner, images(), max_new_tokens=8)
    merged = dataclasses.replace(captioner, model=captioner.model.merge_and_unload())
    assert generate_captions(merged, images(), max_new_tokens=8) == before


@pytest.mark.parametrize('name', TUNED)
def test_same_seed_same_result(name):
    def tuned():
        captioner = attach(P, methods(P)[name], seed=3)
        rows = CaptionRows(captioner, images(), [CAPTIONS] * 4)
        history = fit(captioner, rows, rows, TrainingPlan(lr=1e-3, epochs=1, batch_images=2, seed=3, samples=1, max_new_tokens=2))
        return history['losses'], methods(P)[name].tensors(captioner.model)

    (losses, first), (again, second) = tuned(), tuned()
    assert losses == again
    assert all(torch.equal(first[key], second[key]) for key in first | second)
