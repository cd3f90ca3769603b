"""What a checkpoint promises: killed at any instant, out of space, damaged or read by another number of processes, nothing that was saved is lost."""
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.multiprocessing as mp

from nanochat.checkpoint import (best_checkpoint, describe_checkpoint, last_checkpoint, load_checkpoint, load_model, read_rank_state, read_tensors, remove_leftovers, save_checkpoint, shard_name,
                                 step_folders)
from nanochat.common import NanochatError, Run, compute_cleanup, compute_init, leave_now
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import make_optimizers, optimizer_state
from nanochat.tokenizer import Tokenizer

CONFIG = GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


def filled(value: float) -> GPT:
    "A model whose every weight is `value`, so that a mixture of two saves would show"
    model = GPT(CONFIG)
    with torch.no_grad():
        for p in model.parameters(): p.fill_(value)
    return model


def trained(steps: int = 2, config: GPTConfig = CONFIG):
    "A model and its optimizers, some steps old"
    torch.manual_seed(0)
    model = GPT(config)
    optimizers = make_optimizers(model)
    train(model, optimizers, steps, seed=0)
    return model, optimizers


def train(model, optimizers, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(64, (4, 17), generator=generator)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        for optimizer in optimizers: optimizer.step(); optimizer.zero_grad()


def value_of(path) -> float:
    "The value that fills a checkpoint; fails if it holds more than one"
    values = {t.unique().item() for t in read_tensors(path / 'model.safetensors').values()}
    assert len(values) == 1
    return values.pop()


# --- kill ------------------------------------------------------------------------------------------------------------

def save_for_ever(stage_dir) -> None:
    torch.set_num_threads(1)
    step = int(last_checkpoint(stage_dir).name[5:]) if last_checkpoint(stage_dir) else 0
    while True:
        step += 1
        save_checkpoint(stage_dir, step, filled(step), keep=2)


def test_killed_at_any_instant_the_last_checkpoint_is_whole(tmp_path):
    save_checkpoint(tmp_path, 1, filled(1))
    reached = [1]
    for n in range(8):
        child = multiprocessing.get_context('fork').Process(target=save_for_ever, args=(tmp_path,))
        child.start()
        time.sleep(0.3 + 0.037 * n)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        path = last_checkpoint(tmp_path)
        reached.append(int(path.name[5:]))
        assert value_of(path) == reached[-1]
    assert reached == sorted(reached) and reached[-1] > 1  # never back, and the test did save something
    save_checkpoint(tmp_path, 10**6, filled(7), keep=2)
    assert not list(tmp_path.glob('.step*')) and len(step_folders(tmp_path)) == 2  # leftovers of the kills are gone


def test_killed_between_the_two_renames_of_a_replacement_nothing_is_lost(tmp_path):
    path = save_checkpoint(tmp_path, 5, filled(5))
    os.rename(path, tmp_path / '.step_00000005.old.tmp')
    assert last_checkpoint(tmp_path) is None and not path.exists()  # whoever only reads changes nothing: a trainer may be at work
    assert remove_leftovers(tmp_path) == ['.step_00000005.old.tmp'] and value_of(last_checkpoint(tmp_path)) == 5
    save_checkpoint(tmp_path, 6, filled(6))
    assert [p.name for p in step_folders(tmp_path)] == ['step_00000005', 'step_00000006']


def measured(value, step): return dict(values=dict(val_bpb=value), measured=step)


def test_the_best_is_kept_beside_the_newest_and_no_measurement_is_never_the_best(tmp_path):
    for step, value in enumerate([float('nan'), .5, .3, .9, .8, .7], start=1):
        save_checkpoint(tmp_path, step, filled(step), state=measured(value, step), keep=2, keep_best='val_bpb')
    assert [p.name for p in step_folders(tmp_path)] == ['step_00000003', 'step_00000005', 'step_00000006']
    save_checkpoint(tmp_path, 7, filled(7), state=measured(.1, 6), keep=2, keep_best='val_bpb')  # measured before it was saved
    assert best_checkpoint(tmp_path, 'val_bpb').name == 'step_00000003'


def test_a_checkpoint_without_its_state_stops_neither_saving_nor_listing(tmp_path):
    save_checkpoint(tmp_path, 1, filled(1), state=measured(.5, 1))
    (tmp_path / 'step_00000001' / 'state.json').unlink()
    for step in (2, 3): save_checkpoint(tmp_path, step, filled(step), state=measured(.4, step), keep=2, keep_best='val_bpb')
    assert [p.name for p in step_folders(tmp_path)] == ['step_00000002', 'step_00000003']
    (tmp_path / 'step_00000002' / 'state.json').unlink()
    assert 'missing' in describe_checkpoint(tmp_path / 'step_00000002')['whole'] and describe_checkpoint(tmp_path / 'step_00000003')['whole'] == 'yes'


def test_a_kill_while_a_checkpoint_is_removed_leaves_a_leftover(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, filled(1))
    def killed(path, **options): raise SystemExit
    with monkeypatch.context() as patched:
        patched.setattr('nanochat.checkpoint.shutil.rmtree', lambda path, ignore_errors=False: None if ignore_errors else killed(path))
        with pytest.raises(SystemExit): save_checkpoint(tmp_path, 2, filled(2), keep=1)
    assert [p.name for p in step_folders(tmp_path)] == ['step_00000002'] and remove_leftovers(tmp_path) == ['.step_00000001.tmp']


def test_whatever_stops_a_save_is_told_in_one_line(tmp_path):
    with pytest.raises(NanochatError, match='not saved.*not JSON serializable') as caught: save_checkpoint(tmp_path, 1, filled(1), state=dict(odd=object()))
    assert '\n' not in str(caught.value) and not list(tmp_path.iterdir())


# --- space -----------------------------------------------------------------------------------------------------------

def save_with_small_files(stage_dir, answers) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try: save_checkpoint(stage_dir, 2, filled(2))
    except NanochatError as error: answers.put(str(error))


def test_a_write_that_fails_leaves_the_earlier_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, filled(1))
    answers = multiprocessing.get_context('fork').Queue()
    child = multiprocessing.get_context('fork').Process(target=save_with_small_files, args=(tmp_path, answers))
    child.start(); message = answers.get(timeout=60); child.join()
    assert 'not saved: File too large' in message and '\n' not in message
    assert [p.name for p in tmp_path.iterdir()] == ['step_00000001'] and value_of(last_checkpoint(tmp_path)) == 1


FULL = '''
import os
from pathlib import Path
from test_checkpoint import filled, save_checkpoint, last_checkpoint, value_of, NanochatError
stage_dir = Path("disk/base")
for step in range(1, 100):
    try: save_checkpoint(stage_dir, step, filled(step))
    except NanochatError as error: print(step, error); break
assert step > 1 and value_of(last_checkpoint(stage_dir)) == step - 1
assert sorted(os.listdir(stage_dir)) == [f"step_{s:08d}" for s in range(1, step)]
'''


def test_a_disk_that_is_really_full(tmp_path):
    (tmp_path / 'disk').mkdir()
    mount = f'mount -t tmpfs -o size=1m none {tmp_path}/disk'
    if subprocess.run(['unshare', '-Urm', 'sh', '-c', mount], capture_output=True).returncode: pytest.skip('cannot mount a small disk here')
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(['unshare', '-Urm', 'sh', '-c', f'{mount} && cd {tmp_path} && exec "$0" -c "$1"', sys.executable, FULL],
                          capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=paths))
    assert done.returncode == 0, done.stderr
    assert 'No space left on device; earlier checkpoints are whole' in done.stdout


# --- damage ----------------------------------------------------------------------------------------------------------

def cut(file): file.write_bytes(file.read_bytes()[:-1])
def flip(file): raw = bytearray(file.read_bytes()); raw[-1] ^= 1; file.write_bytes(raw)
def empty(file): file.write_bytes(b'')


@pytest.mark.parametrize('name', ['model.safetensors', 'optimizer_rank00000.safetensors', 'state.json'])
@pytest.mark.parametrize('change', [cut, flip, empty, os.remove], ids=['cut', 'flipped', 'empty', 'removed'])
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_used(tmp_path, capsys, name, change):
    model, optimizers = trained()
    good, bad = (save_checkpoint(tmp_path, step, model, optimizers) for step in (1, 2))
    change(bad / name)
    assert last_checkpoint(tmp_path) == good
    assert name in capsys.readouterr().out
    with pytest.raises(NanochatError, match=name) as caught: load_checkpoint(bad, model, optimizers)
    assert '\n' not in str(caught.value)


def test_after_a_damaged_one_keep_does_not_remove_the_good_ones(tmp_path):
    for step in (10, 20, 30): save_checkpoint(tmp_path, step, filled(step))
    empty(tmp_path / 'step_00000030' / 'model.safetensors')
    save_checkpoint(tmp_path, 25, filled(25), keep=2)  # the run went on from 20
    assert [p.name[-2:] for p in step_folders(tmp_path)] == ['20', '25']


def test_no_checkpoint_is_none(tmp_path):
    (tmp_path / '.step_00000007.tmp').mkdir()
    (tmp_path / 'step_notes').mkdir()
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / 'nowhere') is None


def test_a_step_can_be_saved_again(tmp_path):
    for value in (1, 2): path = save_checkpoint(tmp_path, 5, filled(value))
    assert value_of(path) == 2 and [p.name for p in tmp_path.iterdir()] == ['step_00000005']


# --- going on --------------------------------------------------------------------------------------------------------

def test_training_goes_on_to_the_same_bits(tmp_path):
    model, optimizers = trained()
    path = save_checkpoint(tmp_path, 2, model, optimizers, dict(tokens=136), rank_state=dict(file=3))
    train(model, optimizers, 3, seed=1)
    other = GPT(CONFIG); theirs = make_optimizers(other)
    state = load_checkpoint(path, other, theirs)
    train(other, theirs, 3, seed=1)
    assert (state['step'], state['tokens'], state['rank_state']) == (2, 136, dict(file=3))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


def test_a_compiled_model_is_saved_and_loaded_under_clean_names(tmp_path):
    model, optimizers = trained()
    compiled = torch.compile(model)
    path = save_checkpoint(tmp_path, 1, compiled, optimizers)
    assert set(read_tensors(path / 'model.safetensors')) == set(model.state_dict())
    other = torch.compile(GPT(CONFIG))
    load_checkpoint(path, other, make_optimizers(other))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


def test_weights_are_float32_whatever_they_were(tmp_path):
    path = save_checkpoint(tmp_path, 1, filled(0.5).bfloat16())
    assert {t.dtype for t in read_tensors(path / 'model.safetensors').values()} == {torch.float32} and value_of(path) == 0.5


def test_another_models_checkpoint_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, filled(1))
    for change in (dict(n_layer=3), dict(vocab_size=128)):
        with pytest.raises(NanochatError, match='of another model'): load_checkpoint(path, GPT(GPTConfig(**{**vars(CONFIG), **change})))


# --- another number of processes -------------------------------------------------------------------------------------

def full_disk(handle): raise OSError(28, 'No space left on device')


def work(rank: int, world_size: int, port: int, folder: str, job: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    compute = compute_init('cpu')
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(CONFIG); optimizers = make_optimizers(model)
    if job == 'save':
        tokens = torch.randint(64, (world_size, 17))[rank:rank + 1]
        model(tokens[:, :-1], tokens[:, 1:], reduction='sum').backward()
        for optimizer in optimizers: optimizer.step()
        path = save_checkpoint(folder, 1, model, optimizers, compute=compute, rank_state=dict(rank=rank))
        assert load_checkpoint(path, model, optimizers)['rank_state'] == dict(rank=rank)
        if rank == 1: os.fsync = full_disk  # of one process only: it must fail all, and hang none
        with pytest.raises(NanochatError, match='not saved'): save_checkpoint(folder, 2, model, optimizers, compute=compute)
    else:
        state = load_checkpoint(last_checkpoint(folder), model, optimizers)
        assert state['rank_state'] is None
        save_checkpoint(folder, 3, model, optimizers, compute=compute)
    compute_cleanup(); leave_now()


def processes(world_size: int, folder, job: str) -> None:
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    mp.spawn(work, (world_size, port, str(folder), job), nprocs=world_size)


def test_two_processes_save_and_three_or_one_go_on(tmp_path):
    processes(2, tmp_path, 'save')
    assert [p.name for p in tmp_path.iterdir()] == ['step_00000001']  # the failed save of step 2 left nothing
    path = last_checkpoint(tmp_path)
    two = [read_tensors(path / shard_name(rank)) for rank in range(2)]
    assert [read_rank_state(path / shard_name(rank)) for rank in range(2)] == [dict(rank=0), dict(rank=1)]
    processes(3, tmp_path, 'load and save')
    three = [read_tensors(tmp_path / 'step_00000003' / shard_name(rank)) for rank in range(3)]
    whole = {name: t for shard in two for name, t in shard.items()}
    assert sum(map(len, three)) == sum(map(len, two)) == len(whole)  # every tensor in exactly one shard
    assert all(torch.equal(t, whole[name]) for shard in three for name, t in shard.items())
    model = GPT(CONFIG); optimizers = make_optimizers(model)
    load_checkpoint(tmp_path / 'step_00000003', model, optimizers)
    assert all(torch.equal(t, whole[name]) for name, t in optimizer_state(optimizers, model).items())


# --- the model of a stage --------------------------------------------------------------------------------------------

@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv('NANOCHAT_HOME', str(tmp_path))
    run = Run.create('r')
    tokenizer = Tokenizer.train(['a cat and a dog and a cat'] * 5, 270)
    tokenizer.save(run.path('tokenizer'))
    model = GPT(GPTConfig(sequence_len=16, vocab_size=270, n_layer=1, n_head=1, n_kv_head=1, n_embd=16))
    for step in (1, 2): save_checkpoint(run.path('sft'), step, model, state=dict(loss=0.5), tokenizer=tokenizer)
    return run


def test_load_model_gives_the_last_whole_model_with_its_tokenizer(run):
    flip(run.path('sft', 'step_00000002', 'model.safetensors'))
    model, tokenizer, state = load_model('r', 'sft', 'cpu')
    assert (state['step'], state['loss'], tokenizer.vocab_size, model.config.vocab_size, model.training) == (1, 0.5, 270, 270, False)
    with pytest.raises(NanochatError, match='SHA-256'): load_model('r', 'sft', 'cpu', step=2)


def test_another_tokenizer_is_refused(run):
    shutil.rmtree(run.path('tokenizer'))
    Tokenizer.train(['something else entirely'] * 5, 270).save(run.path('tokenizer'))
    with pytest.raises(NanochatError, match='another tokenizer'): load_model('r', 'sft', 'cpu')


def test_a_stage_that_has_not_run_is_named(run):
    with pytest.raises(NanochatError, match="no whole checkpoint of stage rl; run that stage first"): load_model('r', 'rl', 'cpu')
    with pytest.raises(NanochatError, match='steps there: 1, 2'): load_model('r', 'sft', 'cpu', step=9)


def test_a_checkpoint_of_another_version_is_refused(run):
    file = run.path('sft', 'step_00000002', 'state.json')
    state = json.loads(file.read_text())
    state['model_config']['wings'] = 2
    file.write_text(json.dumps(state))
    with pytest.raises(NanochatError, match='another version'): load_model('r', 'sft', 'cpu')
