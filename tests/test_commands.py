"""Every command takes its options in either spelling, installed or run as a module."""
import configparser, re, subprocess, sys
from pathlib import Path
import pytest
from dal_med.data.command import spelled

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = configparser.ConfigParser(interpolation=None)
SETTINGS.read(ROOT/'settings.ini')
COMMANDS = dict(line.split('=') for line in SETTINGS['DEFAULT']['console_scripts'].split())


def call(name, *options):
    "The command as its script calls it."
    module, function = COMMANDS[name].split(':')
    program = f'__file__ = {name!r}; from {module} import {function}; {function}()'
    return subprocess.run([sys.executable, '-c', program, *options], capture_output=True, text=True)


@pytest.mark.parametrize('name', COMMANDS)
def test_either_spelling(name):
    if name == 'dal_monitor': pytest.importorskip('panel')
    said = call(name, '--help')
    assert said.returncode == 0 and 'with hyphens or with underscores' in said.stdout, said.stderr
    options = re.findall(r'^ +--(\w+)', said.stdout, re.M)
    for o in options: assert spelled([f'--{o.replace("_", "-")}', '--other-thing'], options) == [f'--{o}', '--other-thing']


@pytest.mark.parametrize('option', ['--dry-run', '--dry_run'])
def test_dry_run(tmp_path, option):
    said = call('dal_sweep', str(ROOT/'nbs'/'experiments'/'demo.yaml'), str(tmp_path/'out'), option)
    assert said.returncode == 0 and '10 of 10 runs would be run' in said.stdout, said.stderr
    assert not (tmp_path/'out').exists()


def test_as_a_module(tmp_path):
    said = subprocess.run([sys.executable, '-m', 'dal_med.data.prepare', 'ham10000', str(tmp_path/'nowhere'), str(tmp_path/'out'), '--no-masks'], capture_output=True, text=True)
    assert said.returncode == 2 and 'nowhere does not exist' in said.stderr, said.stderr
