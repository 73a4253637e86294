"""The command line: what is wrong is said in one sentence, with exit status 2, before anything runs."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toys import NO_RISCM, RISCM, journal, project, rsstudy

ONE = 'journal("one"); write("01_one", 1)'
TWO = 'journal("two"); write("02_two", read("01_one") + 1) # reads "01_one"'


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--set", "rnak=4"], "unknown setting 'rnak'"),
        (["--set", "rank=four"], "setting 'rank' must be int, got 'four'"),
        (["--set", "rank=0"], "setting 'rank' must be at least 1"),
        (["--set", "strict=maybe"], "setting 'strict' must be true or false, got 'maybe'"),
        (["--set", "rank"], "--set wants SETTING=VALUE"),
        (["--seeds", "0,one"], "setting 'seeds' must be"),
        (["--seeds", "0", "--set", "seeds=1"], "setting 'seeds' is given twice"),
        (["--data", "nowhere"], "data folder nowhere does not exist"),
        (["--data", "nbs"], "data folder nbs holds no captions.csv"),
        (["--data", "hub:"], "no dataset after hub:"),
        (["--profile", "nanno"], "unknown profile 'nanno'"),
        (["--only", "03_lora"], "unknown notebook '03_lora': the study has 01_one, 02_two"),
        (["--only", "02_two"], "run 01_one first"),
    ],
)
def test_wrong_requests(tmp_path, words, sentence):
    project(tmp_path, one=ONE, two=TWO)
    run = rsstudy(tmp_path, "run", *words)
    assert run.returncode == 2
    assert run.stderr.startswith("rsstudy: ") and sentence in run.stderr and run.stderr.count("\n") == 1, run.stderr
    assert journal(tmp_path) == [] and not (tmp_path / "results").exists()


@pytest.mark.parametrize("words", [["--track", "trackio"], ["--set", "track=trackio"]])
def test_tracker_missing(tmp_path, words):
    """A tracker that is not installed is said in one sentence, however it was asked for."""
    project(tmp_path, one=ONE)
    without = "import sys; sys.modules['trackio'] = None; from rsstudy.commands.main import main; sys.exit(main())"
    run = subprocess.run([sys.executable, "-c", without, "run", *words], cwd=tmp_path, capture_output=True, text=True)
    assert (
        run.returncode == 2
        and run.stderr.startswith("rsstudy: setting 'track' asks for trackio, which is not installed")
        and run.stderr.count("\n") == 1
    ), run.stderr
    assert journal(tmp_path) == [] and not (tmp_path / "results").exists()


def test_only_and_overrides(tmp_path):
    """`--only` runs just that; overrides of every type reach the notebook as the settings they name."""
    project(tmp_path, one='write("01_one", [P.rank, P.lr, list(P.seeds), P.strict, P.lr_grid_lora])', two=TWO)
    words = "--only 01_one --seeds 3,4 --set rank=4 --set lr=1e-4 --set strict=true --set lr_grid_lora=1,2"
    run = rsstudy(tmp_path, "run", *words.split())
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "results/local/nano/01_one.json").read_text() == "[4, 0.0001, [3, 4], true, [1.0, 2.0]]"
    assert journal(tmp_path) == []
    run = rsstudy(tmp_path, "run", "--only", "02_two", "--set", "lr=none")
    assert run.returncode == 1  # it ran: the list cannot be added to
    assert journal(tmp_path) == ["two"]


LOADED = """
import sys, rsstudy.commands.main
print([m for m in ("torch", "transformers", "pandas", "papermill", "ray") if m in sys.modules])
"""


def test_help_is_complete_and_fast(tmp_path):
    began = time.monotonic()
    run = rsstudy(tmp_path, "run", "--help")
    assert run.returncode == 0 and time.monotonic() - began < 3  # under a second on an idle machine
    for option in ("--profile", "--data", "--only", "--set", "--seeds", "--force", "--track", "--engine", "--address"):
        assert option in run.stdout
    loaded = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True)
    assert loaded.stdout == "[]\n"


def test_profiles_table_version(tmp_path):
    project(tmp_path, one=ONE)
    assert rsstudy(tmp_path, "--version").stdout.startswith("rsstudy ")
    shown = rsstudy(tmp_path, "profiles", "--profile", "nano", "--set", "rank=4").stdout
    assert any(line.split() == ["rank", "4"] for line in shown.splitlines())
    assert all(name in rsstudy(tmp_path, "profiles").stdout for name in ("nano", "riscm-nano", "paligemma"))
    missing = rsstudy(tmp_path, "table")
    assert missing.returncode == 2 and "--only 07_comparison" in missing.stderr and missing.stderr.count("\n") == 1


THINGS = "road lake plane tree field house".split()
CAPTIONS = '{0}.jpg,There is a {0} .,A {0} near the sea .,"A {0}, a wall .",one {0},some {0}'


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Human captions of six images in RISC's layout, two in a split of their own, and two systems."""
    from rsstudy.common.files import FALLBACKS

    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(FALLBACKS, "partial", raising=False)
    rows = ["source,split,image,caption_1,caption_2,caption_3,caption_4,caption_5\n"]
    for i, thing in enumerate(THINGS):
        source, split = "UCM" if i % 2 else "NWPU", "test" if i < 4 else "val"
        rows.append(f"{source},{split},{CAPTIONS.format(thing)}\n")
    Path("captions.csv").write_text("".join(rows))
    lines(
        tmp_path / "mine.jsonl",
        [dict(image=f"resized/{w}.jpg", caption=f"there is a {w}") for w in reversed(THINGS[:4])],
    )
    Path("theirs.csv").write_text("file_name,text\n" + "".join(f'{w}.jpg,"a lake, a wall"\n' for w in THINGS[:4]))
    return tmp_path


def score(capsys, *words):
    """Exit status, standard output and standard error of `rsstudy score`, on quick metrics."""
    from rsstudy.commands.main import main

    metrics = [] if "--metrics" in words else ["--metrics", "bleu,cider"]
    resamples = [] if "--resamples" in words else ["--resamples", "100"]
    status = main(["score", *map(str, words), *metrics, *resamples])
    output = capsys.readouterr()
    return status, output.out, output.err


def test_score_equals_score_captions(files, capsys):
    """The command's scores are those of `score_captions`, whatever the order of the lines and the folder in the names.

    The file holds them with digests, sources and intervals.
    """
    from rsstudy.metrics.registry import score_captions
    from rsstudy.metrics.scores import find_metric
    from rsstudy.report.tuning import read_scores
    from rsstudy.stats.intervals import bootstrap_interval

    status, out, err = score(
        capsys, "mine.jsonl", "--references", "captions.csv", "--split", "test", "--out", "new/scores.json"
    )
    assert (status, err) == (0, "rsstudy: scores of mine in new/scores.json\n")
    scores, data = read_scores("new/scores.json")
    references = [
        [f"there is a {w} .", f"a {w} near the sea .", f"a {w}, a wall .", f"one {w}", f"some {w}"] for w in THINGS[:4]
    ]
    expected = score_captions([f"there is a {w}" for w in THINGS[:4]], references, metrics=("bleu", "cider"))
    assert scores.corpus == pytest.approx(expected.corpus, rel=2e-6, abs=2e-6)
    for name, values in expected.per_image.items():
        assert scores.per_image[name] == pytest.approx(values, abs=2e-5)
    cider = find_metric(expected.corpus, "cider")
    interval = bootstrap_interval(expected.per_image[cider], 100)
    assert data["intervals"][cider] == pytest.approx(dict(low=interval.low, high=interval.high), abs=2e-5)
    assert data["image_ids"] == [f"{w}.jpg" for w in THINGS[:4]]
    assert data["sources"] == ["NWPU", "UCM"] * 2 and data["resamples"] == 100
    assert data["by_source"]["UCM"]["scores"][cider] == pytest.approx(
        expected.per_image[cider][[1, 3]].mean(), abs=2e-5
    )
    assert data["files"] == dict(predictions="mine.jsonl", references="captions.csv", split="test")
    assert data["left_out"] == {}
    shown = f"{scores.corpus[cider]:.4f} [{interval.low:.4f}, {interval.high:.4f}]"
    for text in (cider, "all (4 images)", "NWPU (2 images)", shown):
        assert text in out


def test_score_compares_systems(files, capsys):
    """Several files are systems: one file of scores each, paired differences, tables for a paper."""
    both = ["mine.jsonl", "theirs.csv", "--references", "captions.csv", "--split", "test"]
    status, out, _err = score(capsys, *both, "--out", "scores")
    assert status == 0 and sorted(f.name for f in Path("scores").iterdir()) == ["mine.json", "theirs.json"]
    assert re.search(r"theirs - mine +cider\S+ +-\d\.\d{4} \[-\d\.\d{4}, -\d\.\d{4}\] +lower", out)
    status, markdown, _ = score(capsys, *both, "--table", "markdown")
    assert status == 0 and "4 test images" in markdown and re.search(r"\| mine \| \*\*\d\.\d{3}\*\* \[", markdown)
    status, latex, _ = score(capsys, *both, "--table", "latex", "--metrics", "cider")
    assert (
        status == 0 and latex.count("{") == latex.count("}") and r"mine & \textbf{" in latex and r"\bottomrule" in latex
    )


def test_score_partial(files, capsys):
    """What was left out is announced, recorded and not scored."""
    lines(Path("some.jsonl"), [dict(image=f"{w}.jpg", prediction=f"a {w}") for w in (*THINGS[:3], "moon")])
    words = ["some.jsonl", "--references", "captions.csv", "--split", "test", "--out", "some.json"]
    status, _out, err = score(capsys, *words)
    assert status == 2 and "some.jsonl line 4: image 'moon.jpg' is not among the 4 images" in err
    assert not Path("some.json").exists()
    with pytest.warns(UserWarning, match="partial: 3 of 4 images are scored, 1 captions belong to no image"):
        status, _out, _err = score(capsys, *words, "--partial")
    data = json.loads(Path("some.json").read_text())
    assert status == 0
    assert data["left_out"] == dict(images_without_caption=1, captions_of_unknown_images=1)
    assert data["image_ids"] == [f"{w}.jpg" for w in THINGS[:3]]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["none.jsonl"], "none.jsonl is missing"),
        (["folder.jsonl"], "folder.jsonl is a folder: a file is needed"),
        (["mine.jsonl"], "mine has no caption for 2 of 6 images, such as 'field.jpg' (captions.csv line 6)"),
        (["mine.jsonl", "--split", "train"], "captions.csv has no images of split 'train': it has test, val"),
        (["mine.jsonl", "--split", "val", "--partial"], "no image of the references has a caption of every system"),
        (["mine.jsonl", "mine.jsonl", "--split", "test"], "predictions are given twice: mine.jsonl"),
        (["mine.jsonl", "--split", "test", "--metrics", "blue"], "unknown metric 'blue': allowed are bleu, "),
        (["mine.jsonl", "--split", "test", "--resamples", "0"], "--resamples must be at least 1, got 0"),
        (["mine.jsonl", "--split", "test", "--out", "."], "--out . is a folder"),
        (
            ["mine.jsonl", "--split", "test", "--out", "captions.csv/scores.json"],
            "--out captions.csv/scores.json: captions.csv is no folder",
        ),
        (
            ["mine.jsonl", "--split", "test", "--out", "./mine.jsonl"],
            "--out mine.jsonl would write over mine.jsonl, which is to be read",
        ),
        (["mine.jsonl", "theirs.csv", "--split", "test", "--out", "captions.csv"], "--out captions.csv is a file"),
        (["mine.jsonl", "--split", "test", "--references", "none.csv"], "none.csv is missing"),
        (
            ["mine.jsonl", "--split", "test", "--references", "theirs.csv"],
            "theirs.csv lacks the columns image, caption_1",
        ),
        (
            ["double.jsonl", "--split", "test"],
            "double.jsonl line 2: image 'x/road.jpg' has a caption already, by double.jsonl line 1",
        ),
        (["broken.jsonl", "--split", "test"], "broken.jsonl line 2: not JSON"),
        (["truth.jsonl", "--split", "test"], "truth.jsonl line 1 has caption and prediction: exactly one"),
    ],
)
def test_score_wrong_requests(files, capsys, words, sentence):
    """One sentence that names the file and the place, exit status 2, nothing printed or written."""
    lines(Path("double.jsonl"), [dict(image="road.jpg", caption="a"), dict(image="x/road.jpg", caption="a")])
    Path("broken.jsonl").write_text('{"image": "road.jpg", "caption": "a"}\n{"image"\n')
    lines(Path("truth.jsonl"), [dict(image="road.jpg", caption="a", prediction="b")])
    Path("folder.jsonl").mkdir()
    before = {f: f.is_file() and f.read_bytes() for f in files.rglob("*")}
    status, out, err = score(capsys, *words, *([] if "--references" in words else ["--references", "captions.csv"]))
    assert status == 2 and out == "" and err.startswith("rsstudy: ") and sentence in err and err.count("\n") == 1, err
    assert {f: f.is_file() and f.read_bytes() for f in files.rglob("*")} == before


def test_score_is_a_command(files):
    """From a shell, in a folder that has nothing of the project."""
    words = "theirs.csv --references captions.csv --split test --metrics cider --resamples 50"
    run = rsstudy(files, "score", *words.split())
    assert run.returncode == 0 and "theirs, 95 % intervals" in run.stdout, run.stderr
    assert rsstudy(files, "score", "theirs.csv").returncode == 2  # no references


@pytest.mark.skipif(not (RISCM / "captions.csv").is_file(), reason=NO_RISCM)
def test_score_real_captions(tmp_path, capsys):
    """The first human caption of every image of the real test split, scored against all five.

    BLEU-1 is 1, every source has its column.
    """
    from rsstudy.data.badrows import BadRows
    from rsstudy.data.table import read_table
    from rsstudy.metrics.scores import find_metric
    from rsstudy.report.tuning import read_scores

    rows = [r for r in read_table(RISCM / "captions.csv", BadRows("", ""))[0] if r.split == "test"]
    path = lines(tmp_path / "people.jsonl", [dict(file_name=f"resized/{r.image}", text=r.captions[0]) for r in rows])
    status, _out, _ = score(
        capsys, path, "--references", RISCM / "captions.csv", "--split", "test", "--out", tmp_path / "people.json"
    )
    scores, data = read_scores(tmp_path / "people.json")
    assert status == 0 and data["info"]["images"] == len(rows)
    assert list(data["by_source"]) == sorted({r.source for r in rows})
    assert scores.corpus[find_metric(scores.corpus, "bleu1")] == pytest.approx(1, abs=1e-6)


def test_table_for_a_paper(tmp_path):
    """`rsstudy table --style` prints the comparison's rows, ties and floors."""
    project(tmp_path)
    every_row = dict(source="all", metric="cider-coco.v2", n=96)
    values = dict(none=0.2, lora=0.5, full=0.55, constant=0.1)
    rows = [
        dict(method=method, seed=seed, value=value, low=value - 0.1, high=value + 0.1, **every_row)
        | dict(kind="floor" if method == "constant" else "method")
        for method, value in values.items()
        for seed in (0, None)
    ]
    tie = dict(method="full", against="lora", value=0.05, low=-0.1, high=0.2, verdict="tie", **every_row)
    result = dict(
        scores=rows,
        variants=dict(scores=[]),
        labels=dict(none="untuned base", full="full & frank"),
        differences=[tie],
    )
    (tmp_path / "results/local/nano").mkdir(parents=True)
    (tmp_path / "results/local/nano/07_comparison.json").write_text(json.dumps(result))
    markdown = rsstudy(tmp_path, "table", "--style", "markdown").stdout
    for text in ("| untuned base | 0.200 [0.100, 0.300] |", "| lora | _0.500_ [", "| full & frank | **0.550** ["):
        assert text in markdown
    assert markdown.index("floors and ceilings") < markdown.index("| constant | 0.100")
    latex = rsstudy(tmp_path, "table", "--style", "latex").stdout
    assert r"full \& frank & \textbf{0.550} \\" in latex and "96 test images, 1 seed," in latex
    assert latex.count(r"\midrule") == 2
    missing = rsstudy(tmp_path, "table", "--style", "latex", "--profile", "riscm-nano")
    assert missing.returncode == 2 and "--only 07_comparison" in missing.stderr and missing.stderr.count("\n") == 1
