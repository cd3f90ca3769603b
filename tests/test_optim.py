"""What the optimizers promise: the published formulas, the same result on any number of processes, memory divided, and a cheap step."""
import os
import socket
import time

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from nanochat import muon
from nanochat.common import Compute, NanochatError, Run, compute_cleanup, compute_init, leave_now
from nanochat.dataloader import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import AdamW, Muon, make_optimizers, newton_schulz, optimizer_state
from nanochat.train import Trainer


def tiny(vocab_size: int = 64, n_embd: int = 32, n_layer: int = 2) -> GPT:
    "A model whose weights are all away from zero, so that every gradient is too"
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=16, vocab_size=vocab_size, n_layer=n_layer, n_head=2, n_kv_head=1, n_embd=n_embd))
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.1)
    return model


def largest_difference(ours, theirs, shape: tuple, steps: int = 10) -> float:
    "How far two optimizers drift apart on the same gradients"
    torch.manual_seed(0)
    a, b = (torch.nn.Parameter(w) for w in torch.randn(1, *shape).expand(2, *shape).clone().unbind())
    one, two = ours([a]), theirs([b])
    for _ in range(steps):
        a.grad = torch.randn(shape); b.grad = a.grad.clone()
        one.step(); two.step()
    return (a - b).abs().max().item()


# --- formulas --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('weight_decay', [0.0, 0.1])
def test_adamw_is_torchs(weight_decay):
    options = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=weight_decay)
    assert largest_difference(lambda p: AdamW(p, **options), lambda p: torch.optim.AdamW(p, **options), (32, 16)) < 1e-6


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='this torch has no Muon of its own')
@pytest.mark.parametrize('shape', [(32, 32), (64, 32), (32, 64)], ids=['square', 'tall', 'wide'])
def test_muon_is_torchs(shape, monkeypatch):
    monkeypatch.setattr(muon, 'product_dtype', lambda device: torch.bfloat16)  # torch's works in this format everywhere
    ours, theirs = (lambda p: Muon(p, lr=0.02, momentum=0.95)), (lambda p: torch.optim.Muon(p, lr=0.02, momentum=0.95, weight_decay=0, ns_steps=5))
    assert largest_difference(ours, theirs, shape) < 2e-3


@pytest.mark.parametrize('shape', [(24, 24), (64, 16), (16, 64)], ids=['square', 'tall', 'wide'])
def test_newton_schulz_keeps_directions_and_evens_lengths(shape):
    torch.manual_seed(0)
    G = torch.randn(shape)
    U, S, Vt = torch.linalg.svd(G, full_matrices=False)
    inside = U.T @ newton_schulz(G, dtype=torch.float32) @ Vt.T
    lengths = inside.diag()[S > 0.01 * S.norm()]
    assert (inside - torch.diag(inside.diag())).abs().max() < 1e-3
    assert 0.65 < lengths.min() and lengths.max() < 1.25


def test_newton_schulz_of_a_stack_of_a_zero_and_of_a_transpose():
    torch.manual_seed(0)
    stack = torch.randn(3, 20, 8) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    together = newton_schulz(stack, dtype=torch.float32)
    for one, G in zip(together, stack):
        assert torch.allclose(one, newton_schulz(G, dtype=torch.float32), atol=1e-4)
        assert torch.allclose(one.T, newton_schulz(G.T, dtype=torch.float32), atol=1e-4)
    assert newton_schulz(torch.zeros(4, 4)).abs().max() == 0  # a matrix without a gradient does not move, and is not NaN


# --- groups ----------------------------------------------------------------------------------------------------------

def test_every_parameter_is_in_one_group_with_its_rate():
    model = tiny()
    adamw, muon_ = make_optimizers(model)
    groups = {g['name']: g for o in (adamw, muon_) for g in o.param_groups}
    claimed = [p for g in groups.values() for p in g['params']]
    assert {id(p) for p in claimed} == {id(p) for p in model.parameters()} and len(claimed) == len(list(model.parameters()))
    scale = (32 / 768) ** -0.5
    rates = {name: g['initial_lr'] for name, g in groups.items()}
    assert rates == pytest.approx(dict(unembedding=0.004 * scale, embedding=0.2 * scale, matrices=0.02))
    assert adamw.param_groups[0]['betas'] == (0.8, 0.95) and adamw.param_groups[0]['eps'] == 1e-10


def test_an_unclaimed_parameter_is_refused_and_a_frozen_one_left_alone():
    model = tiny()
    model.lm_head.weight.requires_grad_(False)
    assert [g['name'] for g in make_optimizers(model)[0].param_groups] == ['embedding']
    model.gate = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(NanochatError, match='gate'): make_optimizers(model)


def test_a_compiled_model_has_the_same_groups_and_names():
    model = tiny()
    optimizers = make_optimizers(torch.compile(model))
    for p in model.parameters(): p.grad = torch.ones_like(p)
    for optimizer in optimizers: optimizer.step()
    names = optimizer_state(optimizers, torch.compile(model))
    assert len(names) == 2 * 3 + 12 and not any('_orig_mod' in name for name in names)


# --- several processes -----------------------------------------------------------------------------------------------

def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


VARIANTS = {'sum': {}, 'mean': dict(reduce='mean'), 'reduced by the caller': dict(grads_reduced=True)}


def train_part(compute, variant: str) -> dict:
    "Five steps on this process's part of each batch: the weights, and how much this process remembers"
    model, options = tiny(), VARIANTS[variant]
    optimizers = make_optimizers(model, embedding_lr=0.01, **options)
    torch.manual_seed(1)
    for batch in torch.randint(64, (5, 12, 17)):
        part = batch[compute.rank::compute.world_size]
        count = len(part) if variant == 'mean' else len(batch)
        (model(part[:, :-1], part[:, 1:], reduction='sum') / (count * 16)).backward()
        if variant == 'reduced by the caller':
            for p in model.parameters(): compute.all_reduce(p.grad)
        for optimizer in optimizers: optimizer.step(); optimizer.zero_grad()
    owned = sum(t.numel() for t in optimizer_state(optimizers, model).values())
    return dict(weights=torch.cat([p.detach().flatten() for p in model.parameters()]), owned=torch.tensor(owned))


def process(rank: int, world_size: int, port: int, folder: str) -> None:
    "One of several real processes: trains in every variant and writes the results"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    muon.product_dtype = lambda device: torch.float32  # so that only the order of additions differs
    compute = compute_init('cpu')
    torch.set_num_threads(1)
    for variant in VARIANTS: save_file(train_part(compute, variant), f'{folder}/{variant}_{rank}.safetensors')
    compute_cleanup(); leave_now()


@pytest.mark.parametrize('world_size', [2, 3])
def test_several_processes_end_on_the_weights_of_one(tmp_path, monkeypatch, world_size):
    monkeypatch.setattr(muon, 'product_dtype', lambda device: torch.float32)
    mp.spawn(process, (world_size, free_port(), str(tmp_path)), nprocs=world_size)
    alone = train_part(Compute(torch.device('cpu'), torch.float32), 'sum')
    for variant in VARIANTS:
        parts = [load_file(tmp_path / f'{variant}_{rank}.safetensors') for rank in range(world_size)]
        assert all(torch.equal(part['weights'], parts[0]['weights']) for part in parts)
        assert (parts[0]['weights'] - alone['weights']).abs().max() < 2e-6, variant
        owned = [part['owned'].item() for part in parts]
        assert sum(owned) == alone['owned'].item()  # nothing is remembered twice
        assert max(owned) < 0.7 * sum(owned)


class OneSided:
    "Batches of which only the first process has something to learn, as at the end of an epoch"
    def __init__(self, rank): self.rank = rank
    def next_batch(self):
        tokens = torch.arange(24).reshape(2, 12) % 16
        return Batch(tokens[:, :-1], tokens[:, 1:] if self.rank == 0 else torch.full((2, 11), -1))
    def state_dict(self): return {}


def one_sided(rank: int, world_size: int, port: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), NANOCHAT_HOME=folder)
    compute = compute_init('cpu')
    torch.set_num_threads(1)
    run = Run.create('r') if rank == 0 else Run('r')
    model = tiny()
    Trainer(model, make_optimizers(model), OneSided(rank), run, compute, 'base', None, num_steps=2, compile=False).fit()
    save_file(dict(weights=torch.cat([p.detach().flatten() for p in model.parameters()])), f'{folder}/{rank}.safetensors')
    compute_cleanup(); leave_now()


def test_a_process_with_nothing_to_learn_does_not_keep_the_others_waiting(tmp_path):
    processes = mp.spawn(one_sided, (2, free_port(), str(tmp_path)), nprocs=2, join=False)
    done = processes.join(timeout=60) or processes.join(timeout=60)
    for process in processes.processes: process.kill()
    assert done
    assert torch.equal(*(load_file(tmp_path / f'{rank}.safetensors')['weights'] for rank in range(2)))


def test_an_unknown_reduction_is_refused():
    with pytest.raises(NanochatError, match='sum or mean'): make_optimizers(tiny(), reduce='median')


# --- cost ------------------------------------------------------------------------------------------------------------

def test_a_step_of_a_million_parameters_is_cheap():
    torch.set_num_threads(1)
    model = tiny(vocab_size=1024, n_embd=128, n_layer=4)
    for p in model.parameters(): p.grad = torch.randn_like(p)
    optimizers, times = make_optimizers(model), []
    for _ in range(8):
        begin = time.process_time()
        for optimizer in optimizers: optimizer.step()
        times.append(time.process_time() - begin)
    assert min(times) < 0.15  # CPU seconds on one thread; about 0.02 with bfloat16 in hardware, 0.05 without
