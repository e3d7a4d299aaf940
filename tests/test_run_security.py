"""A configuration is data and stays data on its way through papermill; what the environment holds, tokens above all, stays there."""
import ast, copy, importlib.util, os, subprocess, sys
from pathlib import Path
import pytest
import yaml
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from dal_med.run.config import Config, notebook_config, read_yaml
from dal_med.run.grid import read_sweep
from tiny import tiny

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT/'nbs'/'experiments'/'active_learning.ipynb'
HOSTILE = ['"; import os; os.system("touch owned") #', "'''\nimport os\n'''", '\\"; raise SystemExit #', '\\', '\\\\"', '"""\nx = 1\n"""', '{seed}', '%time 1', '!touch owned', 'a\r\nimport os', '\u2028import os', '\x00', 'é "" \\n', '# type: ignore']


def injected(parameters: dict) -> list:
    "The lines of the cell that papermill puts into the template."
    notebook = parameterize_notebook(load_notebook_node(str(TEMPLATE)), copy.deepcopy(parameters), kernel_name='python3', language='python')
    (cell,) = [c for c in notebook.cells if 'injected-parameters' in c.metadata.tags]
    return ast.parse(cell.source).body


@pytest.mark.parametrize('text', HOSTILE, ids=ascii)
def test_a_value_is_never_code(text):
    "Whatever a text holds, the injected cell assigns it, and does nothing else."
    parameters = dict(dataset=text, strategy=text, classifier=dict(name=text, weights=text), cache=text, seed=3)
    lines = injected(parameters)
    assert all(isinstance(l, ast.Assign) for l in lines)
    assert {l.targets[0].id: ast.literal_eval(l.value) for l in lines} == parameters
    assert notebook_config({**parameters}, set()).dataset == text


@pytest.mark.parametrize('name', ['seed = 0; import os; os.system("touch owned") #', 'seed\nimport os', 'training.steps=1;x', '__builtins__'])
@pytest.mark.parametrize('section', ['parameters', 'vary'])
def test_a_name_is_never_code(tmp_path, name, section):
    "papermill writes a parameter's name as it stands; only names of the configuration get there."
    path = tmp_path/'sweep.yaml'
    path.write_text(yaml.safe_dump({'notebook': str(TEMPLATE), section: {name: [1] if section == 'vary' else 1}}))
    with pytest.raises(ValueError, match='Nothing was run'): read_sweep(path, tmp_path/'out')
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('text', ['dataset: !!python/object/apply:os.system [touch owned]', 'dataset: !!python/name:os.system', 'seed: !!python/object/new:int [1]', 'dataset: !!binary Iitmb28rIg==',
                                  'dataset: !!set {\'"+__import__("os").getcwd()+"\'}', 'training: !!omap [steps: 1]', 'seed: !unknown 1'])
def test_yaml_builds_no_objects(tmp_path, text):
    "Neither as a run's file nor as a part of a sweep. Bytes and sets are safe to read, but papermill would print them into the notebook with their quotes."
    (tmp_path/'run.yaml').write_text(text)
    with pytest.raises(ValueError): read_yaml(tmp_path/'run.yaml')
    (tmp_path/'sweep.yaml').write_text(f'notebook: {TEMPLATE}\nparameters: {{{text}}}\n')
    with pytest.raises(ValueError): read_sweep(tmp_path/'sweep.yaml', tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_no_token_reaches_a_record(tmp_path):
    "The smoke notebook runs, mirrored offline, with tokens in its environment; none is in anything that it leaves behind."
    tokens = {k: f'not-a-real-{k.lower()}-7c1d5b' for k in ('WANDB_API_KEY', 'HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'MLFLOW_TRACKING_PASSWORD', 'MLFLOW_TRACKING_TOKEN', 'AWS_SECRET_ACCESS_KEY', 'SOME_VARIABLE')}
    tracker = 'wandb' if importlib.util.find_spec('wandb') else 'tensorboard'
    config = tiny(tmp_path/'run', tmp_path/'cache', rounds=2, tracker=tracker)
    parameters = {k: v for k, v in config.model_dump().items() if v != Config().model_dump()[k]}
    (tmp_path/'run.yaml').write_text(yaml.safe_dump(parameters))
    (tmp_path/'home').mkdir()
    done = subprocess.run([sys.executable, '-m', 'papermill', str(TEMPLATE), str(tmp_path/'out.ipynb'), '-k', 'python3', '--no-progress-bar', '-f', str(tmp_path/'run.yaml')], cwd=tmp_path, capture_output=True,
                          env={**os.environ, **tokens, 'HOME': str(tmp_path/'home'), 'OMP_NUM_THREADS': '1'}, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    files = [p for p in tmp_path.rglob('*') if p.is_file()]
    assert {'out.ipynb', 'run.json', 'test.parquet'} <= {p.name for p in files} and any('tracker' in p.parts for p in files)
    for where, content in [('the output of papermill', done.stdout + done.stderr), *((p, p.read_bytes()) for p in files)]:
        for name, token in tokens.items(): assert token.encode() not in content, f'{where} holds {name}'
    text = (tmp_path/'out.ipynb').read_text()
    for name in tokens: assert name not in text
