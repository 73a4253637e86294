"""All is said in pyproject.toml but one step: notebooks and settings travel in the wheel.

So a study runs without the repository.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class WithStudy(build_py):
    """Copies settings.ini and the numbered notebooks to rsstudy/study_files of the build, never of the source tree."""

    def run(self):
        super().run()
        if self.editable_mode:
            return  # an editable install reads them where they lie
        for file in [ROOT / "settings.ini", *sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))]:
            target = Path(self.build_lib, "rsstudy", "study_files", file.relative_to(ROOT))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


setup(cmdclass=dict(build_py=WithStudy))
