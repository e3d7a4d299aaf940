"""What the project promises about itself."""
import json, re, subprocess, sys
from pathlib import Path
import pytest
from papermill import inspect_notebook
from dal_med.run.config import make_config, read_yaml
from dal_med.run.grid import read_sweep

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = [*(ROOT/'nbs'/'experiments').glob('*.ipynb'), *(ROOT/'nbs'/'analysis').glob('*.ipynb'), *(ROOT/'nbs'/'benchmarks').glob('*.ipynb')]
ROOMS = {'data': 1, 'learn': 2, 'query': 3, 'generate': 4, 'measure': 5, 'loop': 6, 'run': 7}


def test_import_is_light():
    code = "import sys, dal_med; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


@pytest.mark.parametrize('notebook', TEMPLATES, ids=lambda p: p.stem)
def test_one_parameters_cell(notebook):
    "nbdev_clean must have left papermill's tag where it was; without it the defaults would win silently."
    cells = json.loads(notebook.read_text())['cells']
    assert sum('parameters' in c['metadata'].get('tags', []) for c in cells) == 1


@pytest.mark.parametrize('path', sorted((ROOT/'nbs'/'experiments').glob('*.yaml')), ids=lambda p: p.stem)
def test_experiment_files_are_valid(path):
    content = read_yaml(path)
    own = path.with_suffix('.ipynb')  # a notebook of the same name takes parameters of its own
    if own.exists(): assert set(content) <= set(inspect_notebook(own))
    elif 'vary' in content: assert len(read_sweep(path, 'out').runs) > 1
    else: make_config(content, path.name)


def test_rooms_import_downwards():
    "A room imports only from rooms with a smaller number; query and generate know nothing of each other."
    for path in (ROOT/'dal_med').rglob('*.py'):
        room = path.relative_to(ROOT/'dal_med').parts[0]
        if room not in ROOMS: continue
        dots = r'\.' * len(path.relative_to(ROOT/'dal_med').parts)  # nbdev writes imports of its own package as relative ones
        used = set(re.findall(rf'^(?:from|import) (?:dal_med\.|{dots}(?=\w))(\w+)', path.read_text(), re.M))
        for other in used:
            assert other == room or ROOMS[other] < ROOMS[room], f'{path} imports from {other}'
            assert {room, other} != {'query', 'generate'}, f'{path} imports from {other}'
            synthetic = path.parts[-2] == 'synthetic'  # feature extractor and segmenter are networks
            assert room != 'measure' or other in ('data', 'measure') or (synthetic and other == 'learn'), f'{path}: measures need only arrays, tables and atomic files'


def test_misspelt_parameter_stops_papermill(tmp_path):
    "papermill alone would warn and run the default."
    done = subprocess.run([sys.executable, '-m', 'papermill', str(ROOT/'nbs'/'experiments'/'active_learning.ipynb'), str(tmp_path/'out.ipynb'), '-k', 'python3',
                           '-p', 'stratgy', 'random', '-p', 'folder', str(tmp_path/'run'), '--no-progress-bar'], capture_output=True, text=True)
    assert done.returncode != 0
    assert "unknown parameter 'stratgy': did you mean 'strategy'?" in done.stderr
    assert not (tmp_path/'run').exists()


def test_container_installs_what_was_tested():
    "Dockerfile and devcontainer go through the Makefile, whose environment is the tested one; the server binds to loopback, and not as root."
    container = json.loads((ROOT/'.devcontainer'/'devcontainer.json').read_text())
    dockerfile = ROOT/'.devcontainer'/container['build']['dockerfile']
    assert dockerfile.resolve() == ROOT/'Dockerfile'
    text, makefile = dockerfile.read_text(), (ROOT/'Makefile').read_text()
    assert 'constraints.txt' in text and 'make setup' in text and container['postCreateCommand'] == 'make setup'
    assert re.search(r'^setup: \$\(VENV\)/ready$', makefile, re.M) and 'pip install' in makefile and '-c constraints.txt' in makefile
    for name in re.search(r'^COPY --chown=\S+ (Makefile .*) \./$', text, re.M)[1].split(): assert (ROOT/name).exists()
    assert text.index('\nUSER ') < text.index('make setup') and '${JUPYTER_IP:-127.0.0.1}' in text
    assert f'target={re.search("^WORKDIR (.+)$", text, re.M)[1]},' in container['workspaceMount']
    assert set(container['build']['args']) <= set(re.findall(r'^ARG (\w+)', text, re.M))
    assert {'.git', 'runs', 'prepared'} <= set((ROOT/'.dockerignore').read_text().split())
