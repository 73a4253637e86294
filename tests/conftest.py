"""What several test files explain, and the browser that they look through."""

import os
import shutil

import numpy as np
import pytest

# These files take a minute or more each. They come first: one that began last would be waited for by all other workers
LONG = ("test_end_to_end", "test_docs", "test_ray", "test_package", "test_never_lost", "test_caption", "test_study")


def pytest_collection_modifyitems(items):
    def place(item):
        return LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG)

    items.sort(key=place)


@pytest.fixture(scope="session")
def image():
    "Coloured blocks under a little noise, (224, 224, 3) uint8."
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.integers(0, 200, (7, 7, 3)), np.ones((32, 32, 1), int))
    return (blocks + rng.integers(0, 40, (224, 224, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def browser():
    "Headless Chromium: the machine's own, or playwright's."
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the browser test needs playwright: pip install 'rsstudy[dev]'"
    )
    where = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as p:
        if not where and not os.path.exists(p.chromium.executable_path):
            pytest.skip("the browser test needs Chromium: playwright install chromium, or one on the path")
        chromium = p.chromium.launch(executable_path=where, args=["--no-sandbox"])
        yield chromium
        chromium.close()
