"""The site: nbdev processes the notebooks, Sphinx renders them. Offline, without Quarto; `make docs` calls it.

The chapters are taken as they ran, from results/<profile>/, where there are results; the parts from nbs/lib.
"""
import json, re, shutil, subprocess, sys
from pathlib import Path

import yaml
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ('riscm-nano', 'nano') # the first that has results is shown


def plain(cell:dict) -> dict:
    """A cell as Sphinx takes it: the title as a heading again, Quarto's directives as tags, nothing that is not notebook format."""
    source = ''.join(cell['source'])
    kept = {k: v for k, v in cell.items() if k in ('cell_type', 'id', 'source', 'outputs', 'execution_count', 'attachments')} | dict(metadata={})
    if cell['cell_type'] == 'raw' and source.startswith('---'):
        front = yaml.safe_load(source.strip().strip('-'))
        return dict(cell_type='markdown', id=cell['id'], metadata={}, source=f"# {front['title']}\n\n> {front.get('description', '')}")
    if cell['cell_type'] == 'code':
        if '#| echo: false' in source: kept['metadata'] = dict(tags=['remove-input'])
        kept['source'] = '\n'.join(line for line in source.split('\n') if not line.startswith('#|')).strip()
        for output in kept.get('outputs', []): # a signature starts with a rule and a link with attributes, which only Quarto reads
            if text := output.get('data', {}).get('text/markdown'):
                output['data']['text/markdown'] = re.sub(r'\{target=[^}]*\}', '', ''.join(text).strip().removeprefix('---').lstrip())
    return kept


def main() -> int:
    pages, site = ROOT/'docs/_build/pages', ROOT/'docs/_build/html'
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(proc_nbs(str(ROOT/'nbs'), n_workers=2), pages/'nbs', ignore=shutil.ignore_patterns('*.yml', '.*'))
    for chapter in pages.glob('nbs/[0-9]*.ipynb'):
        ran = next((f for p in PROFILES if (f := ROOT/'results'/p/chapter.name).is_file()), None)
        if ran: shutil.copy(ran, chapter)
    for page in pages.rglob('*.ipynb'):
        nb = json.loads(page.read_text(encoding='utf-8'))
        nb['cells'] = [plain(cell) for cell in nb['cells']]
        page.write_text(json.dumps(nb), encoding='utf-8')
    for name in ('conf.py', 'index.md'): shutil.copy(ROOT/'docs'/name, pages)
    status = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-b', 'html', pages, site]).returncode
    if not status: print(f'the site is in {site}/index.html')
    return status


if __name__ == '__main__': sys.exit(main())
