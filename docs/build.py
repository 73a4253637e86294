"""The site: nbdev processes the notebooks, Sphinx renders them. Offline, without Quarto; `make docs` calls it.

The chapters are taken as they ran, from results/<profile>/, where there are results; the parts from nbs/lib.
"""
import shutil, subprocess, sys
from pathlib import Path

from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ('riscm-nano', 'nano') # the first that has results is shown


def main() -> int:
    pages, site = ROOT/'docs/_build/pages', ROOT/'docs/_build/html'
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(proc_nbs(str(ROOT/'nbs'), n_workers=2, force=True), pages/'nbs', ignore=shutil.ignore_patterns('*.yml', '.*'))
    shutil.rmtree(ROOT/'_proc', ignore_errors=True)
    for chapter in pages.glob('nbs/[0-9]*.ipynb'):
        ran = next((f for p in PROFILES if (f := ROOT/'results'/p/chapter.name).is_file()), None)
        if ran: shutil.copy(ran, chapter)
    for name in ('conf.py', 'index.md'): shutil.copy(ROOT/'docs'/name, pages)
    status = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-b', 'html', pages, site]).returncode
    if not status: print(f'the site is in {site}/index.html')
    return status


if __name__ == '__main__': sys.exit(main())
