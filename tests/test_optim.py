"""What the optimizers promise: the published formulas, the same result on any number of processes, memory divided, and a cheap step."""
import math
import os
import socket
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from nanochat import muon
from nanochat.common import NanochatError, Run, compute_cleanup, compute_init, leave_now
from nanochat.dataloader import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import (GROUPS, POLAR_EXPRESS, QUINTICS, AdamW, Muon, Schedule, divide, load_optimizer_state, lr_multiplier, make_optimizers,
                           muon_momentum, newton_schulz, optimizer_recipe, optimizer_state, set_rates, step_together)
from nanochat.pretrain import CLASSIC, choose_fields, recipe_from_depth
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


# --- the modern switches ---------------------------------------------------------------------------------------------

def one_step(p, grad, **options):
    "A matrix after one step of Muon"
    p = torch.nn.Parameter(p.clone()); p.grad = grad.clone()
    Muon([p], **options).step()
    return p.detach()


def test_without_switches_muon_is_the_classic_formula_to_the_bit():
    torch.manual_seed(0)
    p, memory, optimizer = torch.nn.Parameter(torch.randn(24, 8)), torch.zeros(24, 8), None
    expected = p.detach().clone()
    optimizer = Muon([p], lr=0.02, momentum=0.95, weight_decay=0.1)
    for _ in range(5):
        p.grad = torch.randn(24, 8)
        memory.lerp_(p.grad, 1 - 0.95)
        update = newton_schulz(p.grad.lerp(memory, 0.95)[None])[0]
        expected.mul_(1 - 0.02 * 0.1).add_(update, alpha=-0.02 * 3 ** 0.5)
        optimizer.step()
    assert torch.equal(p, expected)
    assert list(optimizer.state[p]) == ['momentum_buffer']


def test_polar_express_is_published_and_brings_weak_directions_near_one():
    assert [round(a * 1.01, 9) for a, _, _ in POLAR_EXPRESS] == [8.287212018, 4.107059112, 3.948690853, 3.318419657, 2.300652020]  # arXiv 2505.16932
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 16, dtype=torch.float64)).Q for n in (32, 16))
    lengths = torch.logspace(-2.7, 0, 16, dtype=torch.float64)
    G = (U * lengths) @ V.T
    for dtype, widest in ((torch.float64, 0.16), (torch.bfloat16, 0.2)):
        found = torch.linalg.svdvals(newton_schulz(G, dtype=dtype, quintics=POLAR_EXPRESS).double())
        assert (found - 1).abs().max() < widest, dtype
    weakest = {name: torch.linalg.svdvals(newton_schulz(G, dtype=torch.float64, quintics=quintics)).min() for name, quintics in QUINTICS.items()}
    assert weakest['polar_express'] > 0.8 and weakest['newton_schulz'] < 0.7


@pytest.mark.parametrize('shape, lines', [((24, 8), -1), ((8, 24), -2), ((8, 8), -1)], ids=['tall: rows', 'wide: columns', 'square: rows'])
def test_normuon_evens_the_longer_side_and_keeps_the_length(shape, lines, monkeypatch):
    monkeypatch.setattr(muon, 'product_dtype', lambda device: torch.float32)
    torch.manual_seed(0)
    p, squares = torch.nn.Parameter(torch.zeros(shape)), 0
    optimizer = Muon([p], lr=1.0, momentum=0.0, line_memory=0.9)
    for _ in range(3):
        before, p.grad = p.detach().clone(), torch.randn(shape) * torch.rand(shape[0], 1)
        update = newton_schulz(p.grad)
        squares = 0.9 * squares + 0.1 * update.square().mean(lines, keepdim=True)
        expected = update / squares.sqrt()
        expected *= update.norm() / expected.norm() * max(1, shape[0] / shape[1]) ** 0.5
        optimizer.step()
        assert torch.allclose(before - p, expected, atol=1e-5)
    assert optimizer.state[p]['line_squares'].shape == squares.shape
    p.grad.zero_(); optimizer.step()
    assert p.isfinite().all()


def test_cautious_decay_shrinks_only_what_the_step_shrinks():
    torch.manual_seed(0)
    p, grad = torch.randn(8, 8), torch.randn(8, 8)
    step = p - one_step(p, grad, lr=0.02)
    plain = (p - step) - one_step(p, grad, lr=0.02, weight_decay=0.5)
    cautious = (p - step) - one_step(p, grad, lr=0.02, weight_decay=0.5, cautious=True)
    assert torch.allclose(plain, 0.01 * p, atol=1e-6)
    assert torch.allclose(cautious, 0.01 * p * (step * p >= 0), atol=1e-6) and 0.2 < (cautious == 0).float().mean() < 0.8


def test_the_classic_schedule_is_the_old_one_and_the_modern_one_is_the_published():
    classic, (options, modern) = Schedule(), optimizer_recipe('modern')
    for step in range(500):
        assert classic(step, 500) == lr_multiplier(step, 500, 0.0, 0.2, 0.0) and classic.decay_at(step / 500) == 1
        assert classic.momentum_at(step, step / 500) == muon_momentum(step, 0.85, 0.95, 300)
    assert [round(modern(step, 1000), 4) for step in (0, 39, 40, 350, 675, 1000)] == [0.025, 1, 1, 1, 0.525, 0.05]
    assert [round(modern.momentum_at(step, step / 1000), 4) for step in (0, 200, 1000)] == [0.85, 0.91, 0.9]
    assert [round(modern.decay_at(p), 4) for p in (0, 0.25, 0.5, 1)] == [1, 0.8536, 0.5, 0]
    assert options == dict(groups='modern', weight_decay=0.28, quintics='polar_express', line_memory=0.9, cautious=True)
    assert lr_multiplier(0, 20, warmup=40, warmdown=0.65) == 1 / 7  # a warmup longer than the run leaves room for the fall


def test_rates_momentum_and_decay_are_written_and_a_plain_function_leaves_the_rest_classic():
    optimizers = make_optimizers(tiny(), weight_decay=0.28)
    _, modern = optimizer_recipe('modern')
    set_rates(optimizers, modern, 0.5, step=400, progress=0.5)
    matrices = optimizers[1].param_groups[0]
    assert (matrices['lr'], matrices['weight_decay']) == pytest.approx((0.01, 0.14))
    assert matrices['momentum'] == pytest.approx(0.97 - 0.07 * 0.15 / 0.65)
    assert [g['lr'] / g['initial_lr'] for g in optimizers[0].param_groups] == [0.5, 0.5] and optimizers[0].param_groups[0]['weight_decay'] == 0
    set_rates(optimizers, lr_multiplier, 0.1, step=150, progress=0.9)
    assert (matrices['momentum'], matrices['weight_decay']) == pytest.approx((0.90, 0.28))


def test_single_switches_override_a_recipe_and_unknown_words_are_refused():
    options, schedule = optimizer_recipe('modern', cautious=False, warmdown=0.4)
    assert options['cautious'] is False and schedule.warmdown == 0.4 and schedule.decay == 'cosine'
    for wrong in (lambda: optimizer_recipe('ancient'), lambda: optimizer_recipe(decay='steep'), lambda: make_optimizers(tiny(), quintics='cubic'), lambda: make_optimizers(tiny(), groups='new')):
        with pytest.raises(NanochatError, match='unknown; choose'): wrong()


def test_a_recipe_gives_way_to_options_and_both_to_overrides():
    assert choose_fields('classic', {}, **CLASSIC) == ({}, {}, Schedule())
    model, options, schedule = choose_fields('modern', dict(softcap=0.0, warmup=7, cautious=False), **CLASSIC | dict(warmup=5, embedding_lr=0.004))
    assert (model['recipe'], model['softcap'], options['cautious'], options['embedding_lr'], schedule.warmup, schedule.warmdown) == ('modern', 0.0, False, 0.004, 7, 0.65)
    with pytest.raises(NanochatError, match="no field 'swiglu'; choose from"): choose_fields('classic', dict(swiglu=True), **CLASSIC)


def test_rules_from_depth_give_the_reference_systems_figures():
    batches = {8: 18, 10: 19, 12: 19, 16: 19, 18: 20, 20: 20, 24: 20, 26: 20, 32: 21, 50: 21}  # the reference system, 2026
    assert {d: recipe_from_depth(d)['total_batch_size'] for d in batches} == {d: 2**n for d, n in batches.items()}
    assert recipe_from_depth(24)['tokens'] // 2**19 == 16_704                                   # the reference system, 2026, first row
    assert recipe_from_depth(24, ratio=8)['steps'] == 5_568 and recipe_from_depth(20, ratio=8)['steps'] == 3_320  # the reference system, 2026
    for depth, best in {8: 0.40, 12: 0.22, 16: 0.10, 20: 0.08}.items():                         # the reference system, 2026, found by trying
        assert recipe_from_depth(depth, weight_decay=0.2)['weight_decay'] == pytest.approx(best, rel=0.12)
    assert recipe_from_depth(9, width=768) == recipe_from_depth(9, width=768, weight_decay=0.28) != recipe_from_depth(9)
    d20 = recipe_from_depth(20)
    assert d20['lr_scale'] == pytest.approx(math.sqrt(2))
    memory = [r['total_batch_size'] / (r['lr_scale'] * r['weight_decay'] * r['tokens']) for r in map(recipe_from_depth, (8, 12, 20, 32))]
    assert memory == pytest.approx([memory[0]] * 4, rel=1e-6)  # B / (η λ D) is the same for all, arXiv 2405.13698


# --- groups ----------------------------------------------------------------------------------------------------------

class ModernNames(torch.nn.Module):
    "Parameters with the names and shapes of the modern model, and nothing that computes"
    def __init__(self, layers: int = 3, width: int = 32, kv_width: int = 16, vocab: int = 70):
        super().__init__()
        torch.manual_seed(0)
        nn, linear = torch.nn, lambda rows, cols: torch.nn.Linear(cols, rows, bias=False)
        number = lambda *shape: nn.Parameter(torch.randn(shape))
        self.config = SimpleNamespace(n_embd=width)
        def block():
            attn = nn.ModuleDict(dict(c_q=linear(width, width), c_k=linear(kv_width, width), c_v=linear(kv_width, width), c_proj=linear(width, width), ve_gate=linear(1, 12)))
            return nn.ModuleDict(dict(attn=attn, mlp=nn.ModuleDict(dict(c_fc=linear(4 * width, width), c_proj=linear(width, 4 * width)))))
        self.transformer = nn.ModuleDict(dict(wte=nn.Embedding(vocab, width), h=nn.ModuleList(block() for _ in range(layers)),
                                              value_embeds=nn.ModuleDict({'0': nn.Embedding(vocab, kv_width), '2': nn.Embedding(vocab, kv_width)}), smear_gate=linear(1, 24)))
        for name, shape in dict(resid_lambdas=(layers,), x0_lambdas=(layers,), smear_lambda=(1,), backout_lambda=(1,)).items(): self.transformer.register_parameter(name, number(*shape))
        self.lm_head = linear(vocab, width)


def test_the_modern_model_s_parameters_have_the_published_rates():
    model = ModernNames()
    names = {p: name for name, p in model.named_parameters()}
    groups = {g['name']: g for o in make_optimizers(model, groups='modern', lr_scale=2.0) for g in o.param_groups}
    assert sorted(name for g in groups.values() for name in map(names.get, g['params'])) == sorted(names.values())
    of = {names[p]: g for g in groups.values() for p in g['params']}
    width = (32 / 768) ** -0.5
    expected = {'lm_head.weight': (0.008 * width, (0.8, 0.96), 0.01), 'transformer.wte.weight': (0.3 * width, (0.8, 0.995), 0.001),
                'transformer.value_embeds.2.weight': (0.15 * width, (0.8, 0.995), 0.01), 'transformer.resid_lambdas': (0.005, (0.8, 0.95), 0.05),
                'transformer.x0_lambdas': (0.5, (0.96, 0.95), 0), 'transformer.smear_gate.weight': (0.2, (0.8, 0.95), 0), 'transformer.smear_lambda': (0.2, (0.8, 0.95), 0),
                'transformer.backout_lambda': (0.2, (0.8, 0.95), 0), 'transformer.h.1.attn.ve_gate.weight': (0.005, (0.8, 0.95), 0)}  # the reference system, 2026
    for name, (lr, betas, decay) in expected.items():
        assert (of[name]['initial_lr'], of[name]['betas'], of[name]['weight_decay']) == (pytest.approx(2 * lr), betas, decay), name
    assert len(groups['matrices']['params']) == 3 * 6 and groups['matrices']['initial_lr'] == 0.04


def test_the_stand_in_has_the_groups_of_the_real_modern_model():
    real = GPT(GPTConfig.from_depth(4, 64, 16, recipe='modern', n_embd=64, n_head=2))
    kinds = lambda model: {g['name'] for o in make_optimizers(model) for g in o.param_groups}
    assert kinds(real) == kinds(ModernNames()) == {*GROUPS['modern'], 'matrices'}
    assert sum(len(o.params) for o in make_optimizers(real)) == len(list(real.parameters()))


def test_with_classic_groups_only_the_two_token_tables_differ():
    assert {kind for kind in GROUPS['modern'] if GROUPS['modern'][kind] != GROUPS['classic'][kind]} == {'unembedding', 'embedding'}


@pytest.mark.parametrize('name, shape', [('transformer.extra', (4,)), ('lm_head.bias', (4,)), ('head.weight', (32, 32))])
def test_a_parameter_of_no_group_is_refused(name, shape):
    with pytest.raises(NanochatError, match='belongs to no optimizer group'): muon.group_of(name, shape)



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


STEPS, PARTS, ALONE, LATER_NONE = 5, 12, 'transformer.resid_lambdas', 'transformer.smear_gate.weight'
OPTIONS = {'classic': {}, 'mean': dict(reduce='mean'), 'reduced by the caller': dict(grads_reduced=True), 'modern': dict(optimizer_recipe('modern')[0], cut_above=256)}


def gradients(model, step: int, rank: int, world_size: int) -> None:
    "This process's part of the gradients: twelve contributions are dealt out; one parameter has its only one in the first process, one has none at all after step 3"
    for i, (name, p) in enumerate(model.named_parameters()):
        parts = torch.randn(PARTS, *p.shape, generator=torch.Generator().manual_seed(100 * step + i)) / PARTS
        if name == ALONE: p.grad = parts[0].clone() if rank == 0 else None
        elif step < 3 or name != LATER_NONE: p.grad = parts[rank::world_size].sum(0)


def train_part(rank: int, world_size: int, variant: str, begin: int = 0, start: dict | None = None) -> dict:
    "Steps with this process's part of the gradients: weights and memory, at step 3 and at the end"
    model, kept = ModernNames(), {}
    if start: model.load_state_dict(start['weights'])
    optimizers = make_optimizers(model, lr_scale=0.1, **OPTIONS[variant])
    if start: load_optimizer_state(optimizers, model, start['memory'])
    for step in range(begin, STEPS):
        gradients(model, step, rank, world_size)
        if variant == 'reduced by the caller' and world_size > 1:
            for name, p in model.named_parameters():
                if name == ALONE and rank > 0: p.grad = torch.zeros_like(p)
                if p.grad is not None: dist.all_reduce(p.grad)
        if variant == 'mean':
            for p in model.parameters(): p.grad = p.grad if p.grad is None else p.grad * world_size
        if variant == 'modern': step_together(optimizers)
        else: [optimizer.step() for optimizer in optimizers]
        for optimizer in optimizers: optimizer.zero_grad()
        if step in (2, STEPS - 1):
            kept |= {f'{step + 1}/weights/{name}': p.detach().clone() for name, p in model.named_parameters()}
            kept |= {f'{step + 1}/memory/{name}': t.clone() for name, t in optimizer_state(optimizers, model).items()}
    return kept


def part_of(kept: dict, beginning: str) -> dict: return {name.removeprefix(beginning): t for name, t in kept.items() if name.startswith(beginning)}


def process(rank: int, world_size: int, port: int, folder: str) -> None:
    "One of several real processes: trains in every variant, goes on from what fewer processes wrote, and writes the results"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    muon.product_dtype = lambda device: torch.float32  # so that only the order of additions differs
    compute_init('cpu')
    torch.set_num_threads(1)
    for variant in OPTIONS: save_file(train_part(rank, world_size, variant), f'{folder}/{variant}_{world_size}_{rank}.safetensors')
    fewer = [load_file(f'{folder}/modern_{world_size - 1}_{r}.safetensors') for r in range(world_size - 1)]
    start = dict(weights=part_of(fewer[0], '3/weights/'), memory={name: t for shard in fewer for name, t in part_of(shard, '3/memory/').items()})
    save_file(train_part(rank, world_size, 'modern', 3, start), f'{folder}/resumed_{world_size}_{rank}.safetensors')
    compute_cleanup(); leave_now()


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "What one, two, three and four processes make of the same gradients: {variant: {world size: [of each process]}}"
    folder = tmp_path_factory.mktemp('processes')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, 'product_dtype', lambda device: torch.float32)
        for variant in OPTIONS: save_file(train_part(0, 1, variant), folder / f'{variant}_1_0.safetensors')
    for world_size in (2, 3, 4): mp.spawn(process, (world_size, free_port(), str(folder)), nprocs=world_size)
    return {variant: {n: [load_file(folder / f'{variant}_{n}_{rank}.safetensors') for rank in range(n)] for n in (1, 2, 3, 4) if (folder / f'{variant}_{n}_0.safetensors').exists()}
            for variant in [*OPTIONS, 'resumed']}


def apart(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize('world_size', [2, 3, 4])
@pytest.mark.parametrize('variant', OPTIONS)
def test_several_processes_end_on_the_weights_of_one(trained, variant, world_size):
    alone, parts = part_of(trained[variant][1][0], '5/weights/'), [part_of(kept, '5/weights/') for kept in trained[variant][world_size]]
    assert all(torch.equal(part[name], parts[0][name]) for part in parts for name in part)  # they agree to the bit
    assert apart(parts[0], alone) < 1e-6


@pytest.mark.parametrize('world_size', [2, 3, 4])
def test_memory_is_divided_and_nothing_is_remembered_twice(trained, world_size):
    whole = part_of(trained['modern'][1][0], '5/memory/')
    parts = [part_of(kept, '5/memory/') for kept in trained['modern'][world_size]]
    numbers = lambda memory: sum(t.numel() for name, t in memory.items() if '.step' not in name)
    assert sum(map(numbers, parts)) == numbers(whole) and max(map(numbers, parts)) < 1.35 * numbers(whole) / world_size
    for rank, part in enumerate(parts): assert any(name.startswith('lm_head.weight.exp_avg[') for name in part), rank  # everyone has rows of it
    together = {name: t for part in parts for name, t in part.items()}
    assert all(torch.allclose(muon.whole_tensor(together, name), t, atol=1e-6) for name, t in whole.items())


@pytest.mark.parametrize('world_size', [2, 3, 4])
def test_a_checkpoint_of_fewer_processes_is_continued(trained, world_size):
    for kept in trained['resumed'][world_size]: assert apart(part_of(kept, '5/weights/'), part_of(trained['modern'][1][0], '5/weights/')) < 1e-6


def test_a_checkpoint_of_four_processes_is_continued_by_one(trained, monkeypatch):
    monkeypatch.setattr(muon, 'product_dtype', lambda device: torch.float32)
    four = trained['modern'][4]
    start = dict(weights=part_of(four[0], '3/weights/'), memory={name: t for kept in four for name, t in part_of(kept, '3/memory/').items()})
    assert apart(part_of(train_part(0, 1, 'modern', 3, start), '5/weights/'), part_of(trained['modern'][1][0], '5/weights/')) < 1e-6


def test_a_checkpoint_that_lacks_some_rows_or_a_switch_s_memory_is_refused(trained):
    memory = {name: t for kept in trained['modern'][3] for name, t in part_of(kept, '3/memory/').items()}
    model = ModernNames()
    optimizers = make_optimizers(model, **OPTIONS['modern'])
    rows = next(name for name in memory if name.startswith('lm_head.weight.exp_avg['))
    with pytest.raises(NanochatError, match='lm_head.weight: .exp_avg. has shape'): load_optimizer_state(optimizers, model, {name: t for name, t in memory.items() if name != rows})
    with pytest.raises(NanochatError, match='line_squares'): load_optimizer_state(optimizers, model, {name: t for name, t in memory.items() if 'line_squares' not in name})


def test_a_parameter_without_a_gradient_in_any_process_is_left_alone(trained):
    for world_size, parts in trained['modern'].items():
        for kept in parts: assert all(torch.equal(t, kept[name.replace('5/', '3/', 1)]) for name, t in kept.items() if name.startswith('5/') and LATER_NONE in name), world_size


@pytest.mark.parametrize('world_size', [1, 2, 3, 5])
def test_pieces_cover_every_parameter_once(world_size):
    params = [torch.zeros(shape) for shape in ((), (1,), (7,), (7, 3), (4, 4, 4), (2, 100), (64, 5))]
    pieces = divide(params, world_size, cut_above=20)
    for p in params:
        for piece in pieces:
            if piece.param is p: piece.of(p).add_(1)
    assert all((p == 1).all() for p in params) and {piece.owner for piece in pieces} <= set(range(world_size))
    assert all((piece.param is params[5]) <= (piece.rows is None or world_size <= 2) for piece in pieces)  # two rows are not cut for three processes


def test_all_gradients_are_on_their_way_before_the_first_is_waited_for_and_results_leave_early(monkeypatch):
    events = []
    class Work:
        def __init__(self, name): self.name = name; events.append(f'start {name}')
        def wait(self): events.append(f'wait {self.name}')
    monkeypatch.setattr(muon.dist, 'all_reduce', lambda t, op, async_op: Work('found'))
    for kind in ('reduce', 'broadcast'): monkeypatch.setattr(muon.dist, kind, lambda t, owner, async_op, kind=kind: Work(f'{kind} {t.numel()} {owner}'))
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((4, 4), (2, 3))]
    optimizer = AdamW(params, lr=0.1)
    optimizer.world_size = 2  # rank 0 of two; it owns everything
    update = optimizer.update
    optimizer.update = lambda group, pieces: (events.append(f'compute {pieces[0].param.numel()}'), update(group, pieces))
    for p in params: p.grad = torch.ones_like(p)
    optimizer.step()
    assert events[:10] == ['start found', 'start reduce 16 0', 'start reduce 6 0', 'wait found', 'wait reduce 16 0', 'compute 16', 'start broadcast 16 0',
                           'wait reduce 6 0', 'compute 6', 'start broadcast 6 0']
    assert events[-2:] == ['wait broadcast 16 0', 'wait broadcast 6 0']


@pytest.mark.parametrize('reduce, expected', [('sum', 2.0), ('mean', 1.0)])
def test_gradients_are_added_or_averaged(reduce, expected, monkeypatch):
    done = SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(muon.dist, 'all_reduce', lambda t, op, async_op: done)
    monkeypatch.setattr(muon.dist, 'reduce', lambda t, owner, async_op: t.mul_(2) is None or done)  # two processes with equal gradients
    monkeypatch.setattr(muon.dist, 'broadcast', lambda t, owner, async_op: done)
    p = torch.nn.Parameter(torch.zeros(4, 4)); p.grad = torch.ones(4, 4)
    optimizer = Muon([p], momentum=0.0, reduce=reduce)
    optimizer.world_size = 2
    optimizer.step()
    assert (optimizer.state[p]['momentum_buffer'] == expected).all()


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


@pytest.mark.parametrize("overrides, says", [(dict(smear="no"), "smear is 'no'; give true or false"), (dict(softcap="hello"), "give a number"), (dict(window_pattern=3), "give a word"),
                                             (dict(momentum_steps=0), "at least 1"), (dict(warmdown=2), "choose from 0 to 1"), (dict(qk_scale=None), "give a number"), (dict(smeer=True), "no field")])
def test_a_field_of_the_wrong_kind_is_one_line(overrides, says):
    from nanochat.pretrain import CLASSIC, choose_fields
    with pytest.raises(NanochatError, match=says): choose_fields("modern", overrides, **CLASSIC)
