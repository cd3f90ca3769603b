"What every stage relies on: options from three places, records, and the loop's clock."
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from nanochat import common, train
from nanochat.common import Compute, NanochatError, Run, load_profile, parse_override, resolve_options, stage


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('NANOCHAT_HOME', str(tmp_path))
    return tmp_path


@stage('report')
def toy(run, compute, *, seed: int = 42, rate: float = 1.0, name: str = 'x') -> dict:
    "A stage that tells what it was given"
    return dict(seen=[seed, rate, name])


# --- options ---------------------------------------------------------------------------------------------------------

def test_options_for_all_stages_reach_a_stage_and_its_own_come_before_them(home):
    toy.cli(['--run', 'a', '--profile', 'tiny', '--all', '{seed: 7, depth: 3}'])
    assert Run.open('a').record('report')['results'] == dict(seen=[7, 1.0, 'x'])
    toy.cli(['--run', 'b', '--profile', 'tiny', '--all', '{seed: 7}', '--seed', '8'])
    assert Run.open('b').record('report')['results'] == dict(seen=[8, 1.0, 'x'])


def test_a_number_that_yaml_takes_for_a_text_becomes_a_number():
    values = resolve_options(toy.func, 'report', dict(stages=dict(all=dict(rate='1e-3'), report=dict(seed='2e2'))), {})
    assert values == dict(seed=200, rate=0.001, name='x') and type(values['seed']) is int


def test_a_section_that_is_no_stage_is_refused_in_a_profile_and_in_an_override(tmp_path):
    (tmp_path / 'odd.yaml').write_text('stages:\n  pretrain:\n    depth: 2\n')
    with pytest.raises(NanochatError, match="odd.yaml.*no stage 'pretrain'; known are all, dataset"): load_profile(str(tmp_path / 'odd.yaml'))
    with pytest.raises(NanochatError, match="override: there is no stage 'pretrain'; known are all, dataset"): parse_override('pretrain.depth=2')


def test_an_unknown_option_is_refused_with_the_known_ones(home, capsys):
    with pytest.raises(NanochatError, match="option 'sed' of stage report: unknown; known are seed, rate, name"): toy('a', 'tiny', sed=1)


def test_a_complete_stage_is_skipped_and_says_which_options_it_was_made_with(home, capsys):
    first = toy('a', 'tiny')
    capsys.readouterr()
    assert toy('a', 'tiny') == first and 'skipped\n' in capsys.readouterr().out
    assert toy('a', 'tiny', rate=2.0) == first
    assert 'skipped; it was made with another rate, for which a new run is needed' in capsys.readouterr().out


def test_a_stage_that_is_through_leaves_one_line_with_what_it_took_and_the_figures_that_were_not_there(home):
    run = Run.create('a', profile='tiny')
    for step in (1, 2): run.log('report', step, loss=3. - step, tokens=10 * step)
    run.log_end('report', 4.5, dict(steps=2, loss=1.25, params=7, good=True, tasks=dict(accuracy=1.), nothing=None))
    [first, last] = run.metrics('report')
    assert 'seconds' not in first and {k: v for k, v in last.items() if k != 'time'} == dict(stage='report', step=2, loss=1., tokens=20, seconds=4.5, params=7, good=True)
    toy('a', 'tiny')
    assert [line['step'] for line in run.metrics('report')] == [0, 1, 2] and run.metrics('report')[0]['seconds'] >= 0
    assert (home / 'runs/a/metrics.jsonl').read_text().count('\n') == 4


# --- machines and time -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, peak', [('NVIDIA A10G', None), ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H200', 989e12), ('NVIDIA A100-SXM4-80GB', 312e12)])
def test_a_device_is_known_by_a_whole_word_of_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    assert train.peak_flops(torch.device('cuda')) == peak


def test_a_horizon_in_minutes_counts_what_was_trained_before_a_resume(monkeypatch):
    trainer = train.Trainer.__new__(train.Trainer)
    monkeypatch.setattr(time, 'time', lambda: 1000.0)
    trainer.__dict__.update(compute=Compute(torch.device('cpu'), torch.float32), minutes=2.0, seconds=60.0, step=120, warm_step=110, warm_time=990.0, begun=980.0)
    trainer.choose_steps()  # a second a step; 60 s before the resume and 20 since: 40 s are left
    assert trainer.num_steps == 160


def test_a_stages_seconds_are_those_of_all_its_sessions_also_after_kill_9(home):
    run, pid = Run.create('stopped'), os.fork()
    if not pid:
        with run.clock('report', every=0.02): time.sleep(60)
    noted, deadline = run.path('stages', 'report.seconds'), time.time() + 20
    while not (noted.exists() and float(noted.read_text()) > 0.3) and time.time() < deadline: time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    before = float(noted.read_text())
    assert before > 0.3
    with pytest.raises(ZeroDivisionError), run.clock('report'): time.sleep(0.3); raise ZeroDivisionError  # stopped again, by an error
    assert before + 0.3 <= toy('stopped', 'tiny')['seconds'] < before + 5 and not noted.exists()


@pytest.mark.filterwarnings('error')  # a traceback of the thread that notes the time
def test_a_full_disk_is_said_by_the_stage_and_not_by_its_clock(home, monkeypatch):
    run, tried = Run.create('full'), []
    def fills_up(*args):
        tried.append(args)
        if len(tried) > 1: raise NanochatError('the disk is full')
    monkeypatch.setattr(common, 'write_atomic', fills_up)
    with run.clock('report', every=0.01): time.sleep(0.1)
    assert len(tried) == 2


# --- measurements for others to watch --------------------------------------------------------------------------------

FAKE = '''
seen = []
def init(**options): seen.append(options)
def log(values): seen.append(values)
def finish(): seen.append('finished')
'''


def test_measurements_also_go_to_the_tracker_that_is_asked_for(home, tmp_path, monkeypatch):
    (tmp_path / 'trackio.py').write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv('NANOCHAT_TRACKER', 'trackio')
    common.tracker.cache_clear()
    run = Run.create('watched')
    run.log('base', 3, loss=2.5, note='words stay here')
    run.log('base', 4, loss=2.25)
    import trackio
    opened, first, second = trackio.seen
    assert opened == dict(project='nanochat', name='watched', resume='allow')
    assert (first['base/step'], first['base/loss'], second['base/loss']) == (3, 2.5, 2.25) and 'base/note' not in first
    assert len(run.metrics('base')) == 2


def test_a_stage_closes_the_tracker_also_when_it_fails(home, tmp_path, monkeypatch):
    (tmp_path / 'trackio.py').write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, 'trackio', raising=False)
    monkeypatch.setenv('NANOCHAT_TRACKER', 'trackio')
    toy('closing', 'tiny')
    import trackio
    assert trackio.seen[-1] == 'finished'
    monkeypatch.setattr(toy, 'func', lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError): toy.execute('failing', 'tiny', 'report', {}, Compute(torch.device('cpu'), torch.float32))
    assert [what for what in trackio.seen if what == 'finished'] == ['finished'] * 2


@pytest.mark.parametrize('name, says', [('tensorboard', 'unknown; known are wandb, trackio'), ('wandb', 'not installed')])
def test_a_tracker_that_cannot_be_had_is_one_line(home, monkeypatch, name, says):
    monkeypatch.setenv('NANOCHAT_TRACKER', name)
    monkeypatch.setitem(sys.modules, 'wandb', None)  # as if it were not installed
    common.tracker.cache_clear()
    with pytest.raises(NanochatError, match=says): Run.create('r').log('base', 1)
    common.tracker.cache_clear()


SAME_BITS = """
import torch
from nanochat.common import compute_init
compute_init("cpu")
torch.set_num_threads(4)
table, ids, weight = torch.randn(16, 64).requires_grad_(), torch.randint(16, (4096,)), torch.randn(4096, 64)
loss = torch.compile(lambda table: (torch.nn.functional.embedding(ids, table) * weight).sum())
found = {torch.autograd.grad(loss(table), table)[0].numpy().tobytes() for _ in range(100)}
print(len(found))
"""


def test_the_same_step_on_several_threads_gives_the_same_bits():
    done = subprocess.run([sys.executable, "-c", SAME_BITS], capture_output=True, text=True)
    assert done.stdout == "1\n", done


NO_RUST = """
import sys, types
sys.modules["rustbpe"] = types.ModuleType("rustbpe") # what Python makes of the folder rustbpe/ where nothing is installed
from nanochat.tokenizer import Tokenizer, rustbpe
print(rustbpe, Tokenizer.train(["hello world " * 20], 270).vocab_size)
"""


def test_without_the_crate_the_folder_of_its_sources_is_not_taken_for_it():
    done = subprocess.run([sys.executable, "-c", NO_RUST], capture_output=True, text=True)
    assert done.stdout == "None 270\n", done
