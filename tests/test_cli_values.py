"""Every option and argument of every command with ten bad values: one line that says what is wrong, or a good run."""
import json
import resource
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from transformer_experiments.cli import main
from transformer_experiments.tracing import Graph, Node

BAD = ['', ' ', '-1', '0', '1e400', 'nan', '1e-50', '2.5', '/dev/null/at/all', 'é\x07x']
BASE = {
    'generate': ('--tokens', '2', '--device', 'cpu'),
    'train': ('--text', 'text.txt', '--out', 'run', '--steps', '1', '--device', 'cpu'),
    'block-internals run': ('internals', '-b', '0', '--stride', '50000', '--device', 'cpu', '-q'),
    'block-internals show': ('internals',),
    'walk': ('--depth', '1'),
    'keys add': ('ada',), 'keys list': (), 'keys revoke': ('ada',),
    'run': ('graph.json', '--model', 'tinyshakespeare', '--ids', '1 2', '--device', 'cpu'),
    'patch': ('task.json', '--out', 'patched', '-q'),
    'similar-strings': ('to be, or ', '--strings', '50', '--folder', 'strings', '-q'),
    'serve': ('--model', 'tinyshakespeare', '--write-config', 'served.yaml'),
}
TASK = dict(model='tinyshakespeare', clean=['to be'], corrupt=['to do'], answers=[[' ', 'n']],
            sweep=dict(location='resid.post_mlp', by=['layer']))
LOGITS = Graph([Node(0, 'site', ('@logits', 'output', 0, None), save='logits')])


def commands(group: click.Group = main, path: tuple = ()) -> dict:
    found = {}
    for name, command in group.commands.items():
        inside = isinstance(command, click.Group)
        found |= commands(command, (*path, name)) if inside else {' '.join((*path, name)): command}
    return found


def options() -> list:
    found = []
    for name, command in commands().items():
        if name not in BASE: continue
        named = [(name, p.opts[0]) for p in command.params if isinstance(p, click.Option) and not p.is_flag]
        found += named + [(name, None)]
    return found


def test_every_command_is_tried():
    assert set(commands()) - set(BASE) == {'demo'} # it runs for a minute; its parts are the commands above


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TRANSFORMER_EXPERIMENTS_HOME', str(tmp_path/'home'))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True) # nobody looks for a model named '-1'
    (tmp_path/'text.txt').write_text('to be, or not to be ' * 60)
    (tmp_path/'graph.json').write_text(LOGITS.to_json())
    (tmp_path/'task.json').write_text(json.dumps(TASK))
    return tmp_path


@pytest.mark.parametrize('name, option', options())
def test_bad_values(name, option, folder):
    for value in BAD:
        if option is None:
            if not BASE[name]: continue
            args = [value, *BASE[name][1:]] if not BASE[name][0].startswith('-') else [*BASE[name], value]
        else:
            args = [*BASE[name], option, value]
        result = CliRunner().invoke(main, [*name.split(), *args])
        error = result.exception
        assert error is None or isinstance(error, SystemExit), (option, value, repr(error))
        assert 'Traceback' not in result.output
        assert not result.exit_code or 'Error: ' in result.output, (option, value, result.output)


WRONG = {
    '--device cuda:77': "can't be used on this machine", '--device foo': "can't be used on this machine",
    '--device meta': "can't be used on this machine", '--temperature nan': 'not a finite number',
    '--tokens -5': 'x>=0', '--seed -1': 'is not in the range', '--prompt=': 'empty',
}


@pytest.mark.parametrize('wrong', WRONG)
def test_a_wrong_value_is_said_in_one_line(wrong, folder):
    result = CliRunner().invoke(main, ['generate', '--tokens', '3', *wrong.split()])
    assert result.exit_code and WRONG[wrong] in result.output.replace('\n', ' '), result.output


def test_a_temperature_next_to_zero_is_zero(folder):
    def said(t): return CliRunner().invoke(main, ['generate', '--tokens', '20', '--temperature', t]).output
    assert said('1e-50') == said('0') != said('0.8')


def test_encodings_are_said_with_the_files_name(folder):
    def train(content, out):
        (folder/'t.txt').write_bytes(content)
        return CliRunner().invoke(main, ['train', '--text', 't.txt', '--out', out, '--steps', '1', '--device', 'cpu'])
    plain = 'to be, or not to be\n' * 60
    assert train(plain.encode(), 'a').exit_code == 0
    result = train(b'\xef\xbb\xbf' + plain.replace('\n', '\r\n').encode(), 'b')
    assert result.exit_code == 0 and '\\r\\n' in result.output, result.output
    assert 't.txt begins with a byte-order mark' in result.output
    from transformer_experiments.models.checkpoint import load_model
    a, b = (load_model(folder/out/'model.safetensors') for out in 'ab')
    assert a.vocab == b.vocab and a.data_sha256 == b.data_sha256
    for content in (plain.replace('o', 'ö').encode('latin1'), plain.encode('utf-16')):
        result = train(content, 'c')
        assert result.exit_code == 1 and 't.txt is not UTF-8' in result.output and not (folder/'c').exists()


def test_a_short_text_leaves_no_run(folder):
    (folder/'t.txt').write_text('to be')
    command = ['train', '--text', 't.txt', '--out', 'run', '--steps', '2', '--device', 'cpu']
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1 and 'split has' in result.output and not (folder/'run').exists()
    (folder/'t.txt').write_text('to be, or not to be ' * 60)
    assert CliRunner().invoke(main, command).exit_code == 0


def test_a_pipe_gets_no_progress_bar(folder):
    code = f"from transformer_experiments.cli import main; main({['train', *BASE['train']]!r})"
    done = subprocess.run([sys.executable, '-c', code], cwd=folder, capture_output=True)
    assert done.returncode == 0 and b'\r' not in done.stdout + done.stderr, done.stderr


FULL = {
    'state.safetensors': (2000, ['train', *BASE['train']]),
    'internals': (2000, ['block-internals', 'run', *BASE['block-internals run']]),
    'out.safetensors': (0, ['run', *BASE['run'], '--out', 'out.safetensors']),
    'walk.html': (0, ['walk', '--depth', '1', '--html', 'walk.html']),
    'keys.json': (0, ['keys', 'add', 'ada']),
}


@pytest.mark.parametrize('name', FULL)
def test_a_full_disk_is_said_with_the_path(folder, name):
    room, args = FULL[name]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    def small(): resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    code = f'from transformer_experiments.cli import main; main({args!r})'
    ignore = 'import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)' # an error instead of an end
    done = subprocess.run([sys.executable, '-c', f'{ignore}; {code}'],
                          cwd=folder, capture_output=True, text=True, preexec_fn=small)
    assert done.returncode == 1 and 'Traceback' not in done.stderr and name in done.stderr, done.stderr
